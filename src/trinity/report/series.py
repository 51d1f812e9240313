"""Series small enough for a page: min/max envelopes of scalars, folded rows of per-layer values.

A run of 200 000 steps must neither fill the memory of the machine that writes the report nor hide its spikes from the
reader: every reduction here keeps extremes.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

POINTS = 480
"""Points of one curve on the page; about one for each two pixels of the widest chart."""
COLUMNS = 100
"""Columns of a heat map over time."""


def is_number(value: Any) -> bool:
    """Whether a value out of a JSON file is a finite number that fits a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # False for NaN


def is_step(value: Any) -> TypeGuard[int]:
    """Whether a value out of a JSON file is a step."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def kept_steps(step_N: np.ndarray) -> np.ndarray:
    """Mask of the records that count: a rollback or a resumed run repeats steps, and the last record of a step wins.

    A record counts when every later record has a larger step.
    """
    if step_N.size == 0:
        return np.zeros(0, dtype=bool)
    later = np.minimum.accumulate(step_N[::-1])[::-1]
    keep = np.ones(step_N.size, dtype=bool)
    keep[:-1] = step_N[:-1] < later[1:]
    return keep


def smooth(y_N: np.ndarray, span: float) -> np.ndarray:
    """Mean of an exponential moving average from the left and one from the right: the curve lags behind nothing.

    A new value has weight 1/span; both averages are corrected for their start; gaps are carried over.
    Args: y_N float64, may hold NaN; span in records, at least 1.
    """
    return (_average(y_N, span) + _average(y_N[::-1], span)[::-1]) / 2


def _average(y_N: np.ndarray, span: float) -> np.ndarray:
    decay = 1.0 - 1.0 / max(1.0, span)
    out = np.full(y_N.size, np.nan)
    total = weight = 0.0
    for i, value in enumerate(y_N.tolist()):
        if np.isfinite(value):
            total, weight = decay * total + (1.0 - decay) * value, decay * weight + (1.0 - decay)
        if weight > 0:
            out[i] = total / weight
    return out


def envelope(
    x_N: np.ndarray, y_N: np.ndarray, points: int = POINTS, *, smoothed: bool = True
) -> dict[str, list[Any]] | None:
    """A curve of at most `points` buckets: `x` (the last of a bucket), `y` (mean), `lo` and `hi`, and `s` (smoothed).

    Values that are not finite are left out; returns None when none is left. `lo` and `hi` are absent when every bucket
    holds one value, `s` when there are too few values to smooth.
    """
    finite = np.isfinite(y_N)
    x_N, y_N = x_N[finite], y_N[finite]
    if x_N.size == 0:
        return None
    edges = np.unique(np.linspace(0, x_N.size, min(points, x_N.size) + 1).astype(np.int64))
    starts, ends = edges[:-1], edges[1:]
    sums = np.add.reduceat(y_N, starts)
    curve: dict[str, list[Any]] = {"x": rounded(x_N[ends - 1]), "y": rounded(sums / (ends - starts))}
    if starts.size < x_N.size:
        curve["lo"] = rounded(np.minimum.reduceat(y_N, starts))
        curve["hi"] = rounded(np.maximum.reduceat(y_N, starts))
    if smoothed and x_N.size >= 20:
        curve["s"] = rounded(smooth(y_N, max(4.0, x_N.size / 60))[ends - 1])
    return curve


def rounded(values: np.ndarray | Sequence[float], digits: int = 5) -> list[Any]:
    """JSON-able numbers of `digits` significant digits; None where a value is not finite."""
    out: list[Any] = []
    for value in np.asarray(values, dtype=np.float64).tolist():
        if not np.isfinite(value):
            out.append(None)
        else:
            short = float(f"{value:.{digits}g}") if abs(value) < 10**digits else round(value)
            out.append(int(short) if short == int(short) and abs(short) < 2**53 else short)
    return out


class Folded:
    """Rows of numbers over time in bounded memory: when 2 * `columns` groups are held, neighbours are merged.

    Each group keeps the mean, the minimum and the maximum of its rows.
    """

    def __init__(self, columns: int = COLUMNS) -> None:
        self.columns = columns
        self.fold = 1
        self._groups: list[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]] = []  # last step, rows, sum, min, max

    def add(self, step: int, values: np.ndarray) -> None:
        """Append a row, float64 with NaN for gaps; rows of a step that comes again (a rollback) are dropped first."""
        while self._groups and self._groups[-1][0] >= step:
            self._groups.pop()
        if self._groups and self._groups[-1][2].size != values.size:
            return  # a layer count that changes inside one stage is damage; keep what came first
        if self._groups and self._groups[-1][1] < self.fold:
            _, rows, total, low, high = self._groups.pop()
            self._groups.append((step, rows + 1, total + values, np.fmin(low, values), np.fmax(high, values)))
        else:
            self._groups.append((step, 1, values, values, values))
        if len(self._groups) >= 2 * self.columns:
            self._merge()

    def _merge(self) -> None:
        self.fold *= 2
        pairs = zip(self._groups[::2], self._groups[1::2], strict=True)
        self._groups = [(b[0], a[1] + b[1], a[2] + b[2], np.fmin(a[3], b[3]), np.fmax(a[4], b[4])) for a, b in pairs]

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def steps(self) -> np.ndarray:
        """Last step of each group, int64 [columns]."""
        return np.array([g[0] for g in self._groups], dtype=np.int64)

    def values(self, how: str = "mean") -> np.ndarray:
        """[columns, width] of "mean", "min" or "max"."""
        if how == "mean":
            return np.stack([g[2] / g[1] for g in self._groups])
        return np.stack([g[3 if how == "min" else 4] for g in self._groups])
