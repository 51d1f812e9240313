"""Groups of sampled answers, their rewards, and the batches that the policy loss trains on.

What a rollout asks follows from its number, and how it is sampled from (seed, question, attempt, sample): the state is
a counter, plus the samples still to be trained on. The sampler runs on the weights being trained, or one step ahead of
the trainer: then step s trains on what the weights before step s - 1 wrote, sampled while step s - 1 was computed.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trinity.base import dist
from trinity.base.rng import derive
from trinity.config import RLConfig
from trinity.data.rows import IGNORE
from trinity.rl.loss import divergence, group_advantages, informative, length_factors, overlong_penalty
from trinity.rl.rows import PolicyRows, ReplayRows, pack, per_sample
from trinity.rl.sample import Sample, Sampled, Sampler, Task, open_episode

__all__ = ["PolicyRows", "Rollouts", "Sampled", "Sampler", "Scorer", "Task"]

GAP_BATCHES = 4
"""Micro-batches on which sampler and trainer are compared."""

Scorer = Callable[[PolicyRows, bool], np.ndarray]
"""(rows, replay) -> the trainer's log-probability of each target [B, T]; `replay`: with the sampler's experts."""
Groups = dict[int, list[Sample]]
"""The samples of each question, by its number."""


class Rollouts:
    """The source of an RL stage.

    `task(number, attempt)` gives question `number`; step s asks questions s * prompts_per_step and following. A
    question whose group teaches nothing is replaced by attempt 1, 2, ... of the same number, `rl.retries` times at
    most. Every rank takes the questions whose number is its own modulo the number of ranks. `scorer` gives the old
    log-probabilities when updates > 1, and the gap between sampler and trainer; `start`, where there is a penalty for
    leaving them, those of the weights that the stage started from, once for each rollout.
    """

    def __init__(
        self,
        settings: RLConfig,
        task: Callable[[int, int], Task],
        sampler: Sampler,
        scorer: Scorer,
        seed: int,
        start: Scorer | None = None,
    ) -> None:
        self._settings, self._task, self._sampler, self._scorer, self._seed = settings, task, sampler, scorer, seed
        self._start = start
        self._next_step = 0
        self._pending: Groups = {}
        """Of the present rollout, for the steps to come."""
        self._ahead: Groups | None = None
        self._sampling: Future[Groups] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if settings.ahead else None
        self._summaries: dict[int, dict[str, float]] = {}
        self.last_samples: list[tuple[str, Sample]] = []
        """(what was said of it, sample) of the first group of the last step, for people to read."""

    def next_batch(self, step: int) -> list[PolicyRows]:
        settings = self._settings
        assert step == self._next_step, f"step {step} was asked for, {self._next_step} is next"
        if step % settings.updates == 0:
            assert not self._pending
            self._pending = self._rollout(step)
            if settings.updates > 1:
                self._pending = self._scored(self._pending, self._scorer, settings.replay, "old_logprobs")
            if self._start is not None:  # which chooses experts of its own
                self._pending = self._scored(self._pending, self._start, False, "start_logprobs")
        numbers = self._numbers(step, 1)
        groups = [self._pending.pop(number) for number in numbers]
        self._next_step += 1
        rewards_PG = torch.tensor([[sample.reward for sample in group] for group in groups], dtype=torch.float64)
        batches = pack(self._chosen(groups, rewards_PG), settings.seq_len, settings.micro_rows)
        gaps = self._gaps(batches) if settings.gap_every and step % settings.gap_every == 0 else {}
        self._summaries[step] = self._summary(groups, rewards_PG) | gaps
        self.last_samples = [(f"step {step + 1}", sample) for sample in groups[0]] if groups else []
        return batches

    def summary(self, step: int, rows: Sequence[Any]) -> dict[str, float]:
        """Means over a step's samples: reward, reward_std (inside groups), length (of what the policy wrote), its
        length_std, the share of answers that ended by themselves (finished) and of groups that were trained on
        (informative); every `gap_every` steps the gaps. To be asked once for each step."""
        return self._summaries.pop(step)

    def state_dict(self) -> dict[str, Any]:
        if self._sampling is not None:
            self._ahead = self._sampling.result()
        return {
            "step": self._next_step,
            "pending": _to_json(self._pending),
            "ahead": None if self._ahead is None else _to_json(self._ahead),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._sampling is not None:  # of the future that a rollback undoes
            self._sampling.result()
            self._sampling = None
        self._next_step = state["step"]
        self._pending = _from_json(state["pending"])
        self._ahead = None if state["ahead"] is None else _from_json(state["ahead"])

    def _numbers(self, step: int, steps: int) -> list[int]:
        first, per_step = step * self._settings.prompts_per_step, self._settings.prompts_per_step
        return [n for n in range(first, first + steps * per_step) if n % dist.world_size() == dist.rank()]

    # Sampling

    def _rollout(self, step: int) -> Groups:
        """The groups of the rollout that begins with `step`; with `ahead` the next one is begun."""
        settings, pool = self._settings, self._pool
        if pool is None:
            self._sampler.sync()
            return self._generate(step)
        if self._sampling is not None:
            self._ahead, self._sampling = self._sampling.result(), None
        groups, self._ahead = self._ahead, None
        self._sampler.sync()
        if groups is None:  # the first rollout of a run
            groups = self._generate(step)
        if step + settings.updates < settings.steps:
            self._sampling = pool.submit(self._generate, step + settings.updates)
        return groups

    def _generate(self, step: int) -> Groups:
        """Sample a group for every question of a rollout. Depends on the step and the sampler's weights alone."""
        numbers = self._numbers(step, self._settings.updates)
        groups = self._attempt(numbers, 0)
        for attempt in range(1, self._settings.retries + 1):
            dull = [n for n, group in groups.items() if len({sample.reward for sample in group}) == 1]
            if not dull:
                break
            groups |= self._attempt(dull, attempt)
        return groups

    def _attempt(self, numbers: Sequence[int], attempt: int) -> Groups:
        tasks = {number: self._task(number, attempt) for number in numbers}
        asked = [(number, sample) for number in numbers for sample in range(self._settings.group)]
        seeds = [
            derive(self._seed, "rollout", number, sample, *([attempt] if attempt else [])) for number, sample in asked
        ]
        samples = self.play([tasks[number] for number, _ in asked], seeds)
        groups: Groups = {}
        for (number, _), sample in zip(asked, samples, strict=True):
            groups.setdefault(number, []).append(sample)
        return groups

    def play(self, tasks: Sequence[Task], seeds: Sequence[int]) -> list[Sample]:
        """One sample of each task, all their turns."""
        most, room = self._settings.max_turns, self._settings.seq_len
        drafts = [Draft(task) for task in tasks]
        try:
            for turn in range(most):
                playing = [i for i, draft in enumerate(drafts) if draft.playing]
                if not playing:
                    break
                answers = self._sampler(
                    [drafts[i].context for i in playing],
                    [derive(seeds[i], "turn", turn) if turn else seeds[i] for i in playing],
                )
                for i, answer in zip(playing, answers, strict=True):
                    drafts[i].take(answer, last=turn + 1 == most, room=room - self._settings.max_new_tokens)
            return [draft.sample(self._penalty(draft)) for draft in drafts]
        finally:
            for draft in drafts:
                draft.episode.close()

    def _penalty(self, draft: "Draft") -> float:
        settings = self._settings
        return overlong_penalty(sum(draft.written), settings.max_new_tokens * draft.turns, settings.overlong_tokens)

    # What is trained on

    def _chosen(self, groups: Sequence[list[Sample]], rewards_PG: torch.Tensor) -> list[tuple[Sample, float]]:
        """The samples of informative groups with their advantages. A batch that teaches nothing still goes through,
        with advantages of 0, so that balancing and counters go on."""
        settings = self._settings
        advantages_PG = group_advantages(rewards_PG, settings.advantage_scale)
        useful_P = informative(rewards_PG)
        kept = [
            (sample, float(advantages_PG[p, g]))
            for p, group in enumerate(groups)
            for g, sample in enumerate(group)
            if (useful_P[p] or not useful_P.any()) and (sample.finished or not settings.mask_cut)
        ]
        mine = [sample.num_written for sample, _ in kept]
        everyone = [n for part in dist.gather_objects(mine) for n in part]
        scale = dict(zip(everyone, length_factors(everyone, settings.normalise, settings.max_new_tokens), strict=True))
        return [(sample, advantage * scale[sample.num_written]) for sample, advantage in kept]

    def _scored(self, groups: Groups, scorer: Scorer, replay: bool, field: str) -> Groups:
        """The samples with the scorer's log-probabilities in a field."""
        samples = [sample for group in groups.values() for sample in group]
        found: dict[int, list[float]] = {}
        for rows in pack([(sample, 0.0) for sample in samples], self._settings.seq_len, self._settings.micro_rows):
            found |= per_sample(rows, scorer(rows, replay), samples)
        scored = iter(replace(sample, **{field: found[i]}) for i, sample in enumerate(samples))
        return {number: [next(scored) for _ in group] for number, group in groups.items()}

    def _gaps(self, batches: Sequence[PolicyRows]) -> dict[str, float]:
        """Sampler against trainer on some of a step's micro-batches, before its update: the estimated divergence and
        the mean and largest |difference| of log-probabilities, with the experts replayed and without."""
        found: dict[str, float] = {}
        for name, replay in (("replayed", True), ("free", False)):
            if replay and not all(isinstance(rows, ReplayRows) for rows in batches):
                continue
            differences = [np.zeros(0)]
            for rows in batches[:GAP_BATCHES]:
                there_BT = rows.targets_BT != IGNORE
                differences.append((self._scorer(rows, replay) - rows.sampler_logprobs_BT)[there_BT].astype(np.float64))
            d_N = np.concatenate([part for parts in dist.gather_objects(differences) for part in parts])
            if d_N.size:
                found[f"gap_{name}"] = float(divergence(torch.from_numpy(d_N)).mean())
                found[f"gap_{name}_abs"] = float(np.abs(d_N).mean())
                found[f"gap_{name}_max"] = float(np.abs(d_N).max())
        return found

    def _summary(self, groups: Sequence[Sequence[Sample]], rewards_PG: torch.Tensor) -> dict[str, float]:
        samples = [sample for group in groups for sample in group]
        sums = np.zeros(7)
        if samples:
            sums[0] = rewards_PG.mean(dim=1).sum()
            sums[1] = rewards_PG.std(dim=1, correction=0).sum()
            sums[4] = informative(rewards_PG).sum()
        sums[2] = sum(s.num_written for s in samples) / self._settings.group
        sums[3] = sum(s.finished for s in samples) / self._settings.group
        sums[5] = sum(s.num_written**2 for s in samples) / self._settings.group
        sums[6] = sum(s.turns for s in samples) / self._settings.group
        means = np.sum(dist.gather_objects(sums), axis=0) / self._settings.prompts_per_step
        means[5] = max(0.0, means[5] - means[2] ** 2) ** 0.5
        names = ("reward", "reward_std", "length", "finished", "informative", "length_std", "turns")
        return dict(zip(names, means.tolist(), strict=True))


