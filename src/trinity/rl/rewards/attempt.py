"""What a reward sees, and how several rewards become one number.

The shape is that of the `verifiers` package: a row of a data set has `prompt` (messages), `answer` and `info`; a
rollout adds `completion` (messages); a rubric weighs functions of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """A finished rollout."""

    prompt: Sequence[Message]
    completion: Sequence[Message]
    """What came after the prompt: the model's messages and the environment's."""
    answer: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = True
    """Whether the model ended its last turn by itself."""

    @property
    def text(self) -> str:
        """What the model said last, without its thoughts; empty when it said nothing."""
        for message in reversed(self.completion):
            if message.get("role") == "assistant":
                return without_thoughts(message.get("content") or "")
        return ""

    @classmethod
    def of_text(cls, text: str, answer: str = "", *, finished: bool = True, **info: Any) -> "Attempt":
        """A single turn."""
        return cls([], [{"role": "assistant", "content": text}], answer, info, finished)


Reward = Callable[[Attempt], float]
"""A number from 0 to 1; a function of the attempt alone."""


def without_thoughts(text: str) -> str:
    """The text after the last `</think>`; nothing, where a thought was begun and not ended."""
    before, end, after = text.rpartition("</think>")
    if end:
        return after.strip()
    return "" if "<think>" in text else (before + after).strip()


@dataclass(frozen=True)
class Scores:
    total: float
    """Weighted mean, from 0 to 1."""
    parts: dict[str, float]


@dataclass(frozen=True)
class Rubric:
    """Rewards by name with their weights, which are above 0."""

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float] = field(default_factory=dict)
    """1 where none is given."""
    needs_finished: bool = True
    """An attempt that was cut off earns nothing: a policy that rambles after the right answer must not be paid."""

    def __post_init__(self) -> None:
        assert self.rewards, "a rubric needs a reward"
        assert set(self.weights) <= set(self.rewards), "weights of rewards that are not there"
        assert all(weight > 0 for weight in self.weights.values())

    def score(self, attempt: Attempt) -> Scores:
        parts = {name: float(reward(attempt)) for name, reward in self.rewards.items()}
        for name, value in parts.items():
            assert 0.0 <= value <= 1.0, f"the reward {name} gave {value}"
        if self.needs_finished and not attempt.finished:
            return Scores(0.0, parts)
        weights = {name: self.weights.get(name, 1.0) for name in parts}
        return Scores(sum(weights[n] * parts[n] for n in parts) / sum(weights.values()), parts)
