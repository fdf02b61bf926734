"""The picture of a run: its losses and learning rate, from metrics.jsonl."""

import math
from pathlib import Path
from typing import Any

from omnistep.core.logs import read_metrics


def plot_losses(metrics_jsonl: Path, png_path: Path) -> None:
    """Draws a run: the loss of each step and smoothed, held-out losses, the learning rate below.

    The smoothed line is a centred mean over about 1/15 of the steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(metrics_jsonl)
    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(9, 6), height_ratios=[3, 1], layout="constrained"
    )
    steps, losses = _series(rows, "loss")
    top.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="loss")
    top.plot(steps, _smooth(losses, len(losses) // 30), color="tab:blue", label="smoothed")
    if any("eval_loss" in row for row in rows):
        top.plot(*_series(rows, "eval_loss"), "o-", color="tab:red", markersize=4, label="held-out")
    bottom.plot(*_series(rows, "lr"), color="tab:gray")
    bottom.set(xlabel="step", ylabel="learning rate")
    bottom.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.set(ylabel="loss")
    top.legend(frameon=False)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png_path, dpi=150)
    pyplot.close(figure)


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the name; NaN, a gap in the line, for None."""
    pairs = [(r["step"], math.nan if r[name] is None else r[name]) for r in rows if name in r]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smooth(values: list[float], half: int) -> list[float]:
    """The mean over `half` values to either side, as many as both sides have; NaN left out."""
    sums, counts = [0.0], [0]
    for x in values:
        finite = math.isfinite(x)
        sums.append(sums[-1] + (x if finite else 0.0))
        counts.append(counts[-1] + finite)
    reaches = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    spans = [(i - reach, i + reach + 1) for i, reach in enumerate(reaches)]
    return [
        (sums[b] - sums[a]) / (counts[b] - counts[a]) if counts[b] > counts[a] else math.nan
        for a, b in spans
    ]
