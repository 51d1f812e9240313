"""The figures of one run, and their comparison over seeds and variants. No torch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trinity.base.files import read_jsonl

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom."""
MAX_SEEDS = max(T95) + 1
CURVE_EVERY = 5
"""Steps between points of a curve."""
TAIL_POINTS = 60

Figures = dict[str, Any]


def measure(run: Path) -> Figures | None:
    """The figures of a run so far; None when it has too few steps. A figure that does not exist is None.

    `late` is the last two thirds of the steps, `last` the last third.

    - batch_het: mean over `late` of the largest micro-batch loss minus the mean one.
    - loss_variance: over `late`, half the variance of the step-to-step differences of the training cross-entropy. Of
      independent noise around a slow trend that is the noise's variance.
    - final_loss: held-out loss after the last step. tokens_per_second: median over `late`.
    - bits_per_byte:DOMAIN: of each domain's held-out text after the last step.
    - max_vio, max_vio_last: mean over layers and steps of max n / mean n - 1, over `late` and over `last`.
    - bias_std: over `last`, the standard deviation in time of each expert's bias, averaged over experts and layers.
    - bias_oscillation: the same after each expert's straight line over `last` is taken off, so that a steady drift does
      not count; biases that follow the load up and down do.
    - bias_mean: mean over experts and layers of the bias after the last step: where biases drift as a whole.
    - dead_experts: most experts of all layers at any step of `last` that had no token for 20 steps.
    - spikes: bad steps, which the guard skipped.
    - curve: [step, cross-entropy, MaxVio, dead experts] at the first step, every 5th and the last.
    - bias_tail: the biases of the most restless expert (largest deviation over `last`) after each of the last 60 steps.
    """
    records = read_jsonl(run / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    evals = [r for r in records if r["kind"] == "eval" and r["step"] > 0]
    if len(steps) < 6:
        return None
    late, last = steps[len(steps) // 3 :], steps[2 * len(steps) // 3 :]
    jumps = [b["ce"] - a["ce"] for a, b in pairwise(late) if a["ce"] is not None and b["ce"] is not None]
    return {
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
        "batch_het": _mean(late, "batch_het"),
        "loss_variance": statistics.variance(jumps) / 2 if len(jumps) > 1 else None,
        "train_loss": _mean(last, "ce"),
        "final_loss": evals[-1]["loss"] if evals else None,
        **{
            f"bits_per_byte:{domain}": figures.get("bits_per_byte")
            for domain, figures in (evals[-1].get("domains") or {} if evals else {}).items()
        },
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in late if r.get("tokens_per_second")),
        "max_vio": _mean(late, "max_vio"),
        "max_vio_last": _mean(last, "max_vio"),
        **bias_figures(run / "biases.npy"),
        "dead_experts": max(sum(r.get("dead_experts") or []) for r in last),
        "spikes": max(r.get("spikes") or 0 for r in steps),
        "curve": [
            [r["step"], _short(r["ce"]), _short(r.get("max_vio")), sum(r.get("dead_experts") or [])]
            for r in steps
            if r["step"] % CURVE_EVERY == 0 or r is steps[0] or r is steps[-1]
        ],
        "evals": evals,
    }


def bias_figures(path: Path) -> Figures:
    """What `measure` says about biases [steps, L, E]; None without a file."""
    if not path.exists():
        return dict.fromkeys(("bias_std", "bias_oscillation", "bias_mean", "bias_tail"))
    bias_SLE = np.load(path, allow_pickle=False).astype(np.float64)
    last_SX = bias_SLE[2 * len(bias_SLE) // 3 :].reshape(-1, bias_SLE[0].size)
    moved_SX = last_SX - last_SX.mean(0)
    time_S = np.arange(len(last_SX)) - (len(last_SX) - 1) / 2
    slope_X = time_S @ moved_SX / max(1.0, float(time_S @ time_S))
    return {
        "bias_std": float(moved_SX.std(0).mean()),
        "bias_oscillation": float((moved_SX - time_S[:, None] * slope_X).std(0).mean()),
        "bias_mean": float(bias_SLE[-1].mean()),
        "bias_tail": [_short(bias) for bias in last_SX[-TAIL_POINTS:, moved_SX.std(0).argmax()]],
    }


def _short(value: float | None) -> float | None:
    """Five digits are enough for a drawing."""
    return None if value is None else float(f"{value:.5g}")


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [r[key] for r in records if r.get(key) is not None]
    return statistics.fmean(values) if values else None


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and half-width of its 95 % interval (Student's t); None where there are too few values."""
    if len(values) < 2:
        return (values[0] if values else None), None
    return statistics.fmean(values), T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def compare(
    runs: Mapping[str, Mapping[str, Figures]], baselines: Mapping[str, str], metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """By variant and metric: mean and interval, and what is left of the baseline's run of the same seed.

    `runs` is variant -> seed -> figures. `difference` is the mean of value - baseline over common seeds, `relative` the
    mean of value / baseline - 1.
    """
    table: dict[str, dict[str, Any]] = {}
    for variant, seeds in runs.items():
        baseline = baselines[variant]
        table[variant] = {}
        for metric in metrics:
            own = {seed: figures[metric] for seed, figures in seeds.items() if figures[metric] is not None}
            other = {s: f[metric] for s, f in runs.get(baseline, {}).items() if f[metric] is not None}
            pairs = [(own[seed], other[seed]) for seed in own if seed in other and variant != baseline]
            row: dict[str, Any] = {"seeds": len(own), "pairs": len(pairs), "baseline": baseline}
            row["mean"], row["ci95"] = interval(list(own.values()))
            row["difference"], row["difference_ci95"] = interval([a - b for a, b in pairs])
            ratios = [a / b - 1 for a, b in pairs] if all(b != 0 for _, b in pairs) else []
            row["relative"], row["relative_ci95"] = interval(ratios)
            table[variant][metric] = row
    return table


def format_table(table: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each metric and variant."""
    lines = [f"{'metric':18}{'variant':18}{'n':>3}  {'mean':>24}  {'less baseline':>24}  {'relative %':>16}  baseline"]
    for metric in next(iter(table.values()), {}):
        for variant, row in table.items():
            cell = row[metric]
            percent = [None if x is None else 100 * x for x in (cell["relative"], cell["relative_ci95"])]
            mean, difference = _pm(cell["mean"], cell["ci95"]), _pm(cell["difference"], cell["difference_ci95"])
            lines.append(
                f"{metric:18}{variant:18}{cell['seeds']:>3}  {mean:>24}  {difference:>24}  "
                f"{_pm(*percent, digits=3):>16}  {cell['baseline']}"
            )
    return "\n".join(lines)


def markdown(table: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """The comparison as a table of Markdown: a row for each variant; mean and half-width of the 95 % interval.

    The column after `final_loss` is its difference to the baseline, paired by seed.
    """
    heads = ["variant", "seeds"]
    for metric in metrics:
        heads += [metric, "less baseline"] if metric == "final_loss" else [metric]
    rows = [heads, ["---"] * len(heads)]
    for variant, row in table.items():
        cells = [variant, str(max((cell["seeds"] for cell in row.values()), default=0))]
        for metric in metrics:
            cell = row[metric]
            cells.append(_pm(cell["mean"], cell["ci95"], 4))
            if metric == "final_loss":
                own = variant == cell["baseline"]
                paired = _pm(cell["difference"], cell["difference_ci95"], 3)
                cells.append("baseline" if own else f"{paired} ({cell['baseline']})")
        rows.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows).replace("+-", "±")


def _pm(mean: float | None, half: float | None, digits: int = 5) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{digits}g} +- " + ("?" if half is None else f"{half:.2g}")
