"""Training speed on one device: this code in several variants, transformers and torchtitan, same shapes, same run.

    python bench/train.py --shape nano --out nano.json --shards DIR --tokenizer DIR --torchtitan DIR

Each job is a process of its own, so that one failure, or one that runs out of memory, does not lose the others. Jobs:

- limits: the device's matrix products (bfloat16, 8192 wide, and grouped as the experts') and its copies.
- check: each variant's loss and gradients against the reference path, on the same weights and rows, with --check-layers
  layers of the shape. The yardstick is the reference path in bfloat16 against the reference path in float32.
- VARIANT (see `trainbench/shapes.py`): full training steps (data, forward, backward, clip, Muon and AdamW, balancing)
  through `trinity.train.step`, then forward and backward alone, the optimizer alone, and a profile by part.
- transformers, torchtitan: forward and backward alone. torchtitan is not installed: --torchtitan names a directory that
  holds the unpacked wheel of 0.2.2. Its model is the Qwen3 MoE at the same sizes, all layers sparse, full attention.

MFU counts `ModelConfig.flops_per_token` (no recomputation, rows without document borders) against the measured matrix
products. Nothing is overwritten: --out must not exist.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainbench.shapes import SHAPES, VARIANTS
from trainbench.table import format_results
from trinity.base.files import write_json

BENCH = Path(__file__).parent
PEERS = ("transformers", "torchtitan")


def main() -> int:
    options = parse()
    if options.child:
        return child(options)
    if options.out.exists():
        raise SystemExit(f"{options.out} exists already: choose another --out")
    deadline = time.monotonic() + options.minutes * 60
    results: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(options).items()}, "jobs": {}}
    jobs = options.jobs
    if not options.torchtitan and "torchtitan" in jobs:
        jobs = [job for job in jobs if job != "torchtitan"]
        results["jobs"]["torchtitan"] = {"error": "not run: --torchtitan DIR is not given"}
    for job in jobs:
        left = deadline - time.monotonic()
        if left < options.least_seconds:
            results["jobs"][job] = {"error": f"not run: {left:.0f} s were left of --minutes {options.minutes:g}"}
        else:
            print(f"== {job} ({left:.0f} s left)", flush=True)
            results["jobs"][job] = run_job(job, min(left, options.job_seconds), options.out)
        write_json(options.out, results)
    print(format_results(results["jobs"]), flush=True)
    return 1 if any("error" in r or r.get("passed") is False for r in results["jobs"].values()) else 0


def run_job(job: str, seconds: float, out: Path) -> dict[str, Any]:
    """The job's result, or what went wrong; a job past its time is ended, and what it had written is kept."""
    result = out.with_name(f"{out.stem}.{job}.part")
    result.unlink(missing_ok=True)
    log = out.with_name(f"{out.stem}.{job}.log")
    command = [sys.executable, __file__, *sys.argv[1:], "--child", job, "--result", str(result)]
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | {"TOKENIZERS_PARALLELISM": "0"}
    started = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    result.unlink(missing_ok=True)
    lines = log.read_text(errors="replace").splitlines()
    if status is None:
        found["error"] = f"ended after {seconds:.0f} s"
    elif status != 0:
        last = next((line for line in reversed(lines) if line.strip()), "")
        found["error"] = f"exit status {status}: {last[:300]}"
    for line in lines[-30 if "error" in found else -3 :]:
        print(f"   | {line[:240]}", flush=True)
    return {**found, "job_seconds": round(time.monotonic() - started, 1)}


def child(options: argparse.Namespace) -> int:
    """One job, in this process; its result so far is written after each part."""
    result: dict[str, Any] = {}

    def keep(part: dict[str, Any]) -> None:
        result.update(part)
        write_json(options.result, result)
        print(json.dumps(part)[:2000], flush=True)

    if options.child == "limits":
        from trainbench.limits import measure_limits

        measure_limits(options, keep)
    elif options.child == "check":
        from trainbench.check import check_variants

        check_variants(options, keep)
    elif options.child in PEERS:
        from trainbench import peers

        peers.measure(options.child, options, keep)
    else:
        from trainbench.ours import measure_variant

        measure_variant(options.child, options, keep)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="nano")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; logs of the jobs lie beside it")
    parser.add_argument("--jobs", nargs="+", default=["limits", "check", *VARIANTS, *PEERS])
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole call")
    parser.add_argument("--job-seconds", type=float, default=200, help="at most, of one job")
    parser.add_argument("--least-seconds", type=float, default=20, help="a job is not started with less time left")
    parser.add_argument("--micro-rows", type=int, default=0, help="rows of a micro-batch; 0: the shape's")
    parser.add_argument("--peer-rows", type=int, default=0, help="the same for the peers")
    parser.add_argument("--seq-len", type=int, default=0)
    parser.add_argument("--layers", type=int, default=0, help="instead of the shape's number of layers")
    parser.add_argument("--step-tokens", type=int, default=0, help="tokens of an optimizer step")
    parser.add_argument("--steps", type=int, default=5, help="measured steps (after two that do not count)")
    parser.add_argument("--repeats", type=int, default=7, help="of forward and backward alone")
    parser.add_argument("--check-layers", type=int, default=5)
    parser.add_argument("--shards", type=Path, help="real rows instead of made-up documents")
    parser.add_argument("--whole-rows", action="store_true", help="made-up documents as long as the rows")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--torchtitan", type=Path, help="directory with the package torchtitan 0.2.2")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--weights", choices=("masters", "plain"), default="masters")
    parser.add_argument("--recompute", choices=("none", "selective", "block"), default="none")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the run")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [job for job in options.jobs if job not in ("limits", "check", *VARIANTS, *PEERS)]
    if unknown:
        parser.error(f"unknown job {unknown[0]}: use {', '.join(('limits', 'check', *VARIANTS, *PEERS))}")
    if bool(options.shards) != bool(options.tokenizer):
        parser.error("--shards and --tokenizer go together")
    return options


if __name__ == "__main__":
    sys.exit(main())
