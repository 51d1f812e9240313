"""Full steps of this code, forward and backward alone, the optimizer alone, and a profile."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from trainbench.device import matmul_peak, peak_gib, random_weights, speed, synchronize, timed
from trainbench.parts import profile_parts
from trainbench.shapes import VARIANTS, batches, make_config, sizes
from trinity.config import RunConfig
from trinity.model.transformer import Transformer
from trinity.optim.optimizer import build_optimizer
from trinity.optim.schedule import PlannedStep
from trinity.train.compilation import compile_blocks
from trinity.train.guard import SpikeGuard
from trinity.train.losses import language_model_loss, to_device
from trinity.train.precision import MasterWeights
from trinity.train.step import StepRunner, step_share


def variant_config(variant: str, options: argparse.Namespace, layers: int = 0) -> RunConfig:
    dtype = "bfloat16" if options.device.startswith("cuda") else "float32"
    settings = [f"runtime.{key}={value}" for key, value in VARIANTS[variant].items()]
    return make_config(options, f"runtime.dtype={dtype}", "guard.enabled=true", *settings, layers=layers)


def build_runner(config: RunConfig, device: torch.device) -> StepRunner:
    """Model with random weights, optimizer, masters and step, as a run has them."""
    dtype = getattr(torch, config.runtime.dtype)
    with device:
        model = Transformer(config.model, kernels=config.runtime.kernels, recompute=config.runtime.recompute)
    random_weights(model, config.model.init_scale * config.model.dim**-0.5)
    if not config.runtime.master_weights:
        model.to(dtype)
    optimizer = build_optimizer(model, config.model, config.optim)
    if config.runtime.fp8:
        model.use_fp8(device)
    compile_blocks(model, config.runtime, device)
    masters = MasterWeights(model, dtype if config.runtime.master_weights else torch.float32)
    return StepRunner(model, optimizer, language_model_loss, config, SpikeGuard(config.guard, device), masters, device)


def measure_variant(variant: str, options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    device, config = torch.device(options.device), variant_config(variant, options)
    size = sizes(options)
    peak = matmul_peak(device)
    flops = config.model.flops_per_token(size["seq_len"])
    runner = build_runner(config, device)
    source = batches(options, config)
    assert isinstance(runner.model, Transformer)
    layout = runner.model.layout((1, min(size["seq_len"], config.model.window + 1)))
    paths = runner.model.paths(layout) | {"micro-batch": runner.launcher.describe()}
    keep({"rows": size["rows"], "seq_len": size["seq_len"], "step_rows": size["step_rows"], "paths": paths})
    keep({"parameters": config.model.num_params(), "flops_per_token": flops})

    first, losses = time.perf_counter(), []
    loading: list[float] = []
    """Seconds for which a step waits for its rows. Here nothing is prefetched, in training a thread fills ahead."""
    reading: list[float] = []
    """Seconds from the end of the device's work until a step's numbers are on the host as a record has them."""

    def step(number: int) -> None:
        planned = PlannedStep(number, "bench", size["step_rows"], 0, 1.0)
        started = time.perf_counter()
        rows = next(source)
        loading.append(time.perf_counter() - started)
        packed = runner.run(planned, rows.split(size["rows"]))
        synchronize(device)
        started = time.perf_counter()
        losses.append(packed.read()["loss"])
        reading.append(time.perf_counter() - started)

    step(0)
    step(1)
    synchronize(device)
    keep({"warm_up_seconds": time.perf_counter() - first})
    seconds = [timed(lambda number=number: step(2 + number), device, 1, 0)[0] for number in range(options.steps)]
    tokens = size["step_rows"] * size["seq_len"]
    keep({"loss": losses[-1], "losses": losses, "peak_gib": peak_gib(device)})
    keep({"step": speed(seconds, tokens, flops, peak)})
    keep({"loader_share": statistics.median(loading) / statistics.median(seconds)})
    keep({"metrics_share": statistics.median(reading) / statistics.median(seconds)})

    rows = next(source)[: size["rows"]]
    share, batch = step_share([rows], device), to_device(rows, device)
    alone = timed(lambda: runner.launcher.run(batch, share), device, options.repeats, 1)
    keep({"fwd_bwd": speed(alone, size["rows"] * size["seq_len"], flops, peak)})

    runner.optimizer.set_lr(1e-6)
    skip = torch.zeros((), device=device)
    optimizer = statistics.median(
        timed(lambda: (runner.optimizer.step(skip=skip), runner.masters.refresh()), device, 3, 1)
    )
    half_million = 2**19 / (size["rows"] * size["seq_len"]) * statistics.median(alone)
    keep({"optimizer_seconds": optimizer, "optimizer_share": optimizer / statistics.median(seconds)})
    keep({"optimizer_share_of_half_a_million_tokens": optimizer / (half_million + optimizer)})
    if not options.no_profile and device.type == "cuda":
        keep(profile_parts(lambda: step(99)))
