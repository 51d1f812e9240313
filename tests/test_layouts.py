"""Layouts over 1, 2 and 4 processes against one: losses, raw gradients, biases, Muon's updates, checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch

from layouts import compare_layouts, config, losses, reference, train_all
from processes import run
from trinity.base.rundir import RunDir

LAYOUTS: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{}, {"expert": 2}, {"replicate": 2}, {"context": 2}],
    4: [
        {"replicate": 2},
        {"expert": 2},
        {"replicate": 2, "expert": 2},
        {"context": 2, "expert": 2},
        {"context": 4, "expert": 4},
    ],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    reference(folder, config(), torch.device("cpu"))
    return folder


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_a_layout_trains_as_one_process(alone: Path, ranks: int) -> None:
    # The reference keeps its activations.
    settings = config("runtime.recompute=block") if ranks == 4 else config()
    run(compare_layouts, ranks, str(alone), LAYOUTS[ranks], settings)


def test_stacks_of_experts_that_do_not_share_out_evenly_are_split_by_rows(tmp_path: Path) -> None:
    """Six experts over four ranks, and three over two: the matrices of experts travel for Muon, too."""
    settings = config("model.num_experts=6")
    reference(tmp_path, settings, torch.device("cpu"))
    run(compare_layouts, 4, str(tmp_path), [{}, {"expert": 2}], settings)


SAVED: dict[str, tuple[int, dict[str, int] | None]] = {
    "one": (1, None),
    "fsdp2": (2, {}),
    "hsdp2-ep2": (4, {"replicate": 2, "expert": 2}),
    "cp2-ep4": (4, {"context": 2, "expert": 4}),
}


def test_a_checkpoint_of_any_layout_goes_on_in_any_other(tmp_path: Path) -> None:
    """Six steps in each of four layouts, and the last three again from each other's checkpoint of step 3."""
    settings = config(
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=9",
        'pretrain.phases=[{name="a", tokens=1536, weights={x=1.0}}]',
    )

    def train_in_all(runs: dict[str, list[str]]) -> None:
        for ranks in (1, 2, 4):
            todo = [(str(tmp_path / r), SAVED[name][1]) for name in runs if SAVED[name][0] == ranks for r in runs[name]]
            if ranks == 1:
                train_all(0, todo, settings)
            else:
                run(train_all, ranks, todo, settings)

    train_in_all({name: [name] for name in SAVED})
    for name in SAVED:
        for other in SAVED:
            shutil.copytree(tmp_path / name, tmp_path / f"{name}-{other}")
            shutil.rmtree(tmp_path / f"{name}-{other}" / "checkpoints" / "step-00000006")
    train_in_all({other: [f"{name}-{other}" for name in SAVED] for other in SAVED})
    alone = losses(tmp_path / "one")
    assert len(alone) == 6
    for name in SAVED:
        saved = losses(tmp_path / name)
        assert saved == pytest.approx(alone, rel=1e-5)
        for other in SAVED:
            resumed = losses(tmp_path / f"{name}-{other}")
            (event,) = RunDir(tmp_path / f"{name}-{other}").read_events("resume")
            assert event["step"] == 3
            assert resumed[:3] == saved[:3]
            bound = 0 if name == other else 1e-5
            assert resumed[3:] == pytest.approx(saved[3:], rel=bound, abs=0), f"{name}, then {other}"
