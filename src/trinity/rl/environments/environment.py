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


class Play:
    """A task while a policy works on it."""

    def __init__(self, environment: Environment, row: Row) -> None:
        self._environment, self._row = environment, row
        self._session = environment.session(row)
        self.completion: list[Message] = []
        self.finished = False
        """Whether the policy came to an end by itself."""
        self.turns = 0

    def take(self, reply: Reply) -> list[Message] | None:
        """Add a turn of the policy; what its tool calls gave, or None when the work is over: an answer without a call,
        a turn that was cut off, or the last one allowed."""
        said = read_calls(reply.text)
        self.completion.append(said.message())
        self.turns += 1
        if not reply.finished:
            return None
        if not said.calls and not said.problems:
            self.finished = True
            return None
        texts = [self._session.observe(call) for call in said.calls] + said.problems
        observations: list[Message] = [{"role": "tool", "content": text} for text in texts]
        self.completion += observations
        return observations if self.turns < self._environment.max_turns else None

    def attempt(self) -> Attempt:
        info = {**self._row.info, **self._session.info()}
        return Attempt(self._row.prompt, self.completion, self._row.answer, info, self.finished)

    def scores(self) -> Scores:
        return self._environment.rubric.score(self.attempt())


def rollout(environment: Environment, row: Row, policy: Policy) -> Rollout:
    """Let a policy work on a task to the end."""
    play = Play(environment, row)
    going = True
    while going:
        reply = policy([*row.prompt, *play.completion], environment.tools)
        going = play.take(reply) is not None
    return Rollout(play.attempt(), play.scores(), play.turns)


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
