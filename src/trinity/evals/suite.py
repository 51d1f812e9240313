"""Every evaluation of a model at once, as JSON with standard errors."""

from collections.abc import Callable, Sequence
from typing import Any

from trinity.base.errors import UsageError, nearest
from trinity.config import EvalConfig
from trinity.data.shards import Shards
from trinity.data.validation import ValidationRows
from trinity.evals import arithmetic, heldout, niah, positions
from trinity.evals.generation import greedy
from trinity.evals.needles import Haystack
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

SUITE = ("heldout", "positions", "niah", "arithmetic", "arithmetic_chat")


def run_suite(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: EvalConfig,
    *,
    names: Sequence[str] = SUITE,
    shards: Shards | None = None,
    seq_len: int = 4096,
    rows_per_domain: int = 64,
    micro_rows: int = 1,
    haystack: Haystack | None = None,
    max_number: int = 9,
    seed: int = 0,
    on_result: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Results by name; `on_result` gets each as it is there.

    heldout (with `shards`, held-out ones): loss and bits per byte by domain. positions (with `shards`): the same by
    position in long documents. niah: score, standard error, grid.
    arithmetic, arithmetic_chat: exact match on problems that no stage trains on, as equations and as chat turns.
    Raises UsageError for an unknown name, held-out loss without shards, shards of another tokenizer, and needles at
    lengths beyond the model's positions.
    """
    for name in names:
        if name not in SUITE:
            raise UsageError(f"there is no evaluation {name!r}; choose from {', '.join(SUITE)}{nearest(name, SUITE)}")
    if {"heldout", "positions"} & set(names) and shards is None:
        raise UsageError("held-out loss needs shards: name the directory of a held-out split, such as SHARDS/val")
    if shards is not None and shards.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UsageError(f"{shards.directory} was made with another tokenizer than the model's")
    longest, most = max(settings.niah_lengths), model.config.max_positions
    if "niah" in names and longest > most:
        raise UsageError(f"eval.niah_lengths has {longest}, but the model has {most} positions")
    model.eval()
    complete = greedy(model, tokenizer)
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == "heldout":
            assert shards is not None
            rows = ValidationRows(shards, min(seq_len, model.config.max_positions), rows_per_domain)
            bytes_V = heldout.token_bytes(tokenizer, model.config.vocab_size)
            results[name] = heldout.evaluate(model, rows, bytes_V, micro_rows)
        elif name == "positions":
            assert shards is not None
            bytes_V = heldout.token_bytes(tokenizer, model.config.vocab_size)
            length = positions_length(model, shards)
            results[name] = positions.evaluate(model, shards, bytes_V, length, rows_per_domain // 4, micro_rows)
        elif name == "niah":
            results[name] = niah.evaluate(complete, tokenizer, niah.questions(tokenizer, settings, seed, haystack))
        else:
            form: arithmetic.Form = "chat" if name == "arithmetic_chat" else "equation"
            asked = arithmetic.questions(tokenizer, settings.arithmetic_questions, max_number, form=form, seed=seed)
            results[name] = arithmetic.evaluate(complete, asked)
        if on_result is not None:
            on_result(name, results[name])
    return results


def positions_length(model: Transformer, shards: Shards, most: int = 32768, documents: int = 4) -> int:
    """The largest power of two that the model's positions and at least `documents` held-out documents reach."""
    lengths = sorted((int(length) - 1 for length in shards.lengths), reverse=True)
    reach = min(most, model.config.max_positions, lengths[min(documents, len(lengths)) - 1])
    return 1 << max(0, reach.bit_length() - 1)
