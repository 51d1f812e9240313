"""Environments of messages (`rl/environments/`) as the token-level tasks that rollouts play.

The policy's own tokens are kept as it wrote them; what the environment answers is rendered by the chat template and
appended as tokens. A conversation rendered anew could read differently from what was sampled.
"""

from functools import cached_property
from typing import Any

from trinity.rl.environments.calls import read_calls
from trinity.rl.environments.environment import Environment, Row
from trinity.rl.rewards.attempt import Attempt, Message
from trinity.rl.sample import Task
from trinity.tokenizer import Tokenizer

STRIDE = 1_000_003
"""Between a task's number and those that are asked in its place: larger than any run's number of tasks."""


class EnvironmentTasks:
    """Called with (number, attempt): the environment's task, prompt and all turns."""

    def __init__(self, environment: Environment, tokenizer: Tokenizer) -> None:
        self.environment, self._tokenizer = environment, tokenizer

    def __call__(self, number: int, attempt: int) -> Task:
        return self.task(number + attempt * STRIDE)

    def task(self, number: int, *, held_out: bool = False) -> Task:
        row = self.environment.row(number, held_out=held_out)
        tools: list[Any] = [dict(tool) for tool in self.environment.tools]
        ids, _ = self._tokenizer.encode_chat(row.prompt, tools or None, add_generation_prompt=True)
        return Task(ids, episode=lambda: PlayedEpisode(self.environment, row, self))

    def observed(self, observations: list[str]) -> list[int]:
        """Tokens from the end of the assistant's turn to the opening of its next one."""
        messages: list[Message] = [
            *self._call,
            *({"role": "tool", "content": text} for text in observations),
        ]
        text = self._tokenizer.render_chat(messages, add_generation_prompt=True)
        # The turn was closed by the policy; what separates it from the next one was not.
        return self._tokenizer.encode(text[len(self._before) :], special=True)

    @property
    def _call(self) -> list[Message]:
        """A conversation after which tools may answer."""
        return [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "call", "arguments": {}}]},
        ]

    @cached_property
    def _before(self) -> str:
        end = "<|im_end|>"
        text = self._tokenizer.render_chat(self._call)
        return text[: text.rindex(end) + len(end)]


class PlayedEpisode:
    """One rollout of messages, turn by turn (`environments.environment.rollout` is the same by a loop)."""

    def __init__(self, environment: Environment, row: Row, tasks: EnvironmentTasks) -> None:
        self._environment, self._row, self._tasks = environment, row, tasks
        self._session = environment.session(row)
        self._completion: list[Message] = []
        self._finished, self._turns = False, 0

    def reply(self, text: str, finished: bool) -> list[int] | None:
        said = read_calls(text)
        self._completion.append(said.message())
        self._turns += 1
        if not finished:
            return None
        if not said.calls and not said.problems:
            self._finished = True
            return None
        observations = [self._session.observe(call) for call in said.calls] + said.problems
        self._completion += [{"role": "tool", "content": text} for text in observations]
        return None if self._turns >= self._environment.max_turns else self._tasks.observed(observations)

    def reward(self) -> float:
        row = self._row
        info = {**row.info, **self._session.info()}
        attempt = Attempt(row.prompt, self._completion, row.answer, info, self._finished)
        return self._environment.rubric.score(attempt).total

    def close(self) -> None:
        """Sessions hold memory only; the sandbox outlives them."""
