"""FP8 exports: the layout engines read, what rounding costs, and faults that the gate must catch."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from test_export import SMALL, random_model
from trinity.base.errors import UserError
from trinity.config import ModelConfig
from trinity.export.afmoe import export_afmoe
from trinity.export.balance_state import STATE
from trinity.export.formats import FORMATS, Format
from trinity.export.parity import ParityError, Sample, check_parity
from trinity.export.reading import import_afmoe
from trinity.model.transformer import Transformer
from trinity.ops.block_fp8 import dequantize_blocks, fake_quantize_groups, quantize_blocks

Tensors = dict[str, torch.Tensor]
WHOLE = SMALL.model_copy(
    update={"dim": 256, "head_dim": 64, "ffn_dim": 256, "expert_dim": 128, "num_layers": 3, "num_experts": 3}
)
"""Every quantised matrix consists of whole blocks, and q, k and o of more than one."""


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([16, 128]), st.integers(0, 99))
def test_a_value_moves_by_less_than_e4m3_is_coarse(out: int, inner: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=generator) * torch.logspace(-6, 6, out)[:, None]
    stored, scale = quantize_blocks(weight, block)
    assert stored.shape == weight.shape
    assert stored.dtype == torch.float8_e4m3fn
    assert scale.shape == (-(-out // block), -(-inner // block))
    back = dequantize_blocks(stored, scale, block, block)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            area = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            largest = weight[area].abs().max()
            assert scale[i, j] == pytest.approx((largest / 448).item())
            error = (back[area] - weight[area]).abs()
            assert (error <= weight[area].abs() / 16 + largest * 2.0**-10 / 448 * 1.001).all()


def test_zeros_stay_zeros_and_experts_are_quantised_each_alone() -> None:
    weight = torch.randn(3, 130, 140)
    weight[1] = 0
    stored, scale = quantize_blocks(weight)
    assert scale.shape == (3, 2, 2)
    assert not dequantize_blocks(stored, scale)[1].any()
    for e in range(3):
        alone, own = quantize_blocks(weight[e])
        assert torch.equal(alone.view(torch.uint8), stored[e].view(torch.uint8))
        assert torch.equal(own, scale[e])
    x = torch.randn(5, 300)
    assert (fake_quantize_groups(x) - x).abs().max() <= x.abs().max() / 16
    assert not fake_quantize_groups(torch.zeros(2, 130)).any()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(WHOLE)


@pytest.fixture(scope="module")
def written(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8") / "model"
    sample = Sample("twelve windows", torch.randint(WHOLE.vocab_size, (2, 64)))
    report = export_afmoe(model, WHOLE, None, out, dtype="fp8-block", sample=sample)
    compared = {"our reader", "independent forward pass", "transformers"} - set(report.skipped)
    assert set(report.max_error) == compared
    assert "accelerate" in report.skipped.get("transformers", "accelerate")
    quality = report.quality
    assert quality is not None
    assert (quality.text, quality.num_tokens) == ("twelve windows", 126)
    assert quality.perplexity == pytest.approx(quality.perplexity_bf16, rel=0.5)
    assert 0.3 < quality.top1_w8a8 <= 1
    assert f"{quality.perplexity:.4f}" in (out / "README.md").read_text()
    return out


def test_the_layout_is_that_of_the_engines(written: Path, model: Transformer) -> None:
    tensors = load_file(written / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    assert tensors[name].dtype == torch.float8_e4m3fn
    assert tensors[f"{name}_scale_inv"].dtype == torch.float32
    assert tensors[f"{name}_scale_inv"].shape == (1, 2)
    assert tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"].shape == (2, 2)
    plain = [key for key, value in tensors.items() if value.dtype != torch.float8_e4m3fn and "_scale_inv" not in key]
    ends = ("norm.weight", "layernorm.weight", "router.gate.weight", "embed_tokens.weight", "lm_head.weight", "_bias")
    assert all(key.endswith(ends) for key in plain)
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.router.gate", "model.layers.2.mlp.router.gate"],
    }


def test_compressed_tensors_hold_the_same_numbers(written: Path, model: Transformer, tmp_path: Path) -> None:
    report = export_afmoe(model, WHOLE, None, tmp_path / "out", dtype="compressed-tensors")
    assert "compressed-tensors" in report.skipped["transformers"]
    ours, block = load_file(tmp_path / "out" / "model.safetensors"), load_file(written / "model.safetensors")
    assert {name.replace("_scale_inv", "_scale") for name in block} == set(ours)
    for name, tensor in block.items():
        assert torch.equal(tensor.float(), ours[name.replace("_scale_inv", "_scale")].float())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized"
    assert config["config_groups"]["group_0"]["weights"]["block_structure"] == [128, 128]
    assert config["ignore"][0] == "lm_head"


def test_shapes_without_whole_blocks_are_written_and_the_report_says_who_refuses(tmp_path: Path) -> None:
    report = export_afmoe(random_model(SMALL), SMALL, None, tmp_path / "out", dtype="fp8-block")
    assert "whole blocks" in report.skipped["transformers"]
    assert report.max_error["independent forward pass"] <= 1e-4


def test_fused_experts_with_scales_and_scales_of_powers_of_two_are_read(written: Path, tmp_path: Path) -> None:
    _, expected = import_afmoe(written)
    tensors = load_file(written / "model.safetensors")
    for layer in (1, 2):
        for ours, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            for end in ("", "_scale_inv"):
                stacks = []
                for e in range(3):
                    names = [f"model.layers.{layer}.mlp.experts.{e}.{part}.weight{end}" for part in parts]
                    stacks.append(
                        torch.cat([tensors.pop(name).view(torch.uint8 if not end else torch.float32) for name in names])
                    )
                fused = torch.stack(stacks)
                tensors[f"model.layers.{layer}.mlp.experts.{ours}{end}"] = (
                    fused if end else fused.view(torch.float8_e4m3fn)
                )
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", STATE):
        (tmp_path / name).write_text((written / name).read_text())
    _, found = import_afmoe(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    exponents = tensors[name].log2().round().exp2()
    tensors[name] = exponents.to(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / "model.safetensors")
    _, found = import_afmoe(tmp_path)
    stored = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(found["layers.0.attn.qkvg.weight"][:256], dequantize_blocks(stored, exponents))


def test_a_broken_model_is_not_quantised(tmp_path: Path) -> None:
    model = random_model(SMALL)
    with torch.no_grad():
        model.state_dict()["layers.1.moe.experts.down"][2, 3, 4] = float("inf")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.2\.down_proj\.weight holds NaN or infinity"):
        export_afmoe(model, SMALL, None, tmp_path / "out", dtype="fp8-block")
    assert list(tmp_path.iterdir()) == []


def change(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: by(tensors[name]).contiguous()})


def swap(one: str, other: str) -> Callable[[Tensors], Any]:
    def exchange(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    return exchange


Q = "model.layers.2.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.experts.1.down_proj.weight"
FAULTS: dict[str, Callable[[Tensors], Any]] = {
    "scale transposed": change(f"{Q}_scale_inv", lambda scale: scale.T),
    "scale inverted": change(f"{Q}_scale_inv", lambda scale: 1 / scale),
    "scale of another expert": swap(f"{DOWN}_scale_inv", f"{DOWN.replace('.1.down', '.2.down')}_scale_inv"),
    "scale of ones": change(f"{DOWN}_scale_inv", torch.ones_like),
    "scale in bfloat16": change(f"{DOWN}_scale_inv", lambda scale: scale.bfloat16().float()),
    "scales rolled": change(f"{Q}_scale_inv", lambda scale: scale.roll(1, 0)),
    "one scale doubled": change(f"{Q}_scale_inv", lambda scale: scale * torch.tensor([[1.0, 2.0], [1.0, 1.0]])),
    "scale negative": change(f"{DOWN}_scale_inv", torch.neg),
    "scale not a number": change(f"{DOWN}_scale_inv", lambda scale: scale * float("nan")),
    "weight transposed": change(Q, lambda weight: weight.view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)),
    "weight of another projection": swap(Q, "model.layers.1.self_attn.q_proj.weight"),
    "sign bits lost": change(DOWN, lambda weight: (weight.view(torch.uint8) & 127).view(torch.float8_e4m3fn)),
    "a bias in bfloat16": change("model.layers.1.mlp.expert_bias", lambda bias: bias.bfloat16().float()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files_are_caught(fault: str, model: Transformer, written: Path, tmp_path: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    FAULTS[fault](tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", STATE):
        (tmp_path / name).write_text((written / name).read_text())
    with pytest.raises(ParityError, match="other values"):
        check_parity(model, tmp_path, stored_as=FORMATS["fp8-block"])


def test_scales_of_another_shape_are_refused(model: Transformer, written: Path, tmp_path: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    tensors[f"{DOWN}_scale_inv"] = tensors[f"{DOWN}_scale_inv"].T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", STATE):
        (tmp_path / name).write_text((written / name).read_text())
    with pytest.raises(UserError, match=r"down_proj.weight_scale_inv has shape \(1, 2\).*make \(2, 1\)"):
        check_parity(model, tmp_path, stored_as=FORMATS["fp8-block"])


def coarse(quantize: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(weight: torch.Tensor, block: int = 128) -> Any:
        return quantize((weight * 4).round() / 4, block)

    return wrong


def saturated(quantize: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(weight: torch.Tensor, block: int = 128) -> Any:
        return quantize(weight.clamp(-0.05, 0.05), block)

    return wrong


def transposed(quantize: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(weight: torch.Tensor, block: int = 128) -> Any:
        stored, scale = quantize(weight, block)
        return stored, scale.T.contiguous() if scale.shape[0] == scale.shape[1] else scale

    return wrong


@pytest.mark.parametrize("fault", [coarse, saturated, transposed])
def test_a_quantiser_that_is_wrong_for_writer_and_gate_alike_is_caught(
    fault: Callable[..., Any], model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = importlib.import_module("trinity.export.formats")
    monkeypatch.setattr(formats, "quantize_blocks", fault(quantize_blocks))
    with pytest.raises(ParityError, match="FP8 is coarse"):
        export_afmoe(model, WHOLE, None, tmp_path / "out", dtype="fp8-block")


def test_a_scale_that_writer_and_reader_both_invert_is_caught_by_the_independent_pass(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, files = Format.stored, importlib.import_module("trinity.export.files")
    expand = files.TensorFiles._expand

    def inverted(self: Format, public: str, value: torch.Tensor) -> Tensors:
        return {name: 1 / t if name.endswith("_scale_inv") else t for name, t in stored(self, public, value).items()}

    monkeypatch.setattr(Format, "stored", inverted)
    monkeypatch.setattr(files.TensorFiles, "_expand", lambda self, scale, *rest: expand(self, 1 / scale, *rest))
    monkeypatch.setattr(importlib.import_module("trinity.export.parity"), "_compare_tensors", lambda *_: None)
    with pytest.raises(ParityError, match="independent forward pass"):
        export_afmoe(model, WHOLE, None, tmp_path / "out", dtype="fp8-block")


def test_config_without_layers_of_experts_lists_the_head_alone(tmp_path: Path) -> None:
    config: ModelConfig = SMALL.model_copy(update={"num_dense_layers": 4})
    export_afmoe(random_model(config), config, None, tmp_path / "out", dtype="fp8-block")
    public = json.loads((tmp_path / "out" / "config.json").read_text())
    assert public["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
