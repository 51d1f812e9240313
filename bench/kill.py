"""Kill a pretraining run at random moments and compare where it ends with a run that nobody disturbed.

    python bench/kill.py --shards DIR --tokenizer DIR --out DIR --kills 20 [key=value ...]

Every kill is a SIGKILL of the whole process group; the same command is then given again. At the end the exported
weights and the recorded losses must equal those of the undisturbed run bit for bit, and every checkpoint must verify.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from trinity.base.files import read_jsonl

SETTINGS = (
    "checkpoint.every_steps=5",
    "pretrain.eval_every=1000",
    'pretrain.phases=[{name="a",tokens=40000,weights={prose=1,code=1}},{name="b",tokens=40000,weights={math=1,prose=1}}]',
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    calm, killed = options.out / "calm", options.out / "killed"
    for folder in (calm, killed):
        shutil.rmtree(folder, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "trinity", "pretrain", "demo", *SETTINGS, *options.settings),
        *(f"data.shards={options.shards}", f"data.tokenizer={options.tokenizer}", "--run-dir"),
    ]
    started = time.perf_counter()
    subprocess.run([*command, str(calm)], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    rng, kills, starts = random.Random(options.seed), 0, 0
    while True:
        starts += 1
        process = subprocess.Popen(
            [*command, str(killed)], start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        # From the first moment of the process to a few seconds into training; the last start is left alone.
        limit = rng.uniform(0.2, max(4.0, 0.4 * seconds)) if kills < options.kills else None
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            check = subprocess.run(
                [sys.executable, "-m", "trinity", "checkpoints", "verify", str(killed)], capture_output=True, text=True
            )
            whole = check.returncode == 0 or not any(killed.glob("checkpoints/step-*"))
            print(f"kill {kills} after {limit:.1f} s: {'whole' if whole else check.stderr.strip()}", flush=True)
            if not whole:
                return 1
            continue
        assert status == 0, f"the run failed with exit status {status}"
        if kills >= options.kills:
            break
        shutil.rmtree(killed)  # done before the kill came: begin again
    losses = [
        [(r["step"], r["loss"]) for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "step"]
        for run in (calm, killed)
    ]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (calm, killed)]
    print(f"{kills} kills, {starts} starts; {len(losses[0])} steps")
    print(f"losses equal: {losses[0] == losses[1]}; weights equal: {weights[0] == weights[1]}")
    return 0 if losses[0] == losses[1] and weights[0] == weights[1] else 1


if __name__ == "__main__":
    sys.exit(main())
