"""Figures of runs and their table. No torch."""

import statistics
from pathlib import Path
from typing import Any

from trinity.base.files import read_jsonl
from trinity.config import RunConfig


def figures(run: Path, config: RunConfig, seconds: float) -> dict[str, Any]:
    """Of a finished stage: tokens, minutes, speed, memory, held-out loss, MK-NIAH over the steps."""
    records = read_jsonl(run / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    evals = [r for r in records if r["kind"] == "eval"]
    speeds = [r["tokens_per_second"] for r in steps[len(steps) // 3 :] if r.get("tokens_per_second")]
    return {
        "parameters": config.model.num_params(),
        "active": config.model.num_active_params(),
        "steps": len(steps),
        "tokens": steps[-1]["tokens"] if steps else 0,
        "seconds_of_last_call": round(seconds, 1),
        "seconds_of_steps": round(sum(r.get("seconds") or 0.0 for r in steps), 1),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "ce": [[r["step"], r["ce"]] for r in steps if r["step"] % 10 == 0],
        "heldout": evals,
        "niah": [r for r in records if r["kind"] == "niah"],
    }


def by_length(record: dict[str, Any], task: str = "multikey") -> dict[int, float]:
    """Mean score of each length."""
    cells: dict[int, list[float]] = {}
    for cell in record["grid"]:
        if cell["task"] == task:
            cells.setdefault(cell["length"], []).append(cell["score"])
    return {length: statistics.fmean(scores) for length, scores in cells.items()}


def format_results(results: dict[str, Any]) -> str:
    """A few lines for each run."""
    lines = []
    if "long" in results:
        lines.append(f"long: {results['long']}")
    for name, parts in results.get("runs", {}).items():
        for part, found in parts.items():
            if part.startswith("evaluate"):
                for record in (found["niah"], found["other_tasks"]):
                    for task in record["tasks"]:
                        scores = ", ".join(f"{n}: {s:.3f}" for n, s in by_length(record, task).items())
                        lines.append(f"{name} {part} {task}: {scores}")
                for domain, curve in found["positions"]["domains"].items():
                    bits = ", ".join(f"{p['from']}: {p['bits_per_byte']:.3f}" for p in curve["positions"])
                    lines.append(f"{name} {part} bits per byte from position, {domain}: {bits}")
                continue
            lines.append(
                f"{name} {part}: {found['steps']} steps, {found['tokens'] / 1e6:.1f} M tokens, "
                f"{found['seconds_of_steps']} s of steps, {found['tokens_per_second']} tokens/s, "
                f"{found['peak_gib']} GiB"
            )
            for record in found["niah"]:
                scores = ", ".join(f"{n}: {s:.2f}" for n, s in by_length(record).items())
                lines.append(f"   MK-NIAH at step {record['step']}: {scores}")
    return "\n".join(lines)
