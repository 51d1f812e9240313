"""Train variants of a small model with several seeds, side by side on one device, and compare them.

    python bench/experiment.py bench/packing.toml --shards DIR --tokenizer DIR --out DIR --seeds 3 --parallel 3

Every run is `trinity pretrain` in a process of its own; a variant is a list of settings. Results are the mean over
seeds with a 95 % interval of Student's t, and the paired difference (same seed) to the baseline. What is finished when
`--minutes` are over is reported; the rest is named.
"""

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from trinity.base.files import read_jsonl, write_json

OVERLAY = Path(__file__).with_name("small.toml")
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--variants", nargs="*", help="only these")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every run")
    options = parser.parse_args()
    experiment = tomllib.loads(options.experiment.read_text(encoding="utf-8"))
    variants = {k: v for k, v in experiment["variants"].items() if not options.variants or k in options.variants}
    # Seed by seed, so that what is done when time is up is complete seeds.
    jobs = [(name, seed) for seed in range(options.seeds) for name in variants]
    left = run_all(jobs, variants, options)
    found = {
        name: [measure(options.out / f"{name}-{seed}") for seed in range(options.seeds) if (name, seed) not in left]
        for name in variants
    }
    result = {
        "experiment": options.experiment.stem,
        "settings": options.set,
        "runs": found,
        "comparison": compare(found, experiment["baseline"], experiment["metrics"]),
        "not_run": [f"{name}-{seed}" for name, seed in left],
    }
    write_json(options.out / f"{options.experiment.stem}.json", result)
    print_table(result["comparison"], experiment["metrics"])
    print("not run:", ", ".join(result["not_run"]) or "nothing")


def run_all(jobs: list[tuple[str, int]], variants: dict[str, list[str]], options: argparse.Namespace) -> list[Any]:
    """Run the jobs, `--parallel` at a time; returns those that failed or had no time."""
    deadline = time.monotonic() + options.minutes * 60
    waiting, running, left = list(jobs), {}, []
    threads = str(max(1, (os.cpu_count() or 1) // options.parallel - 1))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
    while waiting or running:
        while waiting and len(running) < options.parallel and time.monotonic() < deadline:
            name, seed = waiting.pop(0)
            command = [
                *(sys.executable, "-m", "trinity", "--debug", "pretrain", "demo", "--overlay", str(OVERLAY)),
                *(f"data.shards={options.shards}", f"data.tokenizer={options.tokenizer}", f"runtime.seed={seed}"),
                *(*variants[name], *options.set, "--run-dir", str(options.out / f"{name}-{seed}")),
            ]
            options.out.mkdir(parents=True, exist_ok=True)
            log = (options.out / f"{name}-{seed}.log").open("w")
            running[name, seed] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        time.sleep(0.5)
        for job, process in list(running.items()):
            if process.poll() is None and time.monotonic() > deadline:
                process.kill()
                process.wait()
            if process.poll() is not None:
                del running[job]
                print(f"{job[0]}-{job[1]}: exit status {process.returncode}", flush=True)
                if process.returncode:
                    left.append(job)
                    print((options.out / f"{job[0]}-{job[1]}.log").read_text()[-1500:], flush=True)
        if time.monotonic() > deadline:
            left += waiting
            waiting = []
    return left


def measure(run: Path) -> dict[str, Any]:
    """The figures of one run: means over its last two thirds of steps where not said otherwise."""
    records = read_jsonl(run / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    late, last = steps[len(steps) // 3 :], steps[-max(1, len(steps) // 3) :]
    losses = [r["ce"] for r in late if r["ce"] is not None]
    jumps = [b - a for a, b in itertools.pairwise(losses)]
    return {
        "batch_het": statistics.fmean(r["batch_het"] for r in late if r["batch_het"] is not None),
        # Of independent noise around a slow trend, half the variance of the differences is the variance.
        "loss_variance": statistics.pvariance(jumps) / 2 if len(jumps) > 1 else math.nan,
        "final_loss": [r["loss"] for r in records if r["kind"] == "eval"][-1],
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in late if r.get("tokens_per_second")),
        "max_vio": statistics.fmean(r["max_vio"] for r in late),
        "max_vio_last": statistics.fmean(r["max_vio"] for r in last),
        # How much the norm of each layer's biases moves around its own trend, step to step, in the last third.
        "bias_oscillation": oscillation([r["bias_norm"] for r in last]),
        "dead_experts": max(sum(r["dead_experts"]) for r in last),
        "spikes": steps[-1]["spikes"],
        "curve": [[r["step"], r["ce"], r["max_vio"]] for r in steps[:: max(1, len(steps) // 60)]],
        "eval": [r for r in records if r["kind"] == "eval"][-1],
    }


def oscillation(norms: list[list[float]]) -> float:
    """Mean over layers of the standard deviation of a bias norm after its straight line is taken off."""
    if len(norms) < 3:
        return math.nan
    found = []
    for layer in zip(*norms, strict=True):
        slope, start = statistics.linear_regression(range(len(layer)), layer)
        found.append(statistics.pstdev(y - (start + slope * x) for x, y in enumerate(layer)))
    return statistics.fmean(found)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    return statistics.fmean(values), T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def compare(found: dict[str, list[dict[str, Any]]], baseline: str, metrics: list[str]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, runs in found.items():
        table[name] = {}
        for metric in metrics:
            values = [run[metric] for run in runs]
            pairs = [a[metric] - b[metric] for a, b in zip(runs, found.get(baseline, []), strict=False)]
            mean, half = interval(values)
            difference, uncertainty = interval(pairs) if name != baseline else (0.0, 0.0)
            table[name][metric] = {"mean": mean, "ci95": half, "difference": difference, "difference_ci95": uncertainty}
    return table


def print_table(table: dict[str, Any], metrics: list[str]) -> None:
    print(f"{'variant':16}" + "".join(f"{metric:>28}" for metric in metrics))
    for name, row in table.items():
        cells = (f"{row[m]['mean']:.5g} +- {row[m]['ci95']:.2g} ({row[m]['difference']:+.2g})" for m in metrics)
        print(f"{name:16}" + "".join(f"{cell:>28}" for cell in cells))


if __name__ == "__main__":
    main()
