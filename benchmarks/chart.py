"""Draws memory and time of the cross-entropy from the JSON of benchmarks/cross_entropy.py.

    python -m benchmarks.cross_entropy --losses cross_entropy --rounds 4 --json > FILE.json
    python -m benchmarks.chart FILE.json FILE.svg

The chart shows the first shape in the file. Its background is transparent, for light and dark
pages. The thin line at the end of a bar shows the first to the third quartile of the times.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


NAMES = {
    "eqx_embedding": "eqx_embedding",
    "optax": "from logits, optax",
    "flax": "from logits, flax",
    "penzai": "from logits, penzai",
    "tokamax": "tokamax*",
    "torch": "PyTorch",
    "torch.compile": "PyTorch, compiled",
}
QUARTILES = "Lines: first to third quartile. PyTorch reports no memory."
NOTE = "* Its kernel is for TPUs; here it computes all logits."
TEXT, OURS, OTHERS = "#787d85", "#e8710a", "#8a9bb5"


class Bar(NamedTuple):
    name: str
    value: float
    quartiles: tuple[float, float] | None = None


def read_bars(report: dict[str, Any]) -> tuple[list[Bar], list[Bar]]:
    """The temporaries in MB, and the times divided by optax's."""
    rows = {row["name"]: row for row in report["results"] if row["loss"] == "cross_entropy"}
    rows = {name: rows[name] for name in NAMES if name in rows and not rows[name]["wrong"]}
    memory = [
        Bar(name, row["temporaries"] / 1e6)
        for name, row in rows.items()
        if row["temporaries"] is not None
    ]
    base = rows["optax"]["seconds"]
    times = [
        Bar(name, row["ratio"], tuple(np.quantile(row["times"], (0.25, 0.75)) / base))
        for name, row in rows.items()
    ]
    return memory, times


def draw_bars(axes: Axes, bars: list[Bar], title: str, digits: int):
    ends = [max(bar.value, *(bar.quartiles or (0,))) for bar in bars]
    largest = max(ends)
    for i, bar in enumerate(bars):
        ours = bar.name == "eqx_embedding"
        style: dict[str, Any] = {
            "color": OURS if ours else TEXT,
            "weight": "bold" if ours else "normal",
        }
        axes.barh(i, bar.value, height=0.7, color=OURS if ours else OTHERS)
        if bar.quartiles is not None:
            axes.plot(bar.quartiles, (i, i), color=TEXT, linewidth=1)
        axes.text(-0.02 * largest, i, NAMES[bar.name], ha="right", va="center", **style)
        axes.text(ends[i] + 0.02 * largest, i, f"{bar.value:.{digits}f}", va="center", **style)
    axes.set_title(title, loc="left", color=TEXT, fontsize=10, weight="bold")
    axes.set(xlim=(0, 1.2 * largest), ylim=(len(bars) - 0.5, -0.5))
    axes.axis("off")


def draw(results: dict[str, Any]) -> Figure:
    report = results["reports"][0]
    N, D, V = report["shape"]
    memory, times = read_bars(report)
    figure = Figure(figsize=(4.5, 1.3 + 0.22 * (len(memory) + len(times))))
    top, bottom = figure.subplots(2, 1, height_ratios=(len(memory), len(times)))
    draw_bars(top, memory, "Temporary memory, MB", 0)
    draw_bars(bottom, times, "Time, divided by optax's", 2)
    notes = [f"Cross-entropy and gradients: {N:,} tokens, embedding {D},"]
    notes += [f"vocabulary {V:,}, {report['dtype']}, {results['device'].upper()}."]
    notes.append(QUARTILES)
    if any(bar.name == "tokamax" for bar in times):
        notes.append(NOTE)
    figure.text(0.02, 0.01, "\n".join(notes), color=TEXT, fontsize=9, va="bottom")
    height = figure.get_figheight()
    below, above = (0.25 + 0.17 * len(notes)) / height, 1 - 0.25 / height
    figure.subplots_adjust(left=0.35, right=0.99, bottom=below, top=above, hspace=0.25)
    return figure


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=Path, help=".svg or .png")
    given = parser.parse_args(arguments)
    with matplotlib.rc_context({"svg.hashsalt": "chart", "font.size": 10}):
        figure = draw(json.loads(given.json.read_text()))
        metadata = {"Date": None} if given.picture.suffix == ".svg" else None
        figure.savefig(given.picture, transparent=True, metadata=metadata)


if __name__ == "__main__":
    main()
