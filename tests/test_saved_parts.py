"""Tensors saved in parts come back in any other parts; parts that do not make a whole are refused."""

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layouts import SETTINGS
from test_train_checkpoint import DyingDisk, Killed, die_after
from trinity.base.errors import UserError
from trinity.config import resolve
from trinity.export import shards
from trinity.export.parity import ParityError
from trinity.export.reading import import_afmoe
from trinity.export.shards import export_shards
from trinity.model.transformer import Transformer
from trinity.parallel.saved import SavedTensors, parts_metadata
from trinity.parallel.slices import Slice, chunk
from trinity.train.checkpoint import (
    Part,
    Snapshot,
    clean_partials,
    list_checkpoints,
    load_checkpoint,
    partial_folder,
    prepare,
)
from trinity.train.manifest import part_name
from trinity.train.tensorfile import write_tensors
from trinity.train.writer import CheckpointWriter


def cut(shape: tuple[int, ...], ranks: tuple[int, ...]) -> list[Slice]:
    """The parts of a grid: dimension d in ranks[d] chunks, the last ones perhaps empty."""
    axes = [[chunk(n, r, i) for i in range(r)] for n, r in zip(shape, ranks, strict=True)]
    return [Slice(shape, tuple(c.start for c in box), tuple(len(c) for c in box)) for box in itertools.product(*axes)]


def write_parts(folder: Path, tensors: dict[str, torch.Tensor], ranks: tuple[int, ...]) -> list[Path]:
    files = []
    for number in range(len(cut((1,) * len(ranks), ranks))):
        slices = {
            name: cut(tuple(t.shape), ranks[: t.ndim])[number] for name, t in tensors.items() if t.ndim == len(ranks)
        }
        own = {
            name: slices[name].of(t) if name in slices else t
            for name, t in tensors.items()
            if name in slices or not number
        }
        own = {name: t.contiguous() for name, t in own.items() if t.numel()}
        files.append(folder / part_name("model", number, 99))
        write_tensors(files[-1], own, parts_metadata({n: s for n, s in slices.items() if n in own}))
    return files


@given(st.data())
def test_any_part_of_a_tensor_in_any_parts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("parts")
    dims = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.integers(1, 6)) for _ in range(dims))
    ranks = tuple(data.draw(st.integers(1, 3)) for _ in range(dims))
    whole = {"x": torch.randn(shape), "step": torch.tensor(3.0), "count": torch.arange(4)}
    kinds = {"x": data.draw(st.sampled_from([torch.float32, torch.bfloat16]))}
    whole["x"] = whole["x"].to(kinds["x"])
    if dims == 1:
        del whole["count"]
    saved = SavedTensors(write_parts(folder, whole, ranks))
    assert sorted(saved.names) == sorted(whole)
    for name, tensor in whole.items():
        assert torch.equal(saved.read(name), tensor)
    for part in cut(shape, tuple(data.draw(st.integers(1, 4)) for _ in range(dims))):
        assert torch.equal(saved.read("x", part), part.of(whole["x"]))


def two_parts(folder: Path) -> list[Path]:
    return write_parts(folder, {"x": torch.arange(24.0).view(6, 4)}, (2, 1))


def test_a_missing_part_or_another_shape(tmp_path: Path) -> None:
    files = two_parts(tmp_path)
    with pytest.raises(UserError, match=r"x is not whole .* damaged"):
        SavedTensors(files[:1])
    with pytest.raises(UserError, match=r"x is \[6, 4\], but this run has \[6, 5\]"):
        SavedTensors(files).read("x", Slice((6, 5), (0, 0), (3, 5)))


@pytest.mark.parametrize(
    "parts",
    [
        "[]", "{", '{"x": 3}', '{"x": [[6, 4], [-1, 0]]}', '{"x": [[6, 4], [4, 0]]}', '{"x": [[6, 4], [0]]}',
        '{"x": [[6.0, 4], [0, 0]]}', '{"x": [[6, 4], "00"]}', '{"x": [["6", 4], [0, 0]]}',
        '{"x": [[1e400, 4], [0, 0]]}',
    ],
)  # fmt: skip
def test_hostile_parts_are_refused_in_a_sentence(tmp_path: Path, parts: str) -> None:
    files = two_parts(tmp_path)
    data = files[0].read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["parts"] = parts
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    files[0].write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(UserError, match="safetensors"):
        SavedTensors(files)


def test_overlapping_parts_never_pass_for_numbers(tmp_path: Path) -> None:
    files = two_parts(tmp_path)
    whole = Slice((6, 4), (0, 0), (3, 4))
    write_tensors(tmp_path / "again", {"x": torch.ones(3, 4)}, parts_metadata({"x": whole}))
    with_hole = SavedTensors([files[0], tmp_path / "again"])
    assert with_hole.read("x")[3:].isnan().all()


def parts_of(step: int, number: int, tensors: dict[str, torch.Tensor]) -> Snapshot:
    slices = {name: cut(tuple(t.shape), (2, *[1] * (t.ndim - 1)))[number] for name, t in tensors.items()}
    own = {name: slices[name].of(t).contiguous() for name, t in tensors.items()}
    return Snapshot(step, own, {"m": torch.ones(1)} if number == 0 else {}, {"step": step}, Part(number, 2, slices))


