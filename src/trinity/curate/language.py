"""Which language a text is written in: py3langid, whose model ships inside the package (BSD licence, 4 MB, offline)."""

import functools
from typing import Any

from trinity.base.errors import UserError

SAMPLE_CHARS = 4000
"""Of a text, taken from its start, middle and end."""
NONE = "und"
"""ISO 639-2 for undetermined."""


def identify(text: str, least_probability: float = 0.0) -> tuple[str, float]:
    """(ISO 639-1 code, probability); NONE below the least probability. Raises UserError without the package."""
    if len(text) > SAMPLE_CHARS:
        third = SAMPLE_CHARS // 3
        middle = len(text) // 2
        text = "\n".join((text[:third], text[middle : middle + third], text[-third:]))
    code, probability = _identifier().classify(text)
    return (code if probability >= least_probability else NONE), float(probability)


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("identifying languages needs py3langid: pip install 'trinity-moe[curate]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
