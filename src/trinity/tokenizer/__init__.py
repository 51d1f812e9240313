"""Text to ids: pretokenisation, BPE training, the tokenizer with its chat template, and its measures."""

from trinity.tokenizer.tokenizer import Tokenizer
from trinity.tokenizer.train import train_tokenizer

__all__ = ["Tokenizer", "train_tokenizer"]
