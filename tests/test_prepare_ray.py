"""Preparing on a Ray cluster: the same shards as in one process, also when workers die."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from prepare_fakes import ByteTokenizer, corpus, everything
from trinity.base.errors import UserError
from trinity.data.prepare import prepare

TOKENIZER = ByteTokenizer()


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'trinity-moe\[ray\]'"):
        prepare([corpus(tmp_path / "in")], TOKENIZER, tmp_path / "out", ray="local")


@dataclass(frozen=True)
class Deadly(ByteTokenizer):
    """Kills its worker process twice."""

    marks: str = ""

    def encode_batch(self, texts):
        for mark in ("first", "second"):
            try:
                (Path(self.marks) / mark).touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_batch(texts)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray warns about itself
def test_a_cluster_gives_the_same_shards_though_workers_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.data", reason="needs the extra ray")
    settings = {"unit_bytes": 4000, "val_fraction": 0.2}
    corpus(tmp_path / "in")
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))  # of this tokenizer
    monkeypatch.chdir(tmp_path)  # relative paths reach the workers too
    whole = prepare(["in"], TOKENIZER, "whole", **settings)
    deadly = Deadly(marks=str(tmp_path / "marks"))
    done = prepare(["in"], deadly, "out", ray="local", workers=2, **settings)
    assert {path.name for path in (tmp_path / "marks").iterdir()} == {"first", "second"}
    assert done.fingerprint == whole.fingerprint
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")

    (tmp_path / "in" / "e.jsonl").write_text('{"other": 1}\n' * 3)
    with pytest.raises(UserError, match="text"):
        prepare(["in/e.jsonl"], TOKENIZER, "none", ray="local", workers=2, **settings)
    with pytest.raises(UserError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        prepare(["in"], TOKENIZER, "none2", ray="127.0.0.1:1")
