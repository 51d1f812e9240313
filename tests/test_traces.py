"""Sessions of agents become conversations that the template takes, whole and honest."""

import difflib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_helpers import small_sandbox
from trinity.base.errors import UserError
from trinity.cli import main
from trinity.data.chat import read_conversations
from trinity.data.diffs import replacements
from trinity.data.traces import Counts, TraceSettings, convert
from trinity.tokenizer.template import default_template, render

DIFF = """diff --git a/pkg/a.py b/pkg/a.py
--- a/pkg/a.py
+++ b/pkg/a.py
@@ -1,3 +1,3 @@ def f():
 def f():
-    return 1
+    return 2

@@ -9 +9,2 @@
-x
+y
+z
\\ No newline at end of file
--- /dev/null
+++ b/new.py
@@ -0,0 +1 @@
+print()
"""
STEPS: dict[str, Any] = {
    "task": "Repair f.",
    "system": "Use tools.",
    "steps": [
        {"thought": "Look.", "tool": "run", "arguments": {"command": "ls"}, "observation": "pkg"},
        {"thought": "Change it.", "diff": DIFF},
        {"tool": "run", "arguments": {"command": "make test"}, "observation": "ok " * 5000},
    ],
    "final": "It returned 1.",
    "passed": True,
}
AGENT: dict[str, Any] = {
    "problem_statement": "It crashes.",
    "trajectory": [
        {"action": "cat a.py\n", "observation": "x = 1", "thought": "I read it."},
        {"action": "submit", "observation": None, "response": "It is done."},
    ],
}
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "text", "text": "there"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "text of a"},
        {"role": "assistant", "content": "It says so."},
    ],
    "source": "made-up/1",
}


def written(folder: Path, *records: Any, name: str = "s.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def converted(path: Path, **settings: Any) -> tuple[list[dict[str, Any]], Counts]:
    counts = Counts()
    return list(convert([path], TraceSettings(**settings), counts)), counts


def test_three_forms(tmp_path: Path) -> None:
    rows, counts = converted(written(tmp_path, STEPS, AGENT, CHAT))
    assert (counts.kept, counts.left_out) == (3, {})
    steps, agent, chat = (row["messages"] for row in rows)
    assert [m["role"] for m in steps] == ["system", "user", *["assistant", "tool"] * 5, "assistant"]
    assert steps[2]["reasoning_content"] == "Look."
    edits = [
        m["tool_calls"][0]["arguments"] for m in steps if m.get("tool_calls") and m["tool_calls"][0]["name"] == "edit"
    ]
    assert edits[0] == {"path": "pkg/a.py", "old": "def f():\n    return 1\n\n", "new": "def f():\n    return 2\n\n"}
    assert edits[1] == {"path": "pkg/a.py", "old": "x\n", "new": "y\nz"}
    assert edits[2] == {"path": "new.py", "old": "", "new": "print()\n"}
    assert steps[-1] == {"role": "assistant", "content": "It returned 1."}
    assert "characters left out" in steps[-2]["content"]
    assert len(steps[-2]["content"]) < 8100
    assert [tool["function"]["name"] for tool in rows[0]["tools"]] == ["run", "edit"]
    assert agent[1]["tool_calls"] == [{"name": "run", "arguments": {"command": "cat a.py"}}]
    assert agent[3]["reasoning_content"] == "It is done."
    assert agent[-1]["content"] == "Done."
    assert chat[0] == {"role": "system", "content": "Be brief."}
    assert chat[1]["content"] == "Look\nthere"
    assert chat[2]["tool_calls"] == [{"name": "read", "arguments": {"path": "a"}}]
    assert rows[2]["source"] == "made-up/1"
    for row in rows:
        assert "<tool_response>" in render(default_template(), row["messages"], row["tools"])


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    failed = {**STEPS, "passed": False}
    poor = {**AGENT, "reward": 0.5}
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    open_end = {"messages": CHAT["messages"][:-1]}
    path = written(tmp_path, failed, poor, talk, open_end, CHAT, CHAT, STEPS)
    rows, counts = converted(path, max_messages=6)
    assert len(rows) == counts.kept == 1
    assert counts.left_out == {
        "did not pass": 2,
        "no tool call": 1,
        "ends with an observation": 1,
        "seen before": 1,
        "too many messages": 1,
    }
    assert len(converted(path, only_passed=False)[0]) == 3


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"x": 1}, "line 1 has none of the lists"),
        ({"steps": []}, "no text of the task"),
        ({"task": "a", "steps": [3]}, "step 0 is not an object"),
        ({"task": "a", "steps": [{"tool": "run"}]}, "step 0 has neither"),
        ({"task": "a", "steps": [{"diff": "nothing"}]}, "diff that cannot be read: it has no hunks"),
        ({"task": "a", "trajectory": [{"action": 1}]}, "step 0 has no text `action`"),
        ({"messages": [{"content": "x"}]}, "message 0 has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "content that is not text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "not JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"arguments": {}}]}]}, "without a name"),
        (
            {"messages": [{"role": "robot", "content": "x"}, *CHAT["messages"][2:]]},
            "line 1: message 0 has the role 'robot'",
        ),
    ],
)
def test_what_is_no_session_is_named(tmp_path: Path, record: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        converted(written(tmp_path, record))


TEXT = st.lists(st.sampled_from(["a\n", "b\n", "c\n", "\n", "+x\n", "-y\n", "@@ z\n", "--- q\n"]), max_size=12).map(
    "".join
)


@given(TEXT, TEXT)
def test_diffs_give_back_both_sides(old: str, new: str) -> None:
    """Python's own diffs: every hunk's texts stand in the files, and putting one for the other gives the new file."""
    if old == new:
        return
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), "a/f", "b/f", n=20)
    (found,) = replacements("".join(lines))
    assert (found.path, found.old, found.new) == ("f", old, new)


