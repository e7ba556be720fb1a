"""Converted logs on disk: the columns of `Transitions` as safetensors, the spec in the header."""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ipd_ray.data.transitions import Spec, Transitions
from ipd_ray.storage import Folder

SCHEMA = 1


def columns_path(folder: Path, content_hash: str) -> Path:
    """Where a folder keeps the log of a content."""
    return folder / f"{content_hash[:24]}.safetensors"


def write_columns(path: Path, transitions: Transitions) -> None:
    """Write a log atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    columns = {name: np.ascontiguousarray(values) for name, values in transitions.columns().items()}
    header = {
        "schema": str(SCHEMA),
        "spec": transitions.spec.to_json(),
        "content_hash": transitions.content_hash,
        "checksum": _checksum(columns),
    }
    try:
        save_file(columns, temporary, metadata=header)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_columns(path: Path) -> Transitions | None:
    """Return a log, or None where the file is missing, damaged or of another schema: convert again."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("schema") != str(SCHEMA):
                return None
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if header["checksum"] != _checksum(columns):
            return None
        transitions = Transitions(**columns, spec=Spec.from_json(header["spec"]))
        transitions.__dict__["content_hash"] = header["content_hash"]  # spares hashing the log again
        return transitions
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def columns_file(store: Folder, content_hash: str) -> Folder:
    """Where a store keeps the log of a content."""
    return store / "data" / columns_path(Path(), content_hash).name


def fetch_columns(file: Folder) -> Transitions | None:
    """Return a log of a store, or None as `read_columns` does. Fetched once a machine."""
    if file.remote and read_columns(file.path) is None:
        with file.parent.locked():
            file.parent.pull([file.name])
    return read_columns(file.path)


def keep_columns(store: Folder, transitions: Transitions) -> Folder:
    """Have a log in a store, written where it is missing; return its file.

    That this machine's mirror has it, where it was converted, says nothing of the store.
    """
    file = columns_file(store, transitions.content_hash)
    if read_columns(file.path) is None:
        write_columns(file.path, transitions)
    if file.remote and not file.exists():
        file.parent.push([file.name])
    return file


def _checksum(columns: Mapping[str, NDArray[Any]]) -> str:
    crc = 0
    for name in sorted(columns):
        crc = zlib.crc32(np.ascontiguousarray(columns[name]).data.cast("B"), crc)
    return f"{crc:08x}"
