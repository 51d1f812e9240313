"""Settings of the training stages: what all have, and those of pretraining and context extension."""

from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trinity.config.base import Fraction, Frozen


class Phase(Frozen):
    """One phase of the data mix."""

    name: str
    tokens: PositiveInt
    weights: Annotated[dict[str, PositiveFloat], Field(min_length=1)]
    """Share of the tokens by domain, or by `source:PATTERN` (as in a shell) of the recorded sources; normalised. What
    names nothing in the shards is refused."""


class BatchSize(Frozen):
    """Rows per optimizer step from a number of tokens on."""

    from_tokens: NonNegativeInt
    rows: PositiveInt


class StageConfig(Frozen):
    """What every training stage has. A row is one sequence of `seq_len` tokens."""

    seq_len: PositiveInt
    micro_rows: PositiveInt = 1
    """Rows of one forward pass on one rank; gradients accumulate over the rest."""
    lr_scale: PositiveFloat = 1.0
    """Factor on both learning rates at the start of the stage (after warm-up)."""
    final_lr_scale: NonNegativeFloat = 0.1
    """Factor on both learning rates at the end of the stage."""
    warmup_steps: NonNegativeInt = 0
    decay_fraction: Fraction = 1.0
    """Last part of the stage's tokens over which the learning rate falls along a cosine; before it, it is stable."""
    eval_every: PositiveInt = 250
    eval_rows: PositiveInt = 64
    """Held-out rows of an evaluation, per domain."""


class PretrainConfig(StageConfig):
    niah_share: Fraction = 0.0
    """As `extend.niah_share`."""
    phases: tuple[Phase, ...]
    batch: tuple[BatchSize, ...]
    """Batch ramp; the first entry starts at token 0."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.phases:
            raise ValueError("phases is empty; a run needs at least one")
        if not self.batch or self.batch[0].from_tokens != 0:
            raise ValueError("batch must start with an entry of from_tokens = 0")
        starts = [b.from_tokens for b in self.batch]
        if starts != sorted(set(starts)):
            raise ValueError(f"batch entries must rise in from_tokens, not {starts}")
        return self

    @property
    def tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)


class ExtendConfig(StageConfig):
    """Context extension: straight to the longest rows."""

    tokens: PositiveInt
    batch_rows: PositiveInt
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Share by domain; empty takes the last pretraining phase's."""
    length_bias: NonNegativeFloat = 1.0
    """A document is drawn with odds (length ** length_bias) inside its domain; 0 draws evenly."""
    niah_share: Fraction = 0.0
    """Share of rows that are generated retrieval documents (`retrieval`): nothing in them meets the evaluation. Only
    their answers bear a loss."""
    niah_every: NonNegativeInt = 0
    """Steps between evaluations of MK-NIAH during the run; 0 evaluates at the end only."""
    stop_at: Fraction = 1.0
    """Stop early once MK-NIAH at seq_len reaches this score; 1.0 runs to the end."""
