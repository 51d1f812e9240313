"""What each stage did, read from its run directory, as rows of one table."""

from pathlib import Path
from typing import Any

from trinity.base.files import read_jsonl


def stage_row(run_dir: Path, stage: str) -> dict[str, Any]:
    """{what, measure, before, after, max_vio, ...} of a finished stage."""
    metrics = read_jsonl(run_dir / "metrics.jsonl")
    steps = [r for r in metrics if r["kind"] == "step"]
    if not steps:
        return {"what": "no step was needed"}
    row: dict[str, Any] = {
        "what": f"{len(steps):,} steps, {steps[-1]['tokens']:,} tokens",
        "max_vio": _mean([r["max_vio"] for r in steps[-10:]]),
        **_measure(stage, metrics, steps),
    }
    if stage == "pretrain":
        row["phases"] = phase_losses(metrics)
    if stage == "extend":
        scores = [r["score"] for r in metrics if r["kind"] == "niah"]
        row["niah"] = [round(score, 4) for score in scores]
        row["what"] += f", MK-NIAH {scores[0]:.2f} to {scores[-1]:.2f}"
    return row


def _measure(stage: str, metrics: list[dict[str, Any]], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The one figure that the stage is about, before and after it."""
    if stage == "rl":
        rewards = [r["reward"] for r in steps if "reward" in r]
        window = max(1, len(rewards) // 5)
        return _before_after("reward", [_mean(rewards[:window]), _mean(rewards[-window:])] if rewards else [])
    losses = [r["loss"] for r in metrics if r["kind"] == "eval"]
    return _before_after("held-out loss", losses)


def _before_after(measure: str, values: list[float]) -> dict[str, Any]:
    if not values:
        return {}
    return {"measure": measure, "before": round(values[0], 4), "after": round(values[-1], 4)}


def phase_losses(metrics: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Held-out losses inside each phase of pretraining, in order; an evaluation on a border counts for both sides."""
    first_step: dict[str, int] = {}
    last_step: dict[str, int] = {}
    for record in metrics:
        if record["kind"] == "step":
            first_step.setdefault(record["phase"], record["step"])
            last_step[record["phase"]] = record["step"]
    evals = [(r["step"], r["loss"]) for r in metrics if r["kind"] == "eval"]
    found: dict[str, list[float]] = {}
    for phase in first_step:
        before = [loss for step, loss in evals if step < first_step[phase]]
        inside = [loss for step, loss in evals if first_step[phase] <= step <= last_step[phase]]
        found[phase] = [round(loss, 4) for loss in [*before[-1:], *inside]]
    return found


def table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows for the console."""
    headers = ["step", "what", "measure", "before", "after", "MaxVio", "time"]
    rows = []
    for step in summary["steps"]:
        values = [step.get("before"), step.get("after"), step.get("max_vio")]
        rows.append(
            [
                step["step"],
                step.get("what", ""),
                step.get("measure", ""),
                *("" if value is None else f"{value:.3f}" for value in values),
                f"{step['seconds']:.0f}s",
            ]
        )
    return headers, rows


def _mean(values: list[float]) -> float:
    return round(sum(values) / max(1, len(values)), 4)
