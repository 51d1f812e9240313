"""Ways to compute windowed and global attention over packed documents: forward and backward, checked and timed.

    python bench/attention.py --out FILE                          # Nano's heads, rows of 4096 tokens, on a GPU
    python bench/attention.py --out FILE --device cpu --seq-len 256 --window 64 --variants masked   # toy

Variants: `flex`, what training runs; `flex-tuned`, the same with the compiler searching block sizes; `flex-64` and so
on, with block sizes of the backward pass as named; `varlen`, FlashAttention on documents as sequences of their own;
`masked`, the plain reference, for small sizes. Each is compared with `flex` (on a CPU with `masked`): largest
difference of output and gradients over their largest values. Times are medians after warm-up.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from trainbench.shapes import made_up_rows
from trinity.base.files import write_json
from trinity.data.rows import to_device
from trinity.ops.attention import FlexPlan, dense_plan, fast_plan

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B,T,H,K], k [B,T,G,K], v [B,T,G,K]) -> [B,T,H,K]"""
BLOCKS: dict[str, dict[str, int]] = {
    "flex-64": {"BLOCK_M1": 64, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 64},
    "flex-64-128": {"BLOCK_M1": 64, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 64},
    "flex-32-128": {"BLOCK_M1": 32, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 32},
    "flex-64-128-8w": {"BLOCK_M1": 64, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 64, "bwd_num_warps": 8},
    "flex-64-128-4w": {"BLOCK_M1": 64, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 64, "bwd_num_warps": 4},
}
VARIANTS = ("flex", "flex-tuned", *BLOCKS, "varlen", "masked")


def main() -> int:
    options = _parse()
    device = torch.device(options.device)
    result: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(options).items()}, "kinds": {}}
    if device.type == "cuda":
        result["device"] = torch.cuda.get_device_name()
    for kind, window in (("local", options.window), ("global", None)):
        found = result["kinds"].setdefault(kind, {})
        inputs, segments_BT = make_inputs(options, device)
        expected = None
        for name in options.variants:
            torch.compiler.reset()
            try:
                attend = make(name, options, window, segments_BT, device)
                actual = gradients(attend, *inputs)
                times = measure(attend, inputs, options.repeats, device)
            except Exception as error:  # the others are still worth knowing; said in the result
                found[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
            else:
                expected = expected or actual
                found[name] = times | {"differences": [difference(a, e) for a, e in zip(actual, expected, strict=True)]}
            print(kind, name, found[name], flush=True)
            write_json(options.out, result)
    return 1 if any("error" in each for found in result["kinds"].values() for each in found.values()) else 0


def make_inputs(options: argparse.Namespace, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    rows = to_device(made_up_rows(options.rows, options.seq_len, 512, seed=0), device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    shape = options.rows, options.seq_len
    draws = torch.Generator().manual_seed(0)
    made = tuple(torch.randn(*shape, n, options.head_dim, generator=draws).to(device, dtype) for n in sizes)
    return made, rows.segments_BT


def make(
    name: str, options: argparse.Namespace, window: int | None, segments_BT: Tensor, device: torch.device
) -> Attend:
    size = (options.rows, options.seq_len)
    if name == "masked":
        return dense_plan(*size, window, segments_BT, device).attend
    if name == "varlen":
        return varlen(window, segments_BT)
    plan = fast_plan(*size, window, segments_BT, device)
    if name == "flex":
        return plan.attend
    assert isinstance(plan, FlexPlan), "FlexAttention needs a GPU here"
    mode = "max-autotune-no-cudagraphs" if name == "flex-tuned" else None
    compiled = torch.compile(flex_attention, mode=mode)
    blocks: Any = BLOCKS.get(name)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = compiled(q, k, v, block_mask=plan.block_mask, enable_gqa=True, kernel_options=blocks)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return attend


def varlen(window: int | None, segments_BT: Tensor) -> Attend:
    """Documents of all rows as sequences. Starts are padded with empty ones to a fixed number, as training must."""
    from torch.nn.attention.varlen import varlen_attn

    rows, seq_len = segments_BT.shape
    new_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    new_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = new_BT.flatten().nonzero().flatten()
    most = rows * seq_len // 32
    ends = torch.full((most + 1,), rows * seq_len, dtype=torch.int32, device=segments_BT.device)
    ends[: len(starts)] = starts.int()
    left = -1 if window is None else window - 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        more: dict[str, Any] = {"window_size": (left, 0)}
        if q.shape[2] != k.shape[2]:
            more["enable_gqa"] = True
        out = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, ends, seq_len, seq_len, **more)
        assert isinstance(out, Tensor)
        return out.view_as(q)

    return attend


def gradients(attend: Attend, q: Tensor, k: Tensor, v: Tensor, up: Tensor) -> list[Tensor]:
    """Output and gradients of q, k, v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(leaves[0], leaves[1], leaves[2])
    return [out.detach(), *torch.autograd.grad(out, leaves, up)]


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())


def measure(attend: Attend, inputs: tuple[Tensor, ...], repeats: int, device: torch.device) -> dict[str, float]:
    """Medians in milliseconds of forward, and of forward and backward."""
    q, k, v, up = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def both() -> None:
        torch.autograd.grad(attend(leaves[0], leaves[1], leaves[2]), leaves, up)

    @torch.no_grad()
    def forward() -> None:
        attend(q, k, v)

    found = {}
    for name, work in (("forward_ms", forward), ("both_ms", both)):
        seconds = []
        for number in range(repeats + 3):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(5):
                work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 3:
                seconds.append((time.perf_counter() - start) / 5)
        found[name] = round(1e3 * statistics.median(seconds), 4)
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[v for v in VARIANTS if v != "masked"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
