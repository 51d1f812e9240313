"""Run directories as training would leave them, made of numbers that only look like training."""

import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


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
    seed: int = 0,
) -> Path:
    """Write metrics, events, samples and run.toml of one stage; returns the directory."""
    rng = random.Random(f"{stage}{seed}")
    metrics: list[dict[str, Any]] = []
    start, floor = (8.3, 2.9) if stage == "pretrain" else (3.0, 2.4)
    loads = [[rng.lognormvariate(0, 0.9) for _ in range(experts)] for _ in range(layers)]
    now = 1_764_000_000.0
    events: list[dict[str, Any]] = [
        {"time": now, "stage": stage, "step": 0, "event": "start", "device": "cpu", "torch": "2.13.0", "ranks": 1}
    ]
    order = list(range(1, steps + 1))
    if rollback:
        bad = steps // 2
        events += [
            {"time": now + bad + i, "stage": stage, "step": bad + i, "event": "skip", "loss": 9.1} for i in (1, 2, 3)
        ]
        events.append(
            {"time": now + bad + 4, "stage": stage, "step": bad + 3, "event": "rollback", "to_step": bad - 20}
        )
        order = list(range(1, bad + 4)) + list(range(bad - 19, steps + 1))
    for step in order:
        done = step / steps
        calm = math.exp(-done * 6)
        loss = floor + (start - floor) * math.exp(-done * 9) + rng.gauss(0, 0.05)
        phase = ("general", "enriched", "quality")[min(2, int(done * 3 * 0.999))] if stage == "pretrain" else stage
        record: dict[str, Any] = {
            "kind": "step", "stage": stage, "phase": phase, "step": step, "tokens": step * 4096, "loss": loss, "ce": loss - 0.01,
            "z_loss": 1e-6 * (40 + 10 * rng.random()), "sequence_loss": 1e-4 * (1 + calm + rng.random() / 20),
            "grad_norm": math.exp(rng.gauss(-0.5, 0.25)) + 3 * calm, "lr_scale": min(1.0, step / (steps / 20)) * (1 if done < 0.7 else 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * (done - 0.7) / 0.3))),
            "rows": 16, "tokens_per_second": 6100 + rng.gauss(0, 180), "mfu": 0.31 + rng.gauss(0, 0.008), "batch_het": abs(rng.gauss(0.2, 0.06)),
            "max_vio": 0.25 + 2 * calm + abs(rng.gauss(0, 0.05)), "max_vio_layers": [0.25 + 2 * calm * (1 + i / layers) + abs(rng.gauss(0, 0.06)) for i in range(layers)],
            "dead_experts": [int(rng.random() < 0.4 * calm) for _ in range(layers)], "load_entropy": [math.log(experts) - calm * (0.3 + 0.03 * i) for i in range(layers)],
            "bias_min": [-0.12 * (1 - calm) - 0.004 * i for i in range(layers)], "bias_max": [0.1 * (1 - calm) + 0.005 * i for i in range(layers)], "bias_norm": [0.2 * (1 - calm) + 0.01 * i for i in range(layers)],
            "logit_max": 9 + 4 * done + rng.gauss(0, 0.4), "logit_mean": -1 - done, "router_min": [-4 - 2 * done - 0.1 * i for i in range(layers)], "router_max": [3 + 2 * done + 0.1 * i for i in range(layers)], "seconds": 0.67,
        }  # fmt: skip
        if step % load_every == 0 or step == 1:
            record["load"] = [
                [load ** (0.15 + 2 * calm) * math.exp(rng.gauss(0, 0.08)) for load in row] for row in loads
            ]
            if done < 0.1:
                record["load"][-1][0] = 0.0
        if stage == "rl":
            gain = 1 / (1 + math.exp(-8 * (done - 0.4)))
            record |= {"reward": 0.15 + 0.7 * gain + rng.gauss(0, 0.03), "reward_std": 0.3 - 0.15 * gain, "length": 6 - 2 * gain, "kl_gap": abs(rng.gauss(0.002, 0.001)), "clip_fraction": abs(rng.gauss(0.02, 0.01))}  # fmt: skip
        metrics.append(record)
        if step % max(1, steps // 6) == 0:
            domains = {
                n: {"loss": loss + d, "bits_per_byte": (loss + d) / 2.9}
                for n, d in (("prose", 0.2), ("code", -0.5), ("math", 0.1))
            }
            metrics.append({"kind": "eval", "stage": stage, "step": step, "loss": loss + 0.05, "bits_per_byte": (loss + 0.05) / 2.9, "domains": domains})  # fmt: skip
            events.append(
                {
                    "time": now + step,
                    "stage": stage,
                    "step": step,
                    "event": "checkpoint",
                    "path": f"checkpoints/step-{step:08d}",
                }
            )
            if stage == "extend":
                grid = [{"length": n, "depth": d / 4, "score": min(1.0, max(0.0, 1.3 * done - n / 3000 + 0.1 * math.cos(d))), "samples": 20} for n in (256, 512, 1024, 2048) for d in range(5)]  # fmt: skip
                metrics.append(
                    {
                        "kind": "niah",
                        "stage": stage,
                        "step": step,
                        "score": sum(c["score"] for c in grid) / len(grid),
                        "grid": grid,
                    }
                )
    if stage in ("sft", "rl"):
        metrics.append(
            {
                "kind": "score",
                "stage": stage,
                "name": "arithmetic",
                "value": 0.31 if stage == "sft" else 0.88,
                "standard_error": 0.03,
                "samples": 200,
            }
        )
    if finished:
        events.append({"time": now + steps, "stage": stage, "step": steps, "event": "finish", "seconds": steps * 0.67})
    write_lines(directory / "metrics.jsonl", metrics)
    write_lines(directory / "events.jsonl", events)
    samples = [
        {"stage": stage, "step": s, "prompt": "The sea was", "text": f" {text} at step {s}, grey and wide."}
        for s in (0, steps // 2, steps)
    ]
    samples.append({"stage": stage, "step": steps, "prompt": "3 + 4 =", "text": " 7" if stage == "rl" else " 12"})
    write_lines(directory / "samples.jsonl", samples)
    (directory / "run.toml").write_text(
        f'name = "demo"\n\n[model]\nvocab_size = 4096\nnum_layers = {layers + 1}\nnum_dense_layers = 1\ndim = 128\nnum_heads = 4\nnum_kv_heads = 2\nhead_dim = 32\nffn_dim = 384\n'
        f"expert_dim = 96\nnum_experts = {experts}\nexperts_per_token = 2\nwindow = 128\n\n[optim]\nmuon_lr = 0.02\nadamw_lr = 0.004\n", encoding="utf-8")  # fmt: skip
    return directory


def make_pipeline(directory: Path, *, steps: int = 240, **options: Any) -> Path:
    """A pipeline directory with all four stages and a summary."""
    for i, stage in enumerate(("pretrain", "extend", "sft", "rl")):
        make_stage(directory / stage, stage, steps=max(20, steps // (i + 1)), rollback=stage == "pretrain", **options)
    (directory / "summary.json").write_text(json.dumps({"seconds": 251.0, "num_params": 3_000_000}), encoding="utf-8")
    return directory
