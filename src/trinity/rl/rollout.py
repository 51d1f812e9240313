"""Groups of sampled answers, their rewards, and the rows that the policy loss trains on.

The sampler runs on the weights being trained, so a rollout belongs to the step that asked for it. What a rollout asks
follows from its number, and how it is sampled from (seed, question, sample): the state is a counter, plus the samples
still to be trained on when a rollout serves several updates.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from trinity.base import dist
from trinity.base.rng import derive
from trinity.config import RLConfig
from trinity.data.chat import best_fit
from trinity.data.rows import IGNORE, Chunk, Rows, empty_rows, finish_row
from trinity.rl.loss import group_advantages, informative


@dataclass(frozen=True)
class Task:
    """A question with a checkable answer. `prompt` is ready for the sampler; `reward(completion text, finished)`."""

    prompt: list[int]
    reward: Callable[[str, bool], float]


@dataclass(frozen=True)
class Sampled:
    """What the sampler wrote after a prompt. `tokens` includes the token that ended the turn, if one did."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    """Of each token, under the distribution it was drawn from."""
    finished: bool


@dataclass(frozen=True)
class Sample:
    """One answer of a group, ready to train on."""

    prompt: list[int]
    tokens: list[int]
    sampler_logprobs: list[float]
    old_logprobs: list[float] | None
    """The trainer's, under the weights that sampled; None when the first update will see those very weights."""
    reward: float
    finished: bool


@dataclass(frozen=True)
class PolicyRows(Rows):
    """Rows with what the policy loss needs at each target."""

    advantages_BT: np.ndarray
    sampler_logprobs_BT: np.ndarray
    old_logprobs_BT: np.ndarray
    """NaN where the trainer's current log-probability is to be taken."""


Sampler = Callable[[list[list[int]], list[int]], list[Sampled]]
"""(prompts, seeds) -> one sample each."""
Scorer = Callable[[Rows], np.ndarray]
"""The trainer's log-probability of each target [B, T]."""


