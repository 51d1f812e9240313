"""Environments of messages as tasks of tokens: the same conversation, the same reward, no loss on what is observed."""

import json
from collections.abc import Sequence

import pytest

from stage_fixtures import tiny_config, write_inputs
from trinity.base.errors import UsageError
from trinity.base.rundir import RunDir
from trinity.rl.environments.environment import Reply, Row, Tool, rollout
from trinity.rl.environments.questions import Arithmetic
from trinity.rl.played import EnvironmentTasks
from trinity.rl.rewards.attempt import Rubric
from trinity.rl.sample import open_episode
from trinity.stages import pretrain, rl
from trinity.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    write_inputs(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder / "tokenizer")


class Counter:
    """A tool that counts its calls; three in a row are right."""

    name, max_turns = "counter", 4
    tools: Sequence[Tool] = (
        {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}},
    )

    def __init__(self):
        self.rubric = Rubric({"three": lambda attempt: float(attempt.info["count"] == 3)})

    def row(self, number, *, held_out=False):
        return Row([{"role": "user", "content": f"Task {number}{' held out' * held_out}"}])

    def session(self, row):
        return CounterSession()


class CounterSession:
    def __init__(self):
        self.count = 0

    def observe(self, call):
        self.count += 1
        return f"<|im_end|> {self.count}"

    def info(self):
        return {"count": self.count}


CALL = '<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    "turns",
    [
        ["done"],
        [CALL, CALL, CALL, "done"],
        [CALL + "\n" + CALL, "<think>\nhm\n</think>\n\nx"],
        [CALL] * 4,
        ["<tool_call>x"] * 2,
    ],
)
def test_turns_give_the_conversation_and_the_reward_of_the_loop(tokenizer, turns):
    environment = Counter()
    said = iter(turns)
    found = rollout(environment, environment.row(0), lambda messages, tools: Reply(next(said, "stop")))
    task = EnvironmentTasks(environment, tokenizer)(0, 0)
    episode = open_episode(task)
    ids = list(task.prompt)
    end = tokenizer.special_id("<|im_end|>")
    for text in [*turns, *["stop"] * 4]:
        ids += [*tokenizer.encode(text, special=True), end]
        reply = episode.reply(text, True)
        if reply is None:
            break
        ids += reply
    assert episode.reward() == found.scores.total
    # The observations read as in the rendered conversation; only turns that were taken apart wrongly differ.
    tools = list(environment.tools)
    expected = tokenizer.render_chat([*environment.row(0).prompt, *found.attempt.completion], tools)
    if "<tool_call>x" not in turns:
        assert expected.startswith(tokenizer.decode(ids))


def test_other_attempts_are_other_tasks_and_held_out_ones_are_apart(tokenizer):
    tasks = EnvironmentTasks(Arithmetic(0), tokenizer)
    prompts = {tuple(tasks(number, attempt).prompt) for number in range(3) for attempt in range(3)}
    assert len(prompts) == 9
    assert tasks.task(0, held_out=True).prompt != tasks(0, 0).prompt


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
