"""Where the API key comes from."""

import os
from pathlib import Path

from trinity.base.errors import UsageError, UserError


def read_key(path: Path | None) -> str | None:
    """The API key: the first line of a file, else TRINITY_API_KEY; None without either. Never from the command line,
    where every user of the machine could read it. Raises UserError or UsageError."""
    if path is None:
        return os.environ.get("TRINITY_API_KEY") or None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the key file {path} cannot be read: {error}") from None
    if not key or len(key.split()) != 1 or not key.isascii():
        raise UsageError(f"the key file {path} must hold one line of ASCII characters without blanks")
    return key
