"""The extension stage with rows split over two processes: the losses, needles and model of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

import trinity
from processes import run
from stage_fixtures import tiny_config, write_inputs
from trinity.base.rundir import RunDir
from trinity.config import RunConfig
from trinity.model.transformer import Transformer
from trinity.stages import extend, pretrain

CPU = {"device": "cpu", "dtype": "float32", "threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    write_inputs(folder)
    return folder


def settings(folder: Path, **sections: Any) -> RunConfig:
    phases = [{"name": "a", "tokens": 256, "weights": {"prose": 1.0}}]
    return tiny_config(
        folder, pretrain={"phases": phases}, extend={"tokens": 4096}, eval={"niah_depths": 1}, **sections
    )


def work(rank: int, folder: Path, base: Path, target: Path) -> bool:
    # Two rows of different documents a micro-batch; a window (32) is shorter than a chunk (128).
    config = settings(folder, parallel={"context": 2}, runtime={**CPU, "recompute": "block"})
    return extend.run(config, target, start_from=base).train.finished


def test_extension_over_a_context_group(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    pretrain.run(settings(folder), base)
    extend.run(settings(folder), tmp_path / "alone", start_from=base)
    assert run(work, 2, folder, base, tmp_path / "together") == [True, True]
    alone, together = RunDir(tmp_path / "alone"), RunDir(tmp_path / "together")
    for found, expected in zip(together.read_metrics("step"), alone.read_metrics("step"), strict=True):
        assert found["rows"] == expected["rows"]
        assert found["load_entropy"] == pytest.approx(expected["load_entropy"], rel=1e-2)
        for name in ("loss", "ce", "z_loss", "sequence_loss", "batch_het", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-5), name
    # Muon turns rounding into steps; before the first one there is none.
    first, expected = (run.read_metrics("step")[0] for run in (together, alone))
    assert first["loss"] == pytest.approx(expected["loss"], rel=2e-6)
    assert first["max_vio_layers"] == expected["max_vio_layers"]
    (start,) = together.read_events("start")
    assert start["paths"]["local attention"].startswith("halo of 31 keys over 2 ranks, then SDPA")
    assert start["paths"]["global attention"].startswith("keys gathered over 2 ranks")
    needles, wanted = (run.read_metrics("niah") for run in (together, alone))
    assert [r["step"] for r in needles] == [0, 2]
    assert needles[0]["grid"] == wanted[0]["grid"]
    held_out, wanted = (run.read_metrics("eval")[0] for run in (together, alone))
    assert held_out["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    models: list[Transformer] = [trinity.load(tmp_path / name)[0] for name in ("alone", "together")]
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=5e-3, msg=name)
