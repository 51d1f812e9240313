"""Context extension of a small model: pretrain at short rows, extend at long ones, find needles at and beyond them.

    python bench/extension.py --shards DIR --tokenizer DIR --out DIR [--variants 3to1 full nope] [--lengths 16384 32768]

For each variant of the attention a model is pretrained once, then extended at each of `--lengths`, and each result is
asked for needles at the target length and at twice that, whatever it was trained at. Parts:

- pretrain: at short rows, a share of them retrieval documents (`trinity pretrain`).
- extend: straight to the long rows (`trinity extend`), MK-NIAH every so often; ends early when `--stop-at` is reached.
- evaluate: more needles of every task, bits per byte by position.
- long: random weights of the published Nano at 131 072 tokens: reading the prompt and answering, with one reading for
  several questions.

Variants: 3to1, the model as it is; full, every layer sees all tokens and three of four keep RoPE; nope, no layer has
positions and every one sees all. OUT/extension.json is written anew after every part. Runs are ordinary run directories
in OUT: the same command goes on where the last one was stopped, by --minutes or by a signal.
"""

import argparse
import gc
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # many short texts, one after the other

import torch

from extbench.long import measure_long
from extbench.results import figures, format_results
from extbench.shapes import SHAPES, VARIANTS, run_config
from trinity.base.files import read_json, write_json
from trinity.config import RunConfig
from trinity.data.halves import Half
from trinity.data.shards import Shards
from trinity.evals import run_suite
from trinity.infer.load import load
from trinity.report import write_report
from trinity.stages import extend, pretrain
from trinity.stages.evaluations import haystack

PARTS = ("pretrain", "extend", "evaluate", "long")


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    result_file = options.out / "extension.json"
    results: dict[str, Any] = read_json(result_file) if result_file.exists() else {}
    results.setdefault("calls", []).append({"arguments": {k: str(v) for k, v in vars(options).items()}, **machine()})
    timer = threading.Timer(options.minutes * 60, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        finished = run_parts(options, results, lambda: write_json(result_file, results))
    finally:
        timer.cancel()
        write_json(result_file, results)
    print(format_results(results), flush=True)
    print("all parts are done" if finished else "stopped; the same command goes on", flush=True)
    return 0 if finished else 3


def run_parts(options: argparse.Namespace, results: dict[str, Any], keep: Any) -> bool:
    """Do what is not done yet; False when time was up."""
    if "long" in options.parts and "long" not in results:
        results["long"] = measure_long(options)
        keep()
    for variant in options.variants:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            base = options.out / f"{variant}-{seed}"
            config = run_config(options, variant, seed, options.lengths[0], first=True)
            done = results.setdefault("runs", {}).setdefault(f"{variant}/{seed}", {})
            if "pretrain" in options.parts and "pretrain" not in done:
                started = begin()
                if not pretrain.run(config, base).train.finished:
                    return False
                done["pretrain"] = {**figures(base, config, time.perf_counter() - started), **memory()}
                keep()
            for length in options.lengths:
                if not _extend_and_evaluate(options, variant, seed, length, done, keep):
                    return False
    return True


def _extend_and_evaluate(
    options: argparse.Namespace, variant: str, seed: int, length: int, done: dict[str, Any], keep: Any
) -> bool:
    base = options.out / f"{variant}-{seed}"
    config = run_config(options, variant, seed, length)
    run = options.out / f"{base.name}-{length}"
    if "extend" in options.parts and f"extend-{length}" not in done:
        started = begin()
        if not extend.run(config, run, start_from=base).train.finished:
            return False
        done[f"extend-{length}"] = {**figures(run, config, time.perf_counter() - started), **memory()}
        shutil.copy(write_report(run), options.out / f"{run.name}.html")
        keep()
    if "evaluate" in options.parts:
        for name, folder in ((f"evaluate-{length}", run), ("evaluate-base", base)):
            if name not in done and (folder / "model").exists():
                done[name] = evaluate(config, folder)
                keep()
    return True


def evaluate(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Bits per byte by position, many MK-NIAH questions and some of every other task, of the model a run ended with."""
    model, tokenizer = load(folder, device=config.runtime.device, dtype=config.runtime.dtype)
    shards = Shards.open(Path(config.data.shards) / "val")
    hay = haystack(shards, tokenizer, Half.EVALUATION)
    started = time.perf_counter()
    many = config.eval.model_copy(update={"niah_samples": 5 * config.eval.niah_samples})
    few = config.eval.model_copy(
        update={"niah_tasks": ("single", "multivalue", "multiquery", "tracking"), "niah_depths": 3}
    )
    shared: dict[str, Any] = {"shards": shards, "rows_per_domain": 64, "haystack": hay, "seed": 1}
    found: dict[str, Any] = run_suite(model, tokenizer, many, names=["positions", "niah"], **shared)
    found["other_tasks"] = run_suite(model, tokenizer, few, names=["niah"], **shared)["niah"]
    return {**found, "haystack": hay.kind, "seconds": round(time.perf_counter() - started, 1)}


def begin() -> float:
    """The time; what an earlier part left on the device is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def memory() -> dict[str, float | None]:
    cuda = torch.cuda.is_available()
    return {"peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else None}


def machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=["3to1"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["pretrain", "extend", "evaluate"])
    parser.add_argument("--target", type=int, default=0, help="length to reach; needles stand at it and at twice it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="rows to extend at; by default the target")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--pretrain-tokens", type=int, default=0, help="0: the shape's")
    parser.add_argument("--extend-tokens", type=int, default=0, help="0: the shape's")
    parser.add_argument("--stop-at", type=float, default=1.0, help="MK-NIAH at the rows' length that ends an extension")
    parser.add_argument("--long-length", type=int, default=131_072, help="of the part `long`")
    parser.add_argument("--long-shape", default="nano", help="preset of the part `long`")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole call")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every run")
    options = parser.parse_args()
    options.target = options.target or SHAPES[options.shape].target
    options.lengths = options.lengths or [options.target]
    if set(options.parts) != {"long"} and not (options.shards and options.tokenizer):
        parser.error("--shards and --tokenizer are needed for every part but long")
    return options


if __name__ == "__main__":
    sys.exit(main())
