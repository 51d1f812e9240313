"""Draw what an experiment found as one self-contained SVG file, or print it as a table of Markdown.

    python bench/plot.py OUT/balancing.json records/2026-11-25-balancing.svg [--variants sign smebu ...]
    python bench/plot.py OUT/balancing.json --table [--variants ...] [--metrics max_vio_last final_loss ...]

One panel for each curve: training cross-entropy, MaxVio and dead experts over the steps (mean over seeds, the band from
the smallest to the largest seed), and the bias of the most restless expert over the last steps (first seed). Panels
whose values are the same everywhere are left out. Below stands the mean of the held-out loss of each variant. The
colours follow the reader's light or dark scheme.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from measures import markdown
from trinity.base.files import atomic_write, read_json

COLORS = ("#1b6ca8", "#c92a3d", "#257a30", "#7d3fb2", "#a86200", "#3a3a3a", "#007f7f", "#8f4a10")
DARK = ("#6cb6ff", "#ff7b86", "#6fdd78", "#c297ff", "#f2b04a", "#d5d5d5", "#4fd6d6", "#e39a5b")
"""As many lines as one panel tells apart, on white and on black; beyond them the dashes change."""
DASHES = ("", "6 3", "2 3")
WIDTH, HEIGHT, LEFT, BOTTOM, GAP = 460, 250, 62, 34, 28
TICKS = 5


def _style() -> str:
    """Classes: back, text, dim (text), grid, and line-N and band-N of each colour."""

    def rules(back: str, text: str, dim: str, grid: str, colors: Sequence[str]) -> str:
        series = [f".line-{i}{{stroke:{c}}}.band-{i}{{fill:{c}}}" for i, c in enumerate(colors)]
        return f".back{{fill:{back}}}text{{fill:{text}}}text.dim{{fill:{dim}}}.grid{{stroke:{grid}}}{''.join(series)}"

    light = rules("#ffffff", "#1f2328", "#555555", "#dddddd", COLORS)
    dark = rules("#0d1117", "#e6edf3", "#a0a8b0", "#30363d", DARK)
    return f"<style>{light}@media (prefers-color-scheme: dark){{{dark}}}</style>"


class Line(NamedTuple):
    """A variant on a panel; low and high are the range over seeds."""

    name: str
    x_N: np.ndarray
    y_N: np.ndarray
    low_N: np.ndarray
    high_N: np.ndarray


class Panel(NamedTuple):
    title: str
    axis: str
    lines: list[Line]
    log: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("svg", type=Path, nargs="?")
    parser.add_argument("--table", action="store_true", help="print the comparison")
    parser.add_argument("--metrics", nargs="*", help="of the table; all that the experiment compares by default")
    parser.add_argument("--variants", nargs="*", help="only these")
    options = parser.parse_args()
    if options.svg is None and not options.table:
        parser.error("name an SVG file to draw, or pass --table")
    result = read_json(options.result)
    runs = {name: seeds for name, seeds in result["runs"].items() if name in (options.variants or result["runs"])}
    if options.table:
        table = {name: row for name, row in result["comparison"].items() if name in runs}
        metrics = options.metrics or list(next(iter(table.values()), {}))
        print(markdown(table, metrics))
    if options.svg is not None:
        with atomic_write(options.svg, "w") as file:
            file.write(draw(result["experiment"], runs))
    return 0


def panels(runs: Mapping[str, Mapping[str, Any]]) -> list[Panel]:
    """The panels that have something to show; `runs` is variant -> seed -> figures (`measures.measure`)."""
    found = [
        Panel("Training cross-entropy", "step", _curves(runs, 1), False),
        Panel("MaxVio, mean over layers (log)", "step", _curves(runs, 2), True),
        Panel("Dead experts, all layers", "step", _curves(runs, 3), False),
        Panel("Bias of the most restless expert, less its mean", "steps before the end", _tails(runs), False),
    ]
    return [p for p in found if p.lines and max(np.ptp(line.y_N) for line in p.lines) > 0]


def _curves(runs: Mapping[str, Mapping[str, Any]], column: int) -> list[Line]:
    lines = []
    for name, seeds in runs.items():
        curves = [f["curve"] for f in seeds.values()]  # seeds have the same steps; older results have fewer columns
        y_SN = np.array([[p[column] if column < len(p) else None for p in c] for c in curves], dtype=np.float64)
        seen_N = np.isfinite(y_SN).any(axis=0)
        y_SN = y_SN[:, seen_N]
        if y_SN.size:
            x_N = np.array([point[0] for point in curves[0]], dtype=np.float64)[seen_N]
            lines.append(Line(name, x_N, np.nanmean(y_SN, 0), np.nanmin(y_SN, 0), np.nanmax(y_SN, 0)))
    return lines


def _tails(runs: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    lines = []
    for name, seeds in runs.items():
        tail = next(iter(seeds.values())).get("bias_tail")
        if tail:
            y_N = np.array(tail) - np.mean(tail)
            lines.append(Line(name, np.arange(len(tail)) - len(tail) + 1.0, y_N, y_N, y_N))
    return lines


def draw(title: str, runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The SVG as text."""
    drawn = panels(runs)
    styles = {name: (i % len(COLORS), DASHES[i // len(COLORS) % len(DASHES)]) for i, name in enumerate(runs)}
    top = 44
    width = 2 * (WIDTH + GAP) + GAP
    rows = math.ceil(len(drawn) / 2)
    height = top + rows * (HEIGHT + GAP) + 22 * math.ceil(len(runs) / 2) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        _style(),
        f'<rect width="{width}" height="{height}" class="back"/>',
        f'<text x="{GAP}" y="26" font-size="17" font-weight="600">{escape(title)}</text>',
    ]
    for i, panel in enumerate(drawn):
        x, y = GAP + i % 2 * (WIDTH + GAP), top + i // 2 * (HEIGHT + GAP)
        parts += [f'<g transform="translate({x},{y})">', *_panel(panel, styles), "</g>"]
    for i, (name, seeds) in enumerate(runs.items()):
        x, y = GAP + i % 2 * (WIDTH + GAP), top + rows * (HEIGHT + GAP) + 14 + 22 * (i // 2)
        losses = [f["final_loss"] for f in seeds.values() if f.get("final_loss") is not None]
        loss = f"held-out loss {np.mean(losses):.4f}" if losses else "no held-out loss"
        color, dash = styles[name]
        parts.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 30}" y2="{y - 4}" {_stroke(color, dash)}/>')
        parts.append(f'<text x="{x + 38}" y="{y}">{escape(name)}, {loss}, seeds: {len(seeds)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _stroke(color: int, dash: str) -> str:
    return f'class="line-{color}" stroke-width="1.6" fill="none"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _panel(panel: Panel, styles: Mapping[str, tuple[int, str]]) -> list[str]:
    x_all = np.concatenate([line.x_N for line in panel.lines])
    y_all = np.concatenate([np.concatenate([line.low_N, line.high_N]) for line in panel.lines])
    if panel.log:
        y_all = np.log10(y_all[y_all > 0])
    low, high = float(np.min(y_all)), float(np.max(y_all))
    pad = 0.05 * (high - low) or 1.0
    low, high = low - pad, high + pad
    left, right = float(x_all.min()), float(max(x_all.max(), x_all.min() + 1))
    plot_width, plot_height = WIDTH - LEFT, HEIGHT - BOTTOM - 20

    def place_x(x_N: np.ndarray) -> np.ndarray:
        return LEFT + (x_N - left) / (right - left) * plot_width

    def place_y(y_N: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            scaled_N = np.log10(y_N) if panel.log else y_N
        return 20 + (1 - (np.clip(scaled_N, low, high) - low) / (high - low)) * plot_height

    parts = [f'<text x="{LEFT}" y="12" font-weight="600">{escape(panel.title)}</text>']
    for tick in np.linspace(low, high, TICKS):
        y = 20 + (1 - (tick - low) / (high - low)) * plot_height
        label = f"{10**tick:.3g}" if panel.log else f"{tick:.3g}"
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" class="dim">{label}</text>')
    for tick in np.linspace(left, right, TICKS):
        x = LEFT + (tick - left) / (right - left) * plot_width
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" class="dim">{tick:.0f}</text>')
    parts.append(
        f'<text x="{LEFT + plot_width / 2}" y="{HEIGHT - 2}" text-anchor="middle" class="dim">{panel.axis}</text>'
    )
    for line in panel.lines:
        color, dash = styles[line.name]
        x_N = place_x(line.x_N)
        band = [*_points(x_N, place_y(line.high_N)), *reversed(_points(x_N, place_y(line.low_N)))]
        parts.append(f'<polygon points="{" ".join(band)}" class="band-{color}" fill-opacity="0.12"/>')
        parts.append(f'<polyline points="{" ".join(_points(x_N, place_y(line.y_N)))}" {_stroke(color, dash)}/>')
    return parts


def _points(x_N: np.ndarray, y_N: np.ndarray) -> Sequence[str]:
    return [f"{x:.1f},{y:.1f}" for x, y in zip(x_N, y_N, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
