"""The model against numbers that a third party's implementation computed (tests/golden/README.md)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from afmoe_keys import model_config, to_ours
from safetensors.torch import load_file
from torch import Tensor

from trinity.model.norm import Kernels
from trinity.model.transformer import Transformer

GOLDEN = Path(__file__).parent / "golden"
CASES = [(name, kernels) for name in ("A", "B") for kernels in ("reference", "fast")]


def load(name: str, kernels: Kernels) -> tuple[Transformer, dict[str, Tensor]]:
    config = model_config(json.loads((GOLDEN / name / "config.json").read_text()))
    model = Transformer(config, kernels)
    model.load_state_dict(to_ours(config, load_file(GOLDEN / name / "model.safetensors")))
    return model, load_file(GOLDEN / name / "golden.safetensors")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), f"{what} is off by {error}"


@pytest.mark.parametrize(("name", "kernels"), CASES)
def test_forward_layer_by_layer(name: str, kernels: Kernels) -> None:
    model, golden = load(name, kernels)
    seen: dict[str, Any] = {}

    def keep(key: str):
        def hook(module, inputs, output) -> None:
            seen[key] = output

        return hook

    for i, block in enumerate(model.layers):
        block.attn.register_forward_hook(keep(f"layer.{i}.attn_out"))
        (block.moe if block.moe is not None else block.ffn).register_forward_hook(keep(f"layer.{i}.mlp_out"))
        block.register_forward_hook(keep(f"layer.{i}.out"))
        if block.moe is not None:
            block.moe.router.register_forward_hook(keep(f"router.{i}"))
    tokens = golden["input_ids"]
    with torch.no_grad():
        logits = model(tokens)
        assert_close(model.embed_tokens(tokens), golden["embed_out"], 1e-5, "embed_out")
        assert_close(model.features(tokens).x_BTD, golden["final_norm"], 1e-5, "final_norm")
    assert_close(logits, golden["logits"], 1e-5, "logits")
    for key, output in seen.items():
        if key.startswith("router"):
            assert_close(output.logits_NE, golden[f"{key}.logits"], 1e-5, f"{key}.logits")
            assert torch.equal(output.indices_Nk, golden[f"{key}.experts"].long()), f"{key} picks other experts"
            assert_close(output.weights_Nk, golden[f"{key}.weights"], 1e-5, f"{key}.weights")
        else:
            assert_close(output[0] if isinstance(output, tuple) else output, golden[key], 1e-5, key)
    assert len(seen) == 4 * model.config.num_layers - model.config.num_dense_layers


@pytest.mark.parametrize(("name", "kernels"), CASES)
def test_loss_and_gradients(name: str, kernels: Kernels) -> None:
    """The weights are functions of the public ones, so that autograd returns gradients under the public names."""
    model, golden = load(name, kernels)
    public = load_file(GOLDEN / name / "model.safetensors")
    names = json.loads((GOLDEN / name / "grad_names.json").read_text())
    for key in names:
        public[key].requires_grad_()
    tokens = golden["input_ids"]
    logits = torch.func.functional_call(model, to_ours(model.config, public), (tokens,))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(loss.detach(), golden["loss"], 1e-5, "loss")
    loss.backward()
    for i, key in enumerate(names):
        gradient = public[key].grad
        assert gradient is not None, key
        weave = torch.cos(0.01 * torch.arange(1, gradient.numel() + 1, dtype=torch.float64))
        assert_close(gradient.double().norm(), golden["grad.norms"][i], 1e-4, f"norm of {key}")
        assert_close(gradient.double().flatten() @ weave, golden["grad.dots"][i], 1e-4, f"dot of {key}")
        if f"grad.full.{key}" in golden:
            assert_close(gradient, golden[f"grad.full.{key}"], 1e-4, key)


@pytest.mark.parametrize("name", ["A", "B"])
def test_greedy_continuation(name: str) -> None:
    """Without a cache: 32 greedy tokens, and the logits at each step."""
    model, golden = load(name, "fast")
    tokens = golden["gen.prompt"].long()
    expected = golden["gen.tokens"].long().flatten()
    for step in range(32):
        with torch.no_grad():
            logits_V = model(tokens)[0, -1]
        assert_close(logits_V, golden["gen.step_logits"][step], 1e-5, f"logits of step {step}")
        assert logits_V.argmax() == expected[step], f"step {step}"
        tokens = torch.cat([tokens, logits_V.argmax().view(1, 1)], dim=1)
