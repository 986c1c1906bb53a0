"""What is computed from logits that never all exist at once.

Pure functions of plain arrays. N, D and V are the numbers of tokens, of features of an embedding,
and of rows of the table that one device has; C is the number of tokens of a chunk.

- `_plan.py`: how the work is cut.
- `_chunks.py`: loops over chunks of tokens and tiles of the vocabulary.
- `_scores.py`: the statistics of the logits of a chunk, and their derivative.
- `_losses.py`: scores and losses of all tokens of a device, and their gradients.
- `_batch.py`: the same over several devices, and under `jax.vmap`.
"""

from ._batch import (
    score_tokens as score_tokens,
    total_loss as total_loss,
    weighted_losses as weighted_losses,
)
from ._function import close_over as close_over, TokenFunction as TokenFunction
from ._scores import Options as Options, TokenScores as TokenScores, Used as Used
