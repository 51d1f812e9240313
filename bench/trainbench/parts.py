"""The step's share by part, from the names of the kernels that ran."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = (
    ("attention", r"flex_attention|flash|fmha|_attention|sdpa|block_mask|create_block"),
    ("experts", r"grouped|Grouped|GroupProblem|_swiglu|silu"),
    (
        "routing",
        r"permute|combine|router|routing|topk|TopK|[Ss]ort|[Rr]adix|gatherTopK|bitonic|searchsorted|scatter|gather|^_add_up$",
    ),
    ("norms", r"rms_norm|_norm_|_residual_|layer_norm|RMSNorm|vectorized_layer_norm"),
    ("loss", r"cross_entropy|softmax|nll_loss|^_chunk$"),
    ("rope and gate", r"qk_norm|rope|_gate|sigmoid"),
    ("matrix products", r"gemm|cutlass|nvjet|wgmma|cublas|_mm_|addmm|bmm"),
    ("optimizer and accumulation", r"multi_tensor|foreach|adam|lerp|addcmul|^_accumulate$|^_direction$|^_move$"),
    ("copies", r"Memcpy|Memset|copy_|FillFunctor|CatArray"),
)
"""First match counts. Matrix products of projections, head and Muon have names of cuBLAS and cannot be told apart."""


def part_of(kernel: str) -> str:
    """The part that a kernel's name tells of, or "other"."""
    return next((part for part, pattern in PARTS if re.search(pattern, kernel)), "other")


def profile_parts(work: Callable[[], Any], most: int = 25) -> dict[str, Any]:
    """Share of the device's busy time by part, the `most` longest kernels, and how much of the time it was busy."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
    return summarize(
        [(e.key, e.self_device_time_total / 1e6, e.count) for e in profiler.key_averages()],
        start.elapsed_time(end) / 1e3,
        most,
    )


def summarize(kernels: list[tuple[str, float, int]], wall: float, most: int) -> dict[str, Any]:
    """`kernels`: (name, seconds of all calls, calls)."""
    kernels = [kernel for kernel in kernels if kernel[1] > 0]
    total = sum(seconds for _, seconds, _ in kernels)
    if not total:
        return {"profile_error": "the profiler saw no kernel"}
    parts: dict[str, float] = {}
    for name, seconds, _ in kernels:
        parts[part_of(name)] = parts.get(part_of(name), 0.0) + seconds / total
    longest = sorted(kernels, key=lambda kernel: -kernel[1])[:most]
    return {
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "busy": total / wall,
        "kernel_calls": sum(calls for _, _, calls in kernels),
        "kernels": [{"name": n[:110], "share": s / total, "calls": c, "seconds": s} for n, s, c in longest],
    }
