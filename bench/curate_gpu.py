"""Rephrasing through the pipeline against calling vLLM directly, on one GPU.

    python bench/curate_gpu.py MODEL_DIR --documents FILE.parquet [--requests 1500] [--seqs 128] [--json FILE]

The same requests (one recipe, passages of real documents, the same sampling) are answered three times:
direct: `LLM.chat` over all of them in one call, in a process of its own;
served: `trinity curate` with vLLM's server as its endpoint: asking, journal, checks and committed blocks included;
in Ray: `trinity curate` with the backend vllm, where `ray.data.llm` is installed.
Speeds are generated tokens over seconds, from the first request to the last answer, after a warm-up; starting an engine
is left out of the first two. There the graph's functions run in threads of this process, so that Ray is not needed;
each answer ends as the model ends it, under the same seeds in all three.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trinity.base.files import write_json
from trinity.config.curate import CurateConfig, EndpointConfig
from trinity.curate import run
from trinity.curate.asking import Asker, open_requests
from trinity.curate.client import Client
from trinity.curate.purse import Purse

PORT = 8177
WARM_UP = 32
ENVIRONMENT = {
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Threads:
    """The graph's interface without a cluster: two blocks in hand, finished as they are answered."""

    def __init__(self) -> None:
        self.asking: tuple[float, float] = (0.0, 0.0)

    def each(self, function: Any, items: Sequence[Any], *shared: Any) -> Iterator[Any]:
        for item in items:
            yield function(item, *shared)

    def ask(
        self,
        blocks: Sequence[int],
        config: CurateConfig,
        endpoints: tuple[EndpointConfig, ...],
        work: Path,
        retry: bool,
        purse: Any,
        finish: Any,
        shared: tuple[Any, ...],
    ) -> Iterator[Any]:
        asker = Asker(Client(config, endpoints, purse or Purse(config.budget)), work, config, retry)

        def one(block: int) -> Any:
            asker.ask_block(block)
            return finish(block, *shared)

        start = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            yield from pool.map(one, blocks)
        self.asking = (start, time.perf_counter())
        asker.close()

    def purse(self, config: CurateConfig, tokens: int, money: float) -> Any:
        return Purse(config.budget, tokens, money)


def recipe(options: argparse.Namespace, backend: str) -> CurateConfig:
    """The same documents and rewrites for every way of asking."""
    endpoint = {"url": f"http://127.0.0.1:{PORT}/v1", "model": "writer", "concurrency": options.seqs}
    return CurateConfig.model_validate(
        {
            "stages": ["normalise", "deduplicate", "rephrase", "validate", "label"],
            "input": {"paths": [options.documents], "block_bytes": 1 << 20},
            "duplicates": {"near": False},
            "rephrase": [
                {
                    "recipe": "encyclopaedia",
                    "passage_chars": 2000,
                    "max_passages": 4,
                    "max_tokens": options.max_tokens,
                }
            ],
            "generate": {
                "backend": backend,
                "model": options.model,
                "endpoints": [endpoint] if backend == "endpoint" else [],
                "concurrency": options.seqs,
                "workers": 1,
                "engine": engine(options),
                "on_gpu": not options.cpu,
            },
            "run": {"workers": 8},
        }
    )


