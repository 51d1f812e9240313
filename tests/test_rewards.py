"""Rewards pay for what is right and for nothing else."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_helpers import small_sandbox
from trinity.base.errors import UserError
from trinity.rl.rewards import Attempt, Rubric, symbolic
from trinity.rl.rewards.attempt import without_thoughts
from trinity.rl.rewards.form import (
    boxed,
    code_block,
    final_number,
    has_box,
    is_json,
    last_number,
    length_within,
    thinks_first,
)
from trinity.rl.rewards.unit_tests import Call, CallsRight, TestsPass, program_of, same
from trinity.rl.sandbox.pool import Sandbox
from trinity.rl.sandbox.worker import MissingLayerError


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with small_sandbox() as made:
        yield made


def test_a_rubric_weighs_its_parts() -> None:
    rubric = Rubric({"right": final_number, "form": has_box}, {"right": 3.0})
    good = rubric.score(Attempt.of_text("It is \\boxed{7}.", "7"))
    assert (good.total, good.parts) == (1.0, {"right": 1.0, "form": 1.0})
    assert rubric.score(Attempt.of_text("It is 7", "7")).total == 0.75
    assert rubric.score(Attempt.of_text("\\boxed{8}", "7")).total == 0.25
    cut = rubric.score(Attempt.of_text("It is \\boxed{7}", "7", finished=False))
    assert (cut.total, cut.parts["right"]) == (0.0, 1.0)


def test_rewards_outside_their_range_are_bugs() -> None:
    with pytest.raises(AssertionError, match="gave 2"):
        Rubric({"x": lambda attempt: 2.0}).score(Attempt.of_text(""))


def test_an_attempt_s_text_is_what_was_said_last() -> None:
    completion = [
        {"role": "assistant", "content": "first", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nlast"},
    ]
    assert Attempt([], completion).text == "last"
    assert Attempt([], completion[:2]).text == "first"
    assert Attempt([], []).text == ""
    assert without_thoughts("<think> never ended 42") == ""
    assert without_thoughts("<think>a</think><think>b</think> c") == "c"


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{unclosed", None),
        ("none", None),
    ],
)
def test_boxes(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("The result is 1,234.", "1234", 1.0),
        ("$5.50 each, so 11 dollars", "11.0", 1.0),
        ("minus \N{MINUS SIGN}3", "-3", 1.0),
        ("It is 7, not 8", "7", 0.0),
        (r"\boxed{7} and not 8", "7", 1.0),
        (r"\boxed{7 8}", "7", 0.0),
        ("no number", "7", 0.0),
        ("7", "seven", 0.0),
        ("<think>7</think>", "7", 0.0),
    ],
)
def test_final_numbers(text: str, answer: str, reward: float) -> None:
    assert final_number(Attempt.of_text(text, answer)) == reward


@given(st.integers(-(10**12), 10**12), st.text(st.characters(exclude_categories=["N", "C"]), max_size=30))
def test_the_last_number_is_found_behind_any_words(number: int, words: str) -> None:
    assert last_number(f"{words} {number}") == str(number)
    assert last_number(f"{words} {number:,}.") == str(number)
    assert boxed(f"{words.replace('{', '')} \\boxed{{{number}}}") == str(number)


def test_form() -> None:
    assert thinks_first(Attempt.of_text("<think>\na\n</think>\n\nb")) == 1.0
    for text in (
        "b",
        "<think></think>b",
        "<think>a</think>",
        "b <think>a</think>",
        "<think>a</think><think>a</think>b",
    ):
        assert thinks_first(Attempt.of_text(text)) == 0.0
    assert [is_json(Attempt.of_text(t)) for t in ('{"a": [1]}', "```json\n[1]\n```", "{'a': 1}", "NaN", "")] == [
        1,
        1,
        0,
        0,
        0,
    ]
    reward = length_within(10)
    assert [reward(Attempt.of_text("w " * n)) for n in (1, 10, 15, 20, 99)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert code_block("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```\n") == "y = 2\n"
    assert code_block("```js\nx\n```") is None
    assert code_block("```python\nnever closed") is None


# Programs


def test_programs_in_answers() -> None:
    assert program_of("Here:\n```python\ndef f(): pass\n```\n") == "def f(): pass\n"
    assert program_of("def f():\n    return 1\n") == "def f():\n    return 1\n"
    for text in ("I cannot.", "", "def f(:", "x" + "(" * 5000, "a\0b"):
        assert program_of(text) is None


def test_tests_inside(sandbox: Sandbox) -> None:
    reward = TestsPass(sandbox)

    def of(code: str) -> float:
        return reward(Attempt.of_text(f"```python\n{code}\n```", tests="assert f(2) == 4\nassert f(0) == 0"))

    assert of("def f(x):\n    return 2 * x") == 1.0
    assert of("def f(x):\n    return x * x + x - 2") == 0.0
    assert of("import os\nos._exit(0)") == 0.0
    assert of("def f(x):\n    while True:\n        raise SystemExit(0)") == 0.0
    assert reward(Attempt.of_text("I cannot.", tests="")) == 0.0


class_trick = """
class Any:
    def __eq__(self, other): return True
    def __repr__(self): return "<any>"
