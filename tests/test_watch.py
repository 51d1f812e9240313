"""Heartbeats and the sentences that come of them; settings compared before any collective. Threads stand for ranks."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from trinity.base.dist import Place
from trinity.base.errors import UsageError, UserError
from trinity.base.package import package_fingerprint
from trinity.parallel.rendezvous import agree, joined, launched
from trinity.parallel.watch import Heartbeat, Watch, missing


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def connect(store, prefix: str = "group") -> dist.Store:
    """A connection of its own, as every rank has."""
    client = dist.TCPStore("127.0.0.1", store.port, 2, is_master=False, wait_for_workers=False)
    return dist.PrefixStore(prefix, client)


HERE = Heartbeat("node-a", "step 120", 121, 600.4, 601)


def test_the_ranks_that_are_behind_are_named() -> None:
    beats = {0: HERE, 1: HERE, 2: replace(HERE, host="node-b", place="step 119", count=120, seconds=612.3)}
    assert missing(beats, 3, 600) == (
        "rank 2 (node-b) did not arrive at step 120 within 600 s: last seen at step 119, 612 s ago"
    )
    ended = replace(HERE, count=3, place="step 2", seconds=5, end="OSError: no space")
    assert missing({0: HERE, 1: ended, 2: ended}, 3, 600).endswith(
        "ranks 1, 2 (node-a) did not arrive at step 120 within 600 s: last seen at step 2, 5 s ago, "
        "where it ended: OSError: no space"
    )
    assert missing({0: HERE, 1: HERE}, 2, 600).startswith("no rank came past step 120 within 600 s")
    assert missing({0: HERE}, 7, 600) == "ranks 1, 2, 3, 4 and 2 more did not join within 600 s"


def test_a_rank_that_stands_still_ends_all_with_one_sentence(store, capsys) -> None:
    left: list[tuple[int, int]] = []
    places = [Place(), Place()]

    def watch(rank: int) -> Watch:
        leave = lambda status: (left.append((rank, status)), threading.current_thread().name)  # noqa: E731
        return Watch(connect(store), rank, 2, places[rank], timeout=1.0, beat=0.1, leave=leave)

    with watch(0), watch(1):
        for step in (1, 2):
            for place in places:
                place.arrive(f"step {step}")
        places[0].arrive("step 3")  # and there it waits for rank 1
        deadline = time.monotonic() + 60
        while len({rank for rank, _ in left}) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert {rank for rank, _ in left} == {0, 1}
    assert {status for _, status in left} == {1}
    spoken = capsys.readouterr().err.splitlines()
    assert len(spoken) == 1
    assert spoken[0].startswith("trinity: rank 1 (")
    assert "did not arrive at step 3 within 1 s: last seen at step 2" in spoken[0]


def test_a_rank_without_heartbeats_is_lost(store) -> None:
    told = threading.Event()
    with Watch(connect(store), 0, 2, Place(), timeout=600, beat=0.1, silent=0.8, leave=lambda _: told.set()) as watch:
        gone = Watch(connect(store), 1, 2, Place(), timeout=600)
        gone._send()  # once, and never again
        assert told.wait(60)
        assert "rank 1" in watch.lost_peer(patience=0.5)


def test_a_peer_that_failed_says_why(store) -> None:
    with Watch(connect(store), 0, 2, Place(), timeout=600, beat=0.1) as watch:
        place = Place()
        failing = Watch(connect(store), 1, 2, place, timeout=600, beat=0.1)
        failing.__enter__()
        place.arrive("step 9")
        failing.__exit__(UserError, UserError("the disk is full"), None)
        assert watch.lost_peer().endswith("ended at step 9: UserError: the disk is full")


def test_a_rank_that_makes_progress_is_left_alone(store) -> None:
    left: list[int] = []
    place = Place()
    with Watch(connect(store), 0, 1, place, timeout=3.0, beat=0.05, silent=1.0, leave=left.append):
        for step in range(20):
            place.arrive(f"step {step}")
            time.sleep(0.02)
    assert left == []


def everywhere(store, *settings: dict) -> list[str]:
    """What `agree` says on each rank."""

    def one(rank: int) -> str:
        try:
            agree(connect(store), rank, len(settings), settings[rank], timeout=20)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(settings)) as pool:
        return list(pool.map(one, range(len(settings))))


def test_equal_settings_agree_and_others_are_refused_on_every_rank(store) -> None:
    same = {"optim": {"muon_lr": 0.02, "betas": (0.9, 0.95)}, "code": "a"}
    assert everywhere(store, same, dict(same)) == ["", ""]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"optim": {"muon_lr": 0.5}, "code": "a"}, "optim.muon_lr is 0.02 on rank 0 and 0.5 on rank 1"),
        ({"optim": {"muon_lr": 0.02}, "code": "b"}, "install the same package on both"),
        ({"optim": {"muon_lr": 0.02}}, "code is 'a' on rank 0 and None on rank 1"),
    ],
)
def test_ranks_that_disagree(store, other: dict, says: str) -> None:
    verdicts = everywhere(store, {"optim": {"muon_lr": 0.02}, "code": "a"}, other)
    assert verdicts[0] == verdicts[1]
    assert says in verdicts[0]


def test_a_rank_that_never_joins_is_named(store) -> None:
    with pytest.raises(UserError, match=r"1 of 2 ranks did not join within 0.2 s, such as rank 1"):
        agree(connect(store), 0, 2, {}, timeout=0.2)


def test_a_single_process_joins_nothing(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() is None
    with joined("auto", timeout=600, settings={}):
        assert not dist.is_initialized()


def test_an_incomplete_environment_is_named(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: start the processes"):
        launched()


def test_the_fingerprint_is_of_the_content(tmp_path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = package_fingerprint(tmp_path)
    (tmp_path / "cache.pyc").write_bytes(b"1")
    assert package_fingerprint(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2\n")
    assert package_fingerprint(tmp_path) != before
    assert len(package_fingerprint()) == 16