@given(st.text(max_size=200))
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        replacements("x" + text)


def test_cut_diffs_are_refused() -> None:
    for cut in (
        "--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n a\n",
        "@@ -1 +1 @@\n-a\n+b\n",
        "--- a\n+++ b\n@@ -1 +1 @@\n-a\n*b\n",
    ):
        with pytest.raises(ValueError, match=r"early|before|begins with"):
            replacements(cut)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sessions, out = tmp_path / "s.jsonl.gz", tmp_path / "out" / "chats.jsonl"
    sessions.write_bytes(gzip.compress((json.dumps(STEPS) + "\n" + json.dumps({**AGENT, "passed": False})).encode()))
    assert main(["data", "traces", str(sessions), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"did not pass": 1}
    (conversation,) = read_conversations([out])
    assert conversation.tools is not None
    before = out.read_bytes()
    assert main(["data", "traces", str(sessions), "--out", str(out)]) == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert main(["data", "traces", str(tmp_path / "none.jsonl"), "--out", str(out), "--force"]) == 1
    assert "there is no file" in capsys.readouterr().err
    failed = written(tmp_path, {**AGENT, "passed": False}, name="f.jsonl")
    assert main(["data", "traces", str(failed), "--out", str(out), "--force"]) == 1
    assert "no session is left to write: 1 (did not pass)" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(["data", "traces", "--out", str(out)]) == 2
    assert main(["data", "traces", str(sessions), "--generate", "3", "--out", str(out)]) == 2


def test_generated_traces(tmp_path: Path) -> None:
    with small_sandbox():
        pass
    out = tmp_path / "g.jsonl"
    assert main(["data", "traces", "--generate", "3", "--seed", "4", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({json.dumps(row["messages"]) for row in rows}) == 3
    for row in rows:
        assert row["messages"][-2]["content"].endswith("Exit status 0.")  # what the tests said at the end
    assert len(list(read_conversations([out]))) == 3
    assert main(["data", "traces", "--generate", "3", "--seed", "4", "--out", str(tmp_path / "again.jsonl")]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()
