"""The parity gate catches faults that keys and shapes do not show, also those that writer and reader share."""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trinity.export.keys
from test_export import SMALL, random_model
from trinity.config import ModelConfig
from trinity.export.afmoe import export_afmoe
from trinity.export.formats import FORMATS
from trinity.export.keys import Piece
from trinity.export.parity import ParityError, check_parity
from trinity.model.transformer import Transformer

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SMALL)


@pytest.fixture(scope="module")
def written(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parity") / "model"
    report = export_afmoe(model, SMALL, None, out, dtype=torch.float32)
    assert set(report.max_error) == {"our reader", "independent forward pass", "transformers"}
    assert report.max_error["our reader"] == 0
    assert report.skipped == {}
    return out


def swap(tensors: Tensors, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()


def layer(i: int, name: str) -> str:
    return f"model.layers.{i}.{name}"


def change(i: int, name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({layer(i, name): by(tensors[layer(i, name)])})


def exchange(i: int, one: str, other: str) -> Callable[[Tensors], Any]:
    return lambda tensors: swap(tensors, layer(i, one), layer(i, other))


TENSOR_FAULTS: dict[str, Callable[[Tensors], Any]] = {
    "a bias is zero": change(2, "mlp.expert_bias", torch.zeros_like),
    "a bias is rounded": change(1, "mlp.expert_bias", lambda bias: bias.bfloat16().float()),
    "gate and up of an expert": exchange(1, "mlp.experts.2.gate_proj.weight", "mlp.experts.2.up_proj.weight"),
    "gate and up of a dense layer": exchange(0, "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "gate and query": exchange(3, "self_attn.gate_proj.weight", "self_attn.q_proj.weight"),
    "key and value": exchange(3, "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "q and k norm": exchange(2, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    "norms": exchange(2, "input_layernorm.weight", "post_attention_layernorm.weight"),
    "two experts": exchange(3, "mlp.experts.0.down_proj.weight", "mlp.experts.1.down_proj.weight"),
    "router rows": change(3, "mlp.router.gate.weight", lambda weight: weight.roll(1, 0)),
    "tied head": lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    "a norm of ones": lambda tensors: tensors["model.norm.weight"].fill_(1.0),
    "not a number": lambda tensors: tensors["model.norm.weight"][0].fill_(float("nan")),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_faulty_tensors_in_the_files_are_caught(fault: str, model: Transformer, written: Path, tmp_path: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    TENSOR_FAULTS[fault](tensors)
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    check_parity(model, tmp_path, stored_as=FORMATS["float32"], with_transformers=False)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ParityError, match="other values"):
        check_parity(model, tmp_path, stored_as=FORMATS["float32"])


def test_a_momentum_that_is_lost_is_caught(model: Transformer, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    (tmp_path / "trinity_state.json").unlink()
    with pytest.raises(
        ParityError, match=r"layers\.1\.moe\.router\.momentum comes back from the files with other values"
    ):
        check_parity(model, tmp_path, stored_as=FORMATS["float32"])


CONFIG_FAULTS: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 9},
    "window, smaller": {"sliding_window": 7},
    "theta": {"rope_theta": 20000.0, "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}},
    "embedding scale": {"mup_enabled": False},
    "route scale": {"route_scale": 2.1},
    "route norm": {"route_norm": False},
    "experts per token": {"num_experts_per_tok": 1},
    "epsilon": {"rms_norm_eps": 1e-2},
    "layer kinds": {"layer_types": ["full_attention"] + ["sliding_attention"] * 3},
    "no global layer": {"layer_types": ["sliding_attention"] * 4},
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_config_that_writer_and_reader_agree_on_is_caught(
    fault: str, model: Transformer, written: Path, tmp_path: Path
) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    public = json.loads((written / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**public, **CONFIG_FAULTS[fault]}))
    with pytest.raises(ParityError, match="our reader"):
        check_parity(model, tmp_path, stored_as=FORMATS["float32"])


def renamed(one: str, other: str) -> Callable[[Piece], Piece]:
    """A mapping that takes one public name for another."""

    def change(piece: Piece) -> Piece:
        if one in piece.public:
            return piece._replace(public=piece.public.replace(one, other))
        return piece._replace(public=piece.public.replace(other, one))

    return change


def moved_expert(piece: Piece) -> Piece:
    return piece if piece.expert is None else piece._replace(expert=(piece.expert + 1) % SMALL.num_experts)


MAPPING_FAULTS: dict[str, Callable[[Piece], Piece]] = {
    "gate and up": renamed("mlp.gate_proj", "mlp.up_proj"),
    "gate and up of experts": renamed(".1.gate_proj", ".1.up_proj"),
    "gate and query": renamed("self_attn.gate_proj", "self_attn.q_proj"),
    "key and value": renamed("k_proj", "v_proj"),
    "q and k norm": renamed("q_norm", "k_norm"),
    "sandwich norms": renamed("input_layernorm", "post_attention_layernorm"),
    "attention and FFN norms": renamed("post_attention_layernorm", "pre_mlp_layernorm"),
    "embedding and head": renamed("model.embed_tokens", "lm_head"),
    "experts": moved_expert,
}


@pytest.mark.parametrize("fault", MAPPING_FAULTS)
def test_a_mapping_that_is_wrong_in_both_directions_is_caught(
    fault: str, model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading undoes what writing did wrong, so only the independent pass can see it; nothing is left on disk."""
    right = trinity.export.keys.pieces

    def wrong(config: ModelConfig) -> Iterator[Piece]:
        return map(MAPPING_FAULTS[fault], right(config))

    for user in ("writing", "reading"):
        monkeypatch.setattr(importlib.import_module(f"trinity.export.{user}"), "pieces", wrong)
    with pytest.raises(ParityError, match="independent forward pass"):
        export_afmoe(model, SMALL, None, tmp_path / "out", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_transformers_alone_would_catch_a_wrong_mapping(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, gate = trinity.export.keys.pieces, importlib.import_module("trinity.export.parity")

    def wrong(config: ModelConfig) -> Iterator[Piece]:
        return map(MAPPING_FAULTS["gate and up of experts"], right(config))

    for user in ("writing", "reading"):
        monkeypatch.setattr(importlib.import_module(f"trinity.export.{user}"), "pieces", wrong)

    compare = gate.compare_logits

    def only_transformers(name: str, expected: Any, logits: torch.Tensor, directory: Path) -> float:
        return compare(name, expected, logits, directory) if name == "transformers" else 0.0

    monkeypatch.setattr(gate, "compare_logits", only_transformers)
    monkeypatch.setattr(gate, "TIE", float("inf"))
    with pytest.raises(ParityError, match="transformers"):
        export_afmoe(model, SMALL, None, tmp_path / "out", dtype=torch.float32)


def test_settings_that_do_not_belong_to_the_model_are_caught(model: Transformer, tmp_path: Path) -> None:
    other = SMALL.model_copy(update={"window": 9})
    with pytest.raises(ParityError):
        export_afmoe(model, other, None, tmp_path / "out", dtype=torch.float32)


def test_rounding_is_no_difference_and_a_bfloat16_model_is_no_excuse(tmp_path: Path) -> None:
    """The weights are compared as rounded, so the tolerance stays that of float32."""
    model = random_model(SMALL).to(torch.bfloat16)
    report = export_afmoe(model, SMALL, None, tmp_path / "out", dtype=torch.bfloat16)
    assert all(error < 1e-5 for error in report.max_error.values())
    assert report.lines()[0].startswith(str(report.num_tokens))
