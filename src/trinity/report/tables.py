"""The parts of the page that are words and tables: stage cards, scores, samples, events, settings, environment."""

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from trinity.base.console import duration, quantity, redact
from trinity.config import ModelConfig, RunConfig
from trinity.report.read import Run, Stage
from trinity.report.series import is_number, is_step

APART = ("time", "stage", "step", "event", "environment", "paths", "optimizer")
"""Fields of an event that have a place of their own."""
MAX_TABLE_EVENTS = 600
MAX_PROMPTS = 24
MAX_GRIDS = 6
MAX_DEAD = 8
"""Deaths, and experts of one of them, that a warning names."""
NONE = "\N{EN DASH}"
SHORT = {"pretrain": "Pretrain", "extend": "Extend", "sft": "SFT", "rl": "RL"}


def name(run: Run) -> str:
    """The run's name from its settings, else its directory's."""
    named = next((s.settings["name"] for s in run.stages if isinstance(s.settings.get("name"), str)), None)
    return named or run.path.resolve().name


def model_line(run: Run) -> str | None:
    """The model in one line, None when no stage holds a valid [model] section."""
    for stage in run.stages:
        try:
            m = ModelConfig.model_validate(stage.settings.get("model"))
        except ValidationError:
            continue
        shared = f" and {m.num_shared_experts} shared" if m.num_shared_experts else ""
        experts = (
            f"{m.num_moe_layers} with {m.num_experts} experts, of which a token visits {m.experts_per_token}{shared}"
        )
        sizes = f"{quantity(m.num_params())} parameters, {quantity(m.num_active_params())} active per token"
        return f"{sizes}. {m.num_layers} layers, {experts}; width {m.dim}, vocabulary {m.vocab_size:,}."
    return None


def card(stage: Stage) -> dict[str, Any]:
    """The summary tile of a stage: one headline number and a few facts."""
    value, label = _headline(stage)
    facts: list[tuple[str, str]] = []
    if stage.step_N.size:
        facts.append(("steps", f"{int(stage.step_N[-1]):,}"))
    tokens, seconds, speed = (stage.scalars.get(key) for key in ("tokens", "seconds", "tokens_per_second"))
    if tokens is not None:
        facts.append(("tokens", quantity(float(np.nanmax(tokens)))))
    if seconds is not None:
        facts.append(("time", duration(float(np.nansum(seconds)))))
    if speed is not None:
        facts.append(("tokens/s", quantity(round(float(np.nanmedian(speed))))))
    events = [e["event"] for e in stage.events]
    skips, rollbacks = events.count("skip"), events.count("rollback")
    facts.append(("skipped steps", str(skips)))
    facts.append(("rollbacks", str(rollbacks)))
    return {
        "title": stage.title,
        "short": SHORT.get(stage.name, stage.name),
        "status": stage.status,
        "value": value,
        "label": label,
        "facts": facts,
    }


def deaths(stage: Stage) -> list[str]:
    """A warning for a stage in which experts died: which, of which layer, at which step."""
    died = [e for e in stage.events if e["event"] == "dead_expert" and isinstance(e.get("experts"), list)]
    if not died:
        return []
    count = sum(len(e["experts"]) for e in died)
    first = "; ".join(
        f"layer {e.get('layer')}, experts {', '.join(map(str, e['experts'][:MAX_DEAD]))}, step {e.get('step')}"
        for e in died[:MAX_DEAD]
    )
    more = "; ..." if len(died) > MAX_DEAD else ""
    return [f"{stage.title}: experts died {count} times, having got no token for many steps: {first}{more}"]


