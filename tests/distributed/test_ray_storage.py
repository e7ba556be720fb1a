"""The Ray engine on an object store: workers, Ray Train's checkpoints and driver meet there and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import LOG, SETTINGS, ipd_ray, write_log

from ipd_ray import run
from ipd_ray.artifacts import Artifact
from ipd_ray.config import RuntimeConfig, load
from ipd_ray.errors import UserError
from ipd_ray.storage import Folder

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_a_run_on_ray_in_a_bucket_is_the_local_run(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_log(tmp_path / "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    settings = [*SETTINGS, "runtime.checkpoint_seconds=0.2"]
    process = ipd_ray("run", LOG, *settings, "runtime.engine=ray", "--run-dir", f"{bucket}/runs/mine", cwd=tmp_path)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    run(LOG, load(overrides=settings), run_dir=tmp_path / "runs" / "mine")

    def digests(place: str | Path) -> dict[str, str]:
        links = json.loads(Folder.of(place).read_text("links.json") or "{}")
        return {name: Artifact(link["path"]).digest for name, link in links.items()}

    assert digests(f"{bucket}/runs/mine") == digests(tmp_path / "runs" / "mine")
    left = Folder.of(f"{bucket}/runs/store").sizes()
    assert not [name for name in left if "/ray/" in name or "checkpoint" in name or "lease" in name]


def test_nodes_that_cannot_reach_the_bucket_are_named_before_anything_starts(ray_cluster: str, bucket: str):
    """The cluster was started without the credentials and the endpoint that this process has."""
    import socket

    from ipd_ray.distributed.engine import RayEngine

    engine = RayEngine(RuntimeConfig(engine="ray"), "cpu")
    named = rf"node {socket.gethostname()} \(\w+\), {bucket}/store: .*credentials on every"
    with pytest.raises(UserError, match=named):
        engine.require_storage([f"{bucket}/store"])
    engine.close()


def test_storage_that_nodes_share_is_left_as_it_was(ray_cluster: str, tmp_path: Path):
    from ipd_ray.distributed.engine import RayEngine

    engine = RayEngine(RuntimeConfig(engine="ray"), "cpu")
    engine.require_storage([str(tmp_path / "runs" / "store"), str(tmp_path / "runs" / "mine")])
    engine.close()
    assert list(tmp_path.iterdir()) == []
