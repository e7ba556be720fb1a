"""The command line. Nothing heavy is imported before a command needs it: `ipd-ray --help` answers at once."""

from __future__ import annotations

import os

from ipd_ray.cli import run  # noqa: F401  (each adds its commands, in this order)

# isort: split
from ipd_ray.cli import data, runs  # noqa: F401

# isort: split
from ipd_ray.cli import clusters  # noqa: F401

# isort: split
from ipd_ray.cli.app import app


def main() -> None:
    """Entry point of the console script."""
    if os.environ.get("IPD_RAY_CREDENTIALS"):  # a job that was handed some
        from ipd_ray.distributed.credentials import held

        with held():
            app()
    else:
        app()
