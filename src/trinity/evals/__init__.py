"""Measures of a model: held-out loss, needles in a haystack, arithmetic; all of them at once for `trinity eval`."""

from trinity.evals.saved import evaluate_saved
from trinity.evals.suite import SUITE, run_suite

__all__ = ["SUITE", "evaluate_saved", "run_suite"]
