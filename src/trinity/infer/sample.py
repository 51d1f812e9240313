"""Text on which a quantised model is judged: a given one, or what the model says by itself."""

from pathlib import Path

import torch

from trinity.base.errors import UserError
from trinity.config import ModelConfig
from trinity.export.parity import Sample
from trinity.infer.engine import Engine
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

ROWS, LENGTH = 8, 256


def own_text(model: Transformer, tokenizer: Tokenizer, rows: int = ROWS, length: int = LENGTH) -> Sample:
    """`rows` texts of `length` tokens, drawn at temperature 1 from the beginning of a document."""
    length = min(length, model.config.max_positions - 1)
    params = SamplingParams(max_new_tokens=length, seed=0)
    completions = Engine(model, max_batch=rows).generate([[tokenizer.eos_id]] * rows, params)
    tokens_BT = torch.tensor([[tokenizer.eos_id, *completion.tokens] for completion in completions])
    return Sample("drawn from the model itself", tokens_BT)


def sample_of_text(path: Path, tokenizer: Tokenizer, config: ModelConfig) -> Sample:
    """The beginning of a file as rows. Raises UserError when it is too short to tell anything."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None
    ids = tokenizer.encode(text)[: ROWS * min(4 * LENGTH, config.max_positions)]
    if len(ids) < 64:
        raise UserError(f"{path} has {len(ids)} tokens; a comparison needs at least 64")
    length = min(4 * LENGTH, config.max_positions, len(ids))
    rows = len(ids) // length
    return Sample(path.name, torch.tensor(ids[: rows * length]).view(rows, length))
