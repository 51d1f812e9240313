"""Speed of generation at Trinity Nano's full shape with random weights, beside transformers and vLLM.

    python bench/infer.py --out infer.json                  # everything that is installed, each part in its own process
    python bench/infer.py --parts check,ours --vllm SITE    # SITE: a folder with vLLM's packages
    python bench/infer.py --shape toy                       # seconds, on any machine: whether the script works

Decoding: prompts of 128 random tokens, greedy; batch * 128 tokens / (time for 129 new tokens - time for 1), the best of
two. Prefill: prompt tokens / time until the first new token, the best of two after a warm-up. The same prompts,
lengths and formula for every engine. A part that fails or runs out of its time costs only its own figures.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("check", "ours", "ours-fp8", "ours-profile", "transformers", "vllm")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured."""

    shape: str
    decode_batches: tuple[int, ...]
    prompt: int
    new_tokens: int
    prefill: tuple[int, ...]
    slow_new_tokens: int
    """New tokens where an engine is so slow that fewer must do."""


SIZES = {
    "nano": Sizes("nano", (1, 32), 128, 128, (32_768, 131_072), 16),
    "toy": Sizes("toy", (1, 3), 20, 6, (48, 96), 4),
}


def model_config(shape: str):
    """ModelConfig of a shape; toy has Nano's ratios and runs anywhere."""
    from trinity.config import ModelConfig, resolve

    if shape == "nano":
        return resolve("nano")[0].model
    return ModelConfig(
        vocab_size=300, num_layers=4, num_dense_layers=1, dim=32, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=64,
        expert_dim=16, num_experts=8, experts_per_token=2, window=16, max_positions=256, route_scale=2.0,
    )  # fmt: skip


def device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_model(shape: str, kind=None):
    """Our model with random weights made on the device."""
    import torch

    from trinity.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(model_config(shape))
    model = model.to_empty(device=device()).to(kind or torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("router.bias", "router.momentum")):
                tensor.zero_()
            elif tensor.ndim == 1:
                tensor.fill_(1.0)
            else:
                tensor.normal_(std=0.5 * tensor.shape[-1] ** -0.5)
    return model.eval()


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(length)
    return [torch.randint(4, vocab, (length,), generator=generator).tolist() for _ in range(count)]


def timed(run: Callable[[], Any]) -> float:
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def measure(
    name: str, generate: Callable[[list[list[int]], int], Any], sizes: Sizes, vocab: int, new_tokens: int, skip: float
) -> None:
    """Rates of an engine's `generate(prompts, new tokens)`; figures are printed as they come."""
    for batch in sizes.decode_batches:
        given = prompts(batch, sizes.prompt, vocab)
        generate(given, min(8, new_tokens))
        first = min(timed(lambda: generate(given, 1)) for _ in range(2))  # noqa: B023
        whole = min(timed(lambda: generate(given, new_tokens + 1)) for _ in range(2))  # noqa: B023
        tell(f"{name} decode batch {batch}", batch * new_tokens / (whole - first), "tokens/s")
    for length in sizes.prefill:
        given = prompts(1, length, vocab)
        warm = timed(lambda: generate(given, 1))  # noqa: B023
        again = [warm] if warm > skip else [timed(lambda: generate(given, 1)) for _ in range(2)]  # noqa: B023
        tell(f"{name} prefill {length}", length / min(again), "tokens/s")


def tell(name: str, value: float, unit: str, **more: Any) -> None:
    print("FIGURE " + json.dumps({"name": name, "value": round(value, 6), "unit": unit, **more}), flush=True)


