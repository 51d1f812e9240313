"""What quantisation costs: the same text through the model before and after it."""

import dataclasses
from pathlib import Path

import torch

from trinity.export.oracle import Rounding, oracle_forward


@dataclasses.dataclass(frozen=True)
class Quality:
    """A quantised model beside the same weights in bfloat16, on the same tokens."""

    text: str
    """What the tokens are."""
    num_tokens: int
    """Predicted tokens that were compared."""
    perplexity_bf16: float
    perplexity: float
    """With the weights in FP8 and everything else exact."""
    perplexity_w8a8: float
    """With activations in FP8 too, as engines multiply."""
    top1: float
    """Share of tokens at which the most probable one is the same as in bfloat16; activations exact."""
    top1_w8a8: float

    def line(self) -> str:
        return (
            f"FP8 against bfloat16 on {self.num_tokens} tokens ({self.text}): perplexity {self.perplexity_bf16:.4f} -> "
            f"{self.perplexity:.4f} (activations in FP8 too: {self.perplexity_w8a8:.4f}), the same most probable token "
            f"at {100 * self.top1:.1f} % ({100 * self.top1_w8a8:.1f} %)"
        )


def compare_quality(
    logits_bf16_BTV: torch.Tensor, directory: Path, tokens_BT: torch.Tensor, text: str, rounding: Rounding | None = None
) -> Quality:
    """`logits_bf16_BTV` are those of the model in bfloat16 for `tokens_BT`; `directory` holds the quantised one."""
    exact = oracle_forward(directory, tokens_BT, rounding=rounding).logits_BTV
    rounded = oracle_forward(directory, tokens_BT, rounding=rounding, quantize_inputs=True).logits_BTV
    best_BT = logits_bf16_BTV[:, :-1].argmax(-1)

    def agreement(logits_BTV: torch.Tensor) -> float:
        return (logits_BTV[:, :-1].argmax(-1) == best_BT).double().mean().item()

    return Quality(
        text,
        best_BT.numel(),
        perplexity(logits_bf16_BTV, tokens_BT),
        perplexity(exact, tokens_BT),
        perplexity(rounded, tokens_BT),
        agreement(exact),
        agreement(rounded),
    )


def perplexity(logits_BTV: torch.Tensor, tokens_BT: torch.Tensor) -> float:
    """exp of the mean cross-entropy of every token but the first of each row."""
    loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).double(), tokens_BT[:, 1:].flatten())
    return loss.exp().item()