def _headline(stage: Stage) -> tuple[str, str]:
    reward = stage.scalars.get("reward")
    if reward is not None:
        tail = reward[np.isfinite(reward)][-max(1, reward.size // 20) :]
        return f"{tail.mean():.2f}", "mean reward at the end"
    if stage.name == "extend" and stage.niah and is_number(stage.niah[-1].get("score")):
        return f"{100 * stage.niah[-1]['score']:.0f}%", "MK-NIAH"
    for record in reversed(stage.evals):
        if stage.name != "sft" and is_number(record.get("bits_per_byte")):
            return f"{record['bits_per_byte']:.3f}", "bits per byte, held out"
        if is_number(record.get("loss")):
            return f"{record['loss']:.3f}", "held-out loss"
    loss = stage.scalars.get("loss")
    if loss is not None:
        return f"{loss[np.isfinite(loss)][-1]:.3f}", "training loss, last step"
    return NONE, "no step yet"


def retrieval(run: Run) -> list[dict[str, Any]]:
    """MK-NIAH heat maps of each stage: up to MAX_GRIDS evaluations, the first and the last among them."""
    blocks = []
    for index, stage in enumerate(run.stages):
        if stage.niah:
            picks = np.unique(np.linspace(0, len(stage.niah) - 1, min(MAX_GRIDS, len(stage.niah))).round().astype(int))
            grids = [grid for i in picks for grid in _grids(stage.niah[i])]
            hidden = len(stage.niah) - len(picks)
            blocks.append(
                {"stage": index, "title": stage.title, "grids": grids, "hidden": hidden, "curve": len(stage.niah) > 1}
            )
    return blocks


TASKS = {
    "multikey": "MK-NIAH",
    "single": "one key",
    "multivalue": "several values of a key",
    "multiquery": "several keys at once",
    "tracking": "variable tracking",
}


def _grids(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A heat map for each task of an evaluation, in its order; records once named none and had MK-NIAH only."""
    cells = [
        c for c in record["grid"] if isinstance(c, dict) and is_number(c.get("length")) and is_number(c.get("depth"))
    ]
    by_task: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        by_task.setdefault(str(cell.get("task", "multikey")), []).append(cell)
    return [_grid(record, task, some) for task, some in by_task.items()] or [_grid(record, "multikey", [])]


def _grid(record: dict[str, Any], task: str, some: list[dict[str, Any]]) -> dict[str, Any]:
    cells = {(c["length"], c["depth"]): c for c in some}
    lengths, depths = sorted({k[0] for k in cells}), sorted({k[1] for k in cells})
    rows = [{"length": f"{n:,}", "cells": [_cell(cells.get((n, d))) for d in depths]} for n in lengths]
    tasks = record.get("tasks")
    score = tasks.get(task) if isinstance(tasks, dict) else record.get("score")
    return {
        "step": f"{record['step']:,}",
        "task": TASKS.get(task, task),
        "score": f"{100 * float(score):.0f}%" if score is not None and is_number(score) else NONE,
        "depths": [f"{100 * d:.0f}%" if max(depths) <= 1 else f"{d:g}" for d in depths],
        "rows": rows,
    }


def _cell(cell: dict[str, Any] | None) -> dict[str, Any]:
    if cell is None or not is_number(cell.get("score")):
        return {"score": None, "text": NONE, "title": ""}
    score = min(1.0, max(0.0, float(cell["score"])))
    samples = f", {cell['samples']} questions" if isinstance(cell.get("samples"), int) else ""
    return {"score": round(score, 3), "text": f"{100 * score:.0f}", "title": f"{100 * score:.1f}%{samples}"}


def scores(run: Run) -> list[dict[str, str]]:
    """Rows of the table of scores: the first and the last value of each task in each stage."""
    rows = []
    for stage in run.stages:
        by_name: dict[str, list[dict[str, Any]]] = {}
        for record in sorted(stage.scores, key=lambda r: r["step"] if is_step(r.get("step")) else 0):
            if is_number(record.get("value")):
                by_name.setdefault(str(record.get("name", "score")), []).append(record)
        for task, records in by_name.items():
            last = records[-1]
            rows.append(
                {
                    "name": task,
                    "stage": stage.title,
                    "first": f"{records[0]['value']:.4g}" if len(records) > 1 else NONE,
                    "value": f"{last['value']:.4g}",
                    "error": f"{last['standard_error']:.2g}" if is_number(last.get("standard_error")) else NONE,
                    "samples": f"{last['samples']:,}" if isinstance(last.get("samples"), int) else NONE,
                    "step": _step(last),
                }
            )
    return rows


def samples(run: Run) -> tuple[list[dict[str, Any]], int]:
    """Samples by prompt in the order of the pipeline, and the number of prompts left out."""
    by_prompt: dict[str, list[dict[str, str]]] = {}
    for stage in run.stages:
        for r in sorted(stage.samples, key=lambda r: r["step"] if is_step(r.get("step")) else 0):
            prompt, text = r.get("prompt"), r.get("text")
            if isinstance(prompt, str) and isinstance(text, str):
                when = f"{stage.title}, step {r.get('step', NONE)}"
                by_prompt.setdefault(redact(prompt), []).append({"when": when, "text": redact(text) or "(nothing)"})
    groups = [
        {"prompt": prompt or "(empty prompt)", "ends": [s[0], s[-1]] if len(s) > 1 else s, "between": s[1:-1]}
        for prompt, s in by_prompt.items()
    ]
    return groups[:MAX_PROMPTS], max(0, len(groups) - MAX_PROMPTS)


def events(run: Run) -> tuple[list[dict[str, str]], int]:
    """Rows of the table of events, and how many are left out; checkpoints are left out first."""
    found = [(stage, e) for stage in run.stages for e in stage.events]
    shown = found
    if len(shown) > MAX_TABLE_EVENTS:
        shown = [(s, e) for s, e in shown if e["event"] != "checkpoint"]
        shown = (
            shown
            if len(shown) <= MAX_TABLE_EVENTS
            else shown[: MAX_TABLE_EVENTS // 2] + shown[-MAX_TABLE_EVENTS // 2 :]
        )
    rows = [
        {
            "time": _time(e.get("time")),
            "stage": stage.title,
            "step": _step(e),
            "event": e["event"],
            "detail": _detail({k: v for k, v in e.items() if k not in APART}),
        }
        for stage, e in shown
    ]
    return rows, len(found) - len(shown)


def environment(run: Run) -> list[tuple[str, str]]:
    """What the last start or resume event tells about machine and versions, and the scalars of summary.json."""
    facts: dict[str, Any] = {}
    for stage in run.stages:
        for e in stage.events:
            if e["event"] in ("start", "resume"):
                inner = e["environment"] if isinstance(e.get("environment"), dict) else e
                facts |= {k: v for k, v in inner.items() if k not in APART}
                facts |= e["paths"] if isinstance(e.get("paths"), dict) else {}
    facts |= {k: v for k, v in run.summary.items() if isinstance(v, str | int | float)}
    return [(str(k).replace("_", " "), redact(_text(v))) for k, v in facts.items()]


def settings(run: Run) -> list[dict[str, Any]]:
    """Settings with their origins; stages with equal settings share a block."""
    blocks: dict[str, dict[str, Any]] = {}
    defaults = _defaults(RunConfig)
    for stage in run.stages:
        if not stage.settings:
            continue
        key = json.dumps([stage.settings, stage.origins], sort_keys=True, default=str)
        if key in blocks:
            blocks[key]["title"] += f", {stage.title.lower()}"
            continue
        rows = [
            {
                "key": k,
                "value": redact(_text(v)),
                "origin": stage.origins.get(k) or ("default" if defaults.get(k) == v else "not recorded"),
            }
            for k, v in _flat(stage.settings)
        ]
        changed = sum(row["origin"] != "default" for row in rows)
        blocks[key] = {
            "title": stage.title,
            "rows": rows,
            "changed": f"{len(rows)} settings, {changed} not at their default",
        }
    return list(blocks.values())


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and prefix.count(".") < 1 and "weights" not in key:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value))
    return rows


def _defaults(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Defaults of every key that has one, as TOML would hold them."""
    found: dict[str, Any] = {}
    for key, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= _defaults(info.annotation, f"{prefix}{key}.")
        elif not info.is_required():
            default = info.get_default(call_default_factory=True)
            found[prefix + key] = list(default) if isinstance(default, tuple) else default
    return found


def _detail(fields: dict[str, Any]) -> str:
    text = " · ".join(f"{k.replace('_', ' ')}: {_text(v)}" for k, v in fields.items() if k != "environment")
    return redact(text if len(text) <= 600 else text[:600] + " …")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _step(record: dict[str, Any]) -> str:
    return f"{record['step']:,}" if is_step(record.get("step")) else NONE


def _time(value: Any) -> str:
    if not is_number(value):
        return str(value) if isinstance(value, str) else NONE
    try:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return NONE
