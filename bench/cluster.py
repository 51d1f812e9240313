"""What sharding costs where it brings nothing: FSDP with a world of one against no FSDP, on one device.

    python bench/cluster.py --out DIR [--parts small nano]

Both models are in memory one after the other, in pairs that alternate, so that a warming GPU favours neither. `small`
is a 1.25 B variant (12 layers of width 1024, 64 experts of 512), `nano` Trinity Nano at full shape with a small batch.
"""

import argparse
import gc
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from sharded_step import Subject, measure, settings_of_batch
from trinity.base.files import write_json
from trinity.config import RunConfig, resolve

SMALL = (
    "model.num_layers=12",
    "model.num_dense_layers=1",
    "model.num_experts=64",
    "model.expert_dim=512",
    "model.vocab_size=32768",
)
TOY = (
    "model={vocab_size=128, num_layers=3, num_dense_layers=1, dim=32, num_heads=2, num_kv_heads=1, head_dim=16,"
    " ffn_dim=64, expert_dim=16, num_experts=8, experts_per_token=2, window=32, max_positions=256}",
    "runtime.dtype=float32",
)


def settings(part: str, *, toy: bool, masters: bool) -> RunConfig:
    if toy:
        return resolve("nano", overrides=[*TOY, *settings_of_batch(4, 2, 64)])[0]
    batch = settings_of_batch(16, 8, 2048) if part == "small" else settings_of_batch(4, 1, 4096)
    shape = SMALL if part == "small" else ()
    # Recorded micro-batches exist without FSDP only: this asks what FSDP itself costs.
    runtime = ("runtime.cuda_graphs=false", f"runtime.master_weights={str(masters).lower()}")
    return resolve("nano", overrides=[*shape, *batch, *runtime])[0]


def compare(config: RunConfig, device: torch.device, pairs: int, steps: int) -> dict[str, Any]:
    """Medians over pairs of runs of either kind, and what FSDP costs in per cent of a step."""
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "fsdp": []}
    for pair in range(pairs):
        for kind in ("plain", "fsdp") if pair % 2 == 0 else ("fsdp", "plain"):
            subject = Subject(config, device, sharded=kind == "fsdp")
            found[kind].append(measure(subject, warmup=3, steps=steps, profiled=False))
            del subject
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print(kind, {k: v for k, v in found[kind][-1].items() if not isinstance(v, list)}, flush=True)
    medians = {kind: statistics.median(run["step_seconds"] for run in runs) for kind, runs in found.items()}
    cost = 100 * (medians["fsdp"] / medians["plain"] - 1)
    return {"step_seconds": medians, "cost_percent": cost, "runs": found, "parameters": config.model.num_params()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=("small", "nano"), default=["small", "nano"])
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, to test this script")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu") if options.toy else torch.device("cuda", 0)
    gib = 0.0 if options.toy else torch.cuda.get_device_properties(0).total_memory / 2**30
    head: dict[str, Any] = {
        "device": "cpu" if options.toy else torch.cuda.get_device_name(0),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        store = torch_dist.FileStore(f"{folder}/store", 1)
        torch_dist.init_process_group(
            "gloo" if options.toy else "cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1
        )
        try:
            for part in options.parts:
                masters = part == "small" or gib >= 120  # 80 GiB of state with masters, 37 without
                config = settings(part, toy=options.toy, masters=masters)
                head[part] = {"masters": masters, **compare(config, device, options.pairs, options.steps)}
                write_json(options.out / "cluster.json", head)
                print(f"{part}: FSDP with a world of one costs {head[part]['cost_percent']:.2f} %", flush=True)
        finally:
            torch_dist.destroy_process_group()


if __name__ == "__main__":
    main()
