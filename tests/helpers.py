"""What several tests need: keys, and references in numpy that share no code with the library."""

import random

import jax


class Keys:
    """Makes a new `jax.random.key` at each call, and shows its seed when a test fails."""

    def __init__(self, seed: int | None = None):
        self.seed = random.randrange(2**31) if seed is None else seed
        self.count = 0

    def __call__(self):
        self.count += 1
        return jax.random.fold_in(jax.random.key(self.seed), self.count)

    def __repr__(self):
        return f"Keys(seed={self.seed})"
