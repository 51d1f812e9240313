"""`trinity serve` under load and abuse: streaming clients that check every answer beside clients that do all wrong.

    python bench/serve_load.py --minutes 5 --out load.json         # a tiny model on this machine's CPU
    python bench/serve_load.py --model DIR --minutes 5 --out load.json

The server is a process of its own. Well-formed requests must all be answered whole, wrong ones refused, memory must not
grow, nothing may be left under way at the end, and SIGTERM must end it cleanly; otherwise the exit status is 1. Latency
is what the clients measure: from opening the connection to the first text and to the last byte.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from load_clients import WORDS, WRONG, Client, Tally, badly_behaved, well_behaved

FIXED = "old boats lay under a pale sky"
NAME = "tiny"
WARM = 0.3
"""Part of the time after which memory must have settled: caches and pools are filled once."""
MAX_GROWTH = 8.0
"""MiB that the process may grow by over the rest, as its trend says: a page or two of an allocator, no leak."""


def make_model(folder: Path) -> Path:
    """A directory with random weights and a tokenizer of a few hundred entries."""
    import torch

    from trinity.config import ModelConfig, TokenizerConfig
    from trinity.export.afmoe import export_afmoe
    from trinity.model.transformer import Transformer
    from trinity.tokenizer import train_tokenizer

    config = ModelConfig(
        vocab_size=512, num_layers=4, num_dense_layers=1, dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64,
        expert_dim=16, num_experts=8, experts_per_token=2, window=64, max_positions=2048, route_scale=2.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config)
    model.init_weights(0)
    tokenizer = train_tokenizer([" ".join(WORDS) + "\n"] * 50, TokenizerConfig(vocab_size=512))
    export_afmoe(model, config, tokenizer, folder, dtype=torch.float32)
    return folder


@contextmanager
def serving(model: Path, log: Path, more: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The server's process and its port."""
    command = [sys.executable, "-m", "trinity", "serve", str(model), "--port", "0", "--name", NAME, *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors, env=environment)
    try:
        told = ""
        for _ in range(600):
            told = log.read_text(errors="replace")
            if " at http://" in told or process.poll() is not None:
                break
            time.sleep(0.1)
        if " at http://" not in told:
            sys.exit(f"the server did not start: {told}")
        yield process, int(told.split("127.0.0.1:")[1].split()[0])
    finally:
        process.kill()
        process.wait()


async def page(port: int, path: str) -> str:
    """What a GET gives."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    data = (await reader.read()).decode()
    writer.close()
    return data


def gauge(text: str, name: str) -> float:
    """The value of a metric without labels."""
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


async def watch(process: subprocess.Popen[bytes], port: int, until: float, samples: list[dict[str, float]]) -> None:
    """Memory and queues of the server every second."""
    begun = time.monotonic()
    while time.monotonic() < until:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        metrics = await page(port, "/metrics")
        samples.append({
            "seconds": round(time.monotonic() - begun, 2),
            "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "files": len(list(Path(f"/proc/{process.pid}/fd").iterdir())),
            "running": gauge(metrics, "trinity_answers_running"),
            "waiting": gauge(metrics, "trinity_answers_waiting"),
            "cache_bytes": gauge(metrics, "trinity_cache_bytes"),
        })  # fmt: skip
        await asyncio.sleep(1)


async def idle(port: int) -> dict[str, float]:
    """The queues, once nobody is there any more; gives up after ten seconds."""
    names = ("answers_running", "answers_waiting", "cache_bytes", "engine_failures_total")
    left: dict[str, float] = {}
    for _ in range(100):
        metrics = await page(port, "/metrics")
        left = {name: gauge(metrics, f"trinity_{name}") for name in names}
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    return left


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Milliseconds."""
    if not values:
        return None
    ordered = sorted(values)
    marks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2) for name, q in marks.items()}


def slope(samples: Sequence[dict[str, float]], key: str) -> float:
    """Least-squares slope of a series, a second."""
    n = len(samples)
    if n < 3:
        return 0.0
    x, y = [s["seconds"] for s in samples], [s[key] for s in samples]
    mean_x, mean_y = sum(x) / n, sum(y) / n
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


