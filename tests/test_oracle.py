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
        assert torch.equal(output.indices_LNk[row], golden[f"router.{layer}.experts"].long())
    assert output.regret_LN.max() == 0


def test_replayed_choices_are_used_and_their_regret_is_told() -> None:
    golden = load_file(GOLDEN / "B" / "golden.safetensors")
    first = oracle_forward(GOLDEN / "B", golden["input_ids"])
    again = oracle_forward(GOLDEN / "B", golden["input_ids"], first.indices_LNk.flip(-1))
    assert torch.allclose(again.logits_BTV, first.logits_BTV, atol=1e-5)
    swapped = first.indices_LNk.clone()
    swapped[1, 5] = (swapped[1, 5] + 1) % 16
    other = oracle_forward(GOLDEN / "B", golden["input_ids"], swapped)
    assert (other.regret_LN[1] > 0).nonzero().flatten().tolist() == [5]
    assert not torch.allclose(other.logits_BTV[0, 5:], first.logits_BTV[0, 5:], atol=1e-3)
