"""What the optimizer step costs: its seconds beside those of forward and backward, at a given number of tokens a step.

    python bench/optimizer.py --out FILE                                   # Trinity Nano at full shape on a GPU
    python bench/optimizer.py --out FILE --preset demo --seq-len 64 --micro-rows 4 --tokens 8192     # toy, any device

Forward and backward are those of training: compiled blocks on a GPU, loss, gradients added up; of one micro-batch of
random tokens, times the micro-batches of a step. The optimizer step is `MuonAdamW.step` and the refresh of the working
copies, with the guard's verdict on the device, as in training. What else a step does (clipping, balancing) is left out.
Times are medians after warm-up, on a GPU between events of the device.

Memory of the preset nano (6.1 B parameters): `--weights masters` 80 GiB and activations, `plain` (bfloat16 weights,
gradients and momentum) 34 GiB. `auto` takes masters on a GPU of 120 GiB or more.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from start import MASTERS_GIB, device_gib, device_name, peak_memory
from trinity.base.files import write_json
from trinity.config import RunConfig, resolve
from trinity.data.rows import Rows, empty_rows
from trinity.model.transformer import Transformer
from trinity.optim.optimizer import build_optimizer
from trinity.train.losses import language_model_loss, to_device
from trinity.train.precision import MasterWeights
from trinity.train.step import step_share


def main() -> int:
    options = _parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = options.weights
    if weights == "auto":
        weights = "masters" if device.type == "cpu" or device_gib() >= MASTERS_GIB else "plain"
    config, _ = resolve(options.preset, options.overlay, options.set)
    found = measure(config, device, weights == "masters", options)
    result = {
        "device": device_name(),
        "torch": torch.__version__,
        "preset": options.preset,
        "set": options.set,
        "weights": weights,
        "seq_len": options.seq_len,
        "micro_rows": options.micro_rows,
        "tokens": options.tokens,
        **found,
        **peak_memory(),
    }
    write_json(options.out, result)
    print(
        f"optimizer {found['optimizer_seconds']:.4f} s (Muon {found['muon_seconds']:.4f}, AdamW "
        f"{found['adamw_seconds']:.4f}, refresh {found['refresh_seconds']:.4f}), forward and backward "
        f"{found['compute_seconds']:.3f} s for {options.tokens:,} tokens: {found['share']:.2%} of the step"
    )
    return 0


def measure(config: RunConfig, device: torch.device, masters: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each part, and the optimizer's share of the step."""
    with device:
        model = Transformer(config.model)
    model.init_weights(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if not masters:
        model.to(dtype)
    optimizer = build_optimizer(model, config.model, config.optim)
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64  # as in training
        for block in model.layers:
            block.compile()
    copies = MasterWeights(model, dtype if masters else torch.float32)
    rows = random_rows(config, options.micro_rows, options.seq_len)
    share = step_share([rows], device)

    def compute() -> None:
        language_model_loss(model, to_device(rows, device), share, config.loss).loss.backward()

    tokens = options.micro_rows * options.seq_len
    micro_batch = median_seconds(compute, device, options.repeats)
    keep = torch.zeros((), device=device)
    rate = config.optim.muon_lr * 1e-3  # the weights stay where they are, or nearly
    optimizer.set_lr(1e-3)

    def adamw() -> None:
        optimizer.adamw.found_inf = keep  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.adamw.step()

    seconds = {
        "muon_seconds": median_seconds(lambda: optimizer.muon.step(rate, keep), device, options.repeats),
        "adamw_seconds": median_seconds(adamw, device, options.repeats),
        "refresh_seconds": median_seconds(copies.refresh, device, options.repeats),
        "optimizer_seconds": median_seconds(
            lambda: (optimizer.step(skip=keep), copies.refresh()), device, options.repeats
        ),
    }
    compute_seconds = micro_batch * options.tokens / tokens
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "muon_parameters": sum(m.parameter.numel() for m in optimizer.groups.muon),
        "micro_batch_seconds": micro_batch,
        "compute_seconds": compute_seconds,
        "tokens_per_second": options.tokens / (compute_seconds + seconds["optimizer_seconds"]),
        **seconds,
        "share": seconds["optimizer_seconds"] / (compute_seconds + seconds["optimizer_seconds"]),
    }


def random_rows(config: RunConfig, rows: int, seq_len: int) -> Rows:
    """Full rows of one document each."""
    made = empty_rows(rows, seq_len)
    draws = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, seq_len + 1))
    made.tokens_BT[:], made.targets_BT[:] = draws[:, :-1], draws[:, 1:]
    made.segments_BT[:] = 0
    made.positions_BT[:] = np.arange(seq_len)
    return made


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of `work` after two calls that do not count (compilation, allocation)."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--tokens", type=int, default=524_288, help="of one optimizer step")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--micro-rows", type=int, default=2)
    parser.add_argument("--weights", choices=("auto", "masters", "plain"), default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--overlay", type=Path, action="append", default=[])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