def run_check(sizes: Sizes, args: argparse.Namespace) -> None:
    """Kernels against the reference on this device: the same greedy tokens in float32, close logits in bfloat16."""
    import torch

    from trinity.infer.engine import Engine
    from trinity.infer.sampling import SamplingParams

    config = model_config("toy")
    model = random_model("toy", torch.float32)
    params = SamplingParams(temperature=0.0, max_new_tokens=24)
    path = "fast" if torch.cuda.is_available() else "reference"
    for batch in (1, 3, 9):
        given = [prompts(1, 5 + 9 * i, config.vocab_size)[0] for i in range(batch)]
        pair = [Engine(model, path=p, block=16).generate(given, params) for p in ("reference", path)]
        same = sum(a.tokens == b.tokens for a, b in zip(*pair, strict=True))
        worst = max(
            abs(x - y) for a, b in zip(*pair, strict=True) for x, y in zip(a.logprobs, b.logprobs, strict=True)
        )  # fmt: skip
        tell(f"check float32 batch {batch}: equal answers", same, f"of {batch}", largest_logprob_difference=worst)
    if args.shape == "nano" and torch.cuda.is_available():
        model = random_model("nano")
        for batch, length in ((1, 3000), (5, 700)):
            given = prompts(batch, length, 200_000)
            one = SamplingParams(temperature=0.0, max_new_tokens=12)
            pair = [Engine(model, path=p).generate(given, one) for p in ("reference", "fast")]
            for place in (0, 1):
                worst = max(abs(a.logprobs[place] - b.logprobs[place]) for a, b in zip(*pair, strict=True))
                tell(f"check nano bfloat16 batch {batch}: log-probability of token {place}", worst, "difference")
            same = sum(a.tokens[0] == b.tokens[0] for a, b in zip(*pair, strict=True))
            tell(f"check nano bfloat16 batch {batch}: equal first tokens", same, f"of {batch}")


def engine_generate(engine) -> Callable[[list[list[int]], int], Any]:
    from trinity.infer.sampling import SamplingParams

    return lambda given, count: engine.generate(given, SamplingParams(temperature=0.0, max_new_tokens=count))