def f(x): return Any()
"""


def test_results_compared_outside(sandbox: Sandbox) -> None:
    calls = [("f(2)", "4"), ("f(5)", "10")]
    whole, share = CallsRight(sandbox), CallsRight(sandbox, all_or_nothing=False)

    def of(code: str, reward: CallsRight) -> float:
        return reward(Attempt.of_text(f"```python\n{code}\n```", calls=calls))

    assert of("def f(x):\n    print('noise')\n    return 2 * x", whole) == 1.0
    half = "def f(x):\n    return 4 if x == 2 else None"
    assert (of(half, whole), of(half, share)) == (0.0, 0.5)
    assert of("def f(x):\n    return 4 if x == 2 else 1 / 0", share) == 0.5
    # What would fool tests inside: an object equal to everything, and replacing what judges.
    assert TestsPass(sandbox)(Attempt.of_text(f"```python\n{class_trick}\n```", tests="assert f(2) == 4")) == 1.0
    assert of(class_trick, share) == 0.0
    assert of('import os\nprint(\'["4", "10"]\')\nos._exit(0)', share) == 0.0
    assert of("import json\njson.dumps = lambda *a, **k: 'x'\ndef f(x): return 0", share) == 0.0
    assert of("def f(x):\n    return 2.0 * x", share) == 0.0  # another type


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner), st.tuples(inner, inner)),
        max_leaves=5,
    )
)
def test_literals_equal_themselves_and_nothing_wrapped(value: Any) -> None:
    assert same(repr(value), repr(value))
    assert not same(repr(value), repr([value]))
    assert not same(repr(value), None)
    assert not same(repr(value), "<object>")


def test_literals_of_other_types_differ() -> None:
    assert not same("1", "True")
    assert not same("1", "1.0")
    assert same("0.3", repr(0.1 + 0.2))
    assert not same("0.3", "0.30001")
    assert not same("[1]", "(1,)")
    assert not same("1", "__import__('os')")


def test_calls_that_are_many(sandbox: Sandbox) -> None:
    calls = [Call(f"f({n})", str(n * n)) for n in range(300)]
    assert CallsRight(sandbox).right("def f(x): return x * x", calls) == [True] * 300


# Mathematics


@pytest.fixture(scope="module")
def mathematics() -> Iterator[symbolic.SymbolicMath]:
    if importlib.util.find_spec("math_verify") is None:
        pytest.skip("math-verify is not installed (extra `rl`)")
    try:
        made = symbolic.math_sandbox(workers=1)
    except MissingLayerError as error:
        pytest.skip(f"the kernel forbids a sandbox: {error}")
    with made:
        yield symbolic.SymbolicMath(made)


@pytest.mark.parametrize(
    ("wanted", "text", "equal"),
    [
        ("\\frac{1}{2}", "So we get $\\boxed{0.5}$.", True),
        ("x^2 + 2x + 1", "The answer is $(x+1)^2$", True),
        ("\\sqrt{8}", "$2\\sqrt{2}$", True),
        ("\\{1, 2\\}", "$\\{2, 1\\}$", True),
        ("3", "$\\boxed{3}$", True),
        ("3", "It is 4", False),
        ("x + 1", "$x + 2$", False),
        ("2", "", False),
        ("2", "$\\frac{$", False),
    ],
)
def test_symbolic_equality(mathematics: symbolic.SymbolicMath, wanted: str, text: str, equal: bool) -> None:
    assert mathematics.equal(wanted, text) is equal
    assert mathematics(Attempt.of_text(text, wanted)) == float(equal)


def test_expressions_without_an_end(mathematics: symbolic.SymbolicMath) -> None:
    """What would keep a computer algebra system busy for years, or run as Python, is only wrong."""
    hurried = symbolic.SymbolicMath(mathematics.sandbox, seconds=1.0)
    assert not hurried.equal("1", "$9^{9^{9^{9^{9}}}}$")
    assert not mathematics.equal("1", "__import__('os').system('id')")


def test_mathematics_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package math_verify: pip install 'trinity-moe\[rl\]'"):
        symbolic.math_sandbox()
