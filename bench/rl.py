"""Reinforcement learning on generated arithmetic with several seeds, from a checkpoint that this script trained.

    python bench/rl.py --out DIR --minutes 9

Nothing is needed but this repository: a tokenizer is trained on generated arithmetic, a small model pretrained on it
and tuned on conversations, all by the command line's verbs. Then every variant of `VARIANTS` learns from rewards with
every seed, in processes side by side on one GPU. `--start DIR/start` takes the first part from an earlier call.

DIR/rl.json holds, by variant and seed: the reward of every step, scores on held-out problems before and after, the gap
between sampler and trainer with the experts replayed and without, MaxVio, entropy, lengths; means over seeds with a
95 % interval of Student's t; and 50 sampled answers of each variant's first seed with their rewards. It is written anew
whenever a run ends; runs that time cut short are counted with the steps that they did and say so.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from measures import MAX_SEEDS, interval
from trinity.base.files import read_json, read_jsonl, write_json

BENCH = Path(__file__).parent
VARIANTS: dict[str, list[str]] = {
    "balanced": [],
    "frozen": ["balance.frozen=true"],
    "no-replay": ["rl.replay=false"],
}
"""Settings of each variant: balancing on and experts replayed; biases frozen; experts selected anew in the update."""
DOCUMENTS = 20_000
CONVERSATIONS = 20_000
WINDOW = 10
"""Steps of one point of the curve over seeds."""
KEPT_SAMPLES = 50
FIELDS = ("reward", "length", "finished", "informative", "policy_entropy", "max_vio", "kl_gap", "truncated_fraction")
GAPS = ("gap_replayed", "gap_free", "gap_replayed_abs", "gap_free_abs", "gap_replayed_max", "gap_free_max")


def main() -> int:
    options = _parse()
    started = time.monotonic()
    deadline = started + options.minutes * 60
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are stopped and the JSON written
    start = options.start or options.out / "start"
    if options.start is None:
        make_start(start, options)
    result: dict[str, Any] = {
        "settings": options.set,
        "start": start_figures(start),
        "start_seconds": round(time.monotonic() - started, 1),
        "variants": {name: VARIANTS[name] for name in options.variants},
    }
    print(f"[{time.monotonic() - started:4.0f} s] start: {result['start']}", flush=True)
    ended = run_all(start, result, options, deadline - options.sample_seconds)
    for variant in options.variants:
        if time.monotonic() < deadline:
            folder = options.out / f"{variant}-{options.first_seed}"
            found = command(options, "sample", folder, max(1.0, deadline - time.monotonic() + 30))
            result.setdefault("samples", {})[variant] = found
            write_json(options.out / "rl.json", result)
    print_table(result["over_seeds"])
    print(f"[{time.monotonic() - started:4.0f} s] {options.out / 'rl.json'}")
    return 0 if ended else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="DIR/start of an earlier call")
    parser.add_argument("--overlay", type=Path, default=BENCH / "rl.toml")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=9, help="processes at a time")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--sample-seconds", type=float, default=60.0, help="kept back for the samples at the end")
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every stage")
    parser.add_argument("--sample", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample is not None:
        sample_answers(options.sample)
        sys.exit(0)
    if not 1 <= options.seeds <= MAX_SEEDS:
        parser.error(f"--seeds must be 1 to {MAX_SEEDS}")
    return options


# The checkpoint to start from


def make_start(start: Path, options: argparse.Namespace) -> None:
    """`start/{tokenizer,shards,chats.jsonl,pretrain,sft}`."""
    if start.exists():
        raise SystemExit(f"{start} exists already: name it with --start, or choose another --out")
    write_inputs(start, options)
    for stage, before in (("pretrain", None), ("sft", "pretrain")):
        words = trinity(stage, start / stage, start, options, [f'sft.conversations=["{start / "chats.jsonl"}"]'])
        if before is not None:
            words += ["--from", str(start / before)]
        with (start / f"{stage}.log").open("wb") as log:
            if subprocess.run(words, env=environment(1), stdout=log, stderr=log, check=False).returncode:
                raise SystemExit(f"{stage} failed:\n{tail(start / f'{stage}.log')}")


def write_inputs(start: Path, options: argparse.Namespace) -> None:
    import json

    import numpy as np

    from trinity.config import resolve
    from trinity.data import arithmetic
    from trinity.data.shard_writer import TokenDocument, write_shards
    from trinity.tokenizer import train_tokenizer

    config, _ = resolve("demo", [options.overlay], options.set)
    most = config.rl.max_number
    texts = [arithmetic.text(Random(number), 40, most) for number in range(options.documents)]
    tokenizer = train_tokenizer(texts[:2000], config.tokenizer)
    tokenizer.save(start / "tokenizer")
    split = max(1, len(texts) // 100)
    for name, part in (("train", texts[split:]), ("val", texts[:split])):
        encoded = tokenizer.encode_batch(part)
        documents = [
            TokenDocument(np.append(ids, tokenizer.eos_id), domain="math", id=str(number), num_bytes=len(text.encode()))
            for number, (text, ids) in enumerate(zip(part, encoded, strict=True))
        ]
        facts = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
        write_shards(start / "shards" / name, documents, tokenizer_fingerprint=tokenizer.fingerprint, **facts)
    rng = Random(1)
    with (start / "chats.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(options.conversations):
            file.write(json.dumps(arithmetic.conversation(rng, most)) + "\n")


def start_figures(start: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in ("pretrain", "sft"):
        records = read_jsonl(start / stage / "metrics.jsonl")
        losses = [r["loss"] for r in records if r["kind"] == "eval"]
        steps = [r for r in records if r["kind"] == "step" and "seconds" in r]  # the others were jumped over
        found[stage] = {
            "steps": steps[-1]["step"],
            "tokens": steps[-1]["tokens"],
            "seconds": round(sum(r["seconds"] for r in steps), 1),
            "held_out_loss": [losses[0], losses[-1]] if losses else None,
        }
    return found


# The runs


def trinity(stage: str, folder: Path, start: Path, options: argparse.Namespace, more: Sequence[str]) -> list[str]:
    settings = [f"data.tokenizer={start / 'tokenizer'}", f"data.shards={start / 'shards'}", *more, *options.set]
    words = [sys.executable, "-m", "trinity", stage, "demo", *settings]
    return [*words, "--overlay", str(options.overlay), "--run-dir", str(folder)]


def environment(parallel: int) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // parallel - 1))
    return {**os.environ, "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}


def run_all(start: Path, result: dict[str, Any], options: argparse.Namespace, deadline: float) -> bool:
    """Run every variant with every seed, `--parallel` at a time; whether all ended by themselves."""
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    waiting = [(variant, seed) for seed in seeds for variant in options.variants]  # whole seeds come first
    everything = list(waiting)
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    states: dict[str, str] = {}
    reported = time.monotonic()
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < (options.parallel if warm(options.out, everything, waiting) else 1):
                variant, seed = waiting.pop(0)
                folder = options.out / f"{variant}-{seed}"
                if folder.exists():
                    raise SystemExit(f"{folder} exists already: choose another --out")
                words = trinity("rl", folder, start, options, [f"runtime.seed={seed}", *VARIANTS[variant]])
                with folder.with_name(f"{folder.name}.log").open("wb") as log:
                    running[variant, seed] = subprocess.Popen(
                        [*words, "--from", str(start / "sft")],
                        env=environment(options.parallel),
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
            time.sleep(0.25)
            for key, process in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    name = f"{key[0]}-{key[1]}"
                    states[name] = "finished" if process.returncode == 0 else tail(options.out / f"{name}.log")
                    print(f"{name}: {states[name]}", flush=True)
                    collect(everything, states, result, options)
            if time.monotonic() - reported > 20:
                reported = time.monotonic()
                now = ", ".join(f"{v}-{s} step {steps_done(options.out / f'{v}-{s}')}" for v, s in running)
                print(f"[{deadline - reported:4.0f} s left] {now}; {len(waiting)} waiting", flush=True)
    finally:
        for (variant, seed), process in running.items():
            os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
            process.wait()
            states[f"{variant}-{seed}"] = "cut short"
        collect(everything, states, result, options)
    return all(state == "finished" for state in states.values()) and not waiting


def warm(out: Path, everything: Sequence[tuple[str, int]], waiting: Sequence[tuple[str, int]]) -> bool:
    """Whether the first run has done a step or others have begun: what it compiles the others find."""
    begun = len(everything) - len(waiting)
    return begun > 1 or (begun == 1 and steps_done(out / named(everything[0])) > 0)


def named(run: tuple[str, int]) -> str:
    return f"{run[0]}-{run[1]}"


def steps_done(folder: Path) -> int:
    return max((r["step"] for r in read_jsonl(folder / "metrics.jsonl")), default=0)


def tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])


def collect(
    runs: Sequence[tuple[str, int]], states: Mapping[str, str], result: dict[str, Any], options: argparse.Namespace
) -> None:
    """Take in what all runs recorded so far, and write the JSON."""
    found: dict[str, dict[str, Any]] = {}
    for variant, seed in runs:
        figures = measure(options.out / f"{variant}-{seed}")
        if figures is not None:
            name = f"{variant}-{seed}"
            found.setdefault(variant, {})[str(seed)] = {"state": states.get(name, "running"), **figures}
    result["runs"], result["states"] = found, dict(states)
    result["over_seeds"] = {variant: over_seeds(list(runs.values())) for variant, runs in found.items()}
    write_json(options.out / "rl.json", result)


def measure(folder: Path) -> dict[str, Any] | None:
    """The figures of one run; None before its first steps."""
    records = read_jsonl(folder / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step" and "seconds" in r]
    if len(steps) < 2:
        return None
    curves = {name: [_short(r.get(name)) for r in steps] for name in FIELDS}
    gaps = [r for r in steps if "gap_free" in r]
    scores: dict[str, list[list[float]]] = {}
    for r in records:
        if r["kind"] == "score":
            scores.setdefault(r["name"], []).append([r["step"], r["value"], r["standard_error"]])
    return {
        "steps": len(steps),
        "seconds": round(sum(r["seconds"] for r in steps), 1),
        "curves": curves,
        "reward": windows([r["reward"] for r in steps]),
        "max_vio": windows([r["max_vio"] for r in steps]),
        "max_vio_worst_layer": max(max(r["max_vio_layers"]) for r in steps),
        "dead_experts": max(sum(r.get("dead_experts") or []) for r in steps),
        "gaps": {name: _mean([r[name] for r in gaps if name in r]) for name in GAPS},
        "scores": scores,
        "skips": sum(bool(r.get("skipped")) for r in steps),
    }


def windows(values: Sequence[float]) -> list[float]:
    """Means over windows of WINDOW values; what is left over joins the last."""
    count = max(1, len(values) // WINDOW)
    size = WINDOW if len(values) >= WINDOW else len(values)
    ends = [*(size * (i + 1) for i in range(count - 1)), len(values)]
    return [round(sum(values[a:b]) / (b - a), 5) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds with the half width of a 95 % interval (None for one seed)."""
    shortest = min(len(run["reward"]) for run in runs)

    def mean(values: Sequence[float]) -> list[float | None]:
        return [None if value is None else round(value, 5) for value in interval(values)]

    scores = [run["scores"].get("arithmetic", []) for run in runs]
    return {
        "seeds": len(runs),
        "reward_curve": [mean([run["reward"][i] for run in runs]) for i in range(shortest)],
        "reward_first": mean([run["reward"][0] for run in runs]),
        "reward_last": mean([run["reward"][shortest - 1] for run in runs]),
        "reward_gain": mean([run["reward"][shortest - 1] - run["reward"][0] for run in runs]),
        "score_before": mean([s[0][1] for s in scores]) if all(scores) else None,
        "score_after": mean([s[-1][1] for s in scores]) if all(len(s) > 1 for s in scores) else None,
        "max_vio_first": mean([run["max_vio"][0] for run in runs]),
        "max_vio_last": mean([run["max_vio"][shortest - 1] for run in runs]),
        **{
            name: mean(values)
            for name in GAPS
            if len(values := [run["gaps"][name] for run in runs if run["gaps"][name] is not None]) == len(runs)
        },
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def print_table(over: Mapping[str, Mapping[str, Any]]) -> None:
    for variant, figures in over.items():
        print(f"{variant} ({figures['seeds']} seeds)")
        for name, value in figures.items():
            if name not in ("seeds", "reward_curve"):
                print(f"  {name:18} {value}")


# Answers to read


def command(options: argparse.Namespace, what: str, folder: Path, timeout: float) -> Any:
    """This script in a process of its own, whose memory is given back; what went wrong is part of the result."""
    words = [sys.executable, __file__, "--out", str(options.out), f"--{what}", str(folder)]
    target = folder.with_name(f"{folder.name}.samples.json")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"not done within {timeout:.0f} s"
    return read_json(target) if done.returncode == 0 else done.stderr[-2000:]


def sample_answers(folder: Path) -> None:
    """KEPT_SAMPLES answers at temperature 1 to held-out questions, written beside the run."""
    import torch

    from trinity.config import resolve
    from trinity.evals.arithmetic import chat_question
    from trinity.infer.engine import Engine
    from trinity.infer.load import load
    from trinity.infer.sampling import SamplingParams
    from trinity.rl.rewards import exact_integer

    config, _ = resolve(str(folder / "run.toml"))
    # The kernels that sampled during the run, not those of another type.
    model, tokenizer = load(folder, dtype=getattr(torch, config.runtime.dtype), device=_device(config.runtime.device))
    rng = Random(2)
    asked = [chat_question(tokenizer, rng, config.rl.max_number, held_out=True) for _ in range(KEPT_SAMPLES)]
    params = SamplingParams(
        max_new_tokens=config.rl.max_new_tokens, temperature=1.0, seed=0, stop_ids=tuple(tokenizer.stop_ids)
    )
    done = Engine(model, tokenizer, max_batch=KEPT_SAMPLES).generate([q.prompt for q in asked], params)
    write_json(
        folder.with_name(f"{folder.name}.samples.json"),
        [
            {
                "prompt": tokenizer.decode(question.prompt),
                "text": completion.text,
                "finish": completion.finish,
                "answer": question.answer,
                "reward": exact_integer(completion.text, question.answer, finished=completion.finish == "stop"),
            }
            for question, completion in zip(asked, done, strict=True)
        ],
    )


def _device(name: str) -> str | None:
    return None if name == "auto" else name


if __name__ == "__main__":
    sys.exit(main())
