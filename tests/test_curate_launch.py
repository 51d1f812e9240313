"""The files that start a curation on a cluster: their fields, their commands and their recipe hold together."""

import shlex
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from trinity.cli.app import app
from trinity.config.curate import read_recipe
from trinity.curate.recipes import check_recipes

LAUNCH = Path(__file__).parents[1] / "launch" / "ray"
CLUSTER_KEYS = {
    *("cluster_name", "provider", "auth", "min_workers", "max_workers", "upscaling_speed", "idle_timeout_minutes"),
    *("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
}


def load(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


def check_command(line: str) -> None:
    """A line is a curation that the verb's parser accepts, into shared storage."""
    program, verb, *words = shlex.split(line)
    assert (program, verb) == ("trinity", "curate")
    command = get_command(app).commands["curate"]  # pyright: ignore[reportAttributeAccessIssue]
    parameters = command.make_context("curate", words).params
    assert parameters["recipe"] == Path("/shared/curate.toml")
    assert parameters["settings"] == ["run.ray=auto"]
    assert str(parameters["out"]).startswith("/shared/")


def test_the_job_of_kuberay() -> None:
    job = load("kuberay-rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    known = {"entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
    assert set(spec) == known | {"rayClusterSpec"}
    check_command(spec["entrypoint"])
    cluster = spec["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "memory": "/dev/shm"}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_cluster_of_machines() -> None:
    cluster = load("cluster.yaml")
    assert set(cluster) == CLUSTER_KEYS
    assert cluster["provider"]["type"] == "local"
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    assert any("ray start --head" in line for line in cluster["head_start_ray_commands"])
    comment = (LAUNCH / "cluster.yaml").read_text()
    check_command(comment.split("ray exec launch/ray/cluster.yaml '", 1)[1].split("'", 1)[0])


def test_the_recipe() -> None:
    config = read_recipe(LAUNCH / "curate.toml")
    check_recipes(config)
    assert config.run.ray == "auto"
    assert [endpoint.concurrency for endpoint in config.generate.endpoints] == [128, 128]
