"""GGUF files: through the command line, read back and compared, and every fault of the writer caught."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from test_export import SMALL, random_model
from test_load import TEXT
from trinity.base.errors import UserError
from trinity.cli import main
from trinity.config import ModelConfig, TokenizerConfig
from trinity.export import gguf as writing
from trinity.export.afmoe import export_afmoe
from trinity.export.gguf import export_gguf, stored
from trinity.export.gguf_parity import GgufTensors
from trinity.export.oracle import oracle_forward, oracle_pass
from trinity.export.parity import ParityError
from trinity.tokenizer import Tokenizer, train_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT, "<|im_start|>user assistant system"] * 20, TokenizerConfig(vocab_size=290))


@pytest.fixture(scope="module")
def source(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(SMALL)
    out = tmp_path_factory.mktemp("gguf") / "model"
    export_afmoe(model, model.config, tokenizer, out, dtype=torch.float32)
    return out


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_was_written_computes_what_the_directory_computes(dtype: str, source: Path, tmp_path: Path) -> None:
    report = export_gguf(source, tmp_path / "m.gguf", dtype=dtype)
    assert max(report.max_error.values()) <= 1e-5
    assert "llama.cpp" in report.skipped
    written = GgufTensors(tmp_path / "m.gguf")
    rows_BT = torch.arange(60).view(2, 30)
    found = oracle_pass(written, written.settings(), rows_BT).logits_BTV
    expected = oracle_forward(source, rows_BT, rounding=stored(dtype)).logits_BTV
    assert torch.allclose(found, expected, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    size = (tmp_path / "m.gguf").stat().st_size
    assert size < (source / "model.safetensors").stat().st_size * (1.1 if dtype == "fp32" else 0.7)


def swap(name: str, other: str) -> Any:
    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        table = {**writing._LAYER, name: writing._LAYER[other], other: writing._LAYER[name]}
        monkeypatch.setattr(writing, "_LAYER", table)

    return change


def setting(method: str, change: Any) -> Any:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        true = getattr(gguf.GGUFWriter, method)
        monkeypatch.setattr(gguf.GGUFWriter, method, lambda self, value: true(self, change(value)))

    return patch


def reversed_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = writing._plan
    monkeypatch.setattr(
        writing, "_plan", lambda config: {k: v[::-1] if len(v) > 1 else v for k, v in plan(config).items()}
    )


def shifted_words(monkeypatch: pytest.MonkeyPatch) -> None:
    true = gguf.GGUFWriter.add_token_list
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", lambda self, words: true(self, [*words[1:], words[0]]))


FAULTS = {
    "gate and up": swap("mlp.gate_proj", "mlp.up_proj"),
    "key and value": swap("self_attn.k_proj", "self_attn.v_proj"),
    "query and gate": swap("self_attn.q_proj", "self_attn.gate_proj"),
    "norms": swap("input_layernorm", "post_attention_layernorm"),
    "shared experts": swap("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "experts": reversed_experts,
    "window": setting("add_sliding_window", lambda window: 2 * window),
    "rope": setting("add_rope_freq_base", lambda base: base / 10),
    "epsilon": setting("add_layer_norm_rms_eps", lambda eps: 0.1),
    "scale": setting("add_expert_weights_scale", lambda scale: scale + 1),
    "norm of weights": setting("add_expert_weights_norm", lambda norm: not norm),
    "dense layers": setting("add_leading_dense_block_count", lambda count: count + 1),
    "vocabulary": shifted_words,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_writer_are_caught(
    fault: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(ParityError):
        export_gguf(source, tmp_path / "m.gguf", dtype="fp32")
    assert list(tmp_path.iterdir()) == []


def test_the_commands_write_one(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.gguf"
    for verb in ("export", "import"):
        assert main([verb, str(source), "--format", "gguf", "--dtype", "fp32", "--out", str(out), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["file"] == str(out)
        assert max(told["parity"]["max_error"].values()) <= 1e-5
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
        before = out.read_bytes()
        assert main([verb, str(source), "--format", "gguf", "--out", str(out)]) == 1
        assert "--force" in capsys.readouterr().err
        assert out.read_bytes() == before
        assert main([verb, str(source), "--format", "gguf", "--dtype", "fp8-block", "--out", str(out)]) == 2
        assert "use fp32, bf16, fp16" in capsys.readouterr().err
        assert main([verb, str(source), "--format", "ggfu", "--out", str(out)]) == 2
        assert "afmoe, gguf" in capsys.readouterr().err
        assert main([verb, str(source), "--out", str(tmp_path / "other.gguf")]) == 2
        assert "--format gguf" in capsys.readouterr().err
        out.unlink()
    tmp_path.joinpath("folder").mkdir()
    assert main(["export", str(source), "--format", "gguf", "--out", str(tmp_path / "folder")]) == 1
    assert "is a directory" in capsys.readouterr().err


def test_a_model_that_llama_cpp_computes_differently_is_refused_before_anything_is_written(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = random_model(ModelConfig(**{**SMALL.model_dump(), "global_every": 2}))
    export_afmoe(model, model.config, tokenizer, tmp_path / "model", dtype=torch.float32)
    with pytest.raises(UserError, match="every fourth"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
