"""The pictures of a run, as PNG."""

import io
import itertools
import re
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, FontProperties, get_font


matplotlib.rcdefaults()  # the same pictures whatever a matplotlibrc says, such as `text.usetex`

COLORS = {
    "lower case": "tab:blue",
    "capitals": "tab:orange",
    "digits": "tab:green",
    "white space": "tab:red",
    "others": "0.35",
}
GROUP_COLORS = [f"tab:{name}" for name in "blue orange green red purple brown pink cyan".split()]
Curves = dict[str, list[tuple[int, float]]]
"""The points of each curve, by the name of the curve."""
BEGINNING: dict[str, Any] = {"s": 14, "facecolors": "white", "edgecolors": "tab:orange"}


def loss_picture(metrics: list[dict[str, Any]], reference: dict[str, float]) -> bytes:
    """Bits per byte over steps, beside what easier methods reach."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    _open(axes, "How many bits it takes to tell the next byte", "step", "bits per byte")
    for name, value in reference.items():
        axes.axhline(value, color="0.75", linewidth=1)
        _at_the_right(axes, f"{name} {value:.2f}", value, above=3, inside=True, color="0.45")
    steps = [line["step"] for line in metrics]
    ends = {}
    for name, color, width in ("train", "tab:orange", 1.5), ("val", "tab:blue", 2.5):
        values = [line[f"{name}_bits_per_byte"] for line in metrics]
        axes.plot(steps, values, "o-", markersize=2 * width, lw=width, color=color, clip_on=False)
        ends[name] = values[-1], color
    if "zlib" in reference:
        held_out, zlib = [line["val_bits_per_byte"] for line in metrics], reference["zlib"]
        better = np.asarray(held_out) < zlib
        axes.fill_between(
            steps, held_out, zlib, where=better, interpolate=True, color="tab:blue", alpha=0.12
        )
    axes.set(xlim=(0, steps[-1]))
    val_is_above = ends["val"][0] > ends["train"][0]
    for name, label in ("train", "training text"), ("val", "held-out text"):
        value, color = ends[name]
        above = 7 if (name == "val") == val_is_above else -7  # where both end at one place
        _at_the_right(axes, f"{label} {value:.2f}", value, above=above, inside=False, color=color)
    return _png(figure)


def embedding_picture(
    embeddings: Float[np.ndarray, "vocabulary embedding"],
    counts: Integer[np.ndarray, " vocabulary"],
    pieces: list[bytes],
) -> bytes:
    """The hundred most frequent tokens, in the plane in which their embeddings differ most.

    Where two would overlap, the less frequent one is a dot.
    """
    tokens = [token for token in np.argsort(-counts, kind="stable")[:100] if counts[token] > 0]
    points, shares = principal_plane(embeddings[tokens])
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(*points.T, s=0)
    _open(axes, f"The {len(tokens)} most frequent tokens, as the model arranged them", *_of(shares))
    axes.set(xticks=[], yticks=[])
    kinds = [kind_of(pieces[token]) for token in tokens]
    for kind, color in COLORS.items():
        if kind in kinds:
            axes.scatter([], [], color=color, label=kind)
    figure.legend(loc="outside lower center", ncols=len(COLORS), frameon=False)
    figure.draw_without_rendering()  # puts everything in its place, so that labels have one

    taken = []
    for token, kind, (x, y) in zip(tokens, kinds, points.tolist()):
        style = {"color": COLORS[kind], "ha": "center", "va": "center", "parse_math": False}
        label = axes.text(x, y, readable(pieces[token]), fontsize=12, **style)
        box = label.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            label.remove()
            axes.scatter(x, y, s=8, color=COLORS[kind], alpha=0.5, linewidths=0)
        else:
            taken.append(box)
    return _png(figure)


def growth_picture(
    reports: list[tuple[int, float]],
    before: float,
    old_rows: Float[np.ndarray, "old embedding"],
    untrained: Float[np.ndarray, "new embedding"],
    trained: Float[np.ndarray, "new embedding"],
    counts: Integer[np.ndarray, " vocabulary"],
    pieces: list[bytes],
) -> bytes:
    """Bits per byte over steps, and how the rows of new tokens moved among those of old ones."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    _open(left, "", "step", "bits per byte on held-out text")
    left.axhline(before, color="0.6", linewidth=1, linestyle="--")
    label = f"before, without new tokens {before:.2f}"
    _at_the_right(left, label, before, above=3, inside=True, color="0.4")
    left.plot(*zip(*reports), marker="o", markersize=3, color="tab:blue")
    style = {"textcoords": "offset points", "horizontalalignment": "right"}
    left.annotate(f"with them {reports[-1][1]:.2f}", reports[-1], xytext=(0, 8), **style)

    old = len(old_rows)
    points, shares = principal_plane(np.concatenate([old_rows, untrained, trained]))
    starts, ends = np.split(points[old:], 2)
    _open(right, "", *_of(shares))
    right.set(xticks=[], yticks=[])
    right.scatter(*points.T, s=0)
    right.scatter(*points[:old].T, s=8, color="0.8", linewidths=0, label=f"{old:,} old tokens")
    label = f"{len(trained):,} new tokens, where they went"
    right.scatter(*ends.T, s=10, color="tab:blue", linewidths=0, label=label)
    right.scatter([], [], **BEGINNING, label="and where the most frequent began")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    figure.draw_without_rendering()  # puts everything in its place, so that labels have one
    figure.set_layout_engine("none")  # where it stays
    right.autoscale(False)
    most_frequent = np.argsort(-counts[old:], kind="stable")
    _draw_moves(right, most_frequent, starts, ends, [readable(piece) for piece in pieces[old:]])
    return _png(figure)


