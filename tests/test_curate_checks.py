"""The recipes that ship, and every reason for which a rewrite is dropped."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate_helpers import prose, rewrite
from trinity.base.errors import UsageError
from trinity.config.curate import CurateConfig, RephraseConfig
from trinity.curate.answers import Answer
from trinity.curate.checks import copied, find_fault, numbers, repeated
from trinity.curate.exact import final_answer, value, wrong_equations
from trinity.curate.finish import Judges, bury, verdict
from trinity.curate.forms import plain, read_form
from trinity.curate.recipes import Recipe, list_recipes, load_recipe
from trinity.curate.requests import Source, cut_passages, requests_of

PASSAGE = prose(7, 120) + " In 1912 the harbour had 4,250 ships."
GOOD = rewrite({"messages": [{"content": "Passage:\n" + PASSAGE}]})
MADE_UP = GOOD.replace("1912", "1913").replace("4,250", "4,251") + " It had 77 and 88 and 99 and 66."
GERMAN = (
    "Die Flüsse fließen langsam durch die alte Stadt und die Leute gehen abends nach Hause. Im Jahr 1912 lagen im "
    f"Hafen 4250 Schiffe, {', '.join(sorted(numbers(PASSAGE)))}, die auf Wind warteten. Niemand wusste genau, wann sie "
    "wieder auslaufen würden, denn der Winter war lang und hart."
)
NAMES = [
    "code",
    "dialogue",
    "encyclopaedia",
    "json",
    "list",
    "mathematics",
    "questions",
    "retrieval",
    "table",
    "textbook",
    "translate",
]


def test_the_recipes_are_there_and_say_what_they_are() -> None:
    assert list_recipes() == NAMES
    recipes = [load_recipe(name) for name in NAMES]
    assert len({recipe.fingerprint for recipe in recipes}) == len(NAMES)
    for recipe in recipes:
        assert recipe.summary.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_holds_the_passage_as_it_stands(name: str) -> None:
    recipe = load_recipe(name)
    style = recipe.styles[0] if recipe.styles else ""
    passage = "Braces {style} {text} {language} are the passage's own."
    system, user = recipe.messages(passage, style, "fr")
    assert user["content"].endswith("Passage:\n" + passage)
    assert "{" not in system["content"] + user["content"].replace(passage, "")
    assert style in system["content"] + user["content"]


def test_a_recipe_of_ones_own_is_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('summary = "Mine."\nform = "prose"\nsystem = "s"\nuser = "u {text}"\n[checks]\nmin_chars = 5\n')
    assert load_recipe(str(path)).checks.min_chars == 5
    for text, words in (
        ('form = "prose"\nsystem = "s"\nuser = "u {text}"\n', "summary"),
        ('summary = "x"\nform = "prose"\nsystem = "s"\nuser = "u"\n', "user must hold {text}"),
        ('summary = "x"\nform = "prose"\nsystem = "{style}"\nuser = "{text}"\n', "{style} and styles belong together"),
        ('summary = "x"\nform = "prose"\nsystem = ""\nuser = "{text}"\n[checks]\nmax_copid = 1\n', "'max_copied'"),
    ):
        other = tmp_path / f"{abs(hash(text))}.toml"
        other.write_text(text)
        with pytest.raises(UsageError) as caught:
            load_recipe(str(other))
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("", "empty"),
        ("I'm sorry, but I can't help with that request about " + GOOD, "refusal"),
        ("Es tut mir leid, das geht nicht. " + GOOD, "refusal"),
        (GOOD + " As an AI, I have no opinion.", "refusal"),
        ("Sure! " + GOOD, "leaked prompt"),
        ("Here is the rewritten article:\n" + GOOD, "leaked prompt"),
        (GOOD + "<|im_end|>", "leaked prompt"),
        (GOOD + " Keep names, dates, numbers and units exactly as they are.", "leaked prompt"),
        ("Brief.", "too short"),
        (GOOD + prose(8, 400), "too long"),
        (GOOD.replace("perhaps", "\ufffd\ufffd"), "broken characters"),
        ((prose(9, 20) + " ") * 6, "repetition"),
        (PASSAGE, "copied"),
        (MADE_UP, "made-up numbers"),
        (" ".join(w for w in GOOD.split() if not any(c.isdigit() for c in w)), "lost numbers"),
        (GERMAN, "another language"),
    ],
)
def test_faults_of_rewrites(text: str, reason: str | None) -> None:
    assert find_fault(text, PASSAGE, load_recipe("encyclopaedia"), "en", None) == reason


def test_a_translation_must_be_in_the_language_asked_for() -> None:
    recipe = load_recipe("translate")
    german = (
        "Der Fluss fließt langsam durch die alte Stadt, und im Hafen liegen im Jahr 1912 genau 4250 Schiffe vor Anker."
    )
    english = "The river flows slowly through the old town, and in the harbour there are 4250 ships at anchor in 1912."
    passage = "In 1912 the harbour of the old town on the slow river had 4,250 ships that lay at anchor."
    assert find_fault(german, passage, recipe, "en", "de") is None
    assert find_fault(english, passage, recipe, "en", "de") == "another language"


def test_copied_and_repeated_are_shares_of_words() -> None:
    words = prose(3, 100).split()
    half = " ".join(words[:50])
    assert copied(" ".join(words), " ".join(words)) == 1.0
    assert copied(half + " " + prose(4, 50), " ".join(words)) == pytest.approx(0.5, abs=0.08)
    assert copied(prose(5, 100), prose(6, 100)) == 0.0
    assert repeated(half) == 0.0
    assert repeated(half + " " + half) == pytest.approx(0.5, abs=0.06)


def test_numbers_are_compared_without_separators_and_numbering() -> None:
    assert numbers("1. There were 1,250.5 and 3 and ١٢٣.") == numbers("- 1.250,5 und 123") == {"12505", "123"}


PAIRS = "Q: What flows?\nA: The river.\n\nQ: When?\nA: In 1912."
TALK = "Anna: Hello.\nBen: Good day.\nAnna: What is it?\nBen: A river.\nAnna: I see."
TABLE = "Facts.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"
SUM = "Problem: A box has 12 pens. How many do 3 boxes have?\nSolution: 3 * 12 = 36 pens.\nAnswer: 36\nCheck: 3 * 12"


@pytest.mark.parametrize(
    ("name", "answer", "reason"),
    [
        ("questions", PAIRS, None),
        ("questions", "Q: One?\nA: Yes.", "too few pairs"),
        ("questions", PAIRS.replace("When?", "What flows?"), "a question twice"),
        ("dialogue", TALK, None),
        ("dialogue", TALK.replace("Ben", "Anna"), "not a conversation"),
        ("dialogue", "A text without turns.", "too few turns"),
        ("table", TABLE, None),
        ("table", TABLE.replace("| 3 | 4 |", "| 3 |"), "rows of unequal length"),
        ("table", "no table", "no table"),
        ("list", "Facts.\n\n- one\n- two\n- three", None),
        ("list", "Facts.\n\n- one\n- one\n- three", "a point twice"),
        ("list", "Facts.\n\n- one", "too few points"),
        ("json", '```json\n{"a": 1, "b": [2], "c": {"d": 3}}\n```', None),
        ("json", '{"a": 1', "not JSON"),
        ("json", "[1, 2, 3]", "no object with enough entries"),
        ("mathematics", SUM, None),
        ("mathematics", SUM.replace("= 36 pens", "= 38 pens"), "a wrong calculation"),
        ("mathematics", SUM.replace("Check: 3 * 12", "Check: 3 + 12"), "the answer fails its check"),
        ("mathematics", SUM.replace("\nCheck: 3 * 12", ""), "the answer fails its check"),
        ("mathematics", SUM.replace("Answer: 36", "Answer: many"), "the answer is no number"),
        ("mathematics", SUM.replace("Solution", "Idea"), "problem, solution or answer missing"),
        ("retrieval", "Question: How many ships had the harbour?\nAnswer: 4,250 ships", None),
        ("retrieval", "Question: How many?\nAnswer: 5 ships", "the answer is not in the passage"),
        ("retrieval", "Question: Had it 4,250 ships?\nAnswer: 4,250 ships", "the question gives the answer"),
        ("retrieval", "4,250 ships", "question or answer missing"),
        ("code", "no program", "not one program and its tests"),
    ],
)
def test_forms(name: str, answer: str, reason: str | None) -> None:
    recipe = load_recipe(name)
    found = read_form(recipe.form, answer, PASSAGE, recipe.checks)
    assert found.reason == reason
    assert bool(found.text) == (reason is None)


def test_a_known_answer_must_be_kept() -> None:
    recipe = load_recipe("mathematics")
    for passage, reason in (("... so #### 36", None), (r"thus \boxed{36}", None), ("#### 35", "not the known answer")):
        assert read_form("mathematics", SUM, passage, recipe.checks).reason == reason
    assert final_answer("#### 1,250.5") == Fraction(2501, 2)


def test_programs_must_be_tested_by_asserts_on_themselves() -> None:
    checks = load_recipe("code").checks
    program = "```python\ndef f(x):\n    return x\n```\n\n```python\n{}\n```\n"
    good = "\n".join(f"assert f({i}) == {i}" for i in range(3))
    assert read_form("code", program.format(good), PASSAGE, checks).reason is None
    idle = "assert True\nassert 1 == 1\nassert f"
    assert read_form("code", program.format(idle), PASSAGE, checks).reason == "too few tests of the program"
    assert read_form("code", program.format("assert f("), PASSAGE, checks).reason == "no valid program"


def test_thoughts_and_fences_around_an_answer_are_taken_off() -> None:
    assert plain("<think>\nhm\n</think>\n\nThe sea.") == "The sea."
    assert plain("```json\n{}\n```") == "{}"


SUMS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.builds("({}{}{})".format, inner, st.sampled_from("+-*/"), inner),
    max_leaves=6,
)


@given(SUMS)
def test_expressions_have_the_value_that_python_gives(expression: str) -> None:
    import re

    exact = re.sub(r"\d+", lambda match: f"Fraction({match.group()})", expression)
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        expected = None
    assert value(expression) == expected


@pytest.mark.parametrize(
    "text", ["__import__('os')", "9**9**9", "2^4000", "x + 1", "1 +", "(" * 500, "1 if 1 else 2", ""]
)
def test_what_is_no_bounded_arithmetic_has_no_value(text: str) -> None:
    assert value(text) is None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("3 * 4 = 12 and 12 / 5 = 2.4", []),
        ("10 / 3 = 3.33", []),
        ("10 / 3 = 3.34", ["10 / 3 = 3.34"]),
        ("2 + 3 = 5 * 2 = 10", ["2 + 3 = 5 * 2"]),
        ("x + 3 * 4 = 20", []),
        ("y = 3 + 4 = 7", []),
        ("20% * 50 = 10", []),
        ("1,000 + 500 = 1,500.", []),
        ("in 1912 = 1912", []),
    ],
)
def test_wrong_equations_are_found_and_right_ones_left(text: str, wrong: list[str]) -> None:
    assert list(wrong_equations(text)) == wrong


def source(number: int, text: str) -> Source:
    return Source(text, "web", "s", str(number), "en", number.to_bytes(16, "big"), 1)


def test_a_long_document_buries_the_passage_and_ends_with_the_answer() -> None:
    config = CurateConfig.model_validate(
        {"input": {"paths": ["x"]}, "rephrase": [{"recipe": "retrieval"}], "generate": {"model": "m"}}
    )
    sources = [source(i, prose(50 + i, 60)) for i in range(5)]
    sources[2] = replace(sources[2], text=PASSAGE)
    request = next(r for r in requests_of(sources, config) if r.source.id == "2")
    asked = "Question: How many ships were in the harbour in that year?\nAnswer: 4,250 ships"
    text, reason = verdict(
        request, Answer(request.key, asked, finish="stop"), sources, config, Judges(None, None, None)
    )
    assert reason is None
    assert text.endswith(asked)
    assert all(s.text in text for s in sources)
    sources[4] = replace(sources[4], text=sources[4].text + " 4,250 ships")
    assert bury(asked, request, sources) is None
    cut = verdict(request, Answer(request.key, asked, finish="length"), sources, config, Judges(None, None, None))
    assert cut == ("", "cut off at max_tokens")


@given(st.text(st.sampled_from("ab. \n"), max_size=300), st.integers(5, 60), st.integers(1, 8))
def test_passages_are_the_document_in_order_and_not_too_long(text: str, size: int, most: int) -> None:
    found = cut_passages(text, size, most)
    assert len(found) <= most
    assert all(len(passage) <= size + size // 4 for _, passage in found)
    assert [number for number, _ in found] == sorted({number for number, _ in found})
    everything = cut_passages(text, size, 10**6)
    joined = "".join("".join(passage.split()) for _, passage in everything)
    assert joined == "".join(text.split())


def test_requests_are_the_same_in_every_call_and_differ_in_key_and_style() -> None:
    config = CurateConfig.model_validate(
        {
            "input": {"paths": ["x"]},
            "rephrase": [{"recipe": "encyclopaedia", "share": 0.5}, {"recipe": "dialogue", "domains": ["books"]}],
            "generate": {"model": "m"},
        }
    )
    sources = [source(i, prose(i, 40)) for i in range(200)]
    found = list(requests_of(sources, config))
    assert found == list(requests_of(sources, config))
    assert len({request.key for request in found}) == len(found)
    assert {request.rewrite for request in found} == {0}
    assert 60 < len(found) < 140
    assert {request.style for request in found} == set(load_recipe("encyclopaedia").styles)
    assert json.loads(json.dumps(found[0].body(config)))["seed"] == found[0].seed
    assert RephraseConfig(recipe="list").max_passages == 4
    assert isinstance(load_recipe("list"), Recipe)
