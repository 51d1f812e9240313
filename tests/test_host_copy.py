"""Copies of the state that a checkpoint is written from while training goes on."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_helpers import small_config, small_job, weights
from trinity.train import train, writer
from trinity.train.checkpoint import Snapshot, list_checkpoints, load_checkpoint, save_checkpoint
from trinity.train.host_copy import HostCopies
from trinity.train.tensorfile import DTYPES

CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(
        torch.device("cuda"),
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


@pytest.fixture(params=DEVICES, ids=str)
def copies(request: pytest.FixtureRequest) -> Iterator[HostCopies]:
    made = HostCopies(request.param)
    yield made
    made.close()


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(sorted(DTYPES, key=str))), max_size=8)
)
@settings(max_examples=40, deadline=None)
def test_any_tensors_come_back_and_share_nothing(layout: list[tuple[list[int], torch.dtype]]) -> None:
    made = HostCopies(CPU)
    tensors = {i: (torch.randn(shape) * 9).to(dtype) for i, (shape, dtype) in enumerate(layout)}
    expected = {i: tensor.clone() for i, tensor in tensors.items()}
    copy = made.take(tensors)
    copy.ready()
    for tensor in tensors.values():
        tensor.zero_()
    assert copy.tensors.keys() == expected.keys()
    for i, tensor in expected.items():
        assert copy.tensors[i].dtype == tensor.dtype
        assert torch.equal(copy.tensors[i], tensor)


def test_views_are_copied_by_their_values(copies: HostCopies) -> None:
    base = torch.arange(12.0, device=copies.device).reshape(3, 4)
    copy = copies.take({"transposed": base.T, "column": base[:, 1], "scalar": base[1, 1]})
    copy.ready()
    assert copy.tensors["transposed"].tolist() == base.T.tolist()
    assert copy.tensors["column"].tolist() == [1.0, 5.0, 9.0]
    assert copy.tensors["scalar"].item() == 5.0


def test_the_same_memory_serves_every_copy(copies: HostCopies) -> None:
    state = {"a": torch.zeros(1000, device=copies.device), "b": torch.zeros(7, device=copies.device)}
    places = set()
    for value in range(3):
        for tensor in state.values():
            tensor.fill_(value)
        copy = copies.take(state)
        copy.ready()
        places.add(tuple(tensor.data_ptr() for tensor in copy.tensors.values()))
        assert all(bool((tensor == value).all()) for tensor in copy.tensors.values())
    assert len(places) == 1


def test_what_follows_protect_does_not_reach_the_copy(copies: HostCopies) -> None:
    """On a GPU the copy is queued behind a long computation, so that without the wait the change would be copied."""
    state = torch.ones(1 << 24, device=copies.device)
    for _ in range(3):
        expected = state[0].item()
        copy = copies.take({"state": state})
        copies.protect()
        state.add_(1)
        copy.ready()
        assert bool((copy.tensors["state"] == expected).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_taking_a_copy_does_not_wait_for_the_device() -> None:
    made = HostCopies(torch.device("cuda"))
    state = {"state": torch.ones(1 << 24, device="cuda")}
    made.take(state).ready()  # allocates and pins
    torch.cuda.set_sync_debug_mode("error")
    try:
        copy = made.take(state)
        made.protect()
        state["state"].add_(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    copy.ready()
    assert bool((copy.tensors["state"] == 1).all())
    made.close()


def test_the_step_asks_for_protection_before_anything_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = small_job(tmp_path)
    seen: list[bool] = []
    before = weights(job)

    def protect(_: HostCopies) -> None:
        now = weights(job)
        if not seen:
            seen.append(all(torch.equal(tensor, before[name]) for name, tensor in now.items()))
            assert any(p.grad is not None for p in job.model.parameters()), "after the backward pass"

    monkeypatch.setattr(HostCopies, "protect", protect)
    train(job)
    assert seen == [True]
    assert not torch.equal(weights(job)["norm.weight"], before["norm.weight"])


def test_a_slow_disk_writes_what_was_there_at_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving that takes longer than the steps of an interval: each checkpoint is that of a run that waits."""
    waits = small_job(tmp_path / "waits", small_config("checkpoint.asynchronous=false", "checkpoint.keep_last=9"))
    train(waits)
    taken, news = [0], threading.Condition()

    def slow(folder: Path, snapshot: Snapshot) -> Path:
        if 0 < snapshot.step < 20:
            with news:  # three more steps are taken before anything is read
                assert news.wait_for(lambda: taken[0] >= snapshot.step + 3, timeout=60)
        return save_checkpoint(folder, snapshot)

    monkeypatch.setattr(writer, "save_checkpoint", slow)
    job = small_job(tmp_path / "behind", small_config("checkpoint.asynchronous=true", "checkpoint.keep_last=9"))
    update = job.optimizer.step

    def counted(skip: torch.Tensor | None = None, number: int = 0) -> None:
        update(skip, number)
        with news:
            taken[0] += 1
            news.notify_all()

    job.optimizer.step = counted
    train(job)
    found = list_checkpoints(tmp_path / "behind/checkpoints")
    assert [info.step for info in found] == [0, 5, 10, 15, 20]
    for info in found:
        one, other = load_checkpoint(info.path), load_checkpoint(tmp_path / "waits/checkpoints" / info.path.name)
        assert all(torch.equal(tensor, other.model[name]) for name, tensor in one.model.items())
        assert all(torch.equal(tensor, other.optimizer[name]) for name, tensor in one.optimizer.items())
