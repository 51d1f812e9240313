"""A scripted solver of the repository environment: what it does is honest work through the same tools.

It runs the tests, reads what failed, reads the module, makes the one edit and runs the tests again. Its words are made
from what it saw. It knows the mistake, and so never learns from a wrong attempt; a share of the sessions begins with a
detour that finds nothing.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from random import Random
from typing import Any

from trinity.base.errors import UserError
from trinity.base.rng import derive
from trinity.rl.environments.environment import Environment, Reply, Row, Tool, rollout
from trinity.rl.environments.repository import TEST_COMMAND
from trinity.rl.rewards.attempt import Message

_DETOUR_SHARE = 0.3
_OPENINGS = (
    "First I look at which test fails.",
    "I begin by running the tests.",
    "Let me see what fails.",
)
_LOOKS = (
    "{test} fails: {reason}. I read {path}.",
    "The failing test is {test} ({reason}). The code is in {path}.",
)
_EDITS = (
    "In {path} the part `{old}` is wrong: it should be `{new}`.",
    "`{old}` does not do what the test expects; `{new}` does.",
)
_ENDS = (
    "The tests pass now. The mistake was in {path}: {kind}. `{old}` became `{new}`.",
    "Repaired: {path} had `{old}` where `{new}` belongs ({kind}). All tests pass.",
)


@dataclass
class Oracle:
    """A policy for one row."""

    row: Row
    rng: Random
    _step: int = 0

    def __call__(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Reply:
        bug: dict[str, str] = self.row.info["bug"]
        names = {"path": bug["path"], "kind": bug["kind"], "old": _one_line(bug["old"]), "new": _one_line(bug["new"])}
        if self._step == 0:
            self._detour = self.rng.random() < _DETOUR_SHARE
        plan = ["run", *(["readme"] if self._detour else []), "tests", "read", "edit", "again", "end"]
        step = plan[self._step]
        self._step += 1
        if step == "run":
            return _turn(self.rng.choice(_OPENINGS), "run", command=TEST_COMMAND)
        if step == "readme":
            return _turn("The README may say how the code is meant to work.", "read", path="README.md")
        if step == "tests":
            return _turn("Now the test that fails.", "read", path=self.row.info["tests"])
        if step == "read":
            output = next(m["content"] for m in messages if m["role"] == "tool")
            test, reason = _failure(output)
            thought = self.rng.choice(_LOOKS).format(test=test, reason=reason, path=bug["path"])
            return _turn(thought, "read", path=bug["path"])
        if step == "edit":
            old, new = edit(self.row.info["start"][bug["path"]], self.row.info["right"])
            return _turn(self.rng.choice(_EDITS).format(**names), "edit", path=bug["path"], old=old, new=new)
        if step == "again":
            return _turn("I run the tests again.", "run", command=TEST_COMMAND)
        return Reply(self.rng.choice(_ENDS).format(**names))


def _turn(thought: str, name: str, **arguments: str) -> Reply:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return Reply(f"<think>\n{thought}\n</think>\n\n<tool_call>\n{call}\n</tool_call>")


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def edit(wrong: str, right: str) -> tuple[str, str]:
    """The whole lines that differ, with as many around them as make them stand once in the file: (old, new)."""
    old, new = wrong.splitlines(keepends=True), right.splitlines(keepends=True)
    changes = [c for c in SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if c[0] != "equal"]
    before, after = changes[0][1], len(old) - changes[-1][2]
    while before + after > 0 and (
        before + after == len(old) or wrong.count("".join(old[before : len(old) - after])) != 1
    ):
        before, after = max(0, before - 1), max(0, after - 1)
    return "".join(old[before : len(old) - after]), "".join(new[before : len(new) - after])


def _failure(output: str) -> tuple[str, str]:
    """(name, reason) of the first test that failed, from unittest's report."""
    name = re.search(r"^(?:FAIL|ERROR): (\w+)", output, re.MULTILINE)
    reason = re.search(r"^(\w*(?:Error|Exception)\b.*)$", output, re.MULTILINE)
    return (name.group(1) if name else "a test"), (reason.group(1) if reason else "no reason given")


def trace(environment: Environment, number: int, seed: int) -> dict[str, Any]:
    """One solved task as a conversation for training: `messages`, `tools`, and where it comes from.

    Raises UserError when the solver's work does not earn the full reward: such a session is no example.
    """
    row = environment.row(number)
    done = rollout(environment, row, Oracle(row, Random(derive(seed, "oracle", number))))
    if done.scores.total < 1.0:
        raise UserError(f"the scripted solver did not solve task {number} of {environment.name}")
    return {
        "messages": [*row.prompt, *done.attempt.completion],
        "tools": list(environment.tools),
        "source": f"{environment.name}/{number}",
        "reward": done.scores.total,
    }
