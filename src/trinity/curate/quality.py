"""A quality score between 0 and 1: calibrated logistic regression on simple features, from a few hundred labels.

The model is a few dozen numbers in JSON. Its calibration is measured by cross-validation: every example is scored by
a model that has not seen it; the scores are fitted to the labels by a sigmoid (Platt 1999), whose fit is measured on
other folds again.
"""

import gzip
import json
import math
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trinity.base.errors import UserError
from trinity.curate.checks import repeated
from trinity.curate.words import word_hashes

FEATURES = (
    "log characters",
    "mean word",
    "mean sentence",
    "distinct words",
    "letters",
    "digits",
    "symbols",
    "capitals",
    "blanks",
    "lines without end mark",
    "short lines",
    "repeated runs",
    "bytes after compression",
    "most frequent word",
)
SAMPLE_CHARS = 20_000
FOLDS = 5
LEAST_EXAMPLES = 40
BINS = 10
_RIDGE = 1.0
_ENDS = (".", "!", "?", ":", ";", '"', "\u201d", "\u3002", "\uff01", "\uff1f", "|")


class Example(NamedTuple):
    text: str
    good: bool


def features(text: str) -> np.ndarray:
    """[len(FEATURES)] float64, of the first SAMPLE_CHARS characters."""
    sample = text[:SAMPLE_CHARS]
    count = max(1, len(sample))
    kinds = Counter(unicodedata.category(c)[0] for c in sample)
    hashes = word_hashes(sample)
    words = max(1, len(hashes))
    letters = max(1, kinds["L"])
    lines = [line.strip() for line in sample.split("\n") if line.strip()]
    rows = max(1, len(lines))
    sentences = max(1, sum(sample.count(mark) for mark in (".", "!", "?", "\u3002")))
    data = sample.encode("utf-8", "replace")
    _, repeats = np.unique(hashes, return_counts=True)
    return np.array(
        [
            math.log(count),
            letters / words,
            math.log(words / sentences + 1),
            len(repeats) / words**0.85,  # grows less than the text does
            kinds["L"] / count,
            kinds["N"] / count,
            (kinds["P"] + kinds["S"]) / count,
            sum(c.isupper() for c in sample) / letters,
            kinds["Z"] / count,
            sum(not line.endswith(_ENDS) for line in lines) / rows,
            sum(len(line) < 40 for line in lines) / rows,
            repeated(sample),
            len(zlib.compress(data, 6)) / max(1, len(data)),
            (repeats.max() if len(repeats) else 0) / words,
        ]
    )


