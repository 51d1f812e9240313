"""The quality model: learns what it can, says how sure it is, and survives a file."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from curate_helpers import prose
from trinity.base.errors import UserError
from trinity.curate.quality import Example, QualityModel, features, read_examples, tier, train


def examples(count: int, noise: float = 0.0) -> list[Example]:
    """Prose is good, lists of shouted words are not; a share of the labels is turned round."""
    draw = Random(0)
    found = []
    for number in range(count):
        good = number % 2 == 0
        text = prose(number, 80)
        if not good:
            text = "\n".join(word.upper() + " |" for word in text.split()[:60])
        found.append(Example(text, good != (draw.random() < noise)))
    return found


def test_it_tells_apart_what_can_be_told_apart() -> None:
    model, report = train(examples(120))
    assert report["accuracy"] > 0.97
    assert report["roc_auc"] > 0.99
    assert model.score(prose(1000, 80)) > 0.9
    assert model.score("BUY |\nNOW |\nCHEAP |\n" * 20) < 0.2


def test_scores_are_calibrated_where_labels_are_uncertain() -> None:
    _, report = train(examples(600, noise=0.25))
    assert report["accuracy"] == pytest.approx(0.75, abs=0.05)
    calibrated = report["calibrated"]
    assert calibrated["calibration_error"] < 0.06
    assert calibrated["brier"] == pytest.approx(0.25 * 0.75, abs=0.03)
    assert sum(row["count"] for row in calibrated["bins"]) == 600


def test_labels_at_random_give_no_certainty() -> None:
    _, report = train(examples(300, noise=0.5))
    assert 0.4 < report["roc_auc"] < 0.6
    assert report["calibrated"]["brier"] == pytest.approx(0.25, abs=0.02)


def test_a_saved_model_gives_the_same_scores() -> None:
    model, _ = train(examples(60))
    again = QualityModel.load_from(json.loads(json.dumps(model.save_as())))
    for number in range(5):
        assert again.score(prose(number)) == model.score(prose(number))
    with pytest.raises(UserError, match="other features"):
        QualityModel.load_from({**model.save_as(), "features": ["x"]})


def test_features_are_finite_for_every_text() -> None:
    for text in ("", " ", "\n\n", "...", "\ufffd", "海" * 50, "a" * 50_000):
        assert np.isfinite(features(text)).all()


def test_bad_examples_are_refused_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text('{"text": "a", "good": true}\n{"text": "b", "good": "yes"}\n')
    with pytest.raises(UserError, match='line 2 needs "text" and "good"'):
        read_examples(path)
    path.write_text("{\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_examples(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_examples(tmp_path / "none")
    with pytest.raises(UserError, match="at least 40 examples"):
        train(examples(10))


def test_tiers_are_cut_at_the_borders() -> None:
    assert [tier(score, (0.33, 0.67)) for score in (0.0, 0.33, 0.5, 0.67, 1.0)] == [0, 1, 1, 2, 2]