class Rollouts:
    """The source of an RL stage.

    `task(number)` gives question number n; step s asks questions s * prompts_per_step and following. Every rank takes
    the questions whose number is its own modulo the number of ranks. `scorer` is used when updates > 1.
    """

    def __init__(
        self, settings: RLConfig, task: Callable[[int], Task], sampler: Sampler, scorer: Scorer, seed: int
    ) -> None:
        self._settings, self._task, self._sampler, self._scorer, self._seed = settings, task, sampler, scorer, seed
        self._next_step = 0
        self._pending: dict[int, list[Sample]] = {}
        self._summaries: dict[int, dict[str, float]] = {}

    def next_batch(self, step: int) -> list[PolicyRows]:
        settings = self._settings
        assert step == self._next_step, f"step {step} was asked for, {self._next_step} is next"
        if step % settings.updates == 0:
            assert not self._pending
            self._roll(step)
        numbers = self._numbers(step, 1)
        groups = [self._pending.pop(number) for number in numbers]
        self._next_step += 1
        rewards_PG = torch.tensor([[sample.reward for sample in group] for group in groups], dtype=torch.float64)
        self._summaries[step] = self._summary(groups, rewards_PG)
        advantages_PG = group_advantages(rewards_PG)
        useful_P = informative(rewards_PG)
        kept = [
            (sample, float(advantages_PG[p, g]))
            for p, group in enumerate(groups)
            for g, sample in enumerate(group)
            if useful_P[p]
            or not useful_P.any()  # a batch that teaches nothing still goes through: with advantages of 0
        ]
        return self._batches(kept)

    def summary(self, step: int, rows: Sequence[Any]) -> dict[str, float]:
        """Means over a step's samples: reward, reward_std (inside groups), length, and the share of answers that ended
        by themselves (finished) and of groups that were trained on (informative). To be asked once for each step."""
        return self._summaries.pop(step)

    def state_dict(self) -> dict[str, Any]:
        pending: dict[int, list[Sample]] = {}
        for part in dist.gather_objects(self._pending):
            pending |= part
        return {
            "step": self._next_step,
            "pending": {str(number): [asdict(sample) for sample in group] for number, group in sorted(pending.items())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next_step = state["step"]
        mine = {int(n) for n in state["pending"] if int(n) % dist.world_size() == dist.rank()}
        self._pending = {number: [Sample(**fields) for fields in state["pending"][str(number)]] for number in mine}

    def _numbers(self, step: int, steps: int) -> list[int]:
        first, per_step = step * self._settings.prompts_per_step, self._settings.prompts_per_step
        return [n for n in range(first, first + steps * per_step) if n % dist.world_size() == dist.rank()]

    def _roll(self, step: int) -> None:
        """Sample a group for every question of this rollout."""
        settings = self._settings
        numbers = self._numbers(step, settings.updates)
        tasks = {number: self._task(number) for number in numbers}
        asked = [(number, sample) for number in numbers for sample in range(settings.group)]
        sampled = self._sampler(
            [tasks[number].prompt for number, _ in asked],
            [derive(self._seed, "rollout", number, sample) for number, sample in asked],
        )
        samples = [
            Sample(
                prompt=tasks[number].prompt,
                tokens=answer.tokens,
                sampler_logprobs=answer.logprobs,
                old_logprobs=None,
                reward=tasks[number].reward(answer.text, answer.finished),
                finished=answer.finished,
            )
            for (number, _), answer in zip(asked, sampled, strict=True)
        ]
        if settings.updates > 1:
            samples = self._with_old_logprobs(samples)
        for (number, _), sample in zip(asked, samples, strict=True):
            self._pending.setdefault(number, []).append(sample)

    def _with_old_logprobs(self, samples: Sequence[Sample]) -> list[Sample]:
        old: dict[int, list[float]] = {}
        for rows in self._batches([(sample, 0.0) for sample in samples]):
            logprobs_BT = self._scorer(rows)
            for b, chunks in enumerate(rows.documents):
                end = 0
                for chunk in chunks:
                    end += chunk.length
                    count = len(samples[chunk.doc].tokens)
                    old[chunk.doc] = logprobs_BT[b, end - count : end].tolist()
        return [Sample(**{**asdict(sample), "old_logprobs": old[i]}) for i, sample in enumerate(samples)]

    def _batches(self, samples: Sequence[tuple[Sample, float]]) -> list[PolicyRows]:
        """Micro-batches of packed samples; every rank makes as many, of padding where it has fewer."""
        settings = self._settings
        packed = best_fit([len(s.prompt) + len(s.tokens) - 1 for s, _ in samples], settings.seq_len)
        needed = max(dist.gather_objects(-(-len(packed) // settings.micro_rows)))
        packed += [[]] * (needed * settings.micro_rows - len(packed))
        return [
            self._rows(samples, packed[start : start + settings.micro_rows])
            for start in range(0, len(packed), settings.micro_rows)
        ]

    def _rows(self, samples: Sequence[tuple[Sample, float]], groups: Sequence[Sequence[int]]) -> PolicyRows:
        rows = empty_rows(len(groups), self._settings.seq_len)
        shape = rows.tokens_BT.shape
        advantages_BT, sampler_BT = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        old_BT = np.full(shape, np.nan, np.float32)
        for b, group in enumerate(groups):
            at, chunks = 0, []
            for number in group:
                sample, advantage = samples[number]
                ids = sample.prompt + sample.tokens
                length = len(ids) - 1
                answer = slice(at + len(sample.prompt) - 1, at + length)
                rows.tokens_BT[b, at : at + length] = ids[:-1]
                rows.targets_BT[b, at : at + length] = [*[IGNORE] * (len(sample.prompt) - 1), *sample.tokens]
                advantages_BT[b, answer] = advantage
                sampler_BT[b, answer] = sample.sampler_logprobs
                if sample.old_logprobs is not None:
                    old_BT[b, answer] = sample.old_logprobs
                chunks.append(Chunk(number, 0, length))
                at += length
            finish_row(rows, b, chunks)
        return PolicyRows(
            **{
                **rows.__dict__,
                "advantages_BT": advantages_BT,
                "sampler_logprobs_BT": sampler_BT,
                "old_logprobs_BT": old_BT,
            }
        )

    def _summary(self, groups: Sequence[Sequence[Sample]], rewards_PG: torch.Tensor) -> dict[str, float]:
        samples = [sample for group in groups for sample in group]
        sums = np.zeros(5)
        sums[0] = rewards_PG.mean(dim=1).sum()
        sums[1] = rewards_PG.std(dim=1, correction=0).sum()
        sums[2] = sum(len(s.tokens) for s in samples) / self._settings.group
        sums[3] = sum(s.finished for s in samples) / self._settings.group
        sums[4] = informative(rewards_PG).sum()
        means = np.sum(dist.gather_objects(sums), axis=0) / self._settings.prompts_per_step
        names = ("reward", "reward_std", "length", "finished", "informative")
        return dict(zip(names, means.tolist(), strict=True))
