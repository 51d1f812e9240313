"""Run directories as training would leave them, made of numbers that only look like training."""

import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
START = 1_764_000_000.0
SETTINGS = """name = "demo"

[model]
vocab_size = 4096
num_layers = {num_layers}
num_dense_layers = 1
dim = 128
num_heads = 4
num_kv_heads = 2
head_dim = 32
ffn_dim = 384
expert_dim = 96
num_experts = {num_experts}
experts_per_token = 2
window = 128

[optim]
muon_lr = 0.02
adamw_lr = 0.004
"""


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def make_stage(
    directory: Path,
    stage: str = "pretrain",
    *,
    steps: int = 300,
    layers: int = 7,
    experts: int = 8,
    load_every: int = 10,
    text: str = "a calm sentence",
    rollback: bool = False,
    finished: bool = True,
) -> Path:
    """Write metrics, events, samples and run.toml of one stage; returns the directory."""
    rng = random.Random(stage)
    favour = [[rng.lognormvariate(0, 0.9) for _ in range(experts)] for _ in range(layers)]
    metrics: list[dict[str, Any]] = []
    events = [event(stage, 0, "start", parameters=4_051_000, steps=steps, peak_flops=1.2e11, peak_source="measured")]
    order = list(range(1, steps + 1))
    if rollback:
        bad = steps // 2
        events += [event(stage, bad + i, "skip", loss=9.1, reason="spike") for i in (1, 2, 3)]
        events.append(event(stage, bad + 3, "rollback", to_step=bad - 20))
        order = [*range(1, bad + 4), *range(bad - 19, steps + 1)]
    for step in order:
        record = step_record(rng, stage, step, steps, layers, experts)
        if step % load_every == 0 or step == 1:
            record["load"] = loads(rng, favour, step / steps)
        metrics.append(record)
        if step % max(1, steps // 6) == 0:
            metrics += evaluations(stage, step, steps, record["loss"])
            events.append(event(stage, step, "checkpoint", path=f"checkpoints/step-{step:08d}", bytes=48_000_000))
    if finished:
        events.append(event(stage, steps, "finish", reason="all steps done", skips=0, rollbacks=0))
    write_lines(directory / "metrics.jsonl", metrics)
    write_lines(directory / "events.jsonl", events)
    samples = [
        {"stage": stage, "step": step, "prompt": "The sea was", "text": f" {text} at step {step}, grey and wide."}
        for step in (0, steps // 2, steps)
    ]
    samples.append({"stage": stage, "step": steps, "prompt": "3 + 4 =", "text": " 7" if stage == "rl" else " 12"})
    write_lines(directory / "samples.jsonl", samples)
    settings = SETTINGS.format(num_layers=layers + 1, num_experts=experts)
    (directory / "run.toml").write_text(settings, encoding="utf-8")
    return directory


def make_pipeline(directory: Path, *, steps: int = 240, **options: Any) -> Path:
    """A pipeline directory with all four stages and a summary."""
    for i, stage in enumerate(("pretrain", "extend", "sft", "rl")):
        make_stage(directory / stage, stage, steps=max(20, steps // (i + 1)), rollback=stage == "pretrain", **options)
    (directory / "summary.json").write_text(json.dumps({"seconds": 251.0, "device": "cpu"}), encoding="utf-8")
    return directory


def event(stage: str, step: int, name: str, **fields: Any) -> dict[str, Any]:
    return {"time": START + step, "stage": stage, "step": step, "event": name, **fields}


def step_record(rng: random.Random, stage: str, step: int, steps: int, layers: int, experts: int) -> dict[str, Any]:
    done = step / steps
    calm = math.exp(-done * 6)
    start, floor = (8.3, 2.9) if stage == "pretrain" else (3.0, 2.4)
    loss = floor + (start - floor) * math.exp(-done * 9) + rng.gauss(0, 0.05)
    decay = 1.0 if done < 0.7 else 0.1 + 0.45 * (1 + math.cos(math.pi * (done - 0.7) / 0.3))
    record: dict[str, Any] = {
        "kind": "step",
        "stage": stage,
        "phase": ("general", "enriched", "quality")[min(2, int(done * 2.999))] if stage == "pretrain" else stage,
        "step": step,
        "tokens": step * 4096,
        "loss": loss,
        "ce": loss - 0.01,
        "z_loss": 1e-6 * (40 + 10 * rng.random()),
        "sequence_loss": 1e-4 * (1 + calm + rng.random() / 20),
        "grad_norm": math.exp(rng.gauss(-0.5, 0.25)) + 3 * calm,
        "lr_scale": min(1.0, step / (steps / 20)) * decay,
        "rows": 16,
        "tokens_per_second": 6100 + rng.gauss(0, 180),
        "mfu": 0.31 + rng.gauss(0, 0.008),
        "batch_het": abs(rng.gauss(0.2, 0.06)),
        "max_vio": 0.25 + 2 * calm + abs(rng.gauss(0, 0.05)),
        "max_vio_layers": [0.25 + 2 * calm * (1 + i / layers) + abs(rng.gauss(0, 0.06)) for i in range(layers)],
        "dead_experts": [int(rng.random() < 0.4 * calm) for _ in range(layers)],
        "load_entropy": [1 - calm * (0.2 + 0.02 * i) for i in range(layers)],
        "bias_min": [-0.12 * (1 - calm) - 0.004 * i for i in range(layers)],
        "bias_max": [0.1 * (1 - calm) + 0.005 * i for i in range(layers)],
        "bias_norm": [0.2 * (1 - calm) + 0.01 * i for i in range(layers)],
        "logit_max": 9 + 4 * done + rng.gauss(0, 0.4),
        "logit_mean": -1 - done,
        "router_min": [-4 - 2 * done - 0.1 * i for i in range(layers)],
        "router_max": [3 + 2 * done + 0.1 * i for i in range(layers)],
        "seconds": 0.67,
    }
    if stage == "rl":
        gain = 1 / (1 + math.exp(-8 * (done - 0.4)))
        record |= {
            "reward": 0.15 + 0.7 * gain + rng.gauss(0, 0.03),
            "reward_std": 0.3 - 0.15 * gain,
            "length": 6 - 2 * gain,
            "kl_gap": abs(rng.gauss(0.002, 0.001)),
            "clip_fraction": abs(rng.gauss(0.02, 0.01)),
        }
    return record


def loads(rng: random.Random, favour: list[list[float]], done: float) -> list[list[float]]:
    power = 0.15 + 2 * math.exp(-done * 6)
    rows = [[value**power * math.exp(rng.gauss(0, 0.08)) for value in row] for row in favour]
    if done < 0.1:
        rows[-1][0] = 0.0
    return rows


def share(done: float, length: int) -> float:
    return min(1.0, max(0.0, 1.3 * done - length / 3000))


def evaluations(stage: str, step: int, steps: int, loss: float) -> list[dict[str, Any]]:
    domains = {
        name: {"loss": loss + more, "bits_per_byte": (loss + more) / 2.9}
        for name, more in (("prose", 0.2), ("code", -0.5), ("math", 0.1))
    }
    where = {"stage": stage, "step": step}
    records: list[dict[str, Any]] = [
        {"kind": "eval", **where, "loss": loss + 0.05, "bits_per_byte": (loss + 0.05) / 2.9, "domains": domains}
    ]
    if stage == "extend":
        grid = [
            {
                "task": task,
                "length": n,
                "depth": d / 4,
                "score": min(1.0, max(0.0, 1.3 * step / steps - n / 3000)),
                "samples": 20,
            }
            for task in ("multikey", "tracking")
            for n in (256, 512, 1024, 2048)
            for d in range(5)
        ]
        records.append({"kind": "niah", **where, "score": sum(c["score"] for c in grid) / len(grid), "grid": grid})
    if stage in ("sft", "rl"):
        value = 0.3 * step / steps if stage == "sft" else 0.3 + 0.58 * step / steps
        score = {"name": "arithmetic", "value": value, "standard_error": 0.03, "samples": 200}
        records.append({"kind": "score", **where, **score})
    return records
