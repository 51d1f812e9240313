"""How long saving holds training up: the same run with checkpoints every few steps, on a CPU or a GPU.

    python bench/save_stall.py --shards DIR --tokenizer DIR --out DIR [--every 20] [--steps 100] [--set key=value ...]

Saving is asynchronous, as by default: the state is copied (the stall), then written behind the next steps, which may be
slower for it. A step is quiet when nothing is written during it. Reported are the stall of a save, the slowdown of the
steps beside one, and the share of the run's time that both take, at the interval of this run and at that of
`--interval` steps, over which they are spread: share = lost time of a save / (quiet step x interval + lost time).
`--synchronous` shows what it would be without a thread.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from start import device_name
from trinity.base.files import write_json
from trinity.config import resolve
from trinity.data.shards import Shards
from trinity.stages import pretrain
from trinity.train import loop, run_checkpoints
from trinity.train.checkpoint import Snapshot
from trinity.train.writer import CheckpointWriter


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
    pretrain.run(config, options.out / "run", progress=watch)
    found = summary(watch, stalls, options.steps, options.interval)
    result = {"device": device_name(), "synchronous": options.synchronous, "every": options.every, **found}
    write_json(options.out / "save_stall.json", result)
    print({key: value for key, value in result.items() if not isinstance(value, list)})
    return 0


def summary(watch: Watch, stalls: list[dict[str, Any]], steps: int, interval: int) -> dict[str, Any]:
    """Stall, slowdown and shares; the saves before the first and after the last step do not count."""
    inside = [s["seconds"] for s in stalls if 0 < s["step"] < steps]
    later = [s for s in watch.steps if s["step"] > 3]  # the first compile and fill caches
    after = {s["step"] + 1 for s in stalls}
    quiet = statistics.median(s["seconds"] for s in later if not s["beside"] and s["step"] not in after)
    lost = sum(s["seconds"] - quiet for s in later if s["beside"] or s["step"] in after)
    per_save = lost / len(inside)
    return {
        "saves": len(inside),
        "gib": max(s["bytes"] for s in watch.saves) / 2**30,
        "quiet_step_seconds": quiet,
        "stall_seconds_median": statistics.median(inside),
        "stall_seconds_largest": max(inside),
        "lost_seconds_per_save": per_save,
        "share_here": lost / sum(s["seconds"] for s in later),
        f"share_at_{interval}_steps": per_save / (interval * quiet + per_save),
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
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--interval", type=int, default=500, help="steps between saves to reckon with")
    parser.add_argument("--synchronous", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