class QualityModel(NamedTuple):
    """Weights on standardised features, and the sigmoid on top."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    """The last is the constant."""
    sigmoid: tuple[float, float]
    """Factor and offset."""

    def score(self, text: str) -> float:
        """Estimated probability that a text is good."""
        return float(self.scores(features(text)[None])[0])

    def scores(self, features_NF: np.ndarray) -> np.ndarray:
        """[N] in (0, 1)."""
        standard = (features_NF - np.array(self.mean)) / np.array(self.scale)
        logits = standard @ np.array(self.weights[:-1]) + self.weights[-1]
        return _sigmoid(self.sigmoid[0] * logits + self.sigmoid[1])

    def save_as(self) -> dict[str, Any]:
        return {"features": list(FEATURES), **{key: list(value) for key, value in self._asdict().items()}}

    @classmethod
    def load_from(cls, value: dict[str, Any]) -> "QualityModel":
        if value.get("features") != list(FEATURES):
            raise UserError("the quality model was trained on other features; train it anew")
        mean, scale, weights, sigmoid = (tuple(value[key]) for key in cls._fields)
        return cls(mean, scale, weights, (sigmoid[0], sigmoid[1]))


def train(examples: Sequence[Example], seed: int = 0) -> tuple[QualityModel, dict[str, Any]]:
    """(model, report on scores that no model had the example's label for).

    The report: examples, accuracy, area under the ROC curve, Brier score (mean squared error), expected calibration
    error over ten bins of equal width, each bin's mean score and share of good ones, before and after the sigmoid.
    Raises UserError for too few examples or one kind alone.
    """
    labels = np.array([example.good for example in examples], np.float64)
    if len(examples) < LEAST_EXAMPLES or min(labels.sum(), (1 - labels).sum()) < FOLDS:
        raise UserError(
            f"a quality model needs at least {LEAST_EXAMPLES} examples with {FOLDS} of either kind; there are "
            f"{int(labels.sum())} good and {int((1 - labels).sum())} other ones"
        )
    x_NF = np.stack([features(example.text) for example in examples])
    folds = _folds(labels, seed)
    logits = np.zeros(len(examples))
    for fold in range(FOLDS):
        inside = folds != fold
        logits[~inside] = _logits(_fit(x_NF[inside], labels[inside]), x_NF[~inside])
    calibrated = np.zeros(len(examples))
    for fold in range(FOLDS):
        inside = folds != fold
        factor, offset = _platt(logits[inside], labels[inside])
        calibrated[~inside] = _sigmoid(factor * logits[~inside] + offset)
    mean, scale, weights = _fit(x_NF, labels)
    model = QualityModel(tuple(mean.tolist()), tuple(scale.tolist()), tuple(weights.tolist()), _platt(logits, labels))
    report = {
        "examples": len(examples),
        "good": int(labels.sum()),
        "accuracy": float(((calibrated > 0.5) == (labels > 0.5)).mean()),
        "roc_auc": _auc(calibrated, labels),
        "uncalibrated": _calibration(_sigmoid(logits), labels),
        "calibrated": _calibration(calibrated, labels),
        "weights": dict(zip((*FEATURES, "constant"), [round(w, 3) for w in weights.tolist()], strict=True)),
    }
    return model, report


def read_examples(path: Path) -> list[Example]:
    """jsonl (.gz) with `text` and `good`. Raises UserError that names file and line."""
    examples = []
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"the examples of quality {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str) or record.get("good") not in (0, 1):
            raise UserError(f'{path}, line {number} needs "text" and "good": true or false')
        examples.append(Example(record["text"], bool(record["good"])))
    return examples


def tier(score: float, borders: Sequence[float]) -> int:
    """0 below the first border, and so on."""
    return sum(score >= border for border in borders)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -35, 35)))


def _folds(labels_N: np.ndarray, seed: int) -> np.ndarray:
    """Fold of each example; good and other ones are spread evenly."""
    generator = np.random.default_rng(seed)
    folds = np.zeros(len(labels_N), int)
    for kind in (0, 1):
        mine = generator.permutation(np.flatnonzero(labels_N == kind))
        folds[mine] = np.arange(len(mine)) % FOLDS
    return folds


def _fit(x_NF: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, scale, weights with the constant last): penalised likelihood by Newton's method."""
    mean, scale = x_NF.mean(axis=0), np.maximum(x_NF.std(axis=0), 1e-6)
    x = np.concatenate([(x_NF - mean) / scale, np.ones((len(x_NF), 1))], axis=1)
    return mean, scale, _newton(x, labels_N, np.array([_RIDGE] * x_NF.shape[1] + [1e-6]))


def _newton(x_NF: np.ndarray, targets_N: np.ndarray, ridge_F: np.ndarray) -> np.ndarray:
    weights = np.zeros(x_NF.shape[1])
    for _ in range(100):
        p = _sigmoid(x_NF @ weights)
        gradient = x_NF.T @ (p - targets_N) + ridge_F * weights
        hessian = (x_NF * (p * (1 - p))[:, None]).T @ x_NF + np.diag(ridge_F)
        step = np.linalg.solve(hessian, gradient)
        weights -= step * min(1.0, 5.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _logits(fitted: tuple[np.ndarray, np.ndarray, np.ndarray], x_NF: np.ndarray) -> np.ndarray:
    mean, scale, weights = fitted
    return (x_NF - mean) / scale @ weights[:-1] + weights[-1]


def _platt(logits_N: np.ndarray, labels_N: np.ndarray) -> tuple[float, float]:
    """Factor and offset; targets are drawn in from 0 and 1 as in Platt's paper."""
    good = labels_N.sum()
    targets = np.where(labels_N > 0.5, (good + 1) / (good + 2), 1 / (len(labels_N) - good + 2))
    x = np.stack([logits_N, np.ones_like(logits_N)], axis=1)
    factor, offset = _newton(x, targets, np.array([1e-6, 1e-6]))
    return float(factor), float(offset)


def _auc(scores_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Probability that a good one scores above another one; ties count half."""
    good, other = scores_N[labels_N > 0.5], np.sort(scores_N[labels_N < 0.5])
    below = np.searchsorted(other, good, "left") + np.searchsorted(other, good, "right")
    return float(below.mean() / 2 / len(other))


def _calibration(scores_N: np.ndarray, labels_N: np.ndarray) -> dict[str, Any]:
    bins = np.minimum((scores_N * BINS).astype(int), BINS - 1)
    rows, error = [], 0.0
    for number in range(BINS):
        mine = bins == number
        if mine.any():
            score, share = float(scores_N[mine].mean()), float(labels_N[mine].mean())
            error += mine.mean() * abs(score - share)
            rows.append({"count": int(mine.sum()), "score": round(score, 4), "good": round(share, 4)})
    return {"brier": float(((scores_N - labels_N) ** 2).mean()), "calibration_error": float(error), "bins": rows}
