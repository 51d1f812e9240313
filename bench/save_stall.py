"""How long saving holds training up: the same run with checkpoints every few steps, on a CPU or a GPU.

    python bench/save_stall.py --shards DIR --tokenizer DIR --out DIR [--every 20] [--steps 220] [--set key=value ...]
    ... --preset demo --overlay bench/small.toml     # 328 M parameters on a GPU, 10 saves

Saving is asynchronous, as by default: the state is copied beside the next step (on a CPU: before it) and written
behind the steps that follow, which may be slower for it. A step is quiet when no save touches it. What a save costs is
the time from it to the next one less as many quiet steps: the stall, the slowdown of what runs beside it, and waiting
where a save is not done when the next is due. Reported are that cost of each save, its mean and 95 % interval, and its
share of a run's time at the interval of this run and at that of `--interval` steps: cost / (quiet step x
interval + cost). `--synchronous` shows what it would be without a thread. The saves before the first and after the
last step, and the export at the end, are left out.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import measures
from start import device_name
from trinity.base.files import write_json
from trinity.config import resolve
from trinity.data.shards import Shards
from trinity.stages import finish, pretrain
from trinity.train import loop, run_checkpoints
from trinity.train.checkpoint import Snapshot
from trinity.train.writer import CheckpointWriter

WARM_UP = 3
"""Steps that compile and fill caches."""


class TimedWriter(CheckpointWriter):
    """The writer of the loop, which tells whether it is at work."""

    at_work = False

    def _save(self, snapshot: Snapshot) -> None:
        TimedWriter.at_work = True
        try:
            super()._save(snapshot)
        finally:
            TimedWriter.at_work = False


class Watch:
    """Step times from the console's callbacks: from one record to the next, a save in between included."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.saves: list[dict[str, Any]] = []
        self.before = (time.perf_counter(), True)

    def on_step(self, record: dict[str, Any]) -> None:
        now, busy = time.perf_counter(), TimedWriter.at_work
        self.steps.append({"step": record["step"], "seconds": now - self.before[0], "beside": busy or self.before[1]})
        self.before = (now, busy)

    def on_event(self, record: dict[str, Any]) -> None:
        if record["event"] == "checkpoint":
            self.saves.append({"step": record["step"], "bytes": record["bytes"]})

    def on_metric(self, record: dict[str, Any]) -> None: ...


def main() -> int:
    options = _parse()
    names = Shards.open(options.shards / "train").domains
    shares = ", ".join(f'"{name}" = 1.0' for name in names)
    head = [f"data.shards={options.shards}", f"data.tokenizer={options.tokenizer}"]
    config, _ = resolve(options.preset, options.overlay, [*head, *options.set])
    tokens = options.steps * config.pretrain.batch[0].rows * config.pretrain.seq_len
    saving = [
        "checkpoint.enabled=true",
        f"checkpoint.every_steps={options.every}",
        f"checkpoint.asynchronous={'false' if options.synchronous else 'true'}",
        f'pretrain.phases=[{{ name = "real text", tokens = {tokens}, weights = {{ {shares} }} }}]',
        "pretrain.eval_every=1000000",
    ]
    config, _ = resolve(options.preset, options.overlay, [*head, *options.set, *saving])
    watch, stalls = Watch(), list[dict[str, Any]]()
    save = loop._Loop._save

    def timed(self: Any, *, wait: bool) -> None:
        began = time.perf_counter()
        save(self, wait=wait)
        stalls.append({"step": self.step, "seconds": time.perf_counter() - began})

    loop._Loop._save, run_checkpoints.CheckpointWriter = timed, TimedWriter
    pretrain.beginnings = lambda _shards, _most=0: []  # no samples
    finish.export_afmoe = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
    pretrain.run(config, options.out / "run", progress=watch)
    found = summary(watch, stalls, options.steps, options.every, options.interval)
    result = {"device": device_name(), "synchronous": options.synchronous, "every": options.every, **found}
    write_json(options.out / "save_stall.json", result)
    print({key: value for key, value in result.items() if not isinstance(value, list)})
    return 0


def summary(watch: Watch, stalls: list[dict[str, Any]], steps: int, every: int, interval: int) -> dict[str, Any]:
    """Stall, cost of each save, and shares."""
    inside = [s for s in stalls if 0 < s["step"] <= steps - every]  # those with a whole interval behind them
    if not inside:
        raise SystemExit(f"no save has {every} steps behind it: raise --steps to at least {2 * every}")
    later = [s for s in watch.steps if s["step"] > WARM_UP]
    after = {s["step"] + 1 for s in stalls}
    still = [s["seconds"] for s in later if not s["beside"] and s["step"] not in after]
    if not still:
        raise SystemExit("every step runs beside a save: raise --every, or name a faster disk with --out")
    quiet = statistics.median(still)
    seconds = {s["step"]: s["seconds"] for s in watch.steps}
    costs = [sum(seconds[s["step"] + 1 + i] for i in range(every)) - every * quiet for s in inside]
    mean, half = measures.interval(costs[: measures.MAX_SEEDS])
    assert mean is not None
    return {
        "saves": len(inside),
        "gib": max(s["bytes"] for s in watch.saves) / 2**30,
        "quiet_steps": len(still),
        "quiet_step_seconds": quiet,
        "quiet_step_deviation": statistics.pstdev(still),
        "stall_seconds_median": statistics.median(s["seconds"] for s in inside),
        "stall_seconds_largest": max(s["seconds"] for s in inside),
        "cost_seconds": mean,
        "cost_seconds_ci95": half,
        "costs": costs,
        "share_here": mean / (every * quiet + mean),
        f"share_at_{interval}_steps": mean / (interval * quiet + mean),
        f"share_at_{interval}_steps_ci95": None if half is None else half / (interval * quiet),
        "steps": watch.steps,
        "stalls": stalls,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--overlay", type=Path, action="append", default=[])
    parser.add_argument("--every", type=int, default=20, help="steps between saves in this run")
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--interval", type=int, default=500, help="steps between saves to reckon with")
    parser.add_argument("--synchronous", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
