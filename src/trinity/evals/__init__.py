"""Measures of a model: held-out loss, needles in a haystack, arithmetic; all of them at once for `trinity eval`."""

from trinity.evals.suite import run_suite

__all__ = ["run_suite"]
