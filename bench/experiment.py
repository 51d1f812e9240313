"""Train variants of a small model with several seeds, side by side on one or several GPUs, and compare them.

    python bench/experiment.py bench/packing.toml --shards DIR --tokenizer DIR --out DIR --seeds 3 --parallel 3

Every run is a pretraining in a process of its own (`bench/one_run.py`) with a run directory in `--out`; a variant is a
list of settings. Results are means over seeds with a 95 % interval of Student's t, and paired differences (same seed,
so same weights at the start) to a baseline. OUT/NAME.json is written anew after every run. When `--minutes` are over,
running processes are stopped; what they did is in the JSON under `unfinished` and in no mean. To go on in another
call, name the JSON with `--merge`: the runs in it are taken over and not done again.

The processes, also those of later calls, share what the compiler made (`--cache`). With `--warm-first` the first run
compiles alone; the others start when it has done a step, and find most of what they need.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measures import MAX_SEEDS, compare, format_table, measure
from trinity.base.files import read_json, read_jsonl, write_json

BENCH = Path(__file__).parent
LOG_TAIL = 3000
REPORT_SECONDS = 20.0


@dataclass
class Experiment:
    """What is to run, and what was found."""

    name: str
    variants: dict[str, list[str]]
    baselines: dict[str, str]
    metrics: list[str]
    settings: list[str]
    """Of every run, after the overlay and before the variant's own."""
    out: Path
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """variant -> seed -> figures, of finished runs."""
    failed: dict[str, str] = field(default_factory=dict)
    """Run -> the end of its log."""
    unfinished: dict[str, Any] = field(default_factory=dict)
    """Run -> its figures when time was up; None: not begun or a few steps."""

    def write(self) -> dict[str, Any]:
        """Write OUT/NAME.json; returns the comparison."""
        comparison = compare(self.runs, self.baselines, self.metrics)
        result = {
            "experiment": self.name,
            "settings": self.settings,
            "variants": self.variants,
            "comparison": comparison,
            "failed": self.failed,
            "unfinished": self.unfinished,
            "runs": self.runs,
        }
        write_json(self.out / f"{self.name}.json", result)
        return comparison


