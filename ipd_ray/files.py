"""Files: written so that a kill at any moment leaves the old one or the new one, and measured."""

from __future__ import annotations

import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a half."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def probe(uri: str) -> None:
    """Write a small file into a folder, read it back, delete it, and what was made on the way. Raises OSError."""
    folder = Path(uri)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    file, text = folder / f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        if file.read_text() != text:
            raise OSError(errno.EIO, "what was written is not what is read", uri)
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
            for path in missing:
                path.rmdir()


def folder_bytes(path: Path) -> int:
    """Return what a folder takes on disk."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
