"""Peak matrix throughput of the device, the denominator of MFU."""

import re
import time

import torch

# Dense bf16 TFLOP/s of NVIDIA's data sheets (without sparsity), by the name that CUDA gives; the first match counts.
DATA_SHEET = (
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s and where the number is from: "data sheet" for known GPUs in bfloat16, else "measured"."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, tera in DATA_SHEET:
            if re.search(rf"\b{known}\b", name):
                return tera * 1e12, "data sheet"
    return measure_matmul(device, dtype), "measured"


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few square matrix products; some tens of milliseconds."""
    size = 8192 if device.type == "cuda" else 768
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
