"""Suites, and the figures that the report gives for Trinity Large beside each task."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    task: str
    reported: float | None = None
    """Percent, of Trinity Large (base or preview)."""
    note: str = ""
    limit: int | None = None
    """Questions, the first ones; None takes all."""


@dataclass(frozen=True)
class Suite:
    name: str
    of: str
    """Whose figures stand beside ours."""
    entries: tuple[Entry, ...]


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "trinity-base",
            "Trinity Large Base",
            (
                Entry("mbpp_plus", 88.62),
                Entry("math500", 65.20),
                Entry("hellaswag", 90.11),
                Entry("winogrande", 80.82),
                Entry("mmlu", 82.58),
                Entry("mmlu_pro", 66.02),
                Entry("triviaqa", 83.30),
                Entry("arc_challenge", 65.44),
                Entry("bbh", 65.70),
                Entry("gpqa_diamond", 43.94),
            ),
        ),
        Suite(
            "trinity-instruct",
            "Trinity Large Preview",
            (
                Entry("mmlu_chat", 87.21),
                Entry("mmlu_pro_chat", 75.25),
                Entry("gpqa_diamond_chat", 63.32),
                Entry("simpleqa", 23.92, "right if the answer stands in the reply; the report's judge is a model"),
                Entry("aime25", 24.36),
            ),
        ),
        Suite(
            "quick",
            "",
            tuple(
                Entry(task, limit=200)
                for task in (
                    "arc_easy",
                    "arc_challenge",
                    "hellaswag_1000",
                    "winogrande",
                    "piqa",
                    "openbookqa",
                    "copa",
                    "mmlu",
                    "lambada",
                    "triviaqa",
                )
            ),
        ),
    )
}
