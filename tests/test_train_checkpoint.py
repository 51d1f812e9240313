"""Checkpoints: whole or absent at every moment, refused when damaged or hostile."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from train_helpers import small_job
from trinity.base.errors import UserError
from trinity.cli.runs import verify_checkpoints
from trinity.train import checkpoint, manifest, tensorfile, train
from trinity.train.checkpoint import (
    Snapshot,
    checkpoint_name,
    clean_partials,
    latest_good,
    list_checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
    verify_checkpoint,
)
from trinity.train.writer import CheckpointWriter


def snapshot(step: int, **state: Any) -> Snapshot:
    draws = torch.Generator().manual_seed(step)
    model = {
        "layers.0.weight": torch.randn(5, 3, generator=draws),
        "head": torch.randn(7, generator=draws).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(step, dtype=torch.int64),
    }
    return Snapshot(step, model, {"momentum": torch.randn(4, 2, generator=draws)}, {"step": step, **state})


def equal(a: Snapshot, b: Snapshot) -> bool:
    tensors = [(a.model, b.model), (a.optimizer, b.optimizer)]
    same = all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in tensors)
    return same and a.state == b.state


def whole(folder: Path) -> list[int]:
    return [info.step for info in list_checkpoints(folder) if info.complete]


def no_damage(info: Any, why: str) -> None:
    raise AssertionError(f"{info} is damaged: {why}")


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(12, note="ü"))
    assert path.name == "step-00000012"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert equal(load_checkpoint(path), snapshot(12, note="ü"))


@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(sorted(tensorfile.DTYPES, key=str))),
        max_size=6,
    )
)
@settings(max_examples=40, deadline=None)
def test_the_files_are_safetensors(tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    tensors.pop("__metadata__", None)
    written = tensorfile.write_tensors(path, tensors)
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert written == tensorfile.digest(path)


class DyingDisk:
    """`os` for the checkpoint modules, whose n-th change to the disk fails, and every later one too."""

    CHANGES = ("open", "write", "fsync", "mkdir", "rename")

    def __init__(self, survives: int) -> None:
        self.left = survives
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CHANGES:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.left -= 1
            if self.left < 0:
                raise Killed
            return real(*args, **kwargs)

        return call


class Killed(BaseException):
    """The process ends here; nothing that follows may be relied on."""


def die_after(monkeypatch: pytest.MonkeyPatch, survives: int) -> DyingDisk:
    disk = DyingDisk(survives)
    monkeypatch.setattr(checkpoint, "os", disk)
    monkeypatch.setattr(tensorfile, "os", disk)
    return disk


def test_killed_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        disk = die_after(patch, 10**9)
        save_checkpoint(tmp_path / "count", snapshot(2))
    assert disk.calls >= 14
    for survives in range(disk.calls):
        folder = tmp_path / f"dies-{survives}"
        save_checkpoint(folder, snapshot(1))
        with monkeypatch.context() as patch:
            die_after(patch, survives)
            with pytest.raises(Killed):
                save_checkpoint(folder, snapshot(2))
        found = latest_good(folder, no_damage)
        assert found is not None
        assert equal(load_checkpoint(found), snapshot(int(found.name[5:])))
        clean_partials(folder)
        assert sorted(p.name for p in folder.iterdir()) == [checkpoint_name(s) for s in whole(folder)]
        save_checkpoint(folder, snapshot(2))
        assert whole(folder) == [1, 2]


def test_replacing_a_damaged_checkpoint_may_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for survives in range(14):
        folder = tmp_path / f"dies-{survives}"
        save_checkpoint(folder, snapshot(1))
        flip(save_checkpoint(folder, snapshot(2)) / "model.safetensors", -1)
        with monkeypatch.context() as patch:
            die_after(patch, survives)
            with pytest.raises(Killed):
                save_checkpoint(folder, snapshot(2))
        found = latest_good(folder, lambda info, why: None)
        assert found is not None
        assert equal(load_checkpoint(found), snapshot(int(found.name[5:])))


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, snapshot(1))

    def full(handle: int, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorfile.os, "write", full)
    with pytest.raises(UserError, match=r"step 2 could not be written to .*: No space left on device; earlier"):
        save_checkpoint(tmp_path, snapshot(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", manifest.FILES)
def test_a_flipped_bit_is_found_and_the_one_before_taken_aloud(tmp_path: Path, name: str) -> None:
    good = save_checkpoint(tmp_path, snapshot(1))
    bad = save_checkpoint(tmp_path, snapshot(2))
    flip(bad / name, len((bad / name).read_bytes()) // 2)
    with pytest.raises(UserError, match=f"{name} has checksum .* damaged"):
        load_checkpoint(bad)
    told: list[tuple[int, str]] = []
    assert latest_good(tmp_path, lambda info, why: told.append((info.step, why))) == good
    assert [step for step, _ in told] == [2]
    assert name in told[0][1]


@pytest.mark.parametrize("name", [*manifest.FILES, "manifest.json"])
def test_a_cut_or_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-3])
    with pytest.raises(UserError, match=name):
        verify_checkpoint(path)
    assert whole(tmp_path) == []
    (path / name).unlink()
    with pytest.raises(UserError, match=name):
        verify_checkpoint(path)


def edit_manifest(path: Path, change: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"../../outside": {"bytes": 1, "sha256": "0"}}),
        lambda m: m["files"].update({"/etc/passwd": m["files"].pop("state.json")}),
        lambda m: m["files"].pop("model.safetensors"),
        lambda m: m.update(files=["model.safetensors", "optimizer.safetensors", "state.json"]),
        lambda m: m.update(files=dict.fromkeys(manifest.FILES, "x")),
        lambda m: m["files"]["state.json"].update(bytes="12"),
        lambda m: m.update(format=99),
    ],
)
def test_a_manifest_may_name_the_three_files_only(tmp_path: Path, change: Any) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    edit_manifest(path, change)
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_checkpoint(path)
    assert latest_good(tmp_path, lambda info, why: None) is None


def forge(path: Path, name: str, data: bytes) -> None:
    """Put `data` in place of a file, with a manifest that agrees."""
    (path / name).write_bytes(data)
    edit_manifest(path, lambda m: m["files"].update({name: tensorfile.digest(path / name)._asdict()}))


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("name", manifest.FILES)
def test_a_pickle_is_not_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save_checkpoint(tmp_path, snapshot(1))
    forge(path, name, pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=name):
        load_checkpoint(path)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, (2**63).to_bytes(8, "little"), b"\x02" + b"\0" * 7 + b"{}x"])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path, data: bytes) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    forge(path, "model.safetensors", data)
    with pytest.raises(UserError, match=r"model\.safetensors is not a readable safetensors file"):
        load_checkpoint(path)


def header(tensors: dict[str, Any], data: bytes = b"", *, text: str | None = None) -> bytes:
    """A safetensors file with any header."""
    encoded = (text if text is not None else json.dumps(tensors)).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BOMBS = {
    "a header of 2^40 bytes": (2**40).to_bytes(8, "little") + b"{}",
    "a header of 200 MB": (200_000_000).to_bytes(8, "little") + b" " * 200_000_000,
    "a shape whose size overflows": header({"a": entry([2**62, 2**62], 0, 4)}, b"\0" * 4),
    "a shape larger than its bytes": header({"a": entry([1 << 40], 0, 4)}, b"\0" * 4),
    "a negative shape": header({"a": entry([-1], 0, 4)}, b"\0" * 4),
    "offsets past the end": header({"a": entry([2], 0, 8)}, b"\0" * 4),
    "offsets that run backwards": header({"a": entry([1], 4, 0)}, b"\0" * 4),
    "tensors that overlap": header({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"\0" * 8),
    "bytes that belong to no tensor": header({"a": entry([1], 0, 4)}, b"\0" * 64),
    "an unknown type": header({"a": entry([1], 0, 4, "PICKLE")}, b"\0" * 4),
    "deep nesting": header({}, text='{"a":' * 100_000),
    "a list": header({}, text="[]"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_hostile_header_is_refused(tmp_path: Path, what: str) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    forge(path, "optimizer.safetensors", BOMBS[what])
    with pytest.raises(UserError, match=r"optimizer\.safetensors is not a readable safetensors file"):
        load_checkpoint(path)


def test_a_tensor_that_stands_twice_in_a_header(tmp_path: Path) -> None:
    """Whichever of the two a reader takes, names and bytes no longer agree: it is refused."""
    one, two = json.dumps(entry([1], 0, 4)), json.dumps(entry([1], 4, 8))
    path = save_checkpoint(tmp_path, snapshot(1))
    forge(path, "model.safetensors", header({}, b"\0" * 8, text=f'{{"a": {one}, "a": {two}}}'))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    hostile = snapshot(1)
    tensors: Any = getattr(hostile, name)
    tensors["poisoned"] = torch.tensor([1.0, value]).bfloat16()
    path = save_checkpoint(tmp_path, hostile)
    with pytest.raises(UserError, match=rf"{name}\.safetensors: poisoned holds numbers that are not finite"):
        load_checkpoint(path)
    with pytest.raises(UserError, match=rf"{name}\.safetensors: poisoned holds numbers that are not finite"):
        verify_checkpoint(path)
    told: list[str] = []
    earlier = save_checkpoint(tmp_path, snapshot(0))
    assert latest_good(tmp_path, lambda _, why: told.append(why)) == earlier
    assert len(told) == 1
    with pytest.raises(UserError, match="1 of 2 checkpoints are damaged"):
        verify_checkpoints(_run_of(tmp_path))
    save_checkpoint(tmp_path, snapshot(1))
    verify_checkpoint(path)  # one of the same step takes its place


def _run_of(checkpoints: Path) -> Path:
    run = checkpoints / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(checkpoints)
    return run


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"step": 1, "step": 2}', "'step' stands there twice"),
        ('{"step": 1, "guard": {"a": 1, "a": 1}}', "'a' stands there twice"),
        ('{"step": 1, "tokens": NaN}', "NaN is not a number of JSON"),
        ('{"step": 1, "tokens": -Infinity}', "-Infinity is not a number of JSON"),
        ('{"step": 2}', "not of the step in its folder's name"),
        ('{"step": true}', "has no step"),
        ('{"a":' * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_state_is_plain_json_of_its_step(tmp_path: Path, text: str, why: str) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    forge(path, "state.json", text.encode())
    with pytest.raises(UserError, match=rf"state\.json.*{why}"):
        load_checkpoint(path)


def test_a_manifest_with_a_key_twice_or_without_end_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"format": 1,', '"format": 99, "format": 1,'))
    with pytest.raises(UserError, match=r"manifest\.json.*'format' stands there twice"):
        load_checkpoint(path)
    (path / "manifest.json").write_text(text + " " * manifest.MANIFEST_BYTES)
    with pytest.raises(UserError, match=r"manifest\.json has \d+ bytes, more than any manifest"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", [*manifest.FILES, "manifest.json"])
def test_a_pipe_or_folder_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    """A pipe would be read for ever."""
    path = save_checkpoint(tmp_path, snapshot(1))
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(UserError, match=rf"{name} is not a regular file"):
        load_checkpoint(path)
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} is not a regular file"):
        load_checkpoint(path)


def forge_run(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Any:
    """A run whose newest checkpoint has another state, with a manifest that agrees; the job that would resume it."""
    job = small_job(tmp_path)
    train(job)
    path = list_checkpoints(tmp_path / "checkpoints")[-1].path
    state = json.loads((path / "state.json").read_text())
    change(state)
    forge(path, "state.json", json.dumps(state).encode())
    return small_job(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("stage"),
        lambda s: s.pop("source"),
        lambda s: s.update(source=[]),
        lambda s: s.update(source={"handed_out": {}}) or s.update(random=5),
        lambda s: s.update(random=[{"cpu": "AAAA"}]),
        lambda s: s.update(random=[{"cpu": "\x00 not base64"}]),
        lambda s: s.update(guard=None),
        lambda s: s["guard"]["history"].update(loss="x"),
        lambda s: s.update(idle_experts=[["a"], []]),
        lambda s: s.update(fingerprints=[]),
        lambda s: s.pop("finished"),
    ],
)
def test_a_forged_state_is_one_sentence(tmp_path: Path, change: Any) -> None:
    job = forge_run(tmp_path, change)
    with pytest.raises(UserError, match=r"state\.json is not the state of such a run"):
        train(job)


def test_tensors_of_another_shape_type_or_name_are_refused(tmp_path: Path) -> None:
    train(small_job(tmp_path))
    path = list_checkpoints(tmp_path / "checkpoints")[-1].path
    for file, name, forged in (
        ("model.safetensors", "norm.weight", torch.ones(17)),
        ("model.safetensors", "norm.weight", torch.ones(16, dtype=torch.float64)),
        ("model.safetensors", "layers.1.moe.router.bias", torch.zeros(5)),
        ("optimizer.safetensors", "adamw.step.norm.weight", torch.zeros(1)),
        ("model.safetensors", "extra", torch.ones(1)),
    ):
        tensors = load_file(path / file)
        data = (path / file).read_bytes()
        (path / file).unlink()
        tensorfile.write_tensors(path / file, {**tensors, name: forged})
        edit_manifest(path, lambda m, file=file: m["files"].update({file: tensorfile.digest(path / file)._asdict()}))
        with pytest.raises(UserError, match=rf"{file}.*({re.escape(name)})"):
            train(small_job(tmp_path))
        forge(path, file, data)


@pytest.mark.parametrize("state", [b"[]", b'{"step": "1"}', b"\xff\xfe", b"{"])
def test_a_state_without_a_step_is_refused(tmp_path: Path, state: bytes) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    forge(path, "state.json", state)
    with pytest.raises(UserError, match=r"state\.json"):
        load_checkpoint(path)


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    elsewhere = save_checkpoint(outside, snapshot(1))
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, snapshot(5))
    (folder / "step-00000003").symlink_to(elsewhere)
    (folder / ".step-00000004.partial").symlink_to(elsewhere)
    assert whole(folder) == [5]
    assert prune(folder, 1, 0) == []
    clean_partials(folder)
    verify_checkpoint(elsewhere)
    path = folder / "step-00000005"
    shutil.move(path / "state.json", tmp_path / "state.json")
    (path / "state.json").symlink_to(tmp_path / "state.json")
    with pytest.raises(UserError, match=r"state\.json"):
        load_checkpoint(path)


def test_pruning_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    for step in (10, 20, 25, 30, 40):
        save_checkpoint(tmp_path, snapshot(step))
    assert prune(tmp_path, 2, 20) == [10, 25]
    assert whole(tmp_path) == [20, 30, 40]


def test_pruning_does_not_count_a_damaged_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, snapshot(step))
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"cut")
    assert prune(tmp_path, 1, 0) == [1]
    assert whole(tmp_path) == [2]


def test_a_whole_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    before = (path / "model.safetensors").stat().st_ino
    save_checkpoint(tmp_path, snapshot(1))
    assert (path / "model.safetensors").stat().st_ino == before


def test_saving_behind_surfaces_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=2, keep_every=0)
    for step in (1, 2, 3):
        writer.save(snapshot(step), wait=False)
    writer.wait()
    assert [info.step for info in writer.written()] == [1, 2, 3]
    assert writer.written() == []
    assert whole(tmp_path) == [2, 3]

    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tensorfile.os, "write", fail)
    writer.save(snapshot(4), wait=False)
    with pytest.raises(UserError, match=r"step 4 .*Input/output error"):
        writer.wait()
    writer.wait()
    assert whole(tmp_path) == [2, 3]
