"""A repository with a failing test: read, edit and run until the tests pass.

The files live outside the sandbox as a dictionary; each `run` puts them into a fresh one, and what a command changes
there is gone afterwards. The reward runs the tests as they were given, whatever became of them, on the module as it is
at the end, and counts only when every test ran and passed.
"""

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from trinity.base.rng import derive
from trinity.rl.environments import bugs
from trinity.rl.environments.calls import Call
from trinity.rl.environments.environment import Row, Session, Tool
from trinity.rl.rewards.attempt import Attempt, Rubric
from trinity.rl.sandbox.pool import Sandbox

TEST_COMMAND = "python -m unittest -q"
_SHOWN_CHARS = 4000
_TIME = re.compile(r"(?<=\bin )\d+\.\d+s\b")
_SYSTEM = (
    "You work on a Python repository through tools. Find out why a test fails and repair the code, not the test. "
    "When the tests pass, say in a sentence or two what was wrong."
)
_GRADE = """
import unittest
suite = unittest.defaultTestLoader.loadTestsFromName({module!r})
result = unittest.TextTestRunner(stream=open("/dev/null", "w")).run(suite)
assert result.wasSuccessful() and result.testsRun == {count} and not result.skipped
"""


def _tool(name: str, description: str, properties: Mapping[str, str]) -> Tool:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": text} for key, text in properties.items()},
                "required": list(properties),
            },
        },
    }


TOOLS: tuple[Tool, ...] = (
    _tool("read", "Show a file.", {"path": "Path from the repository's root."}),
    _tool(
        "edit",
        "Replace a stretch of a file, which must stand there exactly once.",
        {"path": "Path from the repository's root.", "old": "The text to replace.", "new": "The text to put there."},
    ),
    _tool(
        "run", f"Run a shell command in a copy of the repository, such as: {TEST_COMMAND}", {"command": "The command."}
    ),
)


class Repository:
    """Generated repositories, each with one mistake that its tests notice."""

    name = "repository"
    tools: Sequence[Tool] = TOOLS
    max_turns = 12

    def __init__(self, sandbox: Sandbox, seed: int) -> None:
        self._sandbox, self._seed = sandbox, seed
        self.rubric = Rubric(
            {"tests_pass": self._tests_pass}, needs_finished=False
        )  # the work counts, not the last words

    def row(self, number: int, *, held_out: bool = False) -> Row:
        project, bug = bugs.draw(Random(derive(self._seed, "repository", int(held_out), number)), held_out)
        module, tests = f"{project.package}/{project.module}.py", f"tests/test_{project.module}.py"
        files = {
            "README.md": f"# {project.package}\n\nTests: `{TEST_COMMAND}`\n",
            f"{project.package}/__init__.py": "",
            module: project.with_bug(bug),
            "tests/__init__.py": "",
            tests: project.tests,
        }
        listed = "\n".join(sorted(files))
        question = f"A test of this repository fails. Repair the code.\n\nFiles:\n{listed}"
        prompt = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
        count = project.tests.count("    def test_")
        info = {
            "start": files,
            "tests": tests,
            "count": count,
            "bug": {"path": module, "old": bug.wrong, "new": bug.right, "kind": bug.kind},
            "right": project.source,
        }
        return Row(prompt, info=info)

    def session(self, row: Row) -> Session:
        return Workspace(self._sandbox, dict(row.info["start"]))

    def _tests_pass(self, attempt: Attempt) -> float:
        """1 when all tests, as they were given, run and pass on the files as they are."""
        info = attempt.info
        given = {path: text for path, text in info["start"].items() if path.startswith("tests/")}
        kept = {path: text for path, text in info["files"].items() if not path.startswith("tests/")}
        module = info["tests"].removesuffix(".py").replace("/", ".")
        program = "import sys\nsys.path.insert(0, '.')\n" + _GRADE.format(module=module, count=info["count"])
        return float(self._sandbox.passes_with(program, files={**kept, **given}))


class Workspace:
    """The files of one rollout."""

    def __init__(self, sandbox: Sandbox, files: dict[str, str]) -> None:
        self._sandbox, self.files = sandbox, files

    def info(self) -> Mapping[str, Any]:
        return {"files": dict(self.files)}

    def observe(self, call: Call) -> str:
        tools = {"read": self._read, "edit": self._edit, "run": self._run}
        names = {"read": ("path",), "edit": ("path", "old", "new"), "run": ("command",)}
        if call.name not in tools:
            return f"There is no tool {call.name}; there are read, edit and run."
        wanted = names[call.name]
        if set(call.arguments) != set(wanted) or not all(isinstance(call.arguments[name], str) for name in wanted):
            return f"{call.name} takes the texts {', '.join(wanted)}."
        return shortened(tools[call.name](**call.arguments))

    def _read(self, path: str) -> str:
        return self.files.get(path, f"There is no file {path}; there are {', '.join(sorted(self.files))}.")

    def _edit(self, path: str, old: str, new: str) -> str:
        text = self.files.get(path)
        if text is None:
            return f"There is no file {path}."
        found = text.count(old) if old else 0
        if found != 1:
            return f"The text to replace stands {found} times in {path}; it must stand there exactly once."
        self.files[path] = text.replace(old, new)
        return f"Replaced in {path}."

    def _run(self, command: str) -> str:
        if "\0" in command:
            return "The command holds a null character."
        outcome = self._sandbox.command(["sh", "-c", command], files=self.files)
        end = "The time ran out." if outcome.timed_out else f"Exit status {outcome.status}."
        text = _TIME.sub("0.00s", outcome.text.strip())  # or else the same work would never read the same twice
        return f"{text}\n{end}".strip()


def shortened(text: str, most: int = _SHOWN_CHARS) -> str:
    """A long text without its middle."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
