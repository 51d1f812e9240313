"""Environments as tasks of the RL stage: messages become tokens, the environment's turns included.

    code = CodeTasks(sandbox, seed=0)
    stages.rl.run(config, run_dir, start_from=..., environment=lambda stage: task_source(code, stage.tokenizer))

An environment of several turns needs `rl.max_turns` as high as its own.
"""

from collections.abc import Callable, Sequence

from trinity.rl.environments.environment import Environment, Play, Reply, Row, score_text
from trinity.rl.rewards.attempt import Message
from trinity.rl.sample import Task
from trinity.tokenizer import Tokenizer
from trinity.tokenizer.template import TURN_END

_ATTEMPTS_APART = 1_000_003
"""Attempt a of question n is row n + a times this: rows that no run of a usual length asks for otherwise."""


def task_source(environment: Environment, tokenizer: Tokenizer) -> Callable[[int, int], Task]:
    """(number, attempt) -> the task, for `stages.rl.run` and `rl.rollout.Rollouts`."""

    def task(number: int, attempt: int) -> Task:
        row = environment.row(number + attempt * _ATTEMPTS_APART)
        prompt, _ = tokenizer.encode_chat(row.prompt, list(environment.tools) or None, add_generation_prompt=True)
        if environment.max_turns > 1:
            return Task(prompt, episode=lambda: Conversation(environment, row, tokenizer))
        return Task(prompt, lambda text, finished: score_text(environment, row, text, finished))

    return task


class Conversation:
    """An episode of several turns (`rl.sample.Episode`)."""

    def __init__(self, environment: Environment, row: Row, tokenizer: Tokenizer) -> None:
        self._play, self._tokenizer = Play(environment, row), tokenizer

    def reply(self, text: str, finished: bool) -> list[int] | None:
        observations = self._play.take(Reply(text, finished))
        return None if observations is None else between_turns(self._tokenizer, observations)

    def reward(self) -> float:
        return self._play.scores().total

    def close(self) -> None:
        """Nothing is held: every command of a session has its own sandboxed process, which is gone."""


def between_turns(tokenizer: Tokenizer, observations: Sequence[Message]) -> list[int]:
    """Ids from the end of an assistant's turn, which the turn itself holds, to the opening of its next one."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "any", "arguments": {}}]}
    before: list[Message] = [{"role": "user", "content": ""}, call]
    text = tokenizer.render_chat([*before, *observations], add_generation_prompt=True)
    start = tokenizer.render_chat(before).rindex(TURN_END) + len(TURN_END)
    return tokenizer.encode(text[start:], special=True)
