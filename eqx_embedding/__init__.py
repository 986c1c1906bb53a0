"""One embedding table per vocabulary, for lookup, decode and loss, in Equinox.

    table = EmbeddingTable.from_config(50257, {"embedding": 768}, key=jax.random.key(0))
    vectors = EmbeddingLookup(table)(tokens)        # the embedding of each token
    hidden = ...                                    # your model goes here
    decode = EmbeddingDecode(table)                 # the same table: weight tying
    logits = decode(hidden)                         # a score for every token of the vocabulary
    loss = decode.cross_entropy(hidden, targets)    # need not hold all logits at once

**Modules**, one purpose each:

- `_table`: `EmbeddingTable`, the parameters. `_lookup`: `EmbeddingLookup`, tokens to vectors.
    `_decode`: `EmbeddingDecode`, vectors to logits by `_product`, to scores and losses by `_call`.
- `_inputs`: converts and checks the tokens, targets, weights and numbers of the caller.
- `_sharding`: finds which axes of a device mesh split the table and the batch.
- `_blockwise/`: the kernels. They compute losses from the logits of one chunk of tokens at a time.
- `_devices/`: what JAX has to be told about devices, derivatives and `jax.vmap`.
- `_resize/`: grows a vocabulary. `_rows`: trains some of its rows. `_tree`: finds its tables in a
    model, or in the state of an optimizer. `_safetensors`: reads and writes a table.
- `_beartype`: type errors. `_suggest`: errors that say what to write instead.

**How a loss is computed**, from the call to the numbers:

1. Method: `EmbeddingDecode.cross_entropy` writes the loss of one token as a function of its scores.
    `EmbeddingDecode.token_loss` accepts any such function.
2. Inputs: `_call` collects the arguments. `_inputs` checks targets and weights, and marks the
    tokens that count. `_blockwise/_function.py` makes a value of the loss, which says what scores
    it needs.
3. Devices: `_sharding` says which mesh axes split what, and `_blockwise/_batch.py` gives each
    device its part of the batch and of the table.
4. Kernel: the rest of `_blockwise/` runs on each device and loops over chunks of tokens. For each
    chunk it computes the logits, the scores, the loss and the gradients. Devices that have other
    rows of the table add up their sums.
5. Back: the devices add up their losses. Gradients reach the vectors, the table and the weights.
"""

from jaxtyping import install_import_hook

# Outside of the hook: type checks of these two would import beartype right away, or recurse.
from . import _beartype as _beartype, _suggest as _suggest


with install_import_hook("eqx_embedding", "eqx_embedding._beartype.beartype"):
    from ._blockwise import TokenScores
    from ._decode import EmbeddingDecode
    from ._lookup import EmbeddingLookup
    from ._resize import resize_vocabulary
    from ._rows import combine_rows, partition_rows, put_rows, take_rows, unique_tokens
    from ._safetensors import load_safetensors, save_safetensors
    from ._table import EmbeddingTable


__all__ = [
    "EmbeddingDecode",
    "EmbeddingLookup",
    "EmbeddingTable",
    "TokenScores",
    "combine_rows",
    "load_safetensors",
    "partition_rows",
    "put_rows",
    "resize_vocabulary",
    "save_safetensors",
    "take_rows",
    "unique_tokens",
]
