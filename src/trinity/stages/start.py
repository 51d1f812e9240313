"""Whose weights a stage starts from: the tokenizer and the shape must be its own."""

from pathlib import Path

import torch

from trinity.base.errors import UserError
from trinity.config import ModelConfig
from trinity.infer.load import find, find_tokenizer, has_tokenizer, weights
from trinity.model.transformer import Transformer
from trinity.parallel.shard import Sharding
from trinity.tokenizer import Tokenizer

# Settings that may differ between a stage and the model that it starts from: where weights began, and how far rows
# reach.
_FREE = {"max_positions", "init_scale", "post_norm_gain", "global_every", "layer_types"}


def check_tokenizer(tokenizer: Tokenizer, where: str, start_from: Path) -> None:
    """Raises UserError when the model of `start_from` was trained with another tokenizer: its embeddings would stand
    for other texts."""
    place = find(start_from)
    if not has_tokenizer(place):
        return
    own = find_tokenizer(place)
    if own.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the model of {start_from} has another tokenizer ({own.vocab_size} entries) than data.tokenizer = {where} "
            f"({tokenizer.vocab_size} entries): a stage goes on with the model's own"
        )


def load_weights(model: Transformer, config: ModelConfig, start_from: Path, sharding: Sharding | None = None) -> None:
    """Weights and expert biases of a model or run directory, one tensor at a time. Raises UserError that names the
    first setting that differs."""
    found, tensors = weights(start_from, dtype=torch.float32)
    for key in ModelConfig.model_fields:
        if key not in _FREE and getattr(found, key) != getattr(config, key):
            raise UserError(
                f"the model of {start_from} has {key} = {getattr(found, key)}, but this run has model.{key} = "
                f"{getattr(config, key)}: a stage goes on with a model of its own shape"
            )
    if found.layers != config.layers:
        raise UserError(f"the model of {start_from} has other local and global layers than this run's model")
    if sharding is not None:
        sharding.load(tensors)
        return
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors:
            own[name].copy_(tensor)
