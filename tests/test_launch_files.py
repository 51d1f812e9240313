"""The launch files: the shell script runs with stand-ins for SLURM's programs, the manifests have the fields of their
kinds, and their commands are commands of this program."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch_helpers import environment, write_run
from trinity.base.rundir import RunDir
from trinity.config import resolve

LAUNCH = Path(__file__).parents[1] / "launch"
SBATCH = LAUNCH / "slurm.sbatch"


def slurm(folder: Path, python: str) -> dict[str, str]:
    """An environment as in a job on one node, with an `srun` that starts its command here and a `scontrol` that names
    so many hosts that a reader of the first line alone would break its pipe."""
    programs = {
        "srun": 'while [[ $1 == --* ]]; do shift; done\necho "$@" >> "$STUB/srun.log"\nexec "$@"\n',
        "scontrol": 'if [[ $1 == show ]]; then echo 127.0.0.1; for ((i = 0; i < 20000; i++)); do echo "node-$i"; done\n'
        'else echo "$@" >> "$STUB/scontrol.log"; fi\n',
    }
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text("#!/bin/bash\n" + text)
        (folder / name).chmod(0o755)
    return environment(
        PATH=f"{folder}{os.pathsep}{os.environ['PATH']}",
        STUB=str(folder),
        TRINITY_PYTHON=python,
        PROCS_PER_NODE="2",
        SLURM_JOB_ID="12345",
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_NODELIST="node-[0-19999]",
    )


def stand_in(folder: Path, text: str) -> str:
    """A program in the place of python."""
    folder.mkdir(exist_ok=True)
    path = folder / "python"
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)
    return str(path)


def sbatch(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SBATCH), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280, check=False)


def test_the_script_is_sound_shell() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    assert sbatch(environment()).returncode == 2


def test_the_doctor_goes_first_and_then_the_run(tmp_path: Path) -> None:
    variables = slurm(tmp_path / "bin", stand_in(tmp_path / "bin", "exit 0\n"))
    done = sbatch(variables, "pretrain", "nano", "--run-dir", "/shared/runs/nano")
    assert done.returncode == 0, done.stderr
    doctor, run = (tmp_path / "bin" / "srun.log").read_text().splitlines()
    assert doctor.endswith("--max-restarts=0 -m trinity doctor --shared /shared/runs")
    assert "--nnodes=1 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:32345" in run
    assert run.endswith("--max-restarts=3 -m trinity pretrain nano --run-dir /shared/runs/nano")


def test_a_sick_node_stops_the_job_and_a_failed_run_its_status(tmp_path: Path) -> None:
    variables = slurm(tmp_path / "bin", stand_in(tmp_path / "bin", '[[ "$*" != *doctor* ]]\n'))
    sick = sbatch(variables, "pretrain", "nano", "--run-dir", "/x")
    assert (sick.returncode, "DOCTOR=0 starts all the same" in sick.stderr) == (1, True)
    variables = slurm(tmp_path / "bin", stand_in(tmp_path / "bin", "exit 7\n"))
    assert sbatch({**variables, "DOCTOR": "0"}, "pretrain", "nano").returncode == 7
    assert not (tmp_path / "bin" / "scontrol.log").exists(), "a failed run is not queued again"


def test_near_the_time_limit_the_run_saves_and_the_job_is_queued_again(tmp_path: Path) -> None:
    body = 'trap "echo saved >> $STUB/saved; exit 1" TERM\ntouch "$STUB/started"\nwhile :; do sleep 0.05; done\n'
    variables = slurm(tmp_path / "bin", stand_in(tmp_path / "bin", body))
    job = subprocess.Popen(["bash", str(SBATCH), "pretrain", "nano"], env={**variables, "DOCTOR": "0"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "bin" / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert (tmp_path / "bin" / "saved").read_text() == "saved\n"
    assert (tmp_path / "bin" / "scontrol.log").read_text() == "requeue 12345\n"


@pytest.mark.slow
def test_the_script_trains_end_to_end(tmp_path: Path) -> None:
    settings = write_run(tmp_path, 6)
    variables = slurm(tmp_path / "bin", sys.executable)
    done = sbatch(variables, "pretrain", str(settings), "--run-dir", str(tmp_path / "runs" / "x"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fit for a run" in done.stdout
    assert "6 steps" in done.stdout
    assert len(RunDir(tmp_path / "runs" / "x").read_metrics("step")) == 6


# What the kinds have, by dotted path; an unknown field in a manifest is refused by the API server.
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "containers": list,
    "volumes": list,
    "affinity": dict,
}
CONTAINER = {"name", "image", "command", "args", "env", "ports", "resources", "volumeMounts"}
JOB = {"parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int, "template": dict}
KINDS: dict[str, tuple[str, set[str]]] = {
    "JobSet": ("jobset.x-k8s.io/v1alpha2", {"network", "failurePolicy", "replicatedJobs", "successPolicy"}),
    "TrainingRuntime": ("trainer.kubeflow.org/v1alpha1", {"mlPolicy", "template", "podGroupPolicy"}),
    "TrainJob": ("trainer.kubeflow.org/v1alpha1", {"runtimeRef", "trainer", "suspend", "initializer"}),
}


def manifests() -> list[Any]:
    return [one for name in sorted(LAUNCH.glob("*.yaml")) for one in yaml.safe_load_all(name.read_text())]


def find(kind: str) -> Any:
    (found,) = (one for one in manifests() if one["kind"] == kind)
    return found


def check(fields: dict[str, Any], known: dict[str, type]) -> None:
    for name, value in fields.items():
        assert isinstance(value, known[name]), name


def check_pod(pod: dict[str, Any]) -> None:
    check(pod, POD)
    assert pod["terminationGracePeriodSeconds"] > 240, "torchrun is more patient than the kubelet"
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert set(container) <= CONTAINER
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
        for variable in container["env"]:
            assert isinstance(variable.get("value", ""), str), "values of variables are strings"


def test_every_manifest_is_of_a_known_kind() -> None:
    assert [one["kind"] for one in manifests()] == ["TrainingRuntime", "TrainJob", "JobSet"]
    for one in manifests():
        version, fields = KINDS[one["kind"]]
        assert one["apiVersion"] == version
        assert one["metadata"]["name"].replace("-", "").isalnum()
        assert set(one["spec"]) <= fields


def test_the_jobset() -> None:
    spec = find("JobSet")["spec"]
    (job,) = spec["replicatedJobs"]
    check(job["template"]["spec"], JOB)
    nodes = job["template"]["spec"]["completions"]
    assert job["template"]["spec"]["parallelism"] == nodes
    assert job["template"]["spec"]["completionMode"] == "Indexed"
    pod = job["template"]["spec"]["template"]["spec"]
    check_pod(pod)
    (container,) = pod["containers"]
    assert f"--nnodes={nodes}" in container["command"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]
    # JOBSET-JOB-INDEX-POD.SUBDOMAIN, the subdomain being the JobSet's name
    assert f"--rdzv-endpoint=trinity-{job['name']}-0-0.trinity:29400" in container["command"]


def test_the_trainjob() -> None:
    runtime, job = find("TrainingRuntime"), find("TrainJob")
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "TrainingRuntime",
        "name": runtime["metadata"]["name"],
    }
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    labels = replicated["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    check(replicated["template"]["spec"], JOB)
    check_pod(replicated["template"]["spec"]["template"]["spec"])
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert trainer["command"][0] == "torchrun"


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob"])
def test_the_commands_are_of_this_program(kind: str) -> None:
    spec = find(kind)["spec"]
    container = spec.get("trainer")
    if container is None:
        (container,) = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][-2:] == ["-m", "trinity"]
    verb, preset, *rest = container["args"]
    assert verb == "pretrain"
    resolve(preset, overrides=[word for word in rest if "=" in word])
    assert rest[-2] == "--run-dir"
