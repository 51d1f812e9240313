"""Curation on a Ray cluster of this machine: the same blocks as without one, also when workers die."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curate_helpers import recipe_for, serial, write_documents, writer, written
from trinity.base.errors import UserError
from trinity.curate import run
from trinity.curate.summary import chain_holds

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray warns about itself


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One small cluster for the file."""
    found = pytest.importorskip("ray", reason="needs the extra curate")
    pytest.importorskip("ray.data", reason="needs the extra curate")
    from trinity.data.ray_team import ray_cluster

    with ray_cluster("local", 2, object_store_memory=80 << 20):
        yield found


def workers_named(name: str) -> list[int]:
    """Worker processes of this process's cluster whose title has `name`."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode("utf-8", "replace")
        except (OSError, ValueError):
            continue
    return [process for process in titles if name in titles[process] and parents.get(parents[process]) == os.getpid()]


def test_a_cluster_gives_the_same_blocks_though_an_actor_is_killed(
    tmp_path: Path, ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_documents(tmp_path / "in.jsonl", 30)
    killed: list[int] = []

    def misbehave(number: int, body: dict[str, Any]) -> str | None:
        if number == 9:
            killed.append(workers_named("AskingWorker")[0])
            os.kill(killed[0], signal.SIGKILL)
        return None

    with writer(misbehave) as server:
        found = run.curate(recipe_for(inputs, server.url, budget={"tokens": 10**6}), tmp_path / "out")
        assert server.calls < 2 * 30  # answers from before the kill were kept
    assert len(killed) == 1
    assert found["complete"]
    assert chain_holds(found["stages"])
    assert found["stages"]["validate"]["out"] == 30

    monkeypatch.setattr(run, "cluster", serial)
    with writer() as server:
        run.curate(recipe_for(inputs, server.url), tmp_path / "whole")
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_errors_of_workers_reach_the_caller(tmp_path: Path, ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_text('{"other": 1}\n')
    with writer() as server:
        with pytest.raises(UserError, match="no field 'text'"):
            run.curate(recipe_for(tmp_path / "in.jsonl", server.url), tmp_path / "a")
        inputs = write_documents(tmp_path / "in2.jsonl", 4)
        server_is_gone = recipe_for(inputs, "http://127.0.0.1:9/v1", generate={"patience": 0.1})
        with pytest.raises(UserError, match="no endpoint could be reached"):
            run.curate(server_is_gone, tmp_path / "b")
        keyed = [{"url": server.url, "model": "m", "key_variable": "NO_SUCH_KEY_HERE"}]
        with pytest.raises(UserError, match="NO_SUCH_KEY_HERE, the API key"):
            run.curate(recipe_for(inputs, server.url, generate={"endpoints": keyed}), tmp_path / "c")
