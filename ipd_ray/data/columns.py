"""Converted logs on disk: the columns of `Transitions` as safetensors, the spec in the header."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ipd_ray.data.transitions import Spec, Transitions

SCHEMA = 1


def write_columns(path: Path, transitions: Transitions) -> None:
    """Write a log atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    columns = {name: np.ascontiguousarray(values) for name, values in transitions.columns().items()}
    header = {"schema": str(SCHEMA), "spec": transitions.spec.to_json(), "content_hash": transitions.content_hash}
    try:
        save_file(columns, temporary, metadata=header)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_columns(path: Path) -> Transitions | None:
    """Read a log back, or return None where the file is missing, damaged or of another schema: then convert again."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("schema") != str(SCHEMA):
                return None
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        transitions = Transitions(**columns, spec=Spec.from_json(header["spec"]))
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        return None
    transitions.__dict__["content_hash"] = header["content_hash"]  # spares hashing the log again
    return transitions
