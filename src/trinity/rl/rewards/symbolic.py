"""Equality of mathematical expressions, by the package `math-verify` (extra `rl`).

It parses what a model wrote, partly by evaluating it as Python, and simplifies without an end in sight for some inputs:
it runs inside the sandbox.
"""

import importlib.util
import json
from pathlib import Path

from trinity.base.errors import UserError
from trinity.rl.rewards.attempt import Attempt
from trinity.rl.sandbox.limits import MIB, Limits
from trinity.rl.sandbox.pool import Sandbox

_MODULES = ("math_verify", "latex2sympy2_extended", "sympy", "mpmath", "antlr4")
_PROGRAM = """
import json, sys
from math_verify import parse, verify
wanted, given = json.load(sys.stdin)
wanted = parse(wanted, parsing_timeout=None)
given = parse(given, parsing_timeout=None)
print("equal" if wanted and given and verify(wanted, given, timeout_seconds=None) else "different")
"""


def math_sandbox(*, workers: int | None = None, seconds: float = 5.0) -> Sandbox:
    """A sandbox with the packages that `SymbolicMath` needs, loaded. Raises UserError where they are not installed."""
    folders = []
    for name in _MODULES:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise UserError(
                f"comparing mathematical expressions needs the package {name}: pip install 'trinity-moe[rl]'"
            )
        folders.append(str(Path(found.origin).parents[1]))
    limits = Limits(seconds=seconds, cpu_seconds=max(1, round(seconds)), memory=2048 * MIB)
    return Sandbox(limits, workers=workers, packages=list(dict.fromkeys(folders)), preload=["math_verify"])


class SymbolicMath:
    """1 when the expression in the attempt's text equals `answer` as mathematics.

    The text may be prose around an expression in a box, between dollars or bare; the wanted answer is an expression.
    What takes too long, or cannot be read, is not equal.
    """

    def __init__(self, sandbox: Sandbox, seconds: float | None = None) -> None:
        """seconds: for one comparison; the sandbox's own limit unless given."""
        self.sandbox, self._seconds = sandbox, seconds

    def __call__(self, attempt: Attempt) -> float:
        return float(self.equal(attempt.answer, attempt.text))

    def equal(self, wanted: str, text: str) -> bool:
        expression = wanted if "$" in wanted or "\\boxed" in wanted else f"${wanted}$"
        outcome = self.sandbox.run(_PROGRAM, stdin=json.dumps([expression, text]), seconds=self._seconds)
        return outcome.completed and outcome.stdout.split() == [b"equal"]
