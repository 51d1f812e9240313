"""The one exception for what a user can get wrong, and the words of its message."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user or of their files: one clear sentence, shown without a traceback (exit status 1)."""


class UsageError(UserError):
    """A wrong key, value or option on the command line or in a settings file (exit status 2)."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest allowed word, or an empty string."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