@dataclass
class Running:
    """A process and the run that it does."""

    variant: str
    seed: int
    folder: Path
    process: subprocess.Popen[bytes]
    gpu: int

    def stop(self) -> None:
        """Kill the process and its children, compilers of the GPU's code among them."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # it leads a session of its own
            self.process.wait()


def main() -> int:
    options = _parse()
    experiment = load(options)
    jobs = [
        (variant, seed)
        for seed in range(options.first_seed, options.first_seed + options.seeds)  # whole seeds come first
        for variant in experiment.variants
        if str(seed) not in experiment.runs.get(variant, {})
    ]
    experiment.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are stopped and the JSON written
    run_all(experiment, jobs, options)
    print(format_table(experiment.write()))
    print("failed:", ", ".join(experiment.failed) or "nothing")
    print("unfinished:", ", ".join(experiment.unfinished) or "nothing")
    return 1 if experiment.failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overlay", type=Path, default=BENCH / "small.toml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=3, help="processes at a time")
    parser.add_argument("--gpus", type=int, default=1, help="spread the processes over this many")
    parser.add_argument("--warm-first", action="store_true", help="the first run compiles before the others start")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "trinity-bench-compiled", help="of compiled code"
    )
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--variants", nargs="*", help="only these")
    parser.add_argument("--merge", nargs="*", type=Path, default=[], help="JSON files of earlier calls")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every run")
    options = parser.parse_args()
    if not 1 <= options.seeds <= MAX_SEEDS:
        parser.error(f"--seeds must be 1 to {MAX_SEEDS}")
    return options


def load(options: argparse.Namespace) -> Experiment:
    """The experiment file, with the runs of earlier calls."""
    content = tomllib.loads(options.experiment.read_text(encoding="utf-8"))
    variants = content["variants"]
    if unknown := set(options.variants or ()) - set(variants):
        raise SystemExit(f"{options.experiment} has no variants {sorted(unknown)}; it has {', '.join(variants)}")
    experiment = Experiment(
        name=options.experiment.stem,
        variants={name: settings for name, settings in variants.items() if name in (options.variants or variants)},
        baselines={name: content.get("baselines", {}).get(name, content["baseline"]) for name in variants},
        metrics=content["metrics"],
        settings=[*content.get("settings", []), *options.set],
        out=options.out,
    )
    for path in options.merge:
        earlier = read_json(path)
        for name, settings in (("settings", experiment.settings), ("experiment", experiment.name)):
            if earlier[name] != settings:
                raise SystemExit(f"{path} has {name} {earlier[name]}, this call {settings}: they cannot be merged")
        for variant, seeds in earlier["runs"].items():
            if earlier["variants"][variant] != variants.get(variant):
                raise SystemExit(f"{path} has other settings of variant {variant}: they cannot be merged")
            experiment.variants.setdefault(variant, variants[variant])
            experiment.runs.setdefault(variant, {}).update(seeds)
    return experiment


def run_all(experiment: Experiment, jobs: list[tuple[str, int]], options: argparse.Namespace) -> None:
    """Run the jobs, `--parallel` at a time, until they are done or time is up."""
    started = time.monotonic()
    deadline, reported = started + options.minutes * 60, started
    waiting, running = list(jobs), list[Running]()
    try:
        while (waiting or running) and time.monotonic() < deadline:
            begun = len(jobs) - len(waiting)
            cold = options.warm_first and begun <= 1 and not any(_steps(run.folder) for run in running)
            while waiting and len(running) < (1 if cold else options.parallel):
                gpu = min(range(options.gpus), key=lambda gpu: sum(r.gpu == gpu for r in running))
                running.append(start(experiment, *waiting.pop(0), gpu, options))
            time.sleep(0.25)
            for run in [r for r in running if r.process.poll() is not None]:
                running.remove(run)
                collect(experiment, run, time.monotonic() - started)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                steps = ", ".join(f"{r.folder.name} step {_steps(r.folder)}" for r in running)
                print(f"[{reported - started:4.0f} s] {steps}; {len(waiting)} waiting", flush=True)
    finally:
        for run in running:
            run.stop()
            experiment.unfinished[run.folder.name] = measure(run.folder)
        experiment.unfinished |= dict.fromkeys(f"{variant}-{seed}" for variant, seed in waiting)
        experiment.write()


def start(experiment: Experiment, variant: str, seed: int, gpu: int, options: argparse.Namespace) -> Running:
    folder = experiment.out / f"{variant}-{seed}"
    if folder.exists():
        raise SystemExit(f"{folder} exists already: choose another --out, or name the JSON in it with --merge")
    threads = str(max(1, (os.cpu_count() or 1) // options.parallel - 1))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.cache))
    environment.setdefault("TRITON_CACHE_DIR", str(options.cache / "triton"))
    environment.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does
    if options.gpus > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    command = [
        *(sys.executable, str(BENCH / "one_run.py"), "demo"),
        *(f"data.shards={options.shards}", f"data.tokenizer={options.tokenizer}", f"runtime.seed={seed}"),
        *(*experiment.settings, *experiment.variants[variant]),
        *("--overlay", str(options.overlay), "--run-dir", str(folder)),
    ]
    with _log(folder).open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    return Running(variant, seed, folder, process, gpu)


def collect(experiment: Experiment, run: Running, seconds: float) -> None:
    """Take in a process that ended, and write the JSON."""
    figures = measure(run.folder) if run.process.returncode == 0 else None
    if figures is not None:
        experiment.runs.setdefault(run.variant, {})[str(run.seed)] = figures
        shown = ", ".join(f"{name} {figures[name]}" for name in experiment.metrics)
        print(f"[{seconds:4.0f} s] {run.folder.name}: {shown}", flush=True)
    else:
        log = _log(run.folder).read_text(encoding="utf-8", errors="replace")
        tail = "\n".join(line for line in log.splitlines() if line and not line.startswith("frame #"))[-LOG_TAIL:]
        experiment.failed[run.folder.name] = tail
        experiment.unfinished[run.folder.name] = measure(run.folder)
        print(f"[{seconds:4.0f} s] {run.folder.name} failed, exit status {run.process.returncode}:\n{tail}", flush=True)
    experiment.write()


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _steps(folder: Path) -> int:
    return max((r["step"] for r in read_jsonl(folder / "metrics.jsonl")), default=0)


if __name__ == "__main__":
    sys.exit(main())
