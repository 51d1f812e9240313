"""The plain forward from public files equals an implementation that nobody of this project wrote."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trinity.export.oracle import oracle_forward

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["A", "B"])
def test_logits_and_routing_equal_the_golden_data(name: str) -> None:
    golden = load_file(GOLDEN / name / "golden.safetensors")
    output = oracle_forward(GOLDEN / name, golden["input_ids"])
    expected = golden["logits"]
    assert (output.logits_BTV - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    layers = sorted(int(key.split(".")[1]) for key in golden if key.endswith(".experts"))
    for row, layer in enumerate(layers):
        chosen = golden[f"router.{layer}.experts"].flatten().long()
        counts = torch.bincount(chosen, minlength=output.counts_LE.shape[1])
        assert torch.equal(output.counts_LE[row], counts)
