"""Settings of generated training documents about retrieval."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from trinity.config.base import Fraction, Frozen

Retrieval = Literal["lookup", "values", "queries", "tracking", "count", "where", "quote"]
"""What training documents about retrieval ask for (`data/retrieval.py`)."""


class RetrievalConfig(Frozen):
    """How training documents about retrieval are made. Nothing here is public; the values are ours."""

    tasks: Annotated[dict[Retrieval, PositiveFloat], Field(min_length=1)] = Field(
        default_factory=lambda: {
            "lookup": 4.0, "values": 1.0, "queries": 1.0, "tracking": 0.5, "count": 0.25, "where": 1.0, "quote": 2.0
        }
    )  # fmt: skip
    """Share of each task among the questions, by weights."""
    density: tuple[Fraction, Fraction] = (0.1, 0.9)
    """Smallest and largest part of a document that facts and questions take; drawn evenly on a logarithmic scale. The
    rest is text of the training shards. Denser documents ask more often for each token read."""
    whole_rows: Fraction = 0.5
    """Share of the retrieval rows that are one document; the others hold several shorter ones."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.density
        if not 0 < low <= high:
            raise ValueError(f"density must be two rising numbers above 0, not {low} and {high}")
        return self