def curves_picture(xlabel: str, panels: dict[str, Curves]) -> bytes:
    """Curves side by side, by the names of what they show."""
    figure = Figure(figsize=(5.5 * len(panels), 4.5))
    figure.set_layout_engine("constrained", wspace=0.08)
    for axes, (ylabel, curves) in zip(figure.subplots(1, len(panels)), panels.items()):
        _open(axes, "", xlabel, ylabel)
        for name, points in curves.items():
            label = f"{name} {points[-1][1]:.3f}"
            axes.plot(*zip(*points), marker="o", markersize=3, label=label, clip_on=False)
        axes.legend(frameon=False)
    return _png(figure)


def words_picture(
    losses: list[tuple[int, float]],
    vectors: Float[np.ndarray, "words embedding"],
    names: list[str],
    groups: dict[str, list[str]],
) -> bytes:
    """The loss over steps, and the words, most frequent first, in their principal plane.

    Each group, a word with its neighbours, has a color. Other words have names where there is room.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    _open(left, "", "step", "loss of a pair of words, nats")
    left.plot(*zip(*losses), marker="o", markersize=3, color="tab:blue", clip_on=False)
    style = {"textcoords": "offset points", "horizontalalignment": "right"}
    left.annotate(f"{losses[-1][1]:.3f}", losses[-1], xytext=(0, 8), **style)
    left.set(xlim=(0, losses[-1][0]))
    points, shares = principal_plane(vectors)
    _open(right, "", *_of(shares))
    right.set(xticks=[], yticks=[])
    right.scatter(*points.T, s=6, color="0.85", linewidths=0)
    figure.draw_without_rendering()  # puts everything in its place, so that labels have one
    figure.set_layout_engine("none")  # where it stays
    right.autoscale(False)
    colors = dict(zip(groups, itertools.cycle(GROUP_COLORS)))
    for word, near in groups.items():
        colors |= {name: colors[word] for name in near if name not in colors}
    _label_words(right, names, points, colors, bold=list(groups))
    return _png(figure)


def _label_words(
    axes: Axes,
    names: list[str],
    points: Float[np.ndarray, "words 2"],
    colors: dict[str, str],
    bold: list[str],
) -> None:
    """Writes names where there is room, those with colors first, which else are dots."""
    taken, place = [], dict(zip(names, points.tolist()))
    for name in dict.fromkeys([*bold, *colors, *names[:300]]):
        style = {"ha": "center", "va": "center", "fontsize": 8, "parse_math": False}
        style |= {"color": colors.get(name, "0.6"), "weight": "bold" if name in bold else None}
        label = axes.text(*place[name], readable(name.encode()), **style)
        box = label.get_window_extent()
        if not any(box.overlaps(other) for other in taken):
            taken.append(box)
            continue
        label.remove()
        if name in colors:
            axes.scatter(*place[name], s=8, color=colors[name], linewidths=0)


def _draw_moves(
    axes: Axes,
    tokens: Integer[np.ndarray, " new"],
    starts: Float[np.ndarray, "new 2"],
    ends: Float[np.ndarray, "new 2"],
    labels: list[str],
) -> None:
    """A line from where each token began to its name, for the first whose names have room."""
    taken = []
    for token in tokens:
        label = axes.annotate(
            labels[token],
            tuple(ends[token]),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=9,
            parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.7},
        )
        box = label.get_window_extent()
        if len(taken) == 24 or any(box.overlaps(other) for other in taken):
            label.remove()
            continue
        taken.append(box)
        axes.plot(*zip(starts[token], ends[token]), color="tab:orange", linewidth=0.8, zorder=0)
        axes.scatter(*starts[token], **BEGINNING)


def _open(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Axes with names, and open at the top and at the right."""
    axes.set_title(title, loc="left", fontweight="bold", pad=12)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def _of(shares: Float[np.ndarray, " 2"]) -> tuple[str, str]:
    """The names of the axes of a principal plane."""
    first, second = shares
    return f"first principal component, {first:.0%} of the variance", f"second, {second:.0%}"


