"""The band around a line that is a mean over seeds."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from eval.metrics import interval

FEW = 12  # points; the ends of more are one more restless line


def shade(axes: Axes, at: Any, rows: Iterable[Sequence[float]], colour: str) -> None:
    """Shade `interval` along a line; of few points with its ends as hairlines, since the shades of
    bands that lie over each other mix. rows: of each point the seeds' values, which may differ in
    number; where there are fewer than two the band has a gap."""
    ends = np.array([interval(row) for row in rows])
    if np.isfinite(ends).any():
        axes.fill_between(at, ends[:, 0], ends[:, 1], color=colour, alpha=0.1, linewidth=0)
        if len(ends) <= FEW:
            axes.plot(at, ends, color=colour, linewidth=0.5, alpha=0.7)
