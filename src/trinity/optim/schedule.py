"""What each optimizer step does: its rows, its phase and its learning-rate factor. Warm-up, stable, cosine decay.

A plan is computed, not stored: a run of a million steps costs as little as one of ten.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from trinity.config import PretrainConfig, StageConfig


@dataclass(frozen=True)
class PlannedStep:
    step: int
    """Counted from 0."""
    phase: str
    rows: int
    """Rows of the global batch."""
    tokens_before: int
    lr_scale: float
    """Factor on both learning rates."""


@dataclass(frozen=True)
class _Segment:
    """Consecutive steps of equal phase and batch."""

    first_step: int
    first_token: int
    phase: str
    rows: int


class StepPlan:
    """The steps of a stage, by index and length like a list.

    A step belongs to the phase, and has the batch, in which its first token falls; the last step may overshoot the
    budget by less than one batch.
    """

    def __init__(self, stage: StageConfig, phases: Sequence[tuple[str, int]], batch: Sequence[tuple[int, int]]) -> None:
        """`phases`: (name, tokens) in order. `batch`: (from_tokens, rows), the first from token 0."""
        self.stage = stage
        self.tokens = sum(tokens for _, tokens in phases)
        self._segments: list[_Segment] = []
        ends = list(accumulate(tokens for _, tokens in phases))
        starts = [start for start, _ in batch]
        borders = sorted({*ends, *(start for start in starts[1:] if start < self.tokens)})
        step = token = 0
        while token < self.tokens:
            phase = phases[bisect_right(ends, token)][0]
            rows = batch[bisect_right(starts, token) - 1][1]
            self._segments.append(_Segment(step, token, phase, rows))
            border = borders[bisect_right(borders, token)]
            steps = math.ceil((border - token) / (rows * stage.seq_len))
            step, token = step + steps, token + steps * rows * stage.seq_len
        self._num_steps = step

    @classmethod
    def pretrain(cls, stage: PretrainConfig) -> "StepPlan":
        return cls(stage, [(p.name, p.tokens) for p in stage.phases], [(b.from_tokens, b.rows) for b in stage.batch])

    @classmethod
    def constant(cls, stage: StageConfig, phase: str, steps: int, rows: int) -> "StepPlan":
        """`steps` steps of `rows` rows each, in one phase."""
        return cls(stage, [(phase, steps * rows * stage.seq_len)], [(0, rows)])

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> PlannedStep:
        if not 0 <= step < self._num_steps:
            raise IndexError(f"step {step} is outside a plan of {self._num_steps} steps")
        index = bisect_right(self._segments, step, key=lambda segment: segment.first_step) - 1
        segment = self._segments[index]
        tokens = segment.first_token + (step - segment.first_step) * segment.rows * self.stage.seq_len
        return PlannedStep(step, segment.phase, segment.rows, tokens, self._lr_scale(step, tokens))

    def __iter__(self) -> Iterator[PlannedStep]:
        return (self[step] for step in range(len(self)))

    def _lr_scale(self, step: int, tokens: int) -> float:
        stage = self.stage
        if step < stage.warmup_steps:
            return stage.lr_scale * (step + 1) / stage.warmup_steps
        start = self.tokens * (1 - stage.decay_fraction)
        if tokens <= start:
            return stage.lr_scale
        progress = (tokens - start) / (self.tokens - start)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return stage.final_lr_scale + (stage.lr_scale - stage.final_lr_scale) * cosine
