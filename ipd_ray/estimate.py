"""What a run will take in time, memory and disk, before it begins. Estimates: right within a factor of two or so."""

from __future__ import annotations

from ipd_ray.pipeline import Context


def estimate_disk(context: Context, until: str) -> int:
    """Return the bytes that the run will write to the store."""
    return 0
