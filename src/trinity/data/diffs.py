"""Unified diffs as replacements of text."""

import re
from dataclasses import dataclass

_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


@dataclass(frozen=True)
class Replacement:
    """`old` lines of a file, with what stood around them, become `new` ones; an empty `old` begins a new file."""

    path: str
    old: str
    new: str


def replacements(diff: str) -> list[Replacement]:
    """One for each hunk, in order. Raises ValueError for a text that is no unified diff."""
    found: list[Replacement] = []
    path = before = None
    lines = diff.splitlines(keepends=True)
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith("--- "):
            before = _name(line)
        elif line.startswith("+++ "):
            path = _name(line)
            path = before if path == "/dev/null" else path
        elif hunk := _HUNK.match(line):
            if path is None:
                raise ValueError("a hunk comes before the names of its files")
            old, new, at = _hunk(lines, at, int(hunk.group(2) or 1), int(hunk.group(4) or 1))
            found.append(Replacement(path, old, new))
    if not found:
        raise ValueError("it has no hunks")
    return found


def _name(line: str) -> str:
    name = line[4:].split("\t")[0].strip()
    return name[2:] if name.startswith(("a/", "b/")) else name


def _hunk(lines: list[str], at: int, num_old: int, num_new: int) -> tuple[str, str, int]:
    """(old text, new text, line after it) of a hunk with so many lines on either side."""
    old: list[str] = []
    new: list[str] = []
    while len(old) < num_old or len(new) < num_new:
        if at >= len(lines):
            raise ValueError("a hunk ends too early")
        kind, text = lines[at][:1], lines[at][1:]
        at += 1
        if kind == "\n":  # an empty line of context that lost its blank
            kind, text = " ", "\n"
        if kind not in ("-", "+", " ", "\\"):
            raise ValueError(f"a line of a hunk begins with {kind!r}")
        if kind in ("-", " "):
            old.append(text)
        if kind in ("+", " "):
            new.append(text)
        if kind == "\\":  # "No newline at end of file", of the line before
            _unend(old, new, lines[at - 2][:1])
    if at < len(lines) and lines[at].startswith("\\"):
        _unend(old, new, lines[at - 1][:1])
        at += 1
    if len(old) != num_old or len(new) != num_new:
        raise ValueError("a hunk has other counts than its head says")
    return "".join(old), "".join(new), at


def _unend(old: list[str], new: list[str], kind: str) -> None:
    if kind in ("-", " ") and old:
        old[-1] = old[-1].removesuffix("\n")
    if kind in ("+", " ") and new:
        new[-1] = new[-1].removesuffix("\n")
