"""Needles for any causal language model that `transformers` loads: the same questions, in that model's tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trinity.base.errors import UserError
from trinity.config import EvalConfig, override_eval
from trinity.evals import niah
from trinity.evals.generation import Complete
from trinity.infer.load import DTYPES, find_device
from trinity.tokenizer import Tokenizer


def evaluate_foreign(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    on_note: Callable[[str], None],
) -> dict[str, Any]:
    """`evals.niah` on the model directory `path`; settings are the defaults and `overrides` (`eval.KEY=VALUE`).

    Lengths that nobody asked for are cut to the model's positions, which `on_note` is told. Its tokenizer must be
    byte-level BPE. Raises UserError when `transformers` is not installed or cannot load the model.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed: pip install transformers") from None
    settings, changed = override_eval(EvalConfig(), overrides)
    tokenizer, target = Tokenizer.load(path), find_device(device)
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype] if dtype else "auto", local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"transformers cannot load {path}: {str(error).splitlines()[0]}") from None
    model.to(target).eval()
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and "niah_lengths" not in changed:
        fit = tuple(n for n in settings.niah_lengths if n <= positions) or (positions,)
        if fit != settings.niah_lengths:
            on_note(f"the model has {positions} positions: needles are hidden at {', '.join(map(str, fit))} tokens")
            settings = settings.model_copy(update={"niah_lengths": fit})
    return niah.evaluate(_greedy(model, tokenizer), tokenizer, niah.questions(tokenizer, settings))


def _greedy(model: Any, tokenizer: Tokenizer) -> Complete:
    @torch.no_grad()
    def complete(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        texts, stops = [], set(tokenizer.stop_ids)
        padding = list(range(tokenizer.vocab_size, model.config.vocab_size))  # no token of any text
        for prompt in prompts:
            tokens_1T = torch.tensor([prompt], device=model.device)
            found = model.generate(
                tokens_1T,
                attention_mask=torch.ones_like(tokens_1T),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.stop_ids,
                suppress_tokens=padding or None,
                pad_token_id=tokenizer.pad_id,
            )
            answer = found[0, len(prompt) :].tolist()
            texts.append(tokenizer.decode((token for token in answer if token not in stops), skip_special=True))
        return texts

    return complete
