"""One embedding table per vocabulary: looked up, decoded and trained, tied, in Equinox."""

from jaxtyping import install_import_hook

from . import _beartype as _beartype  # before the hook, which would check it by itself


with install_import_hook("eqx_embedding", "eqx_embedding._beartype.beartype"):
    from ._blockwise import TokenScores as TokenScores
    from ._decode import EmbeddingDecode as EmbeddingDecode
    from ._lookup import EmbeddingLookup as EmbeddingLookup
    from ._rows import combine_rows as combine_rows, partition_rows as partition_rows
    from ._safetensors import (
        load_safetensors as load_safetensors,
        save_safetensors as save_safetensors,
    )
    from ._table import EmbeddingTable as EmbeddingTable
    from ._vocabulary import resize_vocabulary as resize_vocabulary
