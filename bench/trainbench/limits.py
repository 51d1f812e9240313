"""What the device can do at best: the figures that the rest is measured against."""

import argparse
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from trainbench.device import matmul_peak, timed
from trainbench.shapes import make_config, sizes


def measure_limits(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    keep({"device": name, "torch": torch.__version__, "python": platform.python_version()})
    if device.type != "cuda":
        return
    keep({"matmul_tflops": (matmul_peak(device) or 0.0) / 1e12})
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    keep({"copy_tb_per_second": 2 * 2**30 / min(timed(lambda: target.copy_(source), device, 10, 3)) / 1e12})
    size, config = sizes(options), make_config(options)
    model = config.model
    rows = size["rows"] * size["seq_len"] * model.experts_per_token
    x_RD = torch.randn(rows, model.dim, device=device, dtype=torch.bfloat16)
    weight_EFD = torch.randn(model.num_experts, 2 * model.expert_dim, model.dim, device=device, dtype=torch.bfloat16)
    ends_E = (torch.arange(1, model.num_experts + 1, device=device) * rows // model.num_experts).int()
    seconds = min(timed(lambda: F.grouped_mm(x_RD, weight_EFD.transpose(1, 2), offs=ends_E), device, 10, 3))
    keep({"grouped_tflops": 2 * rows * model.dim * 2 * model.expert_dim / seconds / 1e12, "grouped_rows": rows})
