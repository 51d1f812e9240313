"""Layouts over 1, 2 and 4 processes against one: losses, raw gradients, biases, Muon's updates."""

from pathlib import Path

import pytest
import torch

from layouts import compare_layouts, config, reference
from processes import run

LAYOUTS: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{}, {"expert": 2}, {"replicate": 2}, {"context": 2}],
    4: [
        {},
        {"replicate": 2},
        {"expert": 2},
        {"expert": 4},
        {"replicate": 2, "expert": 2},
        {"context": 2, "expert": 2},
        {"context": 4, "expert": 4},
    ],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    reference(folder, config(), torch.device("cpu"))
    return folder


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_a_layout_trains_as_one_process(alone: Path, ranks: int) -> None:
    run(compare_layouts, ranks, str(alone), LAYOUTS[ranks], "cpu", True)
