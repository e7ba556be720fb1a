"""Makes the scripts of benchmarks/scores and benchmarks/speed importable by their names."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "benchmarks" / name) for name in ("scores", "speed")]
