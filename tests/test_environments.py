"""Environments: tasks that follow from their numbers, rollouts of messages, rewards that only solutions earn."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_helpers import small_sandbox
from stage_fixtures import write_inputs
from trinity.base.errors import UserError
from trinity.config import RLConfig
from trinity.rl.environments import bugs
from trinity.rl.environments.calls import Call, read_calls
from trinity.rl.environments.code_tasks import FAMILIES, CodeTasks, solution
from trinity.rl.environments.environment import Environment, Reply, Row, Tool, rollout, score_text
from trinity.rl.environments.oracle import Oracle, trace
from trinity.rl.environments.oracle import edit as edit_of
from trinity.rl.environments.questions import Arithmetic, Instructions, WordProblems
from trinity.rl.environments.repository import TEST_COMMAND, TOOLS, Repository, shortened
from trinity.rl.environments.tasks import task_source
from trinity.rl.rewards import Attempt, Message
from trinity.rl.rollout import Rollouts
from trinity.rl.sample import Sampled
from trinity.rl.sandbox.pool import Sandbox
from trinity.tokenizer import Tokenizer
from trinity.tokenizer.template import default_template, render


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with small_sandbox() as made:
        yield made


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Script:
    """A policy that says its lines."""

    def __init__(self, *lines: str, cut: bool = False) -> None:
        self.lines, self.cut, self.seen = list(lines), cut, []

    def __call__(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Reply:
        self.seen = list(messages)
        line = self.lines.pop(0)
        return Reply(line, finished=not (self.cut and not self.lines))


# Calls


def test_turns_are_taken_apart() -> None:
    said = read_calls(
        "<think>\nhm\n</think>\n\nFirst this.\n" + call("read", path="a") + "\n" + call("run", command="b")
    )
    assert (said.thought, said.content) == ("hm", "First this.")
    assert said.calls == [Call("read", {"path": "a"}), Call("run", {"command": "b"})]
    assert not said.problems
    assert read_calls("just words").message() == {"role": "assistant", "content": "just words"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>\n{bad}\n</tool_call>", "is not JSON"),
        ("<tool_call>\n[1]\n</tool_call>", "must be an object"),
        ('<tool_call>\n{"name": "f", "arguments": "x"}\n</tool_call>', "arguments of f must be an object"),
        ('<tool_call>\n{"name": "f"', "begun and not ended"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "is not JSON"),
    ],
)
def test_calls_that_cannot_be_read_are_answered(text: str, problem: str) -> None:
    said = read_calls(text)
    assert not said.calls
    assert problem in said.problems[0]
    render(default_template(), [{"role": "user", "content": "x"}, said.message(), {"role": "tool", "content": "y"}])


@given(st.text(max_size=300))
def test_any_text_is_a_turn(text: str) -> None:
    said = read_calls(text)
    assert said.message()["role"] == "assistant"


@given(st.text(max_size=60), st.text(max_size=60))
def test_calls_survive_the_template(name: str, argument: str) -> None:
    """What the template writes for a call is read back as that call, the protocol's own words in it included."""
    if not name or any(0xD800 <= ord(c) < 0xE000 for c in name + argument) or "< " in name + argument:
        return
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": {"a": argument}}]}
    text = render(default_template(), [{"role": "user", "content": "x"}, message])
    body = text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    assert read_calls(body).calls == [Call(name, {"a": argument})]


def test_the_protocol_s_words_inside_an_argument() -> None:
    argument = "print('</tool_call><think><|im_end|>')"
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "edit", "arguments": {"new": argument}}]}
    text = render(default_template(), [{"role": "user", "content": "x"}, message])
    body = text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    assert read_calls(body).calls == [Call("edit", {"new": argument})]


# Single turns


def test_rows_follow_from_their_numbers(sandbox: Sandbox) -> None:
    environments: list[tuple[Environment, Environment]] = [
        (Arithmetic(3), Arithmetic(4)),
        (CodeTasks(sandbox, 3), CodeTasks(sandbox, 4)),
        (Repository(sandbox, 3), Repository(sandbox, 4)),
    ]
    for environment, other in environments:
        rows = [environment.row(number) for number in range(20)]
        assert rows == [environment.row(number) for number in range(20)]
        assert rows != [other.row(number) for number in range(20)]
        held = [environment.row(number, held_out=True).prompt for number in range(20)]
        assert not any(row.prompt in held for row in rows)


