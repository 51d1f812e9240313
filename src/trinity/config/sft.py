"""Settings of supervised fine-tuning."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from trinity.config.base import Fraction
from trinity.config.stage import StageConfig


class SFTConfig(StageConfig):
    conversations: tuple[str, ...] = ()
    """jsonl(.gz, .zst) or parquet files with a `messages` column."""
    epochs: PositiveInt = 3
    batch_rows: PositiveInt = 32
    held_out: Fraction = 0.05
    """Share of the conversations kept for evaluation, chosen by content hash."""
    turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns have loss; a message's own `weight` (0 or 1) goes before."""
    packing: Literal["best-fit", "rsdb", "single"] = "best-fit"
    """best-fit: whole conversations, longest first into the fullest row with room; rsdb: drawn at random from a buffer,
    a conversation that reaches the end of a row goes on in a later one; single: one conversation a row."""
    template_samples: NonNegativeInt = 32
    """Held-out conversations whose next turn is sampled, to see whether the answers keep to the template."""
    sample_tokens: PositiveInt = 256
    """Most tokens of such an answer."""
