"""The corpus of the machine's own Python, and generated arithmetic."""

import json
import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.base.errors import UserError
from trinity.data import arithmetic, machine
from trinity.data.machine import gather

EQUATION = re.compile(r"^(\d+) ([-+*]) (\d+) = (\d+)$", re.MULTILINE)


def test_it_is_deterministic_and_of_the_size_asked_for(tmp_path):
    one, two, other = (gather(tmp_path / n, 300_000, seed) for n, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert one.fingerprint == two.fingerprint != other.fingerprint
    for first, second in zip(one.files, two.files, strict=True):
        assert first.read_bytes() == second.read_bytes()
    for domain, share in machine.SHARES.items():
        assert 0.8 * share * 300_000 < one.num_bytes[domain] <= share * 300_000
    texts = [json.loads(line)["text"] for path in one.files for line in path.read_text().strip().split("\n")]
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) < 200
    assert max(map(len, texts)) > 20_000


def test_the_place_of_the_library_does_not_matter(tmp_path, monkeypatch):
    fingerprints = []
    for place in ("one", "two/deeper"):
        library = tmp_path / place
        for name in ("b.py", "a.py", "pack/c.py", "test/d.py"):
            path = library / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'"""{f"The module {name} explains itself. " * 20}"""\n')
        paths = {"stdlib": str(library), "purelib": str(library / "none"), "platlib": str(library / "none")}
        monkeypatch.setattr(machine.sysconfig, "get_paths", lambda paths=paths: paths)
        found = gather(tmp_path / "out", 2_000_000)
        assert "test/d.py" not in "".join(path.read_text() for path in found.files)
        fingerprints.append(found.fingerprint)
    assert fingerprints[0] == fingerprints[1]
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: dict.fromkeys(paths, str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="no library sources"):
        gather(tmp_path / "out")


@given(st.integers(0, 2**32), st.integers(9, 10**12), st.booleans())
def test_problems_are_right_and_on_their_side(seed, max_number, held_out):
    question, answer = arithmetic.problem(Random(seed), max_number, held_out)
    match = EQUATION.match(f"{question}{answer}")
    assert match is not None
    a, operation, b = int(match[1]), match[2], int(match[3])
    assert max(a, b) <= max_number
    assert int(answer) == {"+": a + b, "-": a - b, "*": a * b}[operation] >= 0
    found = arithmetic.Problem(operation, a, b)
    assert found.held_out == held_out
    if operation != "-":
        assert arithmetic.Problem(operation, b, a).held_out == held_out


def test_a_tenth_is_held_out_and_training_texts_never_show_it():
    problems = [arithmetic.Problem(o, a, b) for o in "+-*" for a in range(60) for b in range(60) if o != "-" or a >= b]
    assert 0.08 < sum(p.held_out for p in problems) / len(problems) < 0.12
    shown = "\n".join(arithmetic.text(Random(seed), 200, 9) for seed in range(10))
    equations = [arithmetic.Problem(m[2], int(m[1]), int(m[3])) for m in EQUATION.finditer(shown)]
    assert len(equations) > 100
    assert not any(p.held_out for p in equations)
    asks = [r.format(a=p.a, b=p.b) for p in problems if p.held_out for r in arithmetic.ASKS[p.operation]]
    assert not any(ask in shown for ask in asks)


def test_columns_align_by_place_value():
    assert arithmetic.column(arithmetic.Problem("+", 987, 45)) == " 987\n+ 45\n----\n1032"
    assert arithmetic.column(arithmetic.Problem("*", 5, 123)) == "    5\n* 123\n-----\n  615"


@given(st.integers(0, 2**32))
def test_conversations(seed):
    user, assistant = arithmetic.conversation(Random(seed), 99)["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert assistant["content"].isdigit()
    assert len(re.findall(r"\d+", user["content"])) == 2
