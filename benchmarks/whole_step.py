"""The memory of a whole training step of the example's model at a real size, fully sharded.

    JAX_PLATFORMS=cpu python -m benchmarks.whole_step [--target v5e --devices 16]

12 layers, D = 4096, 32 heads, V = 128,256; two sequences of 2048 tokens on each device. Parameters
and the two moments of Adam are in float32 and split over all devices; products are in bfloat16. The
blocks of examples/toy_transformer.py run in a scan, each under `jax.checkpoint`. Compiled with the
compilers of benchmarks/accelerators.py; nothing runs.

The table compares whole steps; steps without blocks (the table, its lookup and the loss alone),
both with this library's loss and with optax's from logits; and a step of the blocks alone. The
compiler reuses memory, so a whole step holds less than the sum of its parts.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from toy_transformer import Block, ModelConfig, norm

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from .accelerators import CHIPS, compile_for, find_devices, NotInstalled


VOCAB_SIZE, SEQUENCES = 128256, 2  # sequences of each device
CONFIG = ModelConfig(sequence_length=2048, num_layers=12, num_heads=32, embedding_size=4096)
RULES = {"batch": "data", "vocabulary": "data"}


def make_parameters(key):
    """The table and the blocks, stacked for `jax.lax.scan`."""
    table = EmbeddingTable.from_config(VOCAB_SIZE, {"embedding": CONFIG.embedding_size}, key=key)
    keys = jax.random.split(key, CONFIG.num_layers)
    return table, eqx.filter_vmap(lambda key: Block(CONFIG, key))(keys)


def run_blocks(blocks, x):
    if blocks is None:
        return jax.vmap(norm)(x)
    arrays, static = eqx.partition(blocks, eqx.is_array)

    @jax.checkpoint
    def step(x, arrays):
        block = eqx.combine(jax.tree.map(lambda a: a.astype(x.dtype), arrays), static)
        return jax.lax.with_sharding_constraint(jax.vmap(block)(x), P("data")), None

    x, _ = jax.lax.scan(step, x, arrays)
    return jax.vmap(norm)(x)


def loss_here(parameters, inputs, targets):
    table, blocks = parameters
    x = EmbeddingLookup(table)(inputs).astype("bfloat16") * CONFIG.embedding_size**0.5
    hidden = run_blocks(blocks, jax.lax.with_sharding_constraint(x, P("data")))
    return EmbeddingDecode(table, dtype=jnp.bfloat16).cross_entropy(hidden, targets, rules=RULES)


def loss_from_logits(parameters, inputs, targets):
    table, blocks = parameters
    rows = table.embeddings
    x = rows[inputs].astype("bfloat16") * CONFIG.embedding_size**0.5
    hidden = run_blocks(blocks, jax.lax.with_sharding_constraint(x, P("data")))
    logits = jnp.einsum(
        "bsd,vd->bsv", hidden, rows.astype("bfloat16"), preferred_element_type="float32"
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def loss_of_blocks(parameters, inputs, targets):
    _, blocks = parameters
    x = jnp.broadcast_to(inputs[..., None], (*inputs.shape, CONFIG.embedding_size))
    return jnp.mean(run_blocks(blocks, x.astype("bfloat16")).astype("float32"))


def compile_step(loss, parts, devices, target):
    """`parts` says whether the step has a table and whether it has blocks."""
    mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
    optimizer = optax.adamw(1e-3)

    def split(leaf):
        axis = int(np.argmax(leaf.shape)) if leaf.ndim > 1 else None
        spec = P() if axis is None else P(*[None] * axis, "data")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    parameters = eqx.filter_eval_shape(make_parameters, jax.random.key(0))
    parameters = tuple(p if part else None for p, part in zip(parameters, parts, strict=True))
    arrays, static = eqx.partition(parameters, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    arrays = jax.tree.map(split, arrays)
    state = jax.tree.map(split, jax.eval_shape(optimizer.init, arrays))
    shape = SEQUENCES * len(devices), CONFIG.sequence_length
    batch = jax.ShapeDtypeStruct(shape, "int32", sharding=NamedSharding(mesh, P("data")))

    def step(arrays, state, inputs, targets):
        def of_arrays(arrays):
            return loss(eqx.combine(arrays, static), inputs, targets)

        value, gradients = jax.value_and_grad(of_arrays)(arrays)
        updates, state = optimizer.update(gradients, state, arrays)
        return value, optax.apply_updates(arrays, updates), state

    places = jax.tree.map(lambda leaf: leaf.sharding, (arrays, state))
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(None, *places))
        return compile_for(target, jitted.trace(arrays, state, batch, batch))


PROGRAMS = {
    "whole, eqx_embedding": (loss_here, (True, True)),
    "whole, optax": (loss_from_logits, (True, True)),
    "table and loss, eqx_embedding": (loss_here, (True, False)),
    "table and loss, optax": (loss_from_logits, (True, False)),
    "blocks": (loss_of_blocks, (False, True)),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", choices=CHIPS, default="v5e")
    parser.add_argument("--devices", type=int, default=16)
    given = parser.parse_args(arguments)
    try:
        devices = find_devices(given.target, given.devices)
    except NotInstalled as error:
        parser.error(f"{given.target}: {error}")
    print(f"{given.target} x {given.devices}, MiB on each device")
    print(f"{'':32}{'parameters, moments':>22}{'temporaries':>14}")
    for name, (loss, parts) in PROGRAMS.items():
        memory = compile_step(loss, parts, devices, given.target).memory_analysis()
        assert memory is not None
        sizes = memory.argument_size_in_bytes / 2**20, memory.temp_size_in_bytes / 2**20
        print(f"{name:32}{sizes[0]:22,.0f}{sizes[1]:14,.0f}", flush=True)


if __name__ == "__main__":
    main()
