"""Where the speed work starts: full training steps of Trinity Nano at full shape (6.1 B parameters) on one GPU.

    python bench/start.py --shards DIR --tokenizer DIR --out DIR

It is `trinity pretrain nano` on real rows with documents: the real loader, compiled blocks, Muon and AdamW, the guard.
Only the batch and the number of steps are small, and nothing is saved (`checkpoint.enabled=false`: 60 GB of state and
12 GB of weights; the guard then has nothing to roll back to). Learning rates are the preset's with a warm-up of ten
steps.

Memory of parameters, gradients and optimizer state: with float32 masters (`--weights masters`) 4 + 2 + 4 + 4 bytes a
parameter, 80 GiB, and AdamW's second moments of embedding and head, 1.5 GiB; with weights in bfloat16 alone (`--weights
plain`) 2 + 2 + 2, 34 GiB, and gradients that are added in bfloat16. `auto` takes masters where the GPU has 120 GiB or
more, and says so.
"""

import argparse
import math
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from trinity.base.files import write_json
from trinity.config import resolve
from trinity.data.shards import Shards
from trinity.stages import pretrain

MASTERS_GIB = 120.0
LAST = 10
"""Steps at the end whose median is reported."""


class Watch:
    """Prints every step and keeps OUT/start.json up to date."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.started = time.perf_counter()
        self.steps: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}

    def on_step(self, record: dict[str, Any]) -> None:
        kept = ("step", "tokens", "loss", "grad_norm", "max_vio", "seconds", "tokens_per_second", "mfu", "skipped")
        values = {key: record.get(key) for key in kept}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.steps.append(finite | peak_memory())
        write_json(self.path, self.result())
        print(
            f"[{self.seconds():4.0f} s] step {record['step']:3}  loss {record['loss']:.4f}  {record['seconds']:.3f} s  "
            f"{record['tokens_per_second']:,.0f} tokens/s  MFU {record['mfu']:.1%}",
            flush=True,
        )

    def on_event(self, record: dict[str, Any]) -> None:
        if record["event"] == "start":
            self.about = record
        print(f"[{self.seconds():4.0f} s] {record}", flush=True)

    def on_metric(self, record: dict[str, Any]) -> None:
        print(f"[{self.seconds():4.0f} s] {record['kind']}: loss {record.get('loss')}", flush=True)

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def result(self) -> dict[str, Any]:
        last = self.steps[-LAST:]
        return {
            **self.head,
            "start": self.about,
            "steps_done": len(self.steps),
            f"tokens_per_second_median_of_last_{LAST}": statistics.median(s["tokens_per_second"] for s in last),
            "mfu_median": statistics.median(s["mfu"] for s in last),
            **peak_memory(),
            "steps": self.steps,
        }


def main() -> int:
    options = _parse()
    if (options.out / "run").exists():
        raise SystemExit(f"{options.out / 'run'} exists already: choose another --out")
    weights = options.weights
    if weights == "auto":
        weights = "masters" if device_gib() >= MASTERS_GIB else "plain"
    print(f"device {device_name()}, {device_gib():.0f} GiB; weights: {weights}", flush=True)
    tokens = options.steps * options.rows * options.seq_len
    names = Shards.open(options.shards / "train").domains
    shares = ", ".join(f'"{name}" = 1.0' for name in names)
    overrides = [
        f"data.shards={options.shards}",
        f"data.tokenizer={options.tokenizer}",
        f"data.streams={options.rows}",
        "checkpoint.enabled=false",
        f"runtime.master_weights={'true' if weights == 'masters' else 'false'}",
        f"pretrain.seq_len={options.seq_len}",
        f"pretrain.micro_rows={options.micro_rows}",
        f"pretrain.batch=[{{ from_tokens = 0, rows = {options.rows} }}]",
        f'pretrain.phases=[{{ name = "real text", tokens = {tokens}, weights = {{ {shares} }} }}]',
        "pretrain.warmup_steps=10",
        "pretrain.eval_every=1000000",
        "pretrain.eval_rows=1",
        *options.set,
    ]
    config, _ = resolve("nano", options.overlay, overrides)
    head = {
        "device": device_name(),
        "torch": torch.__version__,
        "weights": weights,
        "overrides": overrides,
        "parameters": config.model.num_params(),
        "active_parameters": config.model.num_active_params(),
    }
    watch = Watch(options.out / "start.json", head)
    # The loop ends after the step in which the signal comes; before the loop the signal ends the process.
    timer = threading.Timer(options.minutes * 60, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        result = pretrain.run(config, options.out / "run", progress=watch)
    finally:
        timer.cancel()
        if watch.steps:
            write_json(watch.path, watch.result())
    found = watch.result()
    print(
        f"{result.train.reason}: {found[f'tokens_per_second_median_of_last_{LAST}']:,.0f} tokens/s, "
        f"MFU {found['mfu_median']:.1%} (medians of the last {LAST} steps), peak memory {peak_memory()}",
        flush=True,
    )
    return 0 if result.train.finished else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--micro-rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--weights", choices=("auto", "masters", "plain"), default="auto")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--overlay", type=Path, action="append", default=[])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def device_gib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def peak_memory() -> dict[str, float]:
    """Most GPU memory so far in GiB: in tensors, and reserved by the allocator."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
