"""What is computed from logits that never all exist at once.

Pure functions of arrays; below `_batch.py`, of those of one device, whose sums `_devices/` adds to
those of devices that have other rows. N, D and V are the numbers of
tokens, of features of an embedding, and of rows of the table that one device has; C is the number
of tokens of a chunk. The plain way is one chunk: all logits at once.

From a call to the numbers, top down:

- `_token_scores.py`: what a loss is a function of. `_reference.py`: what is computed, in a few
  lines, from all logits at once.
- `_batch.py`: a batch, over the devices of a mesh and under `jax.vmap`.
- `_device_total.py`, `_device_scores.py`, `_device_losses.py`, `_device_search.py`: all tokens of a
  device, and what has derivatives of our own: sums of losses; scores and losses that stay apart;
  the likeliest tokens, and draws.
- `_gradients.py`, `_scores.py`, `_divergence.py`, `_search.py`, `_logits.py`: a chunk of tokens.
- `_chunks.py`, `_plan.py`: loops over chunks and tiles, and how the work is cut.
- `_function.py`: a loss function as a value, made before all that.
"""

from ._batch import sample_tokens, score_tokens, token_losses, top_k_tokens, Wanted
from ._function import close_over, shapes_of_scores
from ._logits import Comparison, Operands, Options, Teacher
from ._scores import Used
from ._search import Draws
from ._token_scores import TokenScores
