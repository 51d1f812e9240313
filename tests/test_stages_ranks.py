"""Every stage over several processes, each going on from the one before in another layout, as a user starts them."""

import json
from pathlib import Path

import pytest

from launch_helpers import torchrun, write_run
from trinity.base.rundir import RunDir


def start(ranks: int, *arguments: str) -> tuple[int, str]:
    process = torchrun(ranks, "trinity", *arguments)
    output, errors = process.communicate(timeout=280)
    return process.returncode, output + errors


def layout(path: Path) -> dict[str, int]:
    (event,) = RunDir(path).read_events("start")
    return event["environment"]["layout"]


@pytest.mark.slow
def test_the_path_from_text_to_rl_over_processes(tmp_path: Path) -> None:
    settings = write_run(tmp_path, 6, checkpoint={"every_steps": 4}, pretrain={"eval_every": 3})
    pre, ext, sft, rl = (tmp_path / name for name in ("pre", "ext", "sft", "rl"))
    code, text = start(4, "pretrain", str(settings), "parallel.replicate=2", "parallel.expert=2", "--run-dir", str(pre))
    assert code == 0, text
    assert layout(pre) == {"replicate": 2, "shard": 2, "expert": 2, "context": 1, "context_order": "zigzag"}
    assert RunDir(pre).read_samples()
    parts = json.loads((pre / "checkpoints" / "step-00000006" / "manifest.json").read_text())["files"]
    assert sorted(parts)[:2] == ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"]

    code, text = start(2, "extend", "--from", str(pre), "--run-dir", str(ext))
    assert code != 0
    assert "parallel.replicate" in text or "parallel.expert" in text
    one = "parallel.replicate=1"
    code, text = start(2, "extend", "--from", str(pre), one, "parallel.context=2", "--run-dir", str(ext))
    assert code == 0, text
    assert layout(ext) == {"replicate": 1, "shard": 1, "expert": 2, "context": 2, "context_order": "zigzag"}
    assert RunDir(ext).read_metrics("niah")

    code, text = start(2, "sft", "--from", str(ext), "parallel.context=1", "--run-dir", str(sft))
    assert code == 0, text
    code, text = start(2, "rl", "--from", str(sft), "--run-dir", str(rl))
    assert code != 0
    assert "rl cannot share experts" in text
    code, text = start(2, "rl", "--from", str(sft), "parallel.expert=1", "--run-dir", str(rl))
    assert code == 0, text
    assert (rl / "model" / "config.json").exists()
