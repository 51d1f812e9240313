"""The layouts of `test_layouts.py` over NCCL: weights and rows as they lie on GPUs, against one GPU."""

from pathlib import Path

import pytest
import torch

from layouts import Bounds, compare_layouts, config, reference
from processes import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Grouped products want bfloat16 on a GPU, so experts over ranks are compared in it. FlexAttention wants 16 channels.
EXACT = ("runtime.cuda_graphs=false", "runtime.kernels=reference", "model.head_dim=16")
FAST = (
    "runtime.cuda_graphs=false",
    "runtime.dtype=bfloat16",
    "model.head_dim=16",
    "model.dim=64",
    "model.expert_dim=32",
)
NOT_EXACT = Bounds(loss=2e-2, gradient=3e-2, gain=6e-2, step=2e-3, same_counts=False)
EXACT_ON_GPU = Bounds(loss=5e-5, gradient=1e-5, gain=3e-5, step=1e-3, same_counts=True)

LAYOUTS: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{}, {"replicate": 2}, {"context": 2}, {"expert": 2}, {"context": 2, "expert": 2}],
    4: [{"replicate": 2, "expert": 2}, {"context": 2, "expert": 4}],
}


@pytest.mark.parametrize("ranks", LAYOUTS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_layout_trains_as_one_gpu(tmp_path: Path, ranks: int, kind: str) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    exact = kind == "float32"
    settings = config(*(EXACT if exact else FAST))
    torch.backends.cuda.matmul.allow_tf32 = False
    reference(tmp_path, settings, torch.device("cuda", 0))
    layouts = [layout for layout in LAYOUTS[ranks] if not (exact and "expert" in layout)]
    bounds = EXACT_ON_GPU if exact else NOT_EXACT
    run(compare_layouts, ranks, str(tmp_path), layouts, settings, "cuda", bounds, backend="cpu:gloo,cuda:nccl")