class Draft:
    """A sample while its turns are played."""

    def __init__(self, task: Task) -> None:
        self.prompt, self.episode = task.prompt, open_episode(task)
        self.tokens: list[int] = []
        self.written: list[bool] = []
        self.logprobs: list[float] = []
        self.experts: np.ndarray | None = None
        self.text, self.finished, self.turns, self.playing = "", True, 0, True

    @property
    def context(self) -> list[int]:
        return self.prompt + self.tokens

    def take(self, answer: Sampled, *, last: bool, room: int) -> None:
        """Append a turn of the policy and, if the episode goes on, the environment's answer to it.

        It ends when the context would exceed `room`, with the `last` turn, and with one that was cut off.
        """
        if answer.experts is not None:
            known = 0 if self.experts is None else len(self.experts)
            parts = [] if self.experts is None else [self.experts]
            self.experts = np.concatenate([*parts, answer.experts[known:]])
        self.tokens += answer.tokens
        self.written += [True] * len(answer.tokens)
        self.logprobs += answer.logprobs
        self.text, self.turns = answer.text, self.turns + 1
        self.finished &= answer.finished
        reply = self.episode.reply(answer.text, answer.finished)
        self.playing = reply is not None and answer.finished and not last and len(self.context) + len(reply) <= room
        if self.playing and reply is not None:
            self.tokens += reply
            self.written += [False] * len(reply)
            self.logprobs += [0.0] * len(reply)

    def sample(self, penalty: float) -> Sample:
        return Sample(
            prompt=self.prompt,
            tokens=self.tokens,
            written=self.written,
            sampler_logprobs=self.logprobs,
            reward=self.episode.reward() - penalty,
            finished=self.finished,
            text=self.text,
            turns=self.turns,
            experts=self.experts,
        )


def _to_json(mine: Groups) -> dict[str, list[dict[str, Any]]]:
    """Of all ranks, by question."""
    every: Groups = {}
    for part in dist.gather_objects(mine):
        every |= part
    return {str(number): [sample.to_json() for sample in group] for number, group in sorted(every.items())}


def _from_json(groups: dict[str, list[dict[str, Any]]]) -> Groups:
    mine = sorted(int(n) for n in groups if int(n) % dist.world_size() == dist.rank())
    return {number: [Sample.from_json(fields) for fields in groups[str(number)]] for number in mine}