def test_two_writers_make_one_checkpoint(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(5, 3)}
    writers = [CheckpointWriter(tmp_path, 2, 0, main=main, timeout=30) for main in (True, False)]
    assert prepare(tmp_path, 4)
    for number, writer in enumerate(writers):
        writer.save(parts_of(4, number, tensors), wait=False)
    for writer in writers:
        writer.wait()
    (info,) = writers[0].written()
    assert writers[1].written() == []
    assert not prepare(tmp_path, 4)  # a whole one is not written again
    found = load_checkpoint(info.path)
    assert torch.equal(found.model["x"], tensors["x"])
    assert sorted(path.name for path in info.path.iterdir()) == sorted(
        ["manifest.json", "state.json", *(part_name(k, n, 2) for k in ("model", "optimizer") for n in range(2))]
    )


def test_a_part_that_does_not_come_or_fails_leaves_nothing(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(5, 3)}
    main, other = (CheckpointWriter(tmp_path, 2, 0, main=main, timeout=0.2) for main in (True, False))
    prepare(tmp_path, 4)
    main.save(parts_of(4, 0, tensors), wait=False)
    with pytest.raises(UserError, match=r"step 4 could not be written .* no part 1.*storage that all hosts share"):
        main.wait()
    prepare(tmp_path, 5)
    (partial_folder(tmp_path, 5) / part_name("model", 1, 2)).mkdir()  # in the way of part 1
    other.save(parts_of(5, 1, tensors), wait=True)
    with pytest.raises(UserError, match=r"step 5 could not be written .* part 1: File exists"):
        main.save(parts_of(5, 0, tensors), wait=True)
    assert list(tmp_path.iterdir()) == []


def test_the_main_rank_killed_at_every_write_leaves_a_whole_checkpoint_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"x": torch.randn(5, 3)}

    def save(folder: Path, survives: int) -> DyingDisk:
        assert prepare(folder, 4)
        writers = [CheckpointWriter(folder, 2, 0, main=main, timeout=5) for main in (True, False)]
        writers[1].save(parts_of(4, 1, tensors), wait=True)
        with monkeypatch.context() as patch:
            disk = die_after(patch, survives)
            if survives > 1000:
                writers[0].save(parts_of(4, 0, tensors), wait=True)
            else:
                with pytest.raises(Killed):
                    writers[0].save(parts_of(4, 0, tensors), wait=True)
        return disk

    changes = save(tmp_path / "count", 10**9).calls
    assert changes >= 14
    committed = 0
    for survives in range(changes):
        folder = tmp_path / f"dies-{survives}"
        save(folder, survives)
        found = list_checkpoints(folder)
        committed += len(found)
        for info in found:
            assert torch.equal(load_checkpoint(info.path).model["x"], tensors["x"])
        clean_partials(folder)
        assert [path.name for path in folder.iterdir()] == [info.path.name for info in found]
    assert committed <= 1  # only after the rename


def test_an_export_of_parts_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor comes back, but not as what the checkpoint's settings make of it."""
    settings = resolve("demo", overrides=SETTINGS)[0].model
    model = Transformer(settings)
    model.init_weights(1)
    write_tensors(tmp_path / "whole", {name: tensor.detach() for name, tensor in model.state_dict().items()})
    write = shards.write_beside

    def wrong(folder: Path, public: dict[str, Any], *rest: Any) -> None:
        write(folder, {**public, "sliding_window": 3}, *rest)

    monkeypatch.setattr(shards, "write_beside", wrong)
    with pytest.raises(ParityError):
        export_shards(SavedTensors([tmp_path / "whole"]), settings, None, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def test_parts_are_exported_without_a_model(tmp_path: Path) -> None:
    settings = resolve("demo", overrides=SETTINGS)[0].model
    model = Transformer(settings)
    model.init_weights(1)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    files = []
    for number in range(3):
        slices = {n: cut(tuple(t.shape), (3, *[1] * (t.ndim - 1)))[number] for n, t in state.items()}
        own = {n: s.of(state[n]).contiguous() for n, s in slices.items() if 0 not in s.size}
        files.append(tmp_path / f"{number}.safetensors")
        write_tensors(files[-1], own, parts_metadata({n: slices[n] for n in own}))
    report = export_shards(SavedTensors(files), settings, None, tmp_path / "out", dtype="float32", max_shard_bytes=9000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert report.max_error == {"independent forward pass": 0.0}
    assert report.quality is None
    _, found = import_afmoe(tmp_path / "out")
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name
    quantised = export_shards(SavedTensors(files), settings, None, tmp_path / "fp8", dtype="fp8-block").quality
    assert quantised is not None
    assert 0 < quantised.top1_w8a8 <= 1
    assert abs(quantised.perplexity / quantised.perplexity_bf16 - 1) < 0.1
    del state["norm.weight"]
    write_tensors(tmp_path / "some", state)
    with pytest.raises(UserError, match=r"norm.weight is missing"):
        export_shards(SavedTensors([tmp_path / "some"]), settings, None, tmp_path / "none")
