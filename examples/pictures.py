"""The pictures of a run, as PNG."""

import io
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, FontProperties, get_font


def loss_picture(metrics: list[dict[str, Any]], reference: dict[str, float]) -> bytes:
    """Bits per byte over steps, beside what easier methods reach."""
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
        )
    axes.plot(steps, [line["train_bits_per_byte"] for line in metrics], label="training text")
    axes.plot(steps, [line["val_bits_per_byte"] for line in metrics], label="held-out text")
    axes.set(xlabel="step", ylabel="bits per byte", xlim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def embedding_picture(
    embeddings: Float[np.ndarray, "vocabulary embedding"],
    counts: Integer[np.ndarray, " vocabulary"],
    pieces: list[bytes],
) -> bytes:
    """The hundred most frequent tokens, in the plane in which their embeddings differ most.

    Where labels would overlap, the more frequent token keeps its own.
    """
    tokens = [token for token in np.argsort(-counts, kind="stable")[:100] if counts[token] > 0]
    rows = np.nan_to_num(embeddings[tokens].astype(np.float64))
    rows -= rows.mean(axis=0)
    _, sizes, directions = np.linalg.svd(rows, full_matrices=False)
    points = np.zeros((len(tokens), 2))
    points[:, : len(directions[:2])] = rows @ directions[:2].T
    shares = [*(sizes**2 / max((sizes**2).sum(), 1e-30)), 0.0]

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    colors = {
        "lower case": "tab:blue",
        "capitals": "tab:orange",
        "digits": "tab:green",
        "white space": "tab:red",
        "others": "0.35",
    }
    kinds = np.array([_kind(pieces[token]) for token in tokens])
    for kind, color in colors.items():
        if (kinds == kind).any():
            axes.scatter(*points[kinds == kind].T, s=6, color=color, label=kind)
    axes.set(
        xlabel=f"first principal component, {shares[0]:.0%} of the variance",
        ylabel=f"second, {shares[1]:.0%}",
    )
    axes.margins(0.06)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, markerscale=2)
    figure.draw_without_rendering()  # puts everything in its place, so that labels have one

    taken = []
    for token, kind, point in zip(tokens, kinds, points):
        label = axes.annotate(
            _readable(pieces[token]),
            (point[0], point[1]),
            xytext=(3, 2),
            textcoords="offset points",
            color=colors[kind],
            parse_math=False,
        )
        box = label.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            label.remove()
        else:
            taken.append(box)
    return _png(figure)


def _kind(piece: bytes) -> str:
    text = piece.decode(errors="replace").strip()
    if not text:
        return "white space"
    if text.isdigit():
        return "digits"
    if text.isalpha():
        return "lower case" if text.islower() else "capitals"
    return "others"


def _readable(piece: bytes) -> str:
    """The text of a token, with white space that can be seen and escapes for what has no glyph."""
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    text = piece.decode(errors="backslashreplace")
    text = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() and ord(c) in glyphs else ascii(c)[1:-1] for c in text)


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()
