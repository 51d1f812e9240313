"""Training documents about retrieval: exact lengths, answers that stand in the text, and nothing of the evaluation."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_fixtures import write_inputs
from trinity.base.errors import UserError
from trinity.base.rng import Draws
from trinity.cli.main import main
from trinity.config import EvalConfig, RetrievalConfig
from trinity.config.retrieval import Retrieval
from trinity.data import retrieval_texts
from trinity.data.halves import Half, half_of
from trinity.data.retrieval import LEAST_TOKENS, TASK_NAMES, Hay, RetrievalDocuments
from trinity.data.retrieval_texts import TASKS, Scene, Vocabulary
from trinity.data.rows import IGNORE
from trinity.data.shards import Shards
from trinity.evals import needles, niah
from trinity.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    write_inputs(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    return folder, tokenizer, Hay(Shards.open(folder / "shards" / "train"), tokenizer, least=64)


def documents(parts, seed=0, **changed):
    return RetrievalDocuments(parts[1], parts[2], RetrievalConfig(**changed), seed)


def answers_of(tokenizer, document):
    """(text up to where an answer begins, the answer) of each answer of a document."""
    learned = document.targets_T != IGNORE
    starts = np.flatnonzero(learned & ~np.append([False], learned[:-1]))
    found = []
    for start in starts:
        stop = start + int(np.argmin(np.append(learned[start:], [False])))
        text = tokenizer.decode(document.tokens_T[: start + 1])
        found.append((text, tokenizer.decode(document.tokens_T[start + 1 : stop + 1])))
    return found


@settings(max_examples=25, deadline=None)
@given(number=st.integers(0, 10**6), length=st.integers(LEAST_TOKENS, 1500), seed=st.integers(0, 3))
def test_a_document_is_made_by_its_number_alone_and_has_its_length(parts, number, length, seed):
    made = documents(parts, seed).document(number, length)
    assert len(made.tokens_T) == len(made.targets_T) == length
    assert made.tokens_T[-1] == parts[1].eos_id
    again = documents(parts, seed).document(number, length)
    assert np.array_equal(made.tokens_T, again.tokens_T)
    assert np.array_equal(made.targets_T, again.targets_T)
    assert not np.array_equal(made.tokens_T, documents(parts, seed).document(number + 1, length).tokens_T)
    learned = np.flatnonzero(made.targets_T != IGNORE)
    assert np.array_equal(made.targets_T[learned], made.tokens_T[learned + 1])


@pytest.mark.parametrize("task", ["lookup", "values", "queries", "where", "quote"])
def test_what_is_asked_for_was_said_before(parts, task):
    made = documents(parts, tasks={task: 1.0})
    count = 0
    for number in range(12):
        for before, answer in answers_of(parts[1], made.document(number, 700)):
            for part in answer.split(", "):
                assert part.strip().rstrip(".;\n ") in before
                count += 1
    assert count > 20


def test_a_chain_is_answered_by_what_it_holds():
    for number in range(60):
        group = TASKS["tracking"](Scene(Draws(number), Vocabulary()))
        value = group.statements[0].split()[-1].rstrip(".")
        names = [re.search(r"From now on (\w+) holds", statement).group(1) for statement in group.statements]  # pyright: ignore
        (question, answer) = group.questions[0]
        assert answer == (
            f" {', '.join(names)}." if question.startswith("Which") else f" {' '.join(group.statements[0].split()[5:])}"
        )
        assert value in group.statements[0]


def test_bells_are_counted():
    for number in range(20):
        group = TASKS["count"](Scene(Draws(number), Vocabulary()))
        assert group.questions[0][1] == f" {len(group.statements)}."


def test_the_share_of_answers_rises_with_density(parts):
    shares = []
    for density in (0.05, 0.3, 0.8):
        made = documents(parts, density=(density, density))
        shares.append(np.mean([(made.document(n, 1200).targets_T != IGNORE).mean() for n in range(10)]))
    assert 0 < 2 * shares[0] < shares[1] < shares[2]


def test_nothing_is_shared_with_the_evaluation(parts):
    tokenizer, hay = parts[1], parts[2]
    tasks = ("multikey", "single", "multivalue", "multiquery", "tracking")
    config = EvalConfig(niah_lengths=(1200,), niah_tasks=tasks, niah_samples=6)
    asked = niah.questions(tokenizer, config)
    trained = [tokenizer.decode(documents(parts).document(n, 1200).tokens_T) for n in range(60)]
    texts = [tokenizer.decode(q.tokens) for q in asked]

    # Values: no answer of the evaluation occurs, and no number of its length is a value.
    values = {answer for q in asked for answer in q.answers}
    together = "\n".join(trained)
    assert values
    assert not [value for value in values if re.search(rf"\b{value}\b", together)]
    assert 7 not in retrieval_texts.DIGITS

    # Keys: every word of the evaluation's is of its half; every word of training's of the other; no common form.
    keys = {key for text in texts for key in re.findall(r"special magic numbers? for ([a-z]+-[a-z]+)", text)}
    assert keys
    assert all(half_of(word) is Half.EVALUATION for key in keys for word in key.split("-"))
    vocabulary, draws = Vocabulary(hay.words), Draws(1)
    drawn = [vocabulary.key(draws, form) for form in range(retrieval_texts.KEY_FORMS) for _ in range(200)]
    words = {word.lower() for key in drawn for word in re.findall(r"[A-Za-z]+", key)} - {"the"}
    assert all(half_of(word) is Half.TRAINING for word in words)
    assert not [key for key in drawn if re.fullmatch(r"[a-z]+-[a-z]+", key)]
    assert all(half_of(vocabulary.number(draws, 5)) is Half.TRAINING for _ in range(50))

    # Wordings: no five words in a row.
    def grams(parts_):
        return {
            tuple(ws[i : i + 5]) for text in parts_ for ws in [re.findall(r"\w+", text)] for i in range(len(ws) - 4)
        }

    wordings = [text for w in (needles.ONE, needles.SEVERAL, needles.TRACKING) for text in (w.intro, w.needle, w.ask)]
    made = [*retrieval_texts.STATEMENTS, *retrieval_texts.ASKS, *retrieval_texts.INTROS]
    for task in TASKS.values():
        group = task(Scene(Draws(3), vocabulary))
        made += [*group.statements, *(question for question, _ in group.questions)]
    assert grams(wordings)
    assert not grams(wordings) & grams(made)


def test_haystacks_of_training_and_evaluation_are_different_documents(parts):
    train, val = (Shards.open(parts[0] / "shards" / name) for name in ("train", "val"))
    texts = [[parts[1].decode(store.tokens(doc)) for doc in range(store.num_documents)] for store in (train, val)]
    assert not set(texts[0]) & set(texts[1])
    run = parts[1].decode(parts[2].run(Draws(5), 60)).strip()
    assert any(run in text for text in texts[0])
    assert not any(run in text for text in texts[1])


def test_the_fingerprint_follows_what_makes_the_documents(parts):
    first = documents(parts).fingerprint
    assert first == documents(parts).fingerprint
    assert len({first, documents(parts, 1).fingerprint, documents(parts, tasks={"quote": 1.0}).fingerprint}) == 3


def test_settings_name_every_task():
    assert set(RetrievalConfig().tasks) == set(TASK_NAMES) == set(Retrieval.__args__)
    with pytest.raises(ValueError, match="density"):
        RetrievalConfig(density=(0.5, 0.1))
    with pytest.raises(ValueError, match="tasks"):
        RetrievalConfig.model_validate({"tasks": {"look-up": 1.0}})


def test_a_store_without_text_is_refused(parts):
    class Empty:
        lengths = np.zeros(0, np.int64)
        fingerprint = ""

    with pytest.raises(UserError, match="haystack"):
        Hay(Empty(), parts[1])  # pyright: ignore[reportArgumentType]


def test_the_command_line_writes_documents_that_prepare_reads(parts, tmp_path, capsys):
    folder, tokenizer = parts[0], parts[1]
    out = tmp_path / "retrieval.jsonl"
    command = ["data", "retrieval", "--tokenizer", str(folder / "tokenizer"), "--shards", str(folder / "shards")]
    more = ["--tokens", "300", "--documents", "5", "--set", "retrieval.density=[0.3, 0.5]"]
    assert main([*command, "--out", str(out), *more]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2", "3", "4"]
    assert all(len(tokenizer.encode(line["text"])) > 250 and line["answers"] for line in lines)
    assert all(answer in line["text"] for line in lines for answer in line["answers"])
    assert main([*command, "--out", str(out), *more]) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "no"), "--tokens", "9"]) == 2
    prepared = ["data", "prepare", f"{out}=retrieval", "--tokenizer", str(folder / "tokenizer"), "--workers", "1"]
    assert main([*prepared, "--no-quality", "--val-fraction", "0", "--out", str(tmp_path / "shards")]) == 0
    assert Shards.open(tmp_path / "shards" / "train").num_documents == 5


def test_files_of_a_folder_become_one_document(tmp_path):
    for name, text in (
        ("one/b.py", "b = 2"),
        ("one/a.py", "a = 1"),
        ("two/c.py", "c = 3"),
        ("two/d.py", "d = 4 " * 50),
    ):
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    out = tmp_path / "joined.jsonl"
    assert main(["data", "join", str(tmp_path / "code"), "--out", str(out), "--tokens", "40"]) == 0
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert texts[0] == "=== one/a.py ===\na = 1\n\n=== one/b.py ===\nb = 2"
    assert len(texts) == 3
    assert texts[2].startswith("=== two/d.py ===")
