"""The likeliest tokens for all vectors of a device, and draws from their distribution."""

import functools
from typing import Any, NamedTuple

from jaxtyping import Array

from ._devices import device_type
from ._logits import chunks_of, make_head, on_device, Operands, Options
from ._search import draw_among, draw_token, Draws, find_likeliest


class Search(NamedTuple):
    k: int | None  # for how many of the likeliest tokens; `None` for all
    draws: bool  # whether to draw one of them, by the keys and temperatures in the data


def device_search(options: Options, search: Search, operands: Operands) -> Any:
    """A token drawn for each of N vectors; or the log-probabilities and tokens of the k likeliest.

    The latter are (N, k).
    """
    options = options._replace(gathered=True)  # There is no gradient in whose place logits fit.
    found = functools.partial(_search, search)
    return on_device(found, options, device_type(operands.targets), operands)


def _search(search: Search, options: Options, operands: Operands) -> Any:
    head = make_head(options, operands)

    def find(x: Array, data: tuple[Array, ...]) -> Any:
        if not search.draws:
            return find_likeliest(options, search.k, head, x)
        if search.k is None:
            return draw_token(options, head, x, Draws(*data))
        return draw_among(*find_likeliest(options, search.k, head, x), Draws(*data))

    def chunk(sums: Any, is_token: Array | None, x: Array, data: tuple[Array, ...]) -> Any:
        return sums, find(x, data)

    tokens = operands.hidden, operands.data
    _, found = chunks_of(options, operands).run(chunk, tokens, ())
    return found
