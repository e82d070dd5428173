"""The band around a line that is a mean over seeds."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy import stats as scipy_stats


def interval(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the 95 % t interval of the mean over the first axis, of at least two rows."""
    values = np.asarray(rows, dtype=float)
    n = len(values)
    half = scipy_stats.t.isf(0.025, n - 1) * values.std(0, ddof=1) / np.sqrt(n)
    return values.mean(0) - half, values.mean(0) + half


def shade(axes: Axes, at: Any, rows: Any, colour: str) -> None:
    """Shade `interval` along a line; nothing for one seed. rows: (seeds, points)."""
    if len(rows) > 1:
        axes.fill_between(at, *interval(rows), color=colour, alpha=0.15, linewidth=0)
