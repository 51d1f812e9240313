"""Preparing shards: the same result whatever the workers and kills, and every mistake named."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prepare_fakes import ByteTokenizer, corpus, everything
from trinity.base.errors import UserError
from trinity.data.duplicates import choose_kept
from trinity.data.prepare import Prepared, Progress, prepare
from trinity.data.shards import Shards
from trinity.data.team import run_jobs

TOKENIZER = ByteTokenizer()


def run(inputs: Path, out: Path, **changes: object) -> Prepared:
    return prepare([inputs], TOKENIZER, out, **{"unit_bytes": 4000, "val_fraction": 0.2, **changes})  # type: ignore[arg-type]


def test_documents_arrive_once_and_whole(tmp_path):
    steps: list[Progress] = []
    done = run(corpus(tmp_path / "in"), tmp_path / "out", progress=steps.append)
    train, val = (Shards.open(tmp_path / "out" / split) for split in ("train", "val"))
    for shards in (train, val):
        shards.verify()
        assert shards.tokenizer_fingerprint == TOKENIZER.fingerprint
        assert all(shards.tokens(doc)[-1] == TOKENIZER.eos_id for doc in range(shards.num_documents))
    texts = [TOKENIZER.decode(s.tokens(doc).tolist()) for s in (train, val) for doc in range(s.num_documents)]
    expected = {json.loads(line)["text"] for line in (tmp_path / "in/a.jsonl").read_text().splitlines()[:120]}
    expected |= {f"only here {i}" for i in range(20)} | {(tmp_path / "in/c.txt").read_text(), "print('hello')\n" * 3}
    assert len(texts) == len(set(texts))
    assert set(texts) == expected
    assert 0.08 < val.num_documents / len(texts) < 0.35
    assert done.dropped == {"duplicate": 21, "empty": 1, "not JSON": 1}
    assert "a.jsonl" in done.examples["not JSON"][0]
    assert done.passed_over == 1
    assert train.domains == ["code", "math", "prose", "text"]
    assert train.describe(0)["source"] == "in/a.jsonl"
    assert {step.step for step in steps} == {"scan", "encode"}
    assert steps[-1].units_done == steps[-1].units
    assert steps[-1].tokens == train.num_tokens + val.num_tokens
    assert not (tmp_path / "out/.work").exists()


def test_of_duplicates_the_first_in_the_inputs_order_stays(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text("the same text")
    prepare([tmp_path / "b.txt", tmp_path / "a.txt"], TOKENIZER, tmp_path / "out", val_fraction=0.0)
    assert Shards.open(tmp_path / "out/train").describe(0)["source"] == "b.txt"


def test_one_and_two_workers_write_the_same_bytes(tmp_path):
    inputs = corpus(tmp_path / "in")
    one, two = run(inputs, tmp_path / "one"), run(inputs, tmp_path / "two", workers=2)
    assert one.fingerprint == two.fingerprint
    assert everything(tmp_path / "one") == everything(tmp_path / "two")


def test_the_fingerprint_knows_neither_units_nor_places(tmp_path):
    one = run(corpus(tmp_path / "in"), tmp_path / "one")
    (tmp_path / "elsewhere").mkdir()
    other = run(corpus(tmp_path / "elsewhere" / "in"), tmp_path / "two", unit_bytes=10**6)
    changed = run(corpus(tmp_path / "new", seed=1), tmp_path / "three")
    assert one.fingerprint == other.fingerprint != changed.fingerprint


def test_long_documents_are_tokenized_in_pieces_that_join(tmp_path):
    text = "".join(f"line {i} of a long book\n" for i in range(130_000))
    (tmp_path / "book.txt").write_text(text)

    class Watched(ByteTokenizer):
        longest = 0

        def encode_batch(self, texts):
            Watched.longest = max(Watched.longest, sum(map(len, texts)))
            return super().encode_batch(texts)

    prepare([tmp_path / "book.txt"], Watched(), tmp_path / "out", val_fraction=0.0)
    shards = Shards.open(tmp_path / "out/train")
    assert shards.num_documents == 1
    assert TOKENIZER.decode(shards.tokens(0).tolist()) == text
    assert Watched.longest <= 2 << 20


def test_the_same_call_again_returns_what_is_there(tmp_path):
    inputs = corpus(tmp_path / "in")
    first = run(inputs, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(inputs, tmp_path / "out", workers=2) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_another_result_in_the_same_place_needs_force(tmp_path):
    inputs, out = corpus(tmp_path / "in"), tmp_path / "out"
    first = run(inputs, out)
    with pytest.raises(UserError, match="min_chars = 1 and not 50"):
        run(inputs, out, min_chars=50)
    with pytest.raises(UserError, match="made differently: by the tokenizer"):
        prepare([inputs], ByteTokenizer(vocab_size=300), out, unit_bytes=4000, val_fraction=0.2)
    with pytest.raises(UserError, match=r"without the input .*c.txt=poems"):
        prepare([f"{inputs / 'c.txt'}=poems"], TOKENIZER, out, unit_bytes=4000, val_fraction=0.2)
    (inputs / "c.txt").write_text("changed")
    with pytest.raises(UserError, match=r"before .*c.txt was changed"):
        run(inputs, out)
    assert run(inputs, out, force=True).fingerprint != first.fingerprint


def test_a_foreign_folder_is_left_alone(tmp_path):
    inputs = corpus(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UserError, match=r"holds thesis\.tex"):
            run(inputs, tmp_path / "out", force=force)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_one_process_at_a_time(tmp_path):
    inputs, out = corpus(tmp_path / "in"), tmp_path / "out"
    clashes = []

    def again(_: Progress) -> None:
        with pytest.raises(UserError, match="another process is preparing") as error:
            run(inputs, out)
        clashes.append(error)

    run(inputs, out, progress=again)
    assert clashes


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_duplicates_are_the_same_in_any_number_of_partitions(tmp_path, at_once):
    rng = np.random.default_rng(0)
    hashes = np.frombuffer(rng.integers(0, 256, (40, 16), np.uint8).tobytes(), "V16")[rng.integers(0, 40, 150)]
    verdicts = (rng.random(150) < 0.2).astype(np.uint8)
    scans = [tmp_path / "0.npz", tmp_path / "1.npz", tmp_path / "2.npz"]
    for scan, part in zip(scans, (slice(0, 70), slice(70, 70), slice(70, 150)), strict=True):
        np.savez(scan, hashes=hashes[part], verdicts=verdicts[part])
    choose_kept(scans, tmp_path / "keep.npy", True, at_once)
    seen, expected = set(), []
    for content, verdict in zip(hashes.tolist(), verdicts, strict=True):
        expected.append(verdict == 0 and content not in seen)
        if verdict == 0:
            seen.add(content)
    assert np.load(tmp_path / "keep.npy").tolist() == expected
    choose_kept(scans, tmp_path / "keep.npy", False, at_once)
    assert np.load(tmp_path / "keep.npy").tolist() == (verdicts == 0).tolist()


def test_mistakes_in_worker_processes_arrive_as_one_sentence(tmp_path):
    inputs = corpus(tmp_path / "in")
    data = (inputs / "b.jsonl.gz").read_bytes()
    (inputs / "b.jsonl.gz").write_bytes(data[:-20])
    with pytest.raises(UserError, match=r"b\.jsonl\.gz is cut off: the gzip stream ends after \d+ decompressed bytes"):
        run(inputs, tmp_path / "out", workers=2)


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_worker_that_is_killed_is_an_error(tmp_path):
    with pytest.raises(UserError, match="a worker process was killed"):
        list(run_jobs(die, [(0,), (1,)], (), workers=2))


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nbroken\n')
    with pytest.raises(UserError, match=r"no document is left .*not JSON 1, too short 1"):
        prepare([tmp_path / "a.jsonl"], TOKENIZER, tmp_path / "out", min_chars=5)


def test_a_full_disk_is_one_sentence_and_keeps_what_is_done(tmp_path, monkeypatch):
    inputs = corpus(tmp_path / "in")
    whole = run(inputs, tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (inputs / "e.txt").write_text(" ".join(map(str, range(20_000))))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        with pytest.raises(UserError, match=r"the disk is full: .*tokens-\d+.bin was not written"):
            run(inputs, tmp_path / "out", val_fraction=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = list((tmp_path / "out/.work/train").glob("*.npz"))
    assert kept
    assert not list((tmp_path / "out").rglob("*.partial"))
    steps: list[Progress] = []
    run(inputs, tmp_path / "out", val_fraction=0.0, progress=steps.append)
    assert next(step for step in steps if step.step == "encode").units_done == len(kept) + 1
    assert whole.fingerprint


def test_a_file_that_changes_between_the_passes_is_noticed(tmp_path):
    inputs = corpus(tmp_path / "in")

    def change(progress: Progress) -> None:
        if progress.step == "scan" and progress.units_done == progress.units:
            path = inputs / "a.jsonl"
            path.write_text(path.read_text().replace("1", "2"))

    with pytest.raises(UserError, match="changed while it was being prepared"):
        run(inputs, tmp_path / "out", progress=change)


CHILD = textwrap.dedent(
    """
    import os, signal, sys, time
    from prepare_fakes import ByteTokenizer, corpus, everything
    from trinity.data.prepare import prepare

    inputs, out, unit_bytes, workers, syncs = sys.argv[1:]

    class Slow(ByteTokenizer):
        def encode_batch(self, texts):
            time.sleep(0.02)
            return super().encode_batch(texts)

    def die_at_last(handle, left=[int(syncs)]):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        print("begun", flush=True)
        tokenizer = Slow()
        if int(syncs):
            os.fsync, tokenizer = die_at_last, ByteTokenizer()
        prepare([inputs], tokenizer, out, unit_bytes=int(unit_bytes), val_fraction=0.2, workers=int(workers))
    """
)


class Killed:
    """Runs `prepare` in a child that dies by SIGKILL, and compares the outcome with a run that was left alone."""

    def __init__(self, tmp_path: Path, unit_bytes: int) -> None:
        self.inputs, self.whole, self.out = corpus(tmp_path / "in"), tmp_path / "whole", tmp_path / "out"
        self.script = tmp_path / "child.py"
        self.script.write_text(CHILD)
        self.unit_bytes = unit_bytes
        run(self.inputs, self.whole, unit_bytes=unit_bytes)

    def child(self, workers: int, syncs: int = 0, seconds: float | None = None) -> bool:
        """Whether the child was killed: at a number of flushes to disk (just before a rename), or after a time."""
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        arguments = (self.inputs, self.out, self.unit_bytes, workers, syncs)
        command = [sys.executable, str(self.script), *map(str, arguments)]
        with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"begun\n"
            if seconds is not None:
                time.sleep(seconds)
                child.send_signal(signal.SIGKILL)
        assert child.returncode in (0, -signal.SIGKILL)
        return child.returncode != 0

    def check(self) -> None:
        run(self.inputs, self.out, unit_bytes=self.unit_bytes)
        assert everything(self.out) == everything(self.whole)


def test_kills_between_any_two_files_do_not_change_the_result(tmp_path):
    killed = Killed(tmp_path, unit_bytes=10_000)
    rng = np.random.default_rng(0)
    kills = 0
    while killed.child(1, syncs=int(rng.integers(10, 120))):
        kills += 1
    assert kills >= 3
    killed.check()


def test_kills_with_two_workers_do_not_change_the_result(tmp_path):
    killed = Killed(tmp_path, unit_bytes=2000)
    assert sum(killed.child(2, seconds=seconds) for seconds in (0.1, 0.6)) == 2
    killed.check()


@pytest.mark.slow
def test_many_kills_do_not_change_the_result(tmp_path):
    """40 kills: half at random moments with two workers, half at random flushes to disk, each time to the end."""
    killed = Killed(tmp_path, unit_bytes=2000)
    rng = np.random.default_rng(7)
    started = time.monotonic()
    assert not killed.child(2)
    whole_run = time.monotonic() - started

    def kill(times: int, child: Callable[[], bool]) -> None:
        kills = whole = 0
        while kills < times:
            assert whole <= times, "it ends before it can be killed"
            if child():
                kills += 1
            else:  # done in spite of the kills before: once more from the beginning
                whole += 1
                killed.check()
                shutil.rmtree(killed.out)
        killed.check()
        shutil.rmtree(killed.out)

    shutil.rmtree(killed.out)
    kill(20, lambda: killed.child(2, seconds=rng.uniform(0, whole_run)))
    # A step must be able to end: only committed units count, and the index is written in one go of about 90 flushes.
    kill(20, lambda: killed.child(1, syncs=int(rng.integers(1, 200))))
