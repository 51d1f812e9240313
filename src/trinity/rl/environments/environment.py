"""The protocol of an environment, and a rollout of messages through one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trinity.rl.environments.calls import Call, read_calls
from trinity.rl.rewards.attempt import Attempt, Message, Rubric, Scores

Tool = Mapping[str, Any]
"""A function as JSON schema, in the form that chat templates take."""


@dataclass(frozen=True)
class Row:
    """A task: what the model is shown, and what it is judged by."""

    prompt: list[Message]
    answer: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What a policy says in one turn, as text with thoughts and tool calls in the chat template's form."""

    text: str
    finished: bool = True
    """Whether it ended the turn by itself."""


Policy = Callable[[Sequence[Message], Sequence[Tool]], Reply]
"""(the conversation so far, the tools) -> the next turn."""


class Session(Protocol):
    """One task in progress; its state belongs to one rollout."""

    def observe(self, call: Call) -> str:
        """The answer to a tool call; also to one that makes no sense."""
        ...

    def info(self) -> Mapping[str, Any]:
        """What rewards see of the state, beside the row's own `info`."""
        ...


class Environment(Protocol):
    """A source of tasks without an end: row n follows from the environment's seed and n."""

    name: str
    tools: Sequence[Tool]
    rubric: Rubric
    max_turns: int
    """Turns of the model."""

    def row(self, number: int, *, held_out: bool = False) -> Row:
        """Task `number`; held-out tasks are never among the others."""
        ...

    def session(self, row: Row) -> Session: ...


@dataclass(frozen=True)
class Rollout:
    attempt: Attempt
    scores: Scores
    turns: int


def rollout(environment: Environment, row: Row, policy: Policy) -> Rollout:
    """Let a policy work on a task until it answers without a tool call, is cut off, or has used up its turns."""
    session = environment.session(row)
    completion: list[Message] = []
    finished, turns = False, 0
    while turns < environment.max_turns:
        reply = policy([*row.prompt, *completion], environment.tools)
        turns += 1
        said = read_calls(reply.text)
        completion.append(said.message())
        if not reply.finished:
            break
        if not said.calls and not said.problems:
            finished = True
            break
        observations = [session.observe(call) for call in said.calls] + said.problems
        completion += [{"role": "tool", "content": text} for text in observations]
    attempt = Attempt(row.prompt, completion, row.answer, {**row.info, **session.info()}, finished)
    return Rollout(attempt, environment.rubric.score(attempt), turns)


class NoTools:
    """The session of a single question."""

    def observe(self, call: Call) -> str:
        return f"There is no tool {call.name}: answer in words."

    def info(self) -> Mapping[str, Any]:
        return {}


def score_text(environment: Environment, row: Row, text: str, finished: bool) -> float:
    """The reward of a single answer: what a trainer of one-turn rollouts asks for."""
    attempt = Attempt(row.prompt, [{"role": "assistant", "content": text}], row.answer, row.info, finished)
    return environment.rubric.score(attempt).total
