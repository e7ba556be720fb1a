"""Shards on disk: what comes back is what was written, or it is refused."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_fixtures import segments_of

from ipd_ray.data.shards import (
    Segments,
    concatenate,
    manifest_digest,
    read_entry,
    read_shard,
    shard_path,
    write_shard,
)
from ipd_ray.errors import UserError
from ipd_ray.storage import Folder


def random_segments(count: int = 3, length: int = 2, seed: int = 0) -> Segments:
    rng = np.random.default_rng(seed)
    return segments_of(
        rng.integers(0, 99, count).tolist(), length, control=rng.random(count) < 0.5,
        observation=rng.normal(size=(count, length + 1, 4)), action=rng.normal(size=(count, length, 2)),
        reward=rng.normal(size=(count, length)), terminal=rng.random((count, length)) < 0.5,
        uncertainty=rng.random((count, length)), value=rng.normal(size=(count, length + 1)),
        own_reward=rng.normal(size=(count, length)), own_terminal=rng.random((count, length)) < 0.5,
        own_length=rng.integers(0, length, count), own_value=rng.normal(size=(count, length + 1)),
    )


def assert_same(one: Segments, other: Segments) -> None:
    for f in fields(Segments):
        a, b = getattr(one, f.name), getattr(other, f.name)
        assert a.dtype == b.dtype and np.array_equal(a, b), f.name


@pytest.mark.parametrize("count", [1, 3])
def test_a_shard_comes_back_as_it_was_written(count: int, tmp_path: Path):
    segments = random_segments(count)
    content = write_shard(Folder.of(tmp_path), 7, segments, {"reward_gain": 0.5})["digest"]
    assert_same(read_shard(tmp_path, 7), segments)
    entry = read_entry(tmp_path, 7)
    assert entry is not None and content == segments.digest
    assert {"shard": 7, "segments": count, "digest": content, "reward_gain": 0.5}.items() <= entry.items()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shard-00007.json", "shard-00007.parquet"]


def test_equal_segments_are_equal_bytes(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_shard(Folder.of(tmp_path / name), 0, random_segments(), {})
    one, two = (sorted(p.read_bytes() for p in (tmp_path / name).iterdir()) for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("column", [f.name for f in fields(Segments)])
def test_the_digest_sees_every_column(column: str):
    segments = random_segments()
    changed = {name: values.copy() for name, values in segments.columns().items()}
    first = changed[column].reshape(-1)
    first[0] = not first[0] if first.dtype == np.bool_ else first[0] + 1
    assert Segments(**changed).digest != segments.digest


def test_the_entry_is_written_after_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace, order = os.replace, []

    def killed(source: Any, target: Any) -> None:
        order.append(Path(target).suffix)
        if Path(target).suffix == ".json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(Folder.of(tmp_path), 0, random_segments(), {})
    assert order == [".parquet", ".json"]
    # Killed in between: the shard does not count, and nothing else is left behind.
    assert read_entry(tmp_path, 0) is None
    assert [p.name for p in tmp_path.iterdir()] == ["shard-00000.parquet"]


def test_a_shard_without_its_entry_does_not_count(tmp_path: Path):
    write_shard(Folder.of(tmp_path), 0, random_segments(), {})
    entry = shard_path(tmp_path, 0).with_suffix(".json")
    text = entry.read_text()
    entry.unlink()
    assert read_entry(tmp_path, 0) is None
    with pytest.raises(UserError, match="does not match its manifest entry"):
        read_shard(tmp_path, 0)
    entry.write_text(text[:-5])
    assert read_entry(tmp_path, 0) is None
    entry.write_text(json.dumps({**json.loads(text), "schema": 99}))
    assert read_entry(tmp_path, 0) is None
    entry.write_text(text)
    assert read_entry(tmp_path, 0) is not None
    shard_path(tmp_path, 0).unlink()
    assert read_entry(tmp_path, 0) is None


def test_a_shard_with_other_content_than_its_entry_says_is_refused(tmp_path: Path):
    write_shard(Folder.of(tmp_path), 0, random_segments(), {})
    write_shard(Folder.of(tmp_path), 1, random_segments(seed=1), {})
    os.replace(shard_path(tmp_path, 1), shard_path(tmp_path, 0))
    with pytest.raises(UserError, match="does not match its manifest entry"):
        read_shard(tmp_path, 0)


def test_a_changed_byte_is_found(tmp_path: Path):
    segments = random_segments()
    write_shard(Folder.of(tmp_path), 0, segments, {})
    path = shard_path(tmp_path, 0)
    content, column = bytearray(path.read_bytes()), segments.observation.tobytes()
    at = bytes(content).find(column[:16])
    assert at > 0
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not match its manifest entry"):
        read_shard(tmp_path, 0)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_is_refused_with_the_remedy(damage: str, tmp_path: Path):
    write_shard(Folder.of(tmp_path), 0, random_segments(), {})
    path = shard_path(tmp_path, 0)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    with pytest.raises(UserError, match="remove"):
        read_shard(tmp_path, 0)


def test_shards_put_together_keep_their_order(tmp_path: Path):
    one, two = random_segments(2, seed=1), random_segments(1, seed=2)
    both = concatenate([one, two])
    assert len(both) == 3 and both.length == 2
    assert np.array_equal(both.observation[:2], one.observation) and np.array_equal(both.reward[2:], two.reward)


def test_the_digest_of_a_set_depends_on_order():
    assert manifest_digest(["a", "b"]) != manifest_digest(["b", "a"])
