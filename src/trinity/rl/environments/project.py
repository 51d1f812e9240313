"""A small package with tests, and the mistakes that can be put into it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    kind: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Project:
    package: str
    module: str
    source: str
    tests: str
    bugs: tuple[Bug, ...]

    def with_bug(self, bug: Bug) -> str:
        assert self.source.count(bug.right) == 1, (self.module, bug)
        return self.source.replace(bug.right, bug.wrong)


def suite(names: str, tests: str) -> str:
    """The test file of a project: `tests` are methods that use `names`; PACKAGE and MODULE stand for its own."""
    return f"import unittest\n\nfrom PACKAGE.MODULE import {names}\n\n\nclass Tests(unittest.TestCase):{tests}"
