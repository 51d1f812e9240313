"""Many GPUs of one host, unattended: first whether every layout trains as one GPU does, then how fast.

    python bench/multi_gpu.py --out DIR [--gpus 8] [--parts correctness fsdp experts context] [--minutes 9]

- correctness: losses, raw gradients and Muon's updates of FSDP2, HSDP, experts and context over 2, 4, 8 GPUs against
  one GPU (`tests/layouts.py`), in float32 where no experts are exchanged, else in bfloat16.
- fsdp: Trinity Nano at full shape (6.1 B), its weights over 2, 4, 8 GPUs.
- experts: Trinity Mini at full shape (26 B) with the experts of a layer over 8 GPUs; over fewer with fewer layers.
- context: rows of 131 072 and 262 144 tokens of Nano over all GPUs.

Each case runs in processes of its own with a time limit, so that one that fails or hangs costs its own time only; what
is left of --minutes is shared out in order. Everything found so far is in DIR/multi_gpu.json at any moment: tokens a
second and GPU, MFU, memory, and the share of a step in which only communication runs.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from sharded_step import Subject, measure, settings_of_batch
from trinity.base.files import write_json
from trinity.config import RunConfig, resolve

PARTS = ("correctness", "fsdp", "experts", "context")
TESTS = Path(__file__).resolve().parents[1] / "tests"
TOY = (
    "model={vocab_size=128, num_layers=3, num_dense_layers=1, dim=32, num_heads=2, num_kv_heads=1, head_dim=16,"
    " ffn_dim=64, expert_dim=16, num_experts=8, experts_per_token=2, window=32, max_positions=512}",
    "runtime.dtype=float32",
)


@dataclass(frozen=True)
class Case:
    """A group of processes and what they do."""

    part: str
    name: str
    ranks: int
    layouts: list[dict[str, int]]
    """One, but for correctness."""
    preset: str = "nano"
    overrides: list[str] = field(default_factory=list)
    seconds: float = 150
    toy: bool = False

    def settings(self) -> RunConfig:
        sizes = [f"parallel.{key}={value}" for key, value in self.layouts[0].items()]
        return resolve(self.preset, overrides=[*self.overrides, *sizes])[0]


def cases(parts: list[str], gpus: int, *, toy: bool) -> list[Case]:
    """In the order of what is worth most if time runs out."""
    counts = [n for n in (2, 4, 8) if n <= gpus]
    found: list[Case] = []
    for ranks in counts if "correctness" in parts else ():
        plain = [{}, {"replicate": 2}, {"context": ranks}]
        mixed = [{"expert": 2}, {"replicate": 2, "expert": ranks // 2}, {"context": 2, "expert": ranks}]
        found.append(Case("correctness", f"float32-{ranks}", ranks, plain, seconds=90, toy=toy))
        found.append(Case("correctness", f"bfloat16-{ranks}", ranks, plain + mixed, seconds=150, toy=toy))
    seq_len = 64 if toy else 4096
    toys = list(TOY) if toy else []
    for ranks in reversed(counts if "fsdp" in parts else []):
        batch = settings_of_batch(2 * ranks, 1, seq_len)
        few = ["runtime.recompute=block"] if ranks == 2 else []
        found.append(Case("fsdp", f"nano-fsdp-{ranks}", ranks, [{}], "nano", [*toys, *few, *batch], toy=toy))
    if "experts" in parts and counts:
        ranks = counts[-1]
        layers = [] if ranks == 8 or toy else [f"model.num_layers={4 * ranks - 4}"]
        batch = settings_of_batch(2 * ranks, 1, seq_len)
        overrides = [*toys, *layers, "runtime.recompute=block", *batch]
        found.append(Case("experts", f"mini-ep-{ranks}", ranks, [{"expert": ranks}], "mini", overrides, toy=toy))
        if ranks > 2:
            found.append(Case("experts", f"mini-fsdp-{ranks}", ranks, [{}], "mini", overrides, toy=toy))
    if "context" in parts and counts:
        ranks = counts[-1]
        for length in (256, 512) if toy else (131072, 262144):
            overrides = [*toys, "runtime.recompute=block", f"model.max_positions={length}"]
            overrides += settings_of_batch(1, 1, length)
            layout = {"context": ranks}
            found.append(
                Case("context", f"nano-{length}-tokens-cp-{ranks}", ranks, [layout], "nano", overrides, toy=toy)
            )
    return found


def work(case: Case, rank: int, folder: Path) -> dict[str, Any]:
    """What one rank does; rank 0's result is kept."""
    device = torch.device("cpu") if case.toy else torch.device("cuda", rank)
    if case.part == "correctness":
        return compare(case, device, folder)
    steps = 2 if case.toy else (3 if case.part == "context" else 8)
    subject = Subject(case.settings(), device, sharded=True)
    return measure(subject, warmup=1 if case.toy else 3, steps=steps)