def engine(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the engine, the same in every way of asking."""
    found: dict[str, Any] = {"max_model_len": options.max_model_len, "dtype": options.dtype}
    found["enforce_eager"] = options.eager
    if options.cpu:  # seeds and prompts in parts do not go together in vLLM's CPU build
        return {**found, "enable_chunked_prefill": False, "max_num_batched_tokens": 32768}
    return {**found, "gpu_memory_utilization": 0.8}


def bodies(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """What is asked in every way, from a first pass that ends before asking."""
    found: list[dict[str, Any]] = []
    config = recipe(options, "endpoint")

    class Stop(Exception):  # noqa: N818
        pass

    class Collect(Threads):
        def ask(self, blocks, config, endpoints, work, retry, purse, finish, shared) -> Iterator[Any]:
            for block in blocks:
                found.extend(request.body(config) for request in open_requests(work, block, config, retry))
            raise Stop

    with using(Collect()), suppress(Stop):
        run.curate(config, folder)
    return found


@contextmanager
def using(graph: Threads) -> Iterator[Threads]:
    """`curate` on this graph."""

    @contextmanager
    def cluster(_: Any) -> Iterator[Any]:
        yield graph

    before, run.cluster = run.cluster, cluster  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield graph
    finally:
        run.cluster = before


DIRECT = """
import json, sys, time
from vllm import LLM, SamplingParams
bodies, model, options = json.load(open(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3])
llm = LLM(model=model, **options)
def ask(some):
    params = [SamplingParams(**{k: b[k] for k in ("max_tokens", "temperature", "top_p", "seed")}) for b in some]
    return llm.chat([b["messages"] for b in some], params, use_tqdm=False)
ask(bodies[: int(sys.argv[4])])
start = time.perf_counter()
made = ask(bodies)
seconds = time.perf_counter() - start
tokens = sum(len(one.outputs[0].token_ids) for one in made)
prompts = sum(len(one.prompt_token_ids) for one in made)
print("RESULT", json.dumps({"requests": len(bodies), "tokens": tokens, "prompt_tokens": prompts, "seconds": seconds}))
"""


def direct(options: argparse.Namespace, asked: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """`LLM.chat` over all requests."""
    path = folder / "bodies.json"
    path.write_text(json.dumps(asked))
    settings = {"max_num_seqs": options.seqs, **engine(options)}
    command = [sys.executable, "-c", DIRECT, str(path), options.model, json.dumps(settings), str(WARM_UP)]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found = json.loads(line.removeprefix("RESULT "))
            return {**found, "tokens_per_second": found["tokens"] / found["seconds"]}
    raise SystemExit(f"calling vLLM directly failed:\n{done.stderr[-3000:]}")


@contextmanager
def server(options: argparse.Namespace) -> Iterator[None]:
    """vLLM's server on PORT, ready."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={options.model}"]
    command += ["--served-model-name=writer", f"--port={PORT}", f"--max-num-seqs={options.seqs}"]
    for name, value in engine(options).items():
        flag = name.replace("_", "-")
        command.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag}={value}")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 420
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise SystemExit(f"vLLM's server did not start:\n{log.read()[-3000:]}") from None
                    time.sleep(1)
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def served(options: argparse.Namespace, asked: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The pipeline with the server as its endpoint."""
    with server(options), using(Threads()) as graph:
        for body in asked[:WARM_UP]:
            data = json.dumps({"model": "writer", **body, "max_tokens": 16}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{PORT}/v1/chat/completions", data, {"Content-Type": "application/json"}
            )
            urllib.request.urlopen(request, timeout=300).close()
        found = run.curate(recipe(options, "endpoint"), folder)
    seconds = graph.asking[1] - graph.asking[0]
    return _figures(found, seconds)


def in_ray(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The pipeline with engines inside Ray: the whole call, with starting Ray and the engine."""
    start = time.perf_counter()
    found = run.curate(recipe(options, "vllm"), folder)
    return {**_figures(found, time.perf_counter() - start), "with_engine_start": True}


def _figures(found: dict[str, Any], seconds: float) -> dict[str, Any]:
    use = found["use"]
    return {
        "requests": found["stages"]["rephrase"]["in"],
        "answers": found["stages"]["rephrase"]["out"],
        "kept": found["stages"]["validate"]["out"],
        "drops": found["stages"]["validate"]["drops"],
        "tokens": use["completion_tokens"],
        "prompt_tokens": use["prompt_tokens"],
        "seconds": seconds,
        "tokens_per_second": use["completion_tokens"] / seconds,
        "troubles": found["troubles"],
    }


def shorten(path: Path, requests: int, folder: Path) -> Path:
    """The first documents of a table, about as many as make so many passages."""
    import pyarrow.parquet

    texts = pyarrow.parquet.ParquetFile(path).read(["text"])["text"].to_pylist()
    chosen, passages = [], 0
    for text in texts:
        if passages >= requests:
            break
        if len(text) > 400:
            chosen.append(text)
            passages += min(4, -(-len(text) // 2000))
    out = folder / "documents.jsonl"
    lines = [json.dumps({"text": text, "id": str(number)}) for number, text in enumerate(chosen)]
    out.write_text("\n".join(lines), encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="Exported model directory.")
    parser.add_argument("--documents", type=Path, required=True, help="Parquet with a column text.")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--seqs", type=int, default=128, help="Sequences at a time, in every way of asking.")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="No CUDA graphs: starts faster.")
    parser.add_argument("--cpu", action="store_true", help="vLLM's CPU build, to try the script.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        options.documents = str(shorten(options.documents, options.requests, folder))
        asked = bodies(options, folder / "first")
        print(f"{len(asked)} requests", flush=True)
        result: dict[str, Any] = {"requests": len(asked), "seqs": options.seqs, "max_tokens": options.max_tokens}
        result["direct"] = direct(options, asked, folder)
        print(json.dumps(result["direct"]), flush=True)
        result["served"] = served(options, asked, folder / "served")
        print(json.dumps(result["served"]), flush=True)
        result["served_over_direct"] = result["served"]["tokens_per_second"] / result["direct"]["tokens_per_second"]
        if importlib.util.find_spec("ray") is not None:
            result["in_ray"] = in_ray(options, folder / "ray")
        print(json.dumps(result, indent=2))
        if options.json:
            write_json(options.json, result)


if __name__ == "__main__":
    main()
