"""The benchmarks of post-training: their figures, and both from end to end at toy size."""

import argparse
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rl as bench_rl
import sft as bench_sft
from stage_fixtures import write_inputs

ROOT = Path(__file__).parents[1]
TOY = """
[model]
vocab_size = 512
num_layers = 3
num_dense_layers = 1
dim = 32
num_heads = 2
num_kv_heads = 1
head_dim = 16
ffn_dim = 64
expert_dim = 16
num_experts = 4
experts_per_token = 2
num_shared_experts = 1
window = 64
max_positions = 512
[tokenizer]
vocab_size = 400
[data]
buffer = 8
streams = 2
[checkpoint]
every_steps = 10
[pretrain]
seq_len = 128
micro_rows = 8
eval_every = 100000
eval_rows = 2
batch = [{ from_tokens = 0, rows = 8 }]
phases = [{ name = "arithmetic", tokens = 12_000, weights = { math = 1.0 } }]
[sft]
seq_len = 128
batch_rows = 2
micro_rows = 2
epochs = 1
eval_every = 100000
template_samples = 4
sample_tokens = 8
[rl]
seq_len = 96
micro_rows = 16
steps = 4
prompts_per_step = 4
group = 4
max_new_tokens = 4
max_number = 9
gap_every = 2
[eval]
arithmetic_questions = 10
[runtime]
device = "cpu"
dtype = "float32"
threads = 1
"""


def test_windows_hold_every_step():
    assert bench_rl.windows([1.0] * 10 + [3.0] * 15) == [1.0, 3.0]
    assert bench_rl.windows([1.0, 3.0]) == [2.0]


def run_of(reward, gap):
    gaps = dict.fromkeys(bench_rl.GAPS, gap)
    scores = {"arithmetic": [[0, reward[0], 0.1], [20, reward[-1], 0.1]]}
    return {"reward": reward, "max_vio": [0.5] * len(reward), "gaps": gaps, "scores": scores}


def test_figures_over_seeds_have_student_s_interval():
    found = bench_rl.over_seeds([run_of([0.2, 0.4], 0.1), run_of([0.3, 0.6, 0.9], 0.3)])
    assert found["reward_gain"] == [0.25, pytest.approx(12.706 * 0.05, rel=1e-3)]
    assert len(found["reward_curve"]) == 2
    assert found["score_after"][0] == pytest.approx(0.65)
    assert found["gap_free"][0] == pytest.approx(0.2)
    alone = bench_rl.over_seeds([run_of([0.2, 0.4], None)])
    assert alone["reward_gain"] == [0.2, None]
    assert "gap_free" not in alone


def test_questions_become_conversations(tmp_path):
    records = [
        {"question": "1 + 1?", "solution": "Two ones.", "answer": "2"},
        {"question": "x", "solution": "x", "answer": "x", "overlap_test": True},
    ]
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    (line,) = bench_sft.from_questions([path], tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["messages"][1]["content"] == "Two ones.\nThe answer is 2."


def test_ratios_are_of_what_was_measured(tmp_path):
    options = argparse.Namespace(out=tmp_path, minutes=1.0, set=[], device_name="cpu")
    bench = bench_sft.Bench(options)
    bench.result |= {
        "sft": {
            "tokens_per_second": 1000.0,
            "held_out": [[0, 3.0, 0.1], [9, 2.0, 0.1]],
            "template": [[9, 0.97, 0.01, {}]],
        },
        "trl": {"fill": 0.9, "best": {"tokens_per_second": 300.0}},
        "loss": {"ratio": {"chunked_512": 20.0}},
    }
    bench_sft.compare(bench)
    summary = json.loads((tmp_path / "sft.json").read_text())["summary"]
    assert summary["speed_against_trl"] == pytest.approx(3.0)
    assert summary["held_out_loss"] == [3.0, 2.0]
    assert summary["loss_memory_ratio"] == {"chunked_512": 20.0}


def run_script(name, *words):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'bench'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / name), *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_rewards_over_seeds_from_end_to_end(tmp_path):
    (tmp_path / "toy.toml").write_text(TOY, encoding="utf-8")
    sizes = ("--documents", 60, "--conversations", 100, "--seeds", 1, "--parallel", 1, "--minutes", 8)
    out = tmp_path / "out"
    run_script("rl.py", "--out", out, "--overlay", tmp_path / "toy.toml", *sizes, "--variants", "balanced", "frozen")
    found = json.loads((out / "rl.json").read_text())
    assert set(found["over_seeds"]) == {"balanced", "frozen"}
    run = found["runs"]["balanced"]["0"]
    assert (run["state"], run["steps"], len(run["curves"]["reward"])) == ("finished", 4, 4)
    assert run["gaps"]["gap_replayed"] is not None
    assert len(found["samples"]["balanced"]) == bench_rl.KEPT_SAMPLES


@pytest.mark.slow
def test_fine_tuning_from_end_to_end(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "toy.toml").write_text(TOY, encoding="utf-8")
    words = ["--out", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer", "--shards", tmp_path / "shards"]
    words += ["--conversations", tmp_path / "chats.jsonl", "--overlay", tmp_path / "toy.toml", "--toy"]
    run_script("sft.py", *words, "--minutes", 8, "--parts", "sft", "loss")
    found = json.loads((tmp_path / "out" / "sft.json").read_text())
    assert found["start"]["whole"]
    assert found["sft"]["steps"] > 5
    assert len(found["sft"]["held_out"]) == 2
    assert set(found["loss"]["losses"]) == {"full", "chunked_2048", "chunked_1024", "chunked_512"}
