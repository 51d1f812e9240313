"""Taking in public directories file by file: every layout, every format, bounded memory, faults caught."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from test_export import SMALL, random_model
from test_fp8_export import WHOLE
from trinity.base.errors import UserError
from trinity.cli import main
from trinity.export.afmoe import export_afmoe
from trinity.export.balance_state import STATE
from trinity.export.convert import convert_afmoe
from trinity.export.files import TensorFiles
from trinity.export.formats import FORMATS, Format
from trinity.export.parity import ParityError
from trinity.export.reading import import_afmoe


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "model"
    export_afmoe(random_model(WHOLE), WHOLE, None, out, dtype=torch.bfloat16, max_shard_bytes=400_000)
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


def fuse(source: Path, out: Path) -> Path:
    """The same model with all experts of a layer in one tensor, in one file."""
    tensors = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    for layer in range(WHOLE.num_dense_layers, WHOLE.num_layers):
        above = f"model.layers.{layer}.mlp.experts."
        both, down = [], []
        for e in range(WHOLE.num_experts):
            both.append(torch.cat([tensors.pop(f"{above}{e}.{part}_proj.weight") for part in ("gate", "up")]))
            down.append(tensors.pop(f"{above}{e}.down_proj.weight"))
        tensors[f"{above}gate_up_proj"], tensors[f"{above}down_proj"] = torch.stack(both), torch.stack(down)
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    for name in ("config.json", STATE):
        (out / name).write_text((source / name).read_text())
    return out


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_every_layout_becomes_every_format(
    plain: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("convert")
    source = fuse(plain, folder / "fused") if data.draw(st.booleans()) else plain
    middle = data.draw(st.sampled_from(sorted(FORMATS)))
    last = data.draw(st.sampled_from(sorted(FORMATS)))
    size = data.draw(st.sampled_from([1, 300_000, 10**9]))
    convert_afmoe(source, folder / "middle", dtype=middle, max_shard_bytes=size)
    convert_afmoe(folder / "middle", folder / "last", dtype=last, max_shard_bytes=size)
    state = random_model(WHOLE).state_dict()
    _, found = import_afmoe(folder / "last", torch.float32)
    for name, tensor in state.items():
        expected = tensor if name.endswith((".bias", ".momentum")) else tensor.bfloat16().float()
        coarse = (FORMATS[middle].scale is not None) + (FORMATS[last].scale is not None)
        limit = expected.abs() * (coarse / 14 + 2**-8) + expected.abs().max() * 2e-5
        assert ((found[name] - expected).abs() <= limit).all(), name
        if name.endswith("router.bias"):
            assert torch.equal(found[name], tensor)


def test_plain_to_plain_keeps_every_bit(plain: Path, tmp_path: Path) -> None:
    convert_afmoe(fuse(plain, tmp_path / "fused"), tmp_path / "out")
    _, expected = import_afmoe(plain)
    _, found = import_afmoe(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "independent forward pass" in card


def test_no_more_than_one_file_is_in_memory(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts what is alive of the tensors that were read, at every read."""
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    stored = Format.stored

    def counted(self: Format, public: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal most
        tensors = stored(self, public, value)
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        now = sum(tensor.nbytes for ref in alive if (tensor := ref()) is not None)
        most = max(most, now)
        return tensors

    monkeypatch.setattr(Format, "stored", counted)
    convert_afmoe(plain, tmp_path / "out", dtype="fp32", max_shard_bytes=600_000)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 4
    assert most <= max(sizes)


def test_a_fault_of_the_writer_is_caught(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing = importlib.import_module("trinity.export.writing")
    store = writing._stored

    def zeroed(value: torch.Tensor, piece: object, chosen: Format) -> dict[str, torch.Tensor]:
        found = store(value, piece, chosen)
        return {name: t * 0 if name.endswith("1.mlp.expert_bias") else t for name, t in found.items()}

    monkeypatch.setattr(writing, "_stored", zeroed)
    with pytest.raises(ParityError, match=r"1\.mlp\.expert_bias comes back with other values"):
        convert_afmoe(plain, tmp_path / "out")
    monkeypatch.setattr(importlib.import_module("trinity.export.convert"), "_compare_tensors", lambda *_: None)
    with pytest.raises(ParityError, match="other experts"):
        convert_afmoe(plain, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_fused_reading_that_takes_the_wrong_expert_is_caught(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fuse(plain, tmp_path / "fused")
    read = TensorFiles.read

    def wrong(self: TensorFiles, name: str, expert: int | None = None, rows: slice | None = None) -> torch.Tensor:
        return read(self, name, None if expert is None else (expert + 1) % WHOLE.num_experts, rows)

    monkeypatch.setattr(TensorFiles, "read", wrong)
    monkeypatch.setattr(importlib.import_module("trinity.export.convert"), "_compare_tensors", lambda *_: None)
    with pytest.raises(ParityError, match=r"other experts|logits differ"):
        convert_afmoe(source, tmp_path / "out")


def test_what_cannot_be_read_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    source = fuse(plain, tmp_path / "fused")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "model.layers.1.extra": torch.zeros(2)}, source / "model.safetensors")
    with pytest.raises(UserError, match="has no place"):
        convert_afmoe(source, tmp_path / "out")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(UserError, match="not a whole safetensors"):
        convert_afmoe(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]


def test_the_command_converts_and_tells_what_fp8_costs(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["import", str(plain), "--out", str(out), "--dtype", "fp8-block", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["dtype"] == "fp8-block"
    assert answer["parity"]["quality"]["perplexity"] > 1
    assert main(["import", str(plain), "--out", str(tmp_path / "x"), "--dtype", "int3"]) == 2
    assert "fp8-block" in capsys.readouterr().err


def test_small_shapes_convert_too(tmp_path: Path) -> None:
    export_afmoe(random_model(SMALL), SMALL, None, tmp_path / "a", dtype=torch.float32)
    report = convert_afmoe(tmp_path / "a", tmp_path / "b", dtype="fp8-block")
    assert report.quality is not None
    assert report.quality.num_tokens == 3 * 23
