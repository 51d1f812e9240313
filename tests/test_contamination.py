"""Overlap of training and test texts by n-grams, against sets of tuples of words."""

import gzip
import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.base.errors import UserError
from trinity.cli import main
from trinity.data.overlap import Overlap, question_text, words
from trinity.evals.contamination import find_overlap

LONG = "the old boat came into the harbour on a calm winter morning with a torn sail and no crew at all"


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def test_a_copied_question_is_found_whatever_its_layout() -> None:
    overlap = Overlap()
    overlap.add("bench", "1", LONG)
    overlap.add("bench", "2", LONG.replace("boat", "ship").replace("torn", "red").replace("winter", "spring"))
    overlap.read("corpus, line 7", "So it was. " + LONG.upper().replace(" ", ",\n ") + "! And then?")
    found = overlap.report()["bench"]
    assert (found["questions"], found["touched"], found["covered_by_half"]) == (2, 1, 1)
    assert found["examples"] == [{"id": "1", "coverage": 1.0, "where": "corpus, line 7"}]
    assert found["share"] == 0.5


def test_thirteen_words_touch_and_twelve_do_not() -> None:
    for count, touched in ((13, 1), (12, 0)):
        overlap = Overlap()
        overlap.add("bench", "1", LONG)
        overlap.read("corpus", "xyz " + " ".join(words(LONG)[3 : 3 + count]) + " xyz")
        assert overlap.report()["bench"]["touched"] == touched


def test_short_questions_are_looked_for_whole_and_very_short_ones_counted() -> None:
    overlap = Overlap()
    overlap.add("bench", "whole", "who was the first man on the moon")
    overlap.add("bench", "other", "who was the last man on the moon")
    overlap.add("bench", "short", "who was it")
    overlap.read("corpus", "they asked: who was the first man on the moon?")
    found = overlap.report()["bench"]
    assert (found["questions"], found["too_short"], found["touched"]) == (2, 1, 1)
    assert found["examples"][0]["id"] == "whole"


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=4, max_size=12), min_size=1, max_size=4),
    st.lists(st.lists(st.sampled_from("abcde"), max_size=40), max_size=4),
)
def test_coverage_is_that_of_sets_of_words(questions: list[list[str]], texts: list[list[str]]) -> None:
    n = 4
    overlap = Overlap(n)
    for number, question in enumerate(questions):
        overlap.add("t", str(number), " ".join(question))
    for text in texts:
        overlap.read("x", " ".join(text))
    there = set().union(*(grams(" ".join(text), n) for text in texts)) if texts else set()
    expected = {}
    for number, question in enumerate(questions):
        own = grams(" ".join(question), n)
        if own & there:
            expected[str(number)] = len(own & there) / len(own)
    found = overlap.report(most_examples=100)["t"]
    assert {e["id"]: e["coverage"] for e in found["examples"]} == pytest.approx(expected)
    assert found["touched"] == len(expected)


def test_texts_across_the_border_of_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trinity.data.overlap._MOST_WORDS", 5)
    overlap = Overlap()
    overlap.add("bench", "1", LONG)
    overlap.read("corpus", "some words before " + LONG)
    assert overlap.report()["bench"]["examples"][0]["coverage"] == 1.0


def test_files_of_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draws = Random(0)
    lines = [" ".join(draws.choices(words(LONG), k=30)) for _ in range(6)]
    records = [{"id": f"q{i}", "question": line, "answer": "x"} for i, line in enumerate(lines)]
    test = tmp_path / "bench.jsonl.gz"
    test.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in records).encode()))
    chats = {"messages": [{"role": "user", "content": lines[0]}, {"role": "assistant", "content": "No."}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chats) + "\n")
    (tmp_path / "worked.jsonl").write_text(json.dumps({"question": "x", "solution": lines[1]}) + "\n")
    (tmp_path / "prose.txt").write_text(f"A book. {lines[2]}\n")
    inputs = [str(tmp_path / name) for name in ("chats.jsonl", "worked.jsonl", "prose.txt")]
    found = find_overlap(inputs, [test])["bench"]
    assert (found["questions"], found["touched"]) == (6, 3)
    assert {e["id"]: e["where"] for e in found["examples"]} == {
        "q0": "chats.jsonl, line 1",
        "q1": "worked.jsonl, line 1",
        "q2": found["examples"][2]["where"],
    }
    assert main(["data", "overlap", *inputs, "--test", str(test), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bench"]["touched"] == 3
    assert main(["data", "overlap", *inputs, "--test", str(test)]) == 0
    assert "50.00 %" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be read"):
        find_overlap(inputs, [tmp_path / "absent.jsonl"])


def test_the_text_that_must_not_be_trained_on() -> None:
    assert question_text({"question": "a", "answer": "b"}) == "a"
    assert question_text({"sentence": "a _ b"}) == "a _ b"
    assert question_text({"prompt": "write f"}) == "write f"
    assert question_text({"other": 1}) == ""
