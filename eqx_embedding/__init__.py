"""One embedding table per vocabulary, for lookup, decode and loss, in Equinox."""

from jaxtyping import install_import_hook

# Before the hook: it would check `_beartype` with itself, and import beartype for `_suggest`
from . import _beartype as _beartype, _suggest as _suggest


with install_import_hook("eqx_embedding", "eqx_embedding._beartype.beartype"):
    from ._blockwise import TokenScores
    from ._decode import EmbeddingDecode
    from ._lookup import EmbeddingLookup
    from ._resize import resize_vocabulary
    from ._rows import combine_rows, partition_rows
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
    "resize_vocabulary",
    "save_safetensors",
]
