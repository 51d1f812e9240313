"""The doctor finds what is wrong with a machine, says it in a sentence with a remedy, and leaves no trace."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch_helpers import SOURCE, environment
from trinity.base.errors import UserError
from trinity.cli import main
from trinity.doctor import Finding, examine, group, node, storage
from trinity.doctor.group import worst_of


def problem(findings: list[Finding], name: str) -> str:
    (found,) = (finding.problem for finding in findings if finding.name == name)
    return found


def test_this_machine_is_fit_and_is_left_as_it_was(tmp_path: Path, capsys) -> None:
    assert main(["doctor", "--path", str(tmp_path), "--device", "cpu", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    by_name = {check["check"]: check for check in found["checks"]}
    assert by_name["torch"]["value"] == torch.__version__
    assert by_name["atomic rename"]["value"] == "yes"
    assert by_name["write speed"]["bytes/s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_problem_is_a_sentence_and_exit_status_1(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--path", str(tmp_path / "file" / "runs"), "--quick"]) == 1
    captured = capsys.readouterr()
    assert "PROBLEM" in captured.out
    assert "cannot be written: " in captured.err
    assert "choose another with --path" in captured.err
    assert main(["doctor", "--device", "tpu"]) == 2


@pytest.mark.parametrize(
    ("check", "name"),
    [
        ("_renames", "atomic rename"),
        ("_syncs", "fsync of folders"),
        ("_locks", "file locks"),
        ("_appends", "appending"),
    ],
)
def test_a_file_system_that_lacks_a_feature(tmp_path: Path, monkeypatch, check: str, name: str) -> None:
    def fails(_: Path) -> bool:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(storage, check, fails)
    said = problem(storage.examine_storage(tmp_path, 1), name)
    assert f"lacks {name} (Operation not supported)" in said
    assert said.endswith("keep runs elsewhere")
    monkeypatch.setattr(storage, check, lambda _: False)
    assert problem(storage.examine_storage(tmp_path, 1), name)


def test_locks_that_do_not_hold_are_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage.fcntl, "flock", lambda *_: None)  # as on a file system that ignores them
    assert problem(storage.examine_storage(tmp_path, 1), "file locks")


def test_little_room_and_slow_storage(tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=1 << 28))
    monkeypatch.setattr(storage, "_SLOW", 1e15)
    found = storage.examine_storage(tmp_path, 1)
    assert "0.25 GiB free: make room" in problem(found, "free disk")
    assert "use faster storage" in problem(found, "write speed")


def test_limits_of_the_process(monkeypatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (256, 4096), resource.RLIMIT_MEMLOCK: (65536, 65536)}
    monkeypatch.setattr(node.resource, "getrlimit", limits.__getitem__)
    assert problem(node.examine_node(), "open files") == "at most 256 files may be open: ulimit -n 4096"


def test_gpus_without_shared_memory_or_processors(monkeypatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(node.torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(node.shutil, "disk_usage", lambda _: usage._replace(total=64 << 20))
    monkeypatch.setattr(node.os, "sched_getaffinity", lambda _: {0, 1})
    assert "docker --shm-size=8g" in node._shared_memory().problem
    assert "8 GPUs share 2 processors" in node._processors().problem


def test_an_old_torch_and_one_without_cuda(monkeypatch) -> None:
    monkeypatch.setattr(node.torch, "__version__", "2.4.1+cpu")
    monkeypatch.setattr(node, "_driver", lambda: "580.95.05")
    monkeypatch.setattr(node.torch.version, "cuda", None)
    found = node.examine_node()
    assert "older than 2.11: pip install -U torch" in problem(found, "torch")
    assert "install a CUDA build" in problem(found, "CUDA")


def test_the_first_rank_with_a_problem_is_named() -> None:
    fine, bad = Finding("memory", "8 GiB"), Finding("memory", "1 GiB", "only 1 GiB is free: end other programs")
    (found,) = worst_of([[fine], [fine], [bad], [bad]], ["a", "a", "b", "b"])
    assert found.problem == "rank 2 (b): only 1 GiB is free: end other programs"
    assert worst_of([[bad]], ["a"]) == [bad]


def test_a_shared_folder_that_is_not_seen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(group, "_SEEN", 0.1)
    assert group._look(tmp_path / "absent", "token") == "does not see rank 0's files"
    (tmp_path / "token").write_text("another")
    assert group._look(tmp_path, "token") == "reads other bytes than rank 0 wrote"


def test_one_process_is_a_group_of_one(tmp_path: Path) -> None:
    names = [finding.name for finding in examine(tmp_path, device="cpu", quick=True)]
    assert "all-reduce 1 MiB" not in names
    assert len(names) == len(set(names))
    with pytest.raises(UserError, match="cannot be written"), storage.own_folder(Path("/proc/no")):
        pass


@pytest.mark.slow
def test_two_machines_that_differ(tmp_path: Path) -> None:
    """Two processes with storage and code of their own, as on two machines that share neither."""
    other = tmp_path / "other"
    shutil.copytree(SOURCE, other / "src")
    with (other / "src" / "trinity" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(2):
        path = str(SOURCE if rank == 0 else other / "src")
        more = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        more |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        more |= {"PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "trinity", "doctor", "--quick", "--json", "--device", "cpu"]
        command += ["--shared", str(tmp_path / f"storage-{rank}")]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(**more)))
    output = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    checks = {check["check"]: check for check in json.loads(output[0])["checks"]}
    assert output[1] == ""
    assert "use the same on all" in checks["same trinity"]["problem"]
    assert checks["shared storage"]["problem"].startswith("rank 1 (")
    assert "mount the same storage on every machine" in checks["shared storage"]["problem"]
    assert not checks["same torch"]["problem"]
    assert checks["all-reduce 0.25 MiB"]["bytes/s"] > 0
    assert checks["all-to-all 0.25 MiB"]["bytes/s"] > 0
