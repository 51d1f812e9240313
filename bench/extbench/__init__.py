"""Parts of bench/extension.py."""
