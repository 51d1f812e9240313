"""Trinity: sparse mixture-of-experts language models, from text to a served model."""

__version__ = "0.1.0"
