"""Needle in a haystack: exact lengths, needles where they should be, and nothing shared with training documents."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import UserError
from trinity.base.rng import Draws
from trinity.config import EvalConfig
from trinity.evals import needles, niah
from trinity.evals.needles import Half, Haystack, half_of


class Letters:
    """A tokenizer of single characters: lengths are easy to count."""

    eos_id = 0

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


LETTERS: niah.Tokenizer = Letters()  # pyright: ignore[reportAssignmentType]


def settings_for(*lengths, keys=3, depths=3, samples=2):
    return EvalConfig(niah_lengths=lengths, niah_depths=depths, niah_keys=keys, niah_samples=samples)


def text_of(question):
    return LETTERS.decode(question.tokens)


def test_the_prompt_ends_where_the_answer_is_due_and_holds_it_once():
    for question in niah.questions(LETTERS, settings_for(1500)):
        text = text_of(question)
        assert text.endswith("mentioned in the provided text is:")
        key = re.search(r"special magic number for ([a-z]+-[a-z]+) mentioned", text).group(1)  # pyright: ignore
        assert f"One of the special magic numbers for {key} is: {question.answer}." in text
        assert text.count(question.answer) == 1
        assert len(re.findall(r"One of the special magic numbers for", text)) == 3


@settings(max_examples=20, deadline=None)
@given(length=st.integers(700, 3000), keys=st.integers(1, 4), seed=st.integers(0, 99))
def test_prompt_and_answer_fill_the_length_up_to_a_sentence(length, keys, seed):
    longest = 120  # characters of a noise sentence, at most
    for question in niah.questions(LETTERS, settings_for(length, keys=keys), seed):
        total = len(question.tokens) + len(" " + question.answer)
        assert length - longest < total <= length


def test_the_needle_stands_at_its_depth():
    for question in niah.questions(LETTERS, settings_for(4000, depths=5, samples=4)):
        text = text_of(question)
        start = len(needles.EVALUATION_WORDINGS[0].intro)
        end = text.index("\nWhat is")
        # The other needles take room too, so the depth is met to within their length and a sentence.
        at = (text.index(question.answer) - start) / (end - start)
        assert abs(at - question.depth) < 0.12


def test_the_same_seed_asks_the_same_questions_whatever_else_is_asked():
    alone = niah.questions(LETTERS, settings_for(1000), seed=3)
    among = niah.questions(LETTERS, settings_for(800, 1000, 1200), seed=3)
    assert [q for q in among if q.length == 1000] == alone
    assert niah.questions(LETTERS, settings_for(1000), seed=4) != alone


def test_a_length_without_room_is_refused():
    with pytest.raises(UserError, match="niah_lengths"):
        niah.questions(LETTERS, settings_for(200))


def test_training_documents_share_no_key_value_wording_or_haystack_with_the_evaluation():
    pairs = re.compile(r"[a-z]+-[a-z]+")
    numbers = re.compile(r"\d{7}")
    asked = "\n".join(text_of(q) for q in niah.questions(LETTERS, settings_for(1500, samples=20)))
    trained = "\n".join(
        LETTERS.decode(niah.retrieval_document(LETTERS, 1500, 3, seed=0, index=i).tolist()) for i in range(60)
    )
    for found in (pairs, numbers):
        assert found.findall(asked)
        assert not set(found.findall(asked)) & set(found.findall(trained))
    sentences = [set(needles.split_sentences(text)) for text in (asked, trained)]
    assert not sentences[0] & sentences[1]
    assert not set(needles.EVALUATION_WORDINGS) & set(needles.TRAINING_WORDINGS)


@settings(max_examples=30, deadline=None)
@given(index=st.integers(0, 10**6), keys=st.integers(1, 4), length=st.integers(900, 2000))
def test_a_training_document_is_made_by_its_index_alone_and_fits(index, keys, length):
    document = niah.retrieval_document(LETTERS, length, keys, seed=1, index=index)
    assert len(document) <= length
    assert document[-1] == LETTERS.eos_id
    assert np.array_equal(document, niah.retrieval_document(LETTERS, length, keys, seed=1, index=index))
    assert not np.array_equal(document, niah.retrieval_document(LETTERS, length, keys, seed=1, index=index + 1))
    text = LETTERS.decode(document.tolist())
    for value in set(re.findall(r"\d{7}", text)):
        assert text.count(value) == 2  # stated once, asked for once
        assert half_of(value) is Half.TRAINING


def test_haystacks_take_documents_of_their_own_half_only():
    documents = [f"Document {i} says this. And {i} more." for i in range(40)]
    for half in Half:
        own = {s for d in documents if half_of(d) is half for s in needles.split_sentences(d)}
        stream = Haystack(half, documents).sentences(Draws(0))
        assert {next(stream) for _ in range(400)} <= own
    lonely = [d for d in documents if half_of(d) is Half.TRAINING]
    with pytest.raises(UserError, match="evaluation half"):
        Haystack(Half.EVALUATION, lonely)


@pytest.mark.parametrize(
    ("completion", "ok"),
    [(" 1234567.", True), ("1234567", True), (" 12345678", False), (" 7654321 1234567", False), ("", False)],
)
def test_scoring_is_exact(completion, ok):
    assert niah.is_correct(completion, "1234567") is ok


def test_the_record_averages_cells():
    asked = niah.questions(LETTERS, settings_for(1000, 1500, depths=2, samples=2))
    record = niah.evaluate(lambda prompts, _: [q.answer if q.length == 1000 else "no" for q in asked], LETTERS, asked)
    assert record["score"] == 0.5
    assert record["samples"] == 8
    assert len(record["grid"]) == 4
    assert niah.score_at(record, 1000) == 1.0
    assert niah.score_at(record, 1500) == 0.0
