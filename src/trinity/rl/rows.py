"""Samples packed into rows, with what the policy loss needs at each target."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trinity.base import dist
from trinity.data.chat import best_fit
from trinity.data.rows import IGNORE, Chunk, Rows, empty_rows, finish_row
from trinity.rl.sample import Sample


@dataclass(frozen=True)
class PolicyRows(Rows):
    """Rows with what the policy loss needs at each target."""

    advantages_BT: np.ndarray
    sampler_logprobs_BT: np.ndarray
    old_logprobs_BT: np.ndarray
    """NaN where the trainer's current log-probability is to be taken."""
    start_logprobs_BT: np.ndarray
    """Of the weights that the stage started from; NaN where nothing asks for them."""


@dataclass(frozen=True)
class ReplayRows(PolicyRows):
    """The same, with the experts that the sampler chose."""

    experts_BTLk: np.ndarray
    """int16; -1 where nothing was recorded."""


def pack(samples: Sequence[tuple[Sample, float]], seq_len: int, micro_rows: int) -> list[PolicyRows]:
    """Micro-batches of packed (sample, advantage); every rank makes as many, of padding where it has fewer.

    `documents` of a row name samples by their number in `samples`.
    """
    packed = best_fit([len(s.prompt) + len(s.tokens) - 1 for s, _ in samples], seq_len)
    needed = max(1, *dist.gather_objects(-(-len(packed) // micro_rows)))
    packed += [[]] * (needed * micro_rows - len(packed))
    shape = next((s.experts.shape[1:] for s, _ in samples if s.experts is not None), None)
    # A rank without samples still takes the same path through the model as the others.
    shape = next((s for s in dist.gather_objects(shape) if s is not None), None)
    return [
        _rows(samples, packed[start : start + micro_rows], seq_len, shape)
        for start in range(0, len(packed), micro_rows)
    ]


def _rows(
    samples: Sequence[tuple[Sample, float]],
    groups: Sequence[Sequence[int]],
    seq_len: int,
    experts_shape: tuple[int, ...] | None,
) -> PolicyRows:
    rows = empty_rows(len(groups), seq_len)
    shape = rows.tokens_BT.shape
    advantages_BT, sampler_BT = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    old_BT, start_BT = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    experts_BTLk = None if experts_shape is None else np.full((*shape, *experts_shape), -1, np.int16)
    for b, group in enumerate(groups):
        at, chunks = 0, []
        for number in group:
            sample, advantage = samples[number]
            ids = sample.prompt + sample.tokens
            length = len(ids) - 1
            answer = slice(at + len(sample.prompt) - 1, at + length)
            targets = np.where(sample.written, sample.tokens, IGNORE)
            rows.tokens_BT[b, at : at + length] = ids[:-1]
            rows.targets_BT[b, at : answer.start] = IGNORE
            rows.targets_BT[b, answer] = targets
            advantages_BT[b, answer] = np.where(sample.written, advantage, 0.0)
            sampler_BT[b, answer] = sample.sampler_logprobs
            if sample.old_logprobs is not None:
                old_BT[b, answer] = sample.old_logprobs
            if sample.start_logprobs is not None:
                start_BT[b, answer] = sample.start_logprobs
            if experts_BTLk is not None and sample.experts is not None:
                experts_BTLk[b, at : at + length] = sample.experts[:length]
            chunks.append(Chunk(number, 0, length))
            at += length
        finish_row(rows, b, chunks)
    fields = {
        **rows.__dict__,
        "advantages_BT": advantages_BT,
        "sampler_logprobs_BT": sampler_BT,
        "old_logprobs_BT": old_BT,
        "start_logprobs_BT": start_BT,
    }
    return PolicyRows(**fields) if experts_BTLk is None else ReplayRows(**fields, experts_BTLk=experts_BTLk)


def per_sample(rows: Rows, values_BT: np.ndarray, samples: Sequence[Sample]) -> dict[int, list[float]]:
    """Values at the targets of each sample, one for each token after its prompt, by the sample's number."""
    found: dict[int, list[float]] = {}
    for b, chunks in enumerate(rows.documents):
        end = 0
        for chunk in chunks:
            end += chunk.length
            found[chunk.doc] = values_BT[b, end - len(samples[chunk.doc].tokens) : end].tolist()
    return found
