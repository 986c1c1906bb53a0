"""The pictures of a run, as PNG."""

import io
import re
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, FontProperties, get_font


COLORS = {
    "lower case": "tab:blue",
    "capitals": "tab:orange",
    "digits": "tab:green",
    "white space": "tab:red",
    "others": "0.35",
}


def loss_picture(metrics: list[dict[str, Any]], reference: dict[str, float]) -> bytes:
    """Bits per byte over steps, with lines for those of simpler methods."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in metrics]
    for name, value in reference.items():
        axes.axhline(value, color="0.6", linewidth=1, linestyle="--")
        axes.annotate(
            f"{name} {value:.2f}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            horizontalalignment="right",
            color="0.4",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0},
            zorder=3,
        )
    for name, label in ("train", "training text"), ("val", "held-out text"):
        values = [line[f"{name}_bits_per_byte"] for line in metrics]
        axes.plot(steps, values, marker="o", markersize=3, label=f"{label} {values[-1]:.2f}")
    axes.set(xlabel="step", ylabel="bits per byte", xlim=(0, None))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
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

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    axes.scatter(*points.T, s=0)
    axes.set(
        title=f"the {len(tokens)} most frequent tokens",
        xlabel=f"first principal component of their embeddings, {shares[0]:.0%} of the variance",
        ylabel=f"second, {shares[1]:.0%}",
        xticks=[],
        yticks=[],
    )
    axes.spines[["top", "right"]].set_visible(False)
    kinds = [kind_of(pieces[token]) for token in tokens]
    for kind, color in COLORS.items():
        if kind in kinds:
            axes.scatter([], [], color=color, label=kind)
    figure.legend(loc="outside lower center", ncols=len(COLORS), frameon=False)
    figure.draw_without_rendering()  # so that labels have positions

    taken = []
    for token, kind, (x, y) in zip(tokens, kinds, points.tolist()):
        style = {"color": COLORS[kind], "ha": "center", "va": "center", "parse_math": False}
        label = axes.text(x, y, readable(pieces[token]), **style)
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
    """Bits per byte over steps, and how the rows of new tokens moved.

    A line leads from the start of each of the most frequent new tokens to its name.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    left.axhline(before, color="0.6", linewidth=1, linestyle="--")
    style = {"textcoords": "offset points", "horizontalalignment": "right"}
    left.annotate(
        f"before, without new tokens {before:.2f}",
        (1, before),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        color="0.4",
        **style,
    )
    left.plot(*zip(*reports), marker="o", markersize=3, color="tab:blue")
    left.annotate(f"with them {reports[-1][1]:.2f}", reports[-1], xytext=(0, 8), **style)
    left.set(xlabel="step", ylabel="bits per byte on held-out text")
    left.spines[["top", "right"]].set_visible(False)

    old = len(old_rows)
    points, shares = principal_plane(np.concatenate([old_rows, untrained, trained]))
    starts, ends = np.split(points[old:], 2)
    right.scatter(*points.T, s=0)
    right.scatter(*points[:old].T, s=8, color="0.8", linewidths=0, label=f"{old:,} old tokens")
    label = f"{len(trained):,} new tokens, where they went"
    right.scatter(*ends.T, s=10, color="tab:blue", linewidths=0, label=label)
    style = {"s": 14, "facecolors": "white", "edgecolors": "tab:orange"}
    right.scatter([], [], **style, label="and where the most frequent began")
    right.set(
        xlabel=f"first principal component of all rows, {shares[0]:.0%} of the variance",
        ylabel=f"second, {shares[1]:.0%}",
        xticks=[],
        yticks=[],
    )
    right.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    figure.draw_without_rendering()  # so that labels have positions
    figure.set_layout_engine("none")  # which then stay
    right.autoscale(False)
    taken = []
    for token in np.argsort(-counts[old:], kind="stable"):
        label = right.annotate(
            readable(pieces[old + token]),
            ends[token],
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
        right.plot(*zip(starts[token], ends[token]), color="tab:orange", linewidth=0.8, zorder=0)
        right.scatter(*starts[token], **style)
    return _png(figure)


def principal_plane(
    rows: Float[np.ndarray, "rows size"],
) -> tuple[Float[np.ndarray, "rows 2"], Float[np.ndarray, " 2"]]:
    """Rows in the plane in which they differ most, and each axis' share of their variance."""
    rows = np.nan_to_num(rows.astype(np.float64))  # a diverged model has NaN
    left, sizes, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    # a single row, or embeddings of size one, have fewer than two axes
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
    """The text of a token, shortened, with visible signs for white space and bytes."""
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
