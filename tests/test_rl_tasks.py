"""Environments by name as tasks of the RL stage, with held-out ones apart."""

import json

import pytest

from stage_fixtures import tiny_config, write_inputs
from trinity.base.errors import UsageError
from trinity.base.rundir import RunDir
from trinity.rl.environments.questions import Arithmetic
from trinity.stages import pretrain, rl
from trinity.stages.rl_tasks import of_environment
from trinity.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    write_inputs(path)
    return path


def test_other_attempts_are_other_tasks_and_held_out_ones_are_apart(folder):
    class Stage:
        tokenizer = Tokenizer.load(folder / "tokenizer")

    tasks = of_environment(Arithmetic(0), Stage())  # pyright: ignore[reportArgumentType]
    training = {tuple(tasks(number, attempt).prompt) for number in range(40) for attempt in range(3)}
    held_out = {tuple(tasks.held_out(number, 0).prompt) for number in range(40)}
    assert len(training) > 80
    assert not training & held_out


def test_a_run_on_word_problems_scores_held_out_ones(folder, tmp_path):
    lines = [json.dumps({"question": f"{i} + {i}?", "answer": str(2 * i)}) for i in range(40)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pretrain.run(tiny_config(folder), tmp_path / "base")
    settings = {"environment": "word-problems", "steps": 2, "seq_len": 128, "held_out_tasks": 3, "micro_rows": 4}
    config = tiny_config(folder, rl={**settings, "questions": str(tmp_path / "questions.jsonl")})
    assert rl.run(config, tmp_path / "run", start_from=tmp_path / "base").train.finished
    scores = RunDir(tmp_path / "run").read_metrics("score")
    assert [(s["name"], s["step"], s["samples"]) for s in scores] == [("word_problems", 0, 3), ("word_problems", 2, 3)]
    config = tiny_config(folder, rl=settings)
    with pytest.raises(UsageError, match=r"rl\.questions"):
        rl.run(config, tmp_path / "other", start_from=tmp_path / "base")
