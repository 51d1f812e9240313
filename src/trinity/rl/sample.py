"""What reinforcement learning asks of an environment and of a sampler, and what a sampled answer is."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Episode(Protocol):
    """One attempt at a task of several turns; each sample of a group has its own."""

    def reply(self, text: str, finished: bool) -> list[int] | None:
        """What follows the assistant's turn `text`, as tokens: the environment's turn and the opening of the next
        assistant's turn. None: the episode is over. `finished`: whether the turn ended by itself."""
        ...

    def reward(self) -> float:
        """Asked for once, after the last turn."""
        ...

    def close(self) -> None:
        """Gives up what the episode holds; called whatever happens."""
        ...


@dataclass(frozen=True)
class Task:
    """A question with a checkable answer. `prompt` is ready for the sampler; `reward(answer's text, finished)`.

    With `episode` the answer may have several turns, and the reward is the episode's.
    """

    prompt: list[int]
    reward: Callable[[str, bool], float] | None = None
    episode: Callable[[], Episode] | None = None


class OneTurn:
    """The episode of a task that ends with the first answer."""

    def __init__(self, reward: Callable[[str, bool], float]) -> None:
        self._reward, self._answer = reward, ("", False)

    def reply(self, text: str, finished: bool) -> None:
        self._answer = (text, finished)

    def reward(self) -> float:
        return self._reward(*self._answer)

    def close(self) -> None:
        pass


def open_episode(task: Task) -> Episode:
    if task.episode is not None:
        return task.episode()
    assert task.reward is not None, "a task has a reward or an episode"
    return OneTurn(task.reward)


@dataclass(frozen=True)
class Sampled:
    """What the sampler wrote after a prompt. `tokens` includes the token that ended the turn, if one did."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    """Of each token, under the model that wrote it, at the temperature that it was drawn at."""
    finished: bool
    experts: np.ndarray | None = None
    """int16 [tokens of prompt and answer but the last, L, k]: the experts that they visited."""


class Sampler(Protocol):
    """Writes answers, with the weights of the last `sync`."""

    def sync(self) -> None:
        """Take over the trainer's weights as they are now. Called by the training thread, never while sampling."""
        ...

    def __call__(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sampled]:
        """One answer to each prompt; with `ahead`, called by another thread."""
        ...


@dataclass(frozen=True)
class Sample:
    """One answer of a group, ready to train on. `tokens` and what follows describe everything after the prompt."""

    prompt: list[int]
    tokens: list[int]
    written: list[bool]
    """Whether the policy wrote the token; the environment's have no loss."""
    sampler_logprobs: list[float]
    reward: float
    finished: bool
    """Whether every turn ended by itself."""
    text: str
    """Of the last turn."""
    turns: int = 1
    old_logprobs: list[float] | None = None
    """The trainer's, before the first update on the sample; None when that update will see those very weights."""
    start_logprobs: list[float] | None = None
    """Those of the weights that the stage started from, where `rl.kl` asks for them."""
    experts: np.ndarray | None = None
    """int16 [tokens of prompt and answer but the last, L, k]"""

    @property
    def num_written(self) -> int:
        return sum(self.written)

    def to_json(self) -> dict[str, Any]:
        fields = {**self.__dict__, "written": "".join("1" if w else "0" for w in self.written)}
        if self.experts is not None:
            array = np.ascontiguousarray(self.experts, dtype="<i2")
            fields["experts"] = [list(array.shape), base64.b64encode(array.tobytes()).decode()]
        return fields

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Sample":
        experts = fields["experts"]
        if experts is not None:
            shape, text = experts
            experts = np.frombuffer(base64.b64decode(text), dtype="<i2").reshape(shape)
        return Sample(**{**fields, "written": [c == "1" for c in fields["written"]], "experts": experts})