async def drive(
    process: subprocess.Popen[bytes], port: int, clients: int, wrong: int, seconds: float
) -> dict[str, Any]:
    """The whole load, and what was seen."""
    tally, samples = Tally(), []
    client = Client(port, NAME, tally)
    expected = (await client.ask(FIXED, 24, temperature=0)).text
    begun = time.monotonic()
    until = begun + seconds
    kinds = itertools.islice(itertools.cycle(WRONG), wrong)
    await asyncio.gather(
        watch(process, port, until, samples),
        *(well_behaved(client, seed, until, expected, FIXED) for seed in range(clients)),
        *(badly_behaved(client, kind, 1000 + i, until, pause=0.5) for i, kind in enumerate(kinds)),
    )
    took = time.monotonic() - begun
    left = await idle(port)
    again = (await client.ask(FIXED, 24, temperature=0)).text
    settled = [sample for sample in samples if sample["seconds"] >= WARM * seconds]
    answers = tally.answers
    return {
        "seconds": round(took, 1),
        "answers": len(answers),
        "tokens_per_second": round(sum(answer.tokens for answer in answers) / took, 1),
        "errors": len(tally.errors),
        "first_errors": tally.errors[:10],
        "first_token_ms": quantiles([answer.first for answer in answers]),
        "whole_answer_ms": quantiles([answer.whole for answer in answers]),
        "between_pieces_ms": quantiles([gap for answer in answers for gap in answer.gaps]),
        "greedy_compared": tally.compared,
        "greedy_different": tally.different,
        "greedy_same_afterwards": again == expected,
        "wrong_requests": dict(sorted(tally.wrong.items())),
        "rss_mib": {
            "start": round(samples[0]["rss_mib"], 1),
            "settled": round(settled[0]["rss_mib"], 1) if settled else None,
            "end": round(samples[-1]["rss_mib"], 1),
            "max": round(max(sample["rss_mib"] for sample in samples), 1),
            "slope_per_minute": round(60 * slope(settled, "rss_mib"), 3),
            "growth_by_trend": round(slope(settled, "rss_mib") * (1 - WARM) * seconds, 2),
        },
        "open_files": {"start": samples[0]["files"], "end": samples[-1]["files"]},
        "most_waiting": max(sample["waiting"] for sample in samples),
        "left_under_way": left,
        "samples": samples[:: max(1, len(samples) // 60)],
    }  # fmt: skip


def verdict(found: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    left = found["left_under_way"]
    checks = {
        f"{found['errors']} errors, such as {found['first_errors'][:2]}": not found["errors"],
        "no answer came at all": found["answers"] > 0,
        f"memory grew by {found['rss_mib']['growth_by_trend']} MiB": found["rss_mib"]["growth_by_trend"] <= MAX_GROWTH,
        f"left under way: {left}": not any(left.values()),
        "the greedy answer changed": found["greedy_same_afterwards"],
        f"exit status {found['exit_status']}, log {found['log']!r}": found["exit_status"] == 0 and not found["log"],
    }
    return [said for said, good in checks.items() if not good]


def environment() -> dict[str, Any]:
    """Where and on what."""
    import torch

    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit or None, "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"), "load_before": os.getloadavg()[0],
        "machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64, help="streaming clients at once")
    parser.add_argument("--wrong", type=int, default=len(WRONG), help="badly behaved clients at once")
    parser.add_argument("--model", type=Path, help="model directory; by default a tiny one is made")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_model(Path(folder) / "model")
        log = Path(folder) / "log"
        options = ["--max-batch", str(arguments.max_batch), "--max-body-mib", "1"]
        started = environment()
        with serving(model, log, options) as (process, port):
            load = drive(process, port, arguments.clients, arguments.wrong, 60 * arguments.minutes)
            found = asyncio.run(load)
            process.send_signal(signal.SIGTERM)
            try:
                found["exit_status"] = process.wait(60)
            except subprocess.TimeoutExpired:
                found["exit_status"] = "still running after 60 seconds"
            # The first line says where it listens.
            found["log"] = "".join(log.read_text(errors="replace").splitlines(keepends=True)[1:])[:2000]
    failed = verdict(found)
    settings = {"clients": arguments.clients, "wrong": arguments.wrong, "options": options}
    result = {**started, **settings, **found, "failed": failed}
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text if not arguments.out else json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
