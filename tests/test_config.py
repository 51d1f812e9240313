"""Settings: presets against published numbers, merging with origins, and refusals that name the key."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trinity.base.errors import UsageError
from trinity.config import ModelConfig, list_presets, resolve, to_toml


def test_presets_are_there() -> None:
    assert list_presets() == ["demo", "large", "mini", "nano"]


@pytest.mark.parametrize(
    ("preset", "total", "active"), [("nano", 6.12e9, 1e9), ("mini", 26.1e9, 3e9), ("large", 398.6e9, 13e9)]
)
def test_presets_have_the_published_sizes(preset: str, total: float, active: float) -> None:
    model = resolve(preset)[0].model
    assert model.num_params() == pytest.approx(total, rel=0.005)
    assert model.num_active_params() == pytest.approx(active, rel=0.2)


@pytest.mark.parametrize("preset", ["demo", "large", "mini", "nano"])
def test_toml_reads_back_to_the_same_settings(preset: str, tmp_path: Path) -> None:
    config, _ = resolve(preset)
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config))
    assert resolve(str(path))[0] == config


def test_the_last_layer_wins_and_is_named(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text("[optim]\nmuon_lr = 0.1\nadamw_lr = 0.1\nclip_norm = 2.0\n")
    second.write_text("[optim]\nmuon_lr = 0.2\nadamw_lr = 0.2\n")
    config, origins = resolve("demo", [first, second], ["optim.muon_lr=0.3", "name=a b"])
    assert (config.optim.muon_lr, config.optim.adamw_lr, config.optim.clip_norm) == (0.3, 0.2, 2.0)
    assert config.name == "a b"
    assert origins["optim.muon_lr"].source == "command line"
    assert origins["optim.adamw_lr"].source == f"overlay {second}"
    assert origins["optim.clip_norm"].source == f"overlay {first}"
    assert origins["optim.nesterov"].source == "default"


def test_every_setting_has_an_origin() -> None:
    config, origins = resolve("demo")
    assert len(origins) == sum(len(value) if isinstance(value, dict) else 1 for value in config.model_dump().values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.moun_lr=1"], ["moun_lr", "muon_lr"]),
        (["optm.muon_lr=1"], ["optm", "optim"]),
        (["optim=1"], ["optim is a section"]),
        (["optim.muon_lr"], ["key=value"]),
        (["optim.muon_lr=-1"], ["optim.muon_lr", "greater than 0"]),
        (["optim.muon_lr=fast"], ["optim.muon_lr", "fast"]),
        (["balance.kind=smebo"], ["balance.kind", "smebu"]),
        (["model.num_heads=3"], ["multiple"]),
        (["pretrain.batch=[]"], ["pretrain"]),
        (["data.streams=2.5"], ["data.streams"]),
    ],
)
def test_refusals_name_the_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as refusal:
        resolve("demo", (), overrides)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("text", ["[optim\n", "name = 1\n", "[nothing]\n", "\udcff".encode("utf-8", "surrogateescape")])
def test_a_bad_file_is_named(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=r"bad\.toml"):
        resolve("demo", [path])


def test_settings_are_frozen() -> None:
    config, _ = resolve("demo")
    with pytest.raises(ValidationError):
        config.name = "other"


def test_local_layers_stop_growing_in_memory_and_work() -> None:
    model = resolve("nano")[0].model
    local = sum(kind == "local" for kind in model.layers)
    assert local == 42
    grown = model.kv_cache_bytes(32768) - model.kv_cache_bytes(16384)
    one_key = 2 * model.num_kv_heads * model.head_dim * 2
    assert grown == 16384 * (model.num_layers - local) * one_key


@given(window=st.integers(1, 40), seq_len=st.integers(1, 60))
def test_mean_keys_is_the_count_under_the_mask(window: int, seq_len: int) -> None:
    model = resolve("demo")[0].model.model_copy(update={"window": window})
    assert isinstance(model, ModelConfig)
    seen = [min(t + 1, window) for t in range(seq_len)]
    assert model.mean_keys("local", seq_len) == pytest.approx(sum(seen) / seq_len)
    assert model.mean_keys("global", seq_len) == pytest.approx((seq_len + 1) / 2)
