"""Without ray installed: everything but `distributed` imports, and the local engine runs the method."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from small_runs import LOG, SETTINGS, write_log

BLOCK_RAY = '''
import sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")

sys.meta_path.insert(0, NoRay())
'''

PROGRAM = f'''
import importlib, pkgutil, sys
import ipd_ray

names = [m.name for m in pkgutil.walk_packages(ipd_ray.__path__, "ipd_ray.", onerror=lambda name: None)]
for name in names:
    if not name.startswith("ipd_ray.distributed"):
        importlib.import_module(name)
assert len(names) > 30 and "ray" not in sys.modules

from ipd_ray.config import load
from ipd_ray.errors import UserError

summary = ipd_ray.run({LOG!r}, load(overrides={SETTINGS!r}), run_dir="runs/no-ray")
assert "policy" in summary
try:
    ipd_ray.run({LOG!r}, load(overrides=["runtime.engine=ray"]), run_dir="runs/ray")
except UserError as error:
    assert "pip install ipd_ray" in str(error) and "runtime.engine=local" in str(error), error
else:
    raise AssertionError("ray was found")
'''


def test_everything_but_distributed_works_where_ray_is_not_installed(tmp_path: Path) -> None:
    write_log(tmp_path / "minari")
    (tmp_path / "sitecustomize.py").write_text(BLOCK_RAY)  # in the workers, too
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "MINARI_DATASETS_PATH": str(tmp_path / "minari")}
    # The program has no `if __name__ == "__main__"`: workers do not run it again.
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs" / "ray").exists()