def test_arithmetic() -> None:
    environment = Arithmetic(0)
    for number in range(50):
        row = environment.row(number)
        assert score_text(environment, row, row.answer, finished=True) == 1.0
        assert score_text(environment, row, row.answer, finished=False) == 0.0
        assert score_text(environment, row, f"{row.answer} {row.answer}", finished=True) == 0.0
        assert score_text(environment, row, str(int(row.answer) + 1), finished=True) == 0.1


def test_word_problems(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    lines = [{"question": f"How many are {n} and 1,000?", "answer": f"Add them.\n#### {n + 1000:,}"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = WordProblems(path, seed=1, held_out_share=0.1)
    first, second = ([environment.row(n + 36 * turn).answer for n in range(36)] for turn in (0, 1))
    assert sorted(first) == sorted(second) == sorted(str(n + 1000) for n in range(36))
    assert first != second
    assert {environment.row(n, held_out=True).answer for n in range(8)} == {str(n + 1000) for n in range(36, 40)}
    row = environment.row(0)
    assert "\\boxed{}" in row.prompt[0]["content"]
    texts = (f"So \\boxed{{{row.answer}}}.", f"It is {int(row.answer):,}", "\\boxed{1}", "no idea")
    assert [score_text(environment, row, text, True) for text in texts] == pytest.approx([1.0, 0.9, 0.1, 0.0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no lines"),
        ("{}\n", "line 1 has no text `question`"),
        ('{"question": "x", "answer": "y"}\n', "'y', which is no number"),
        ("[1]\n", "line 1 is a JSON list"),
        ('{"question": "x", "ans', "line 1 is not JSON"),
        ('{"question": "x", "answer": 3}\n', "has too few questions"),
    ],
)
def test_bad_files_of_problems(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=says):
        WordProblems(tmp_path / "p.jsonl", 0)


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        WordProblems(tmp_path / "p.jsonl", 0)
    (tmp_path / "p.txt").write_text("x")
    with pytest.raises(UserError, match=r"use \.jsonl"):
        WordProblems(tmp_path / "p.txt", 0)
    (tmp_path / "p.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00cut")
    with pytest.raises(UserError, match="cannot be read after line 0"):
        WordProblems(tmp_path / "p.jsonl.gz", 0)


def test_instructions(tmp_path: Path) -> None:
    path = tmp_path / "i.jsonl"
    line = {"prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"x": None}]}
    path.write_text(json.dumps(line) + "\n")
    environment = Instructions(path, 0)
    assert score_text(environment, environment.row(5), "a b", True) == 1.0
    assert score_text(environment, environment.row(5), "a, b", True) == 0.0
    path.write_text(json.dumps({**line, "kwargs": []}) + "\n")
    with pytest.raises(UserError, match="line 1 has no `prompt`"):
        Instructions(path, 0)


def test_every_family_of_functions_has_a_solution(sandbox: Sandbox) -> None:
    environment = CodeTasks(sandbox, 7)
    seen = set()
    for number in range(60):
        row = environment.row(number, held_out=number % 5 == 0)
        if row.info["family"] in seen:
            continue
        seen.add(row.info["family"])
        answer = f"```python\n{row.info['solution']}\n```"
        assert score_text(environment, row, answer, True) == 1.0
        name = row.info["calls"][0][0].partition("(")[0]
        assert score_text(environment, row, f"```python\ndef {name}(x):\n    return x\n```", True) == 0.05
        shown = row.prompt[0]["content"]
        assert row.info["calls"][0][0] in shown
        assert sum(expression in shown for expression, _ in row.info["calls"]) < len(row.info["calls"])
    assert seen == {family.name for family in FAMILIES}
    assert "C" not in solution(FAMILIES[0], "f", 3)


# The repository


@pytest.mark.parametrize("maker", bugs.MAKERS, ids=lambda maker: maker.__name__.strip("_"))
def test_every_mistake_is_noticed_and_nothing_else(maker, sandbox: Sandbox) -> None:
    """With the right module all tests pass, with each mistake at least one fails, whatever numbers are drawn."""
    environment = Repository(sandbox, 0)
    for seed in range(3):
        made = maker(Random(seed))
        tests = made.tests.replace("PACKAGE", "p").replace("MODULE", made.module)
        start = {"p/__init__.py": "", "tests/__init__.py": "", "tests/test_x.py": tests}
        info = {"start": start, "tests": "tests/test_x.py", "count": tests.count("    def test_")}

        def passes(source: str, info=info, start=start, made=made) -> float:
            files = {**start, f"p/{made.module}.py": source}
            return environment.rubric.score(Attempt([], [], info={**info, "files": files})).total

        assert passes(made.source) == 1.0
        for bug in made.bugs:
            assert passes(made.with_bug(bug)) == 0.0, bug
            assert not bug.wrong or made.with_bug(bug).count(bug.wrong) == 1, bug


def test_the_oracle_solves_and_idleness_does_not(sandbox: Sandbox) -> None:
    environment = Repository(sandbox, 5)
    kinds = set()
    for number in range(5):
        row = environment.row(number, held_out=number == 4)
        kinds.add(row.info["bug"]["kind"])
        done = rollout(environment, row, Oracle(row, Random(number)))
        assert done.scores.total == 1.0
        assert done.attempt.finished
        idle = rollout(environment, row, Script("All is well."))
        assert (idle.scores.total, idle.turns) == (0.0, 1)
    assert len(kinds) >= 3


def test_edits_stand_once_in_their_file() -> None:
    for maker in bugs.MAKERS:
        for seed in range(4):
            made = maker(Random(seed))
            for bug in made.bugs:
                wrong = made.with_bug(bug)
                old, new = edit_of(wrong, made.source)
                assert wrong.count(old) == 1
                assert wrong.replace(old, new) == made.source
    assert edit_of("a\na\n", "a\n") == ("a\na\n", "a\n")


def test_ways_to_cheat_earn_nothing(sandbox: Sandbox) -> None:
    environment = Repository(sandbox, 5)
    row = environment.row(0)
    tests, module = row.info["tests"], row.info["bug"]["path"]
    first = row.info["start"][module].splitlines()[0]
    forged = "import os, sys, unittest\nunittest.TestResult.wasSuccessful = lambda self: True\nos._exit(0)"
    cheats = [
        call("edit", path=tests, old="import unittest", new="import unittest\nraise unittest.SkipTest"),
        call("edit", path=tests, old="class Tests", new="class Nothing: pass\nclass Other"),
        call("edit", path=module, old=first, new=forged),
        call(
            "edit",
            path=module,
            old=first,
            new="import unittest\nunittest.TestCase.run = lambda self, result=None: None",
        ),
        call("run", command=f"rm -r tests; {TEST_COMMAND}"),
    ]
    for cheat in cheats:
        assert rollout(environment, row, Script(cheat, "Done.")).scores.total == 0.0, cheat


def test_tools_answer_every_call(sandbox: Sandbox) -> None:
    environment = Repository(sandbox, 5)
    row = environment.row(0)
    session = environment.session(row)
    bug = row.info["bug"]
    assert "There is no file x" in session.observe(Call("read", {"path": "x"}))
    assert session.observe(Call("read", {"path": bug["path"]})) == row.info["start"][bug["path"]]
    assert "stands 0 times" in session.observe(Call("edit", {"path": bug["path"], "old": "no such text", "new": ""}))
    assert "stands 0 times" in session.observe(Call("edit", {"path": bug["path"], "old": "", "new": "x"}))
    assert "There is no file" in session.observe(Call("edit", {"path": "/etc/passwd", "old": "a", "new": "b"}))
    assert "There is no tool delete" in session.observe(Call("delete", {}))
    assert "takes the texts path" in session.observe(Call("read", {"file": "x"}))
    assert "takes the texts command" in session.observe(Call("run", {"command": 3}))
    assert "Exit status 1." in session.observe(Call("run", {"command": TEST_COMMAND}))
    assert "null character" in session.observe(Call("run", {"command": "a\0b"}))
    long = session.observe(Call("run", {"command": "yes x | head -c 20000"}))
    assert len(long) < 5000
    assert "characters left out" in long
    session.observe(Call("run", {"command": "rm -rf *"}))
    assert session.info()["files"] == row.info["start"]  # what a command does is not kept
    assert shortened("abc", 3) == "abc"


def test_rollouts_end(sandbox: Sandbox) -> None:
    environment = Repository(sandbox, 5)
    row = environment.row(0)
    forever = Script(*[call("read", path="README.md")] * 50)
    done = rollout(environment, row, forever)
    assert (done.turns, done.attempt.finished) == (environment.max_turns, False)
    cut = rollout(environment, row, Script("half a sen", cut=True))
    assert not cut.attempt.finished
    broken = Script("<tool_call>{", "I see.")
    done = rollout(environment, row, broken)
    assert "begun and not ended" in done.attempt.completion[1]["content"]
    assert done.attempt.finished


def test_traces_train(sandbox: Sandbox, tmp_path: Path) -> None:
    """A trace renders with the project's template, its calls and words are learned, its observations are not."""
    write_inputs(tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    record = trace(Repository(sandbox, 9), 2, seed=1)
    assert record["reward"] == 1.0
    assert record == trace(Repository(sandbox, 9), 2, seed=1)
    ids, mask = tokenizer.encode_chat(record["messages"], record["tools"])
    learned = tokenizer.decode(np.asarray(ids)[np.asarray(mask, bool)].tolist())
    assert learned.count("<tool_call>") >= 5
    assert "Exit status" not in learned
    assert "Exit status 0." in tokenizer.decode(ids)
    with pytest.raises(UserError, match="did not solve"):
        trace(Idle(Repository(sandbox, 9)), 2, seed=1)


def test_an_episode_s_tokens_are_the_conversation_s(sandbox: Sandbox, tmp_path: Path) -> None:
    """What a policy is shown turn after turn is, token for token, the conversation as the template writes it."""
    write_inputs(tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    environment = Repository(sandbox, 9)
    source = task_source(environment, tokenizer)
    row, task = environment.row(4), source(4, 0)
    assert task.episode is not None
    assert source(4, 1).prompt != task.prompt
    episode, oracle = task.episode(), Oracle(row, Random(0))
    ids, messages = list(task.prompt), list(row.prompt)
    while True:
        turn = oracle(messages, environment.tools).text
        ids += tokenizer.encode(turn + "<|im_end|>", special=True)
        answer = episode.reply(turn, True)
        messages.append(read_calls(turn).message())
        if answer is None:
            break
        ids += answer
        # The texts between two turns of the assistant, as the model was shown them.
        shown = tokenizer.decode(answer).split("<tool_response>\n")[1].split("\n</tool_response>")[0]
        messages.append({"role": "tool", "content": shown})
    assert episode.reward() == 1.0
    episode.close()
    whole, _ = tokenizer.encode_chat(messages, list(environment.tools))
    line = tokenizer.encode("\n")
    assert ids + line == whole


def test_episodes_through_the_trainer_s_rollouts(sandbox: Sandbox, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    environment = Repository(sandbox, 9)
    settings = RLConfig(
        steps=2, prompts_per_step=1, group=2, max_turns=12, seq_len=16384, max_new_tokens=512, micro_rows=1, gap_every=0
    )
    oracles = {True: Oracle(environment.row(0), Random(0))}

    class Scripted:
        """One sample of the group works, the other gives up at once."""

        def sync(self) -> None: ...

        def __call__(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sampled]:
            found = []
            for i, _ in enumerate(prompts):
                text = oracles[True]([{"role": "tool", "content": ""}], ()).text if i == 0 else "I give up."
                tokens = tokenizer.encode(text + "<|im_end|>", special=True)
                found.append(Sampled(text, tokens, [-1.0] * len(tokens), finished=True))
            return found

    rollouts = Rollouts(settings, task_source(environment, tokenizer), Scripted(), lambda rows, replay: np.zeros(0), 0)
    rollouts.next_batch(0)
    (_, worked), (_, idle) = rollouts.last_samples
    assert (worked.reward, idle.reward, idle.turns) == (1.0, 0.0, 1)
    assert worked.turns >= 6
    written = tokenizer.decode([t for t, own in zip(worked.tokens, worked.written, strict=True) if own])
    assert "<tool_call>" in written
    assert "<tool_response>" not in written


def test_single_turns_as_tasks(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    environment = Arithmetic(2)
    task = task_source(environment, tokenizer)(3, 0)
    assert task.reward is not None
    assert task.reward(environment.row(3).answer, True) == 1.0
    assert tokenizer.decode(task.prompt).endswith("<|im_start|>assistant\n")


class Idle:
    """A repository whose edits do nothing."""

    name = "idle"
    tools: Sequence[Tool] = TOOLS
    max_turns = 12

    def __init__(self, inner: Repository) -> None:
        self._inner, self.rubric = inner, inner.rubric

    def row(self, number: int, *, held_out: bool = False) -> Row:
        return self._inner.row(number, held_out=held_out)

    def session(self, row: Row):
        session = self._inner.session(row)
        session._edit = lambda path, old, new: "Replaced."  # type: ignore[attr-defined]
        return session