def _at_the_right(
    axes: Axes, text: str, value: float, above: int, inside: bool, color: str
) -> None:
    """Text at the right end of the axes, at the height of a value and some points above it."""
    axes.annotate(
        text,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-4 if inside else 8, above),
        textcoords="offset points",
        horizontalalignment="right" if inside else "left",
        verticalalignment="bottom" if inside else "center",
        color=color,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0, "alpha": 0.7},
        zorder=3,
    )


def principal_plane(
    rows: Float[np.ndarray, "rows size"],
) -> tuple[Float[np.ndarray, "rows 2"], Float[np.ndarray, " 2"]]:
    """Rows in the plane in which they differ most, and each axis' share of their variance."""
    rows = np.nan_to_num(rows.astype(np.float64))  # diverged rows have no plane
    left, sizes, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    # a plane even for a single row, or for embeddings of size one
    left, sizes = np.pad(left, ((0, 0), (0, 2))), np.pad(sizes, (0, 2))
    return (left * sizes)[:, :2], sizes[:2] ** 2 / max(sum(sizes**2), 1e-30)


def kind_of(piece: bytes) -> str:
    text = piece.decode(errors="replace").strip()
    if not text:
        return "white space"
    if text.isdigit():
        return "digits"
    if text.isalpha() and text.islower():
        return "lower case"
    return "capitals" if text.isalpha() and text[0].isupper() else "others"


def readable(piece: bytes) -> str:
    """The text of a token, cut short, with white space and bytes that can be seen."""
    font = get_font(findfont(FontProperties()))
    text = piece.decode(errors="backslashreplace")
    text = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    shown = (c.isprintable() and font.get_char_index(ord(c)) > 0 for c in text)
    label = "".join(c if show else ascii(c)[1:-1] for c, show in zip(text, shown))
    label = re.sub("␣{4,}", lambda run: f"␣×{len(run[0])}", label)
    return label if len(label) <= 16 else label[:15] + "…"


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()
