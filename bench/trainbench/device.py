"""Clocks, memory and random weights on the device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    """The most that torch had allocated or reserved for graphs since the start of the process."""
    return torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0


def timed(work: Callable[[], Any], device: torch.device, repeats: int, warm_up: int) -> list[float]:
    """Seconds of each of `repeats` calls, the device waited for at both ends."""
    seconds = []
    for index in range(warm_up + repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if index >= warm_up:
            seconds.append(time.perf_counter() - start)
    return seconds


def speed(seconds: list[float], tokens: int, flops_per_token: float, peak: float | None) -> dict[str, Any]:
    """Median, slowest and fastest tokens/s of repeats of `tokens` tokens each, and MFU of the median."""
    median = statistics.median(seconds)
    return {
        "tokens_per_second": tokens / median,
        "slowest": tokens / max(seconds),
        "fastest": tokens / min(seconds),
        "median_seconds": median,
        "repeats": len(seconds),
        "mfu": flops_per_token * tokens / median / peak if peak else None,
    }


@torch.no_grad()
def random_weights(model: nn.Module, std: float) -> None:
    """Normal matrices drawn on the device (a run draws them on the CPU, which takes a minute for 6 B); vectors stay."""
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=std, generator=generator)


def matmul_peak(device: torch.device) -> float | None:
    """FLOP/s of bfloat16 products of 8192 x 8192 matrices, best of 10; None on a CPU, where MFU says nothing here."""
    if device.type != "cuda":
        return None
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / min(timed(lambda: a @ b, device, 10, 3))
