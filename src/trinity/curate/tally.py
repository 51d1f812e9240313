"""What a stage took in, gave out and dropped, and why."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MOST_EXAMPLES = 5


@dataclass
class Tally:
    """Of one stage. What came in is what went out and what was dropped; `check` holds that."""

    taken: int = 0
    given: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    """Of work, summed over workers."""
    drops: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Where some of the dropped ones are, by reason."""

    def drop(self, reason: str, where: str) -> None:
        self.drops[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MOST_EXAMPLES:
            examples.append(where)

    def add(self, other: "Tally") -> None:
        self.taken += other.taken
        self.given += other.given
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.seconds += other.seconds
        self.drops.update(other.drops)
        for reason, where in other.examples.items():
            had = self.examples.setdefault(reason, [])
            had += where[: MOST_EXAMPLES - len(had)]

    def check(self) -> bool:
        return self.taken == self.given + self.drops.total()

    def as_json(self) -> dict[str, Any]:
        return {
            "in": self.taken,
            "out": self.given,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "seconds": round(self.seconds, 3),
            "drops": dict(sorted(self.drops.items(), key=lambda item: (-item[1], item[0]))),
            "examples": self.examples,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Tally":
        return cls(
            value["in"],
            value["out"],
            value["tokens_in"],
            value["tokens_out"],
            value["seconds"],
            Counter(value["drops"]),
            {reason: list(where) for reason, where in value["examples"].items()},
        )


Tallies = dict[str, Tally]
"""By stage, in the order of the graph."""


def total(several: Iterable[dict[str, Any]]) -> Tallies:
    """Sums over blocks of tallies in JSON."""
    sums: Tallies = {}
    for tallies in several:
        for stage, value in tallies.items():
            sums.setdefault(stage, Tally()).add(Tally.from_json(value))
    return sums
