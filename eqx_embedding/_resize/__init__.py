"""Growing and shrinking a vocabulary.

- `_vocabulary.py`: the tables of a tree.
- `_new_rows.py`: what the rows of new tokens are.
- `_join.py`: the state of an optimizer, joined with a new one for the rows that it does not have.
"""

from ._vocabulary import resize_vocabulary