def run_ours(sizes: Sizes, args: argparse.Namespace, *, fp8: bool = False) -> None:
    import torch

    from trinity.infer.engine import Engine
    from trinity.infer.sampling import SamplingParams

    model = random_model(sizes.shape)
    config = model.config
    name = "ours fp8" if fp8 else "ours"
    longest = max(sizes.prefill)
    engine = Engine(model, max_batch=max(sizes.decode_batches), prefill_chunk=longest, fp8_weights=fp8)
    engine.cache.reserve(1, longest + 64)
    engine.cache.reserve(max(sizes.decode_batches), sizes.prompt + 2 * sizes.new_tokens)
    tell(f"{name} path", 0, engine.describe())
    short = dataclasses.replace(sizes, prefill=sizes.prefill if not fp8 else ())
    measure(name, engine_generate(engine), short, config.vocab_size, sizes.new_tokens, 1e9)
    for length in short.prefill:
        request = engine.submit(prompts(1, length, config.vocab_size)[0], SamplingParams(max_new_tokens=2))
        while not request.completion.tokens:
            engine.step()
        block = 64
        formula = config.kv_cache_bytes(length)
        used = engine.cache.used_bytes
        tell(f"{name} cache {length}", used / 1e6, "MB", formula_mb=formula / 1e6, rounded_up_to_tokens=block)
        engine.cancel(request)
    if torch.cuda.is_available():
        tell(f"{name} peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    if fp8:
        del engine
        engine = Engine(model, max_batch=max(sizes.decode_batches), cache_dtype=torch.float8_e4m3fn, fp8_weights=True)
        engine.cache.reserve(max(sizes.decode_batches), sizes.prompt + 2 * sizes.new_tokens)
        measure(f"{name} cache fp8", engine_generate(engine), short, config.vocab_size, sizes.new_tokens, 1e9)


def run_profile(sizes: Sizes, args: argparse.Namespace) -> None:
    """Where a step's time goes, by kernel."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from trinity.infer.engine import Engine

    if not torch.cuda.is_available():
        tell("profile", 0, "needs a GPU")
        return
    model = random_model(sizes.shape)
    engine = Engine(model, max_batch=32, prefill_chunk=131_072)
    generate = engine_generate(engine)
    jobs = [(f"decode batch {b}", prompts(b, sizes.prompt, 1000), 33) for b in sizes.decode_batches]
    jobs += [(f"prefill {n}", prompts(1, n, 1000), 1) for n in sizes.prefill]
    for name, given, count in jobs:
        generate(given, count)
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            generate(given, count)
            wait()
        rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
        total = sum(row.device_time_total for row in rows)
        top = {row.key[:60]: [round(row.device_time_total / 1e3, 3), row.count] for row in rows[:18]}
        tell(f"profile {name}", total / 1e3, "ms of kernels", kernels_ms_and_calls=top)


def run_transformers(sizes: Sizes, args: argparse.Namespace) -> None:
    import torch
    import transformers

    from trinity.export.config import config_to_public

    config = model_config(sizes.shape)
    public = config_to_public(config, dtype="bfloat16")
    kind = transformers.AutoConfig.for_model(**{k: v for k, v in public.items() if k != "architectures"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.bfloat16)
    model = model.to_empty(device=device()).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=0.02) if tensor.ndim > 1 else tensor.fill_(0.01)

    @torch.no_grad()
    def generate(given: list[list[int]], count: int) -> None:
        ids = torch.tensor(given, device=device())
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    measure("transformers", generate, sizes, config.vocab_size, sizes.slow_new_tokens, 3.0)


def run_vllm(sizes: Sizes, args: argparse.Namespace) -> None:
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    from trinity.export.config import config_to_public

    config = model_config(sizes.shape)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_to_public(config, dtype="bfloat16")))
        llm = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            max_model_len=max(sizes.prefill) + 512, gpu_memory_utilization=0.8, max_num_seqs=64,
            enable_prefix_caching=False, max_num_batched_tokens=16_384,
            compilation_config={"cudagraph_capture_sizes": list(sizes.decode_batches)},
        )  # fmt: skip

        def generate(given: list[list[int]], count: int) -> None:
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            llm.generate([{"prompt_token_ids": row} for row in given], params, use_tqdm=False)

        measure("vllm", generate, sizes, config.vocab_size, sizes.new_tokens, 1e9)


RUN: dict[str, Callable[[Sizes, argparse.Namespace], None]] = {
    "check": run_check,
    "ours": run_ours,
    "ours-fp8": lambda sizes, args: run_ours(sizes, args, fp8=True),
    "ours-profile": run_profile,
    "transformers": run_transformers,
    "vllm": run_vllm,
}


def part(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one part in its own process; its figures so far, even when it fails or its time is up."""
    command = [sys.executable, __file__, "--run", name, "--shape", args.shape]
    environment = dict(os.environ)
    if name == "vllm" and args.vllm is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(args.vllm), environment.get("PYTHONPATH", "")])
    start, error = time.perf_counter(), None
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        output, _ = process.communicate(timeout=max(5.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        error = f"stopped after {seconds:.0f} s"
    figures = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("FIGURE ")]
    if error is None and process.returncode:
        lines = [line for line in output.splitlines() if line.strip()]
        error = " | ".join(lines[-6:])[-1500:]
    found = {"part": name, "seconds": round(time.perf_counter() - start, 1), "figures": figures, "error": error}
    for figure in figures:
        more = {k: v for k, v in figure.items() if k not in ("name", "value", "unit")}
        print(f"{figure['name']}: {figure['value']:.4g} {figure['unit']}" + (f"  {json.dumps(more)}" if more else ""))
    if error:
        print(f"{name}: {error}")
    sys.stdout.flush()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="check,ours,ours-fp8,ours-profile,transformers,vllm")
    parser.add_argument("--shape", default="nano", choices=sorted(SIZES))
    parser.add_argument("--vllm", type=Path, help="folder with vLLM's packages; without it vllm must be installed")
    parser.add_argument("--minutes", type=float, default=8.5, help="of all parts together")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        try:
            RUN[args.run](SIZES[args.shape], args)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        return
    wanted = args.parts.split(",")
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        parser.error(f"--parts {unknown[0]} is not one of {', '.join(PARTS)}")
    end = time.perf_counter() + 60 * args.minutes
    results = []
    for name in wanted:
        left = end - time.perf_counter()
        if left < 5:
            print(f"{name}: no time left")
            results.append({"part": name, "figures": [], "error": "no time left"})
            continue
        results.append(part(name, args, left))
        if args.out:
            args.out.write_text(json.dumps({**machine(), "shape": args.shape, "parts": results}, indent=1))


def machine() -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": name, "torch": torch.__version__, "time": time.strftime("%Y-%m-%d %H:%M")}


if __name__ == "__main__":
    main()
