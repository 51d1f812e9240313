"""bench/extension.py on a CPU with a model that trains in seconds: every part, and that a second call repeats none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stage_fixtures import write_inputs

BENCH = Path(__file__).parent.parent / "bench" / "extension.py"
TINY = (
    "model.vocab_size=512 model.num_layers=4 model.dim=32 model.num_heads=2 model.num_kv_heads=1 model.head_dim=16 "
    "model.ffn_dim=64 model.expert_dim=16 model.num_experts=4 model.window=32 pretrain.seq_len=256 eval.niah_samples=1 "
    "eval.niah_depths=2 eval.niah_keys=2 extend.niah_every=2"
)
WEIGHTS = "[{ name = 'all', tokens = 8192, weights = { prose = 1.0 } }]"


def call(folder: Path, *more: str) -> dict:
    command = [
        *(sys.executable, str(BENCH), "--shape", "toy", "--out", str(folder / "out"), "--target", "1024"),
        *("--shards", str(folder / "shards"), "--tokenizer", str(folder / "tokenizer")),
        *("--extend-tokens", "8192", "--pretrain-tokens", "8192", *more, "--set", *TINY.split()),
        *(f"pretrain.phases={WEIGHTS}", "runtime.threads=1"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out" / "extension.json").read_text())


@pytest.mark.slow  # three processes, each of which imports torch and trains
def test_every_part_runs_and_is_not_repeated(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    found = call(tmp_path, "--variants", "3to1", "nope", "--parts", "pretrain", "extend", "evaluate")
    assert set(found["runs"]) == {"3to1/0", "nope/0"}
    for parts in found["runs"].values():
        assert set(parts) == {"pretrain", "extend-1024", "evaluate-1024", "evaluate-base"}
        assert parts["extend-1024"]["tokens"] == 8192
        assert {cell["length"] for cell in parts["evaluate-1024"]["niah"]["grid"]} == {512, 1024, 2048}
        assert list(parts["evaluate-1024"]["niah"]["tasks"]) == ["multikey"]
        assert len(parts["evaluate-1024"]["other_tasks"]["tasks"]) == 4
        assert parts["evaluate-1024"]["positions"]["domains"]
        assert [record["step"] for record in parts["extend-1024"]["niah"]] == [0, 2]
    again = call(tmp_path, "--variants", "3to1", "nope", "--parts", "pretrain", "extend", "evaluate")
    assert again["runs"] == found["runs"]
    assert len(again["calls"]) == 2
    long = ["--parts", "long", "--long-length", "900", "--long-shape", "demo"]
    figures = call(tmp_path, *long)["long"]
    assert figures["reading once"]["questions"] == 20
    assert figures["reading each time"]["questions"] == 5
