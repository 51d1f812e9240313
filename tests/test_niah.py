"""Needle in a haystack: exact lengths, needles where they should be, answers that can be found."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import UserError
from trinity.base.rng import Draws
from trinity.config import EvalConfig
from trinity.data.halves import Half, half_of
from trinity.evals import needles, niah
from trinity.evals.needles import Haystack


class Letters:
    """A tokenizer of single characters: lengths are easy to count."""

    eos_id = 0

    def encode(self, text):
        return [ord(c) for c in text]

    def encode_batch(self, texts):
        return [np.array(self.encode(text)) for text in texts]

    def decode(self, ids, skip_special=False):
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
        start = len(needles.ONE.intro)
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


TASKS = ("multikey", "single", "multivalue", "multiquery", "tracking")


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_that_reads_the_text_is_right_at_every_task(task):
    config = settings_for(1600, depths=3, samples=2, keys=3).model_copy(update={"niah_tasks": (task,)})
    asked = niah.questions(LETTERS, config)
    assert len(asked) == 6

    def answer(prompts, _):
        found = []
        for prompt in prompts:
            text = LETTERS.decode(prompt)
            body, ask = text.rsplit("\n", 1)
            if task == "tracking":
                (value,) = set(re.findall(r"\d{5}", ask))
                names = re.findall(rf"VAR ([A-Z]+) = {value}", body)
                while more := re.findall(rf"VAR ([A-Z]+) = VAR {names[-1]}", body):
                    names += more
                found.append(" " + ", ".join(names))
            else:
                keys = dict.fromkeys(re.findall(r"[a-z]+-[a-z]+", ask))
                found.append(" " + ", ".join(v for k in keys for v in re.findall(rf"for {k} is: (\d+)", body)))
        return found

    record = niah.evaluate(answer, LETTERS, asked)
    assert record["tasks"] == {task: 1.0}
    assert record["score"] == 1.0
    assert {cell["task"] for cell in record["grid"]} == {task}
    assert niah.evaluate(lambda prompts, _: [" 1234567"] * len(prompts), LETTERS, asked)["score"] == 0.0


def test_part_of_several_answers_counts_in_part():
    config = settings_for(1600, depths=1, samples=1).model_copy(update={"niah_tasks": ("multivalue",)})
    (question,) = niah.questions(LETTERS, config)
    assert len(question.answers) == 4
    assert niah.score(f" {question.answers[1]} and {question.answers[3]}", question) == 0.5
    assert niah.score(f" {question.answers[1]}0", question) == 0.0


def test_one_text_serves_all_depths():
    config = settings_for(3000, depths=4, samples=2, keys=2).model_copy(update={"niah_reuse": True})
    asked = niah.questions(LETTERS, config)
    assert [q.depth for q in asked] == 2 * niah.grid(4)
    for first in (0, 4):
        texts = [text_of(q).rsplit("\nWhat", 1)[0] for q in asked[first : first + 4]]
        assert len(set(texts)) == 1
        places = [texts[0].index(q.answer) / len(texts[0]) for q in asked[first : first + 4]]
        assert places == sorted(places)
    assert all(text_of(q).count(q.answer) == 1 for q in asked)


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
