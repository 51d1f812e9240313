"""Which code this is: one fingerprint over the package's own files, to compare between machines."""

import hashlib
from pathlib import Path

_KINDS = {".py", ".toml", ".jinja", ".html", ".css", ".js"}


def package_fingerprint(folder: Path | None = None) -> str:
    """First 16 hexadecimal digits of a SHA-256 over names and contents of the files of `folder`, by default this
    package's; compiled files and caches do not count."""
    folder = folder or Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _KINDS and p.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]