def correctness_settings(case: Case) -> tuple[Any, RunConfig, Any]:
    """The tests' module of layouts, its settings and its bounds for a case."""
    sys.path.insert(0, str(TESTS))
    import layouts
    from test_layouts_gpu import EXACT, EXACT_ON_GPU, FAST, NOT_EXACT

    exact = case.name.startswith("float32")
    sizes = [f"pretrain.batch=[{{from_tokens=0, rows={max(8, case.ranks)}}}]", "model.num_experts=8"]
    settings = layouts.config(*(() if case.toy else EXACT if exact else FAST), *sizes)
    return layouts, settings, layouts.Bounds() if case.toy else EXACT_ON_GPU if exact else NOT_EXACT


def compare(case: Case, device: torch.device, folder: Path) -> dict[str, Any]:
    layouts, settings, bounds = correctness_settings(case)
    verdicts: dict[str, str] = {}
    for layout in case.layouts:
        try:
            layouts.compare_layout(folder, layout, settings, device, bounds)
            verdict = "as one GPU"
        except AssertionError as error:
            verdict = str(error)
        heard: list[Any] = [None] * case.ranks
        torch_dist.all_gather_object(heard, verdict)
        verdicts[json.dumps(layout)] = next((v for v in heard if v != "as one GPU"), "as one GPU")
    return {"layouts_found": verdicts, "passed": set(verdicts.values()) == {"as one GPU"}}


def run_case(case: Case, folder: Path, seconds: float) -> dict[str, Any]:
    """Run the processes of a case; what rank 0 found, or what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps(asdict(case)), encoding="utf-8")
    (folder / "store").unlink(missing_ok=True)
    started = time.monotonic()
    processes = []
    for rank in range(case.ranks):
        log = (folder / f"rank-{rank}.log").open("wb")
        command = [sys.executable, __file__, "--worker", str(folder), "--rank", str(rank)]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
        processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        log.close()
    deadline = started + seconds
    failed = False
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline and not failed:
        failed = any(p.poll() not in (None, 0) for p in processes)
        time.sleep(0.2)
    late = [p for p in processes if p.poll() is None]
    for process in late:
        if failed:  # the others wait for the one that is gone
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        process.kill()
    for process in processes:
        process.wait()
    result = folder / "result.json"
    took = time.monotonic() - started
    if result.exists():
        return {**json.loads(result.read_text(encoding="utf-8")), "took_seconds": took}
    codes = [process.returncode for process in processes]
    broken = next((rank for rank, code in enumerate(codes) if code not in (0, -9)), 0)
    tail = (folder / f"rank-{broken}.log").read_text(encoding="utf-8", errors="replace")[-1500:]
    reason = f"ended after {seconds:.0f} s" if late and not failed else f"exit codes {codes}"
    return {"error": f"{reason}; rank {broken}: {tail}", "took_seconds": took}


def worker(folder: Path, rank: int) -> None:
    case = Case(**json.loads((folder / "case.json").read_text(encoding="utf-8")))
    if case.toy:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    if case.part == "correctness" and rank == 0:  # before there are others, whose numbers it would add to its own
        layouts, settings, _ = correctness_settings(case)
        layouts.reference(folder, settings, torch.device("cpu") if case.toy else torch.device("cuda", 0))
    store = torch_dist.FileStore(str(folder / "store"), case.ranks)
    backend = "gloo" if case.toy else "cpu:gloo,cuda:nccl"
    torch_dist.init_process_group(backend, store=store, rank=rank, world_size=case.ranks)
    try:
        result = work(case, rank, folder)
        if rank == 0:
            write_json(folder / "result.json", result)
        torch_dist.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # destroying the group would wait for the other ranks
    torch_dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, to test this script")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options.rank)
        return 0
    if options.out is None:
        parser.error("name the folder of the results: --out DIR")
    if not options.toy and options.gpus > torch.cuda.device_count():
        parser.error(f"--gpus {options.gpus}, but {torch.cuda.device_count()} are visible")
    todo = cases(options.parts, options.gpus, toy=options.toy)
    if not todo:
        parser.error("two GPUs or more are needed: --gpus")
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "device": "cpu" if options.toy else torch.cuda.get_device_name(0),
        "gpus": options.gpus,
        "torch": torch.__version__,
        "cases": {},
    }
    deadline = time.monotonic() + 60 * options.minutes
    for case in todo:
        left = deadline - time.monotonic()
        if left < 10:
            result: dict[str, Any] = {"error": "not run: --minutes are over"}
        else:
            result = run_case(case, options.out.resolve() / case.name, min(case.seconds, left))
        found["cases"][case.name] = {**asdict(case), **result}
        write_json(options.out / "multi_gpu.json", found)
        print(f"{case.name}: {json.dumps({k: v for k, v in result.items() if k != 'all_step_seconds'})}", flush=True)
    failed = [n for n, r in found["cases"].items() if "error" in r or r.get("passed") is False]
    print(f"{len(todo) - len(failed)} of {len(todo)} cases done" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
