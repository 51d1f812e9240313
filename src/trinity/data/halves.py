"""Two halves of everything that a needle-in-a-haystack text is made of: one for evaluation, one for training.

Which half a word, a value or a document belongs to follows from its text alone, so that generators which know nothing
of each other never share any of it.
"""

import hashlib
from enum import Enum


class Half(Enum):
    EVALUATION = 0
    TRAINING = 1


def half_of(text: str) -> Half:
    """The half that a word, a value or a haystack's document belongs to: one bit of its SHA-256."""
    return Half(hashlib.sha256(text.encode()).digest()[0] & 1)
