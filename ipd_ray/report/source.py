"""What a report is made from: a run folder and its artifacts, any of which may be missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipd_ray.artifacts import Artifact, read_jsonl
from ipd_ray.config import RunConfig, load
from ipd_ray.data.columns import columns_file, fetch_columns
from ipd_ray.data.shards import Segments, concatenate, read_entries, read_shard, shard_curve, shard_path
from ipd_ray.data.transitions import Log, prepare
from ipd_ray.errors import UserError
from ipd_ray.runs import CURVES, RunFolder
from ipd_ray.storage import Folder

VARIANTS = {"policy": "policy", "bc": "BC", "no_imagination": "no imagination"}
"""Names in summary.json, and what a reader sees."""
_MOST_SEGMENTS = 20_000


@dataclass(frozen=True)
class View:
    """One run, read as far as it is there."""

    run: RunFolder
    label: str

    @cached_property
    def identity(self) -> dict[str, Any]:
        return self.run.identity

    @cached_property
    def settings(self) -> dict[str, Any]:
        """{dotted name: value}; without where the store lies, which is nobody else's business."""
        return {name: value for name, value in self.run.config.items() if name != "runtime.store"}

    @cached_property
    def summary(self) -> dict[str, Any]:
        return self.run.summary

    @cached_property
    def links(self) -> dict[str, dict[str, str]]:
        return self.run.links

    @cached_property
    def _parts(self) -> dict[str, dict[str, Any] | str]:
        parts: dict[str, dict[str, Any] | str] = {}
        for name, link in self.links.items():
            artifact = Artifact(link["path"])
            try:
                parts[name] = artifact.described
            except FileNotFoundError:
                skipped = name.startswith("evaluate") and bool(self.summary)
                parts[name] = (
                    "skipped, since no environment was to be had (run.log says why), or pruned from the store"
                    if skipped
                    else "not made yet, or pruned from the store: run again with the same settings to have it made"
                )
            except (UserError, OSError, ValueError):
                parts[name] = (
                    "of another version of ipd_ray, or damaged: run again with the same settings to have it made"
                )
        return parts

    def part(self, name: str) -> dict[str, Any] | None:
        """Content of a part's artifact.json, or None where it is missing."""
        found = self._parts.get(name)
        return found if isinstance(found, dict) else None

    def diagnostics(self, name: str) -> dict[str, Any]:
        """Diagnostics of a part; empty where it is missing."""
        return dict((self.part(name) or {}).get("diagnostics", {}))

    def why_missing(self, name: str) -> str:
        """Say why a part is not there."""
        found = self._parts.get(name)
        return (
            found
            if isinstance(found, str)
            else "not part of this run: it ended before that step, or was told to skip it"
        )

    @cached_property
    def imagined(self) -> dict[str, Any]:
        """What the policy's distillation said of the imagined segments; empty where nothing was imagined."""
        return dict(self.diagnostics("distill").get("imagined") or {})

    @cached_property
    def config(self) -> RunConfig | None:
        """The validated config, or None where this version cannot read it."""
        try:
            return load(path=self.run.path / "config.yaml")
        except UserError:
            return None

    @cached_property
    def log(self) -> Log | None:
        """The converted log, or None where the store has it no longer."""
        if self.config is None:
            return None
        found = fetch_columns(columns_file(self.run.store, self.identity["content_hash"]))
        return prepare(found, self.config.data, int(self.identity["seed"])) if found else None

    @cached_property
    def reward_scale(self) -> float | None:
        """Units of V a unit of raw return, or None where it is not known."""
        if self.log is not None:
            return self.log.reward_scale
        described = self.part("distill")
        return float(described["reward_scale"]) if described and "reward_scale" in described else None

    def raw(self, value: Any) -> Any:
        """Values in units of V as raw returns, where the scale is known."""
        return value / (self.reward_scale or 1.0)

    @property
    def unit(self) -> str:
        return "raw units" if self.reward_scale else "scaled units"

    @cached_property
    def curves(self) -> dict[str, list[dict[str, Any]]]:
        """Learning curves by part: the run's own copy, else the artifact's."""
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in read_jsonl(self.run.path / CURVES):
            curves.setdefault(str(row.get("part", "")), []).append(row)
        for name, link in self.links.items():
            if name not in curves and self.part(name) is not None:
                artifact = Artifact(link["path"])
                curves[name] = shard_curve(artifact.folder) if name == "imagine" else artifact.curve()
        return {name: sorted(rows, key=lambda r: r["step"]) for name, rows in curves.items() if rows}

    def returns(self, variant: str) -> NDArray[np.float64] | None:
        """Raw returns of the evaluation episodes of a policy, by its name in summary.json."""
        name = "evaluate" if variant == "policy" else f"evaluate:{variant}"
        values = self.diagnostics(name).get("returns")
        return np.asarray(values, np.float64) if values else None

    def score_curve(self, variant: str) -> tuple[list[float], list[float]]:
        """Updates and mean return of the policies kept along the way, by the policy's name in summary.json."""
        points = self.diagnostics("evaluate" if variant == "policy" else f"evaluate:{variant}").get("curve") or []
        return [float(p["step"]) for p in points], [float(p["return_mean"]) for p in points]

    @cached_property
    def segments(self) -> Segments | None:
        """Imagined segments, of evenly spaced shards where there are very many; None where they are missing."""
        described = self.part("imagine")
        if described is None:
            return None
        artifact = Artifact(self.links["imagine"]["path"])
        there = sorted(read_entries(artifact.folder))
        total = max(1, int(described["diagnostics"].get("segments", 0)))
        wanted = min(len(there), max(1, len(there) * _MOST_SEGMENTS // total))
        chosen = [there[i] for i in np.linspace(0, len(there) - 1, wanted).astype(int)] if there else []
        artifact.pull([shard_path(artifact.path, i).name for i in chosen])
        try:
            return concatenate([read_shard(artifact.path, i, verify=False) for i in chosen]) if chosen else None
        except (OSError, KeyError, ValueError):
            return None

    @cached_property
    def judged(self) -> Any:
        """The verdict on `segments`, as distillation took it; None where something for it is missing."""
        from ipd_ray.imagine.accept import accept

        threshold, spread = self.imagined.get("kappa"), self.diagnostics("values").get("v_std")
        if self.segments is None or self.log is None or self.config is None or threshold is None or spread is None:
            return None
        return accept(
            self.segments,
            self.config.accept,
            threshold=float(threshold),
            discount=self.log.discount,
            value_std=float(spread),
            ranges=self.log.step_ranges,
        )


def open_views(folders: Sequence[str | Path | Folder]) -> list[View]:
    """Return the runs, each under a name of its own. Raises UserError for a folder that is no run."""
    places = [Folder.of(folder) for folder in folders]
    if not places:
        raise UserError("a report needs a run folder: `ipd-ray runs ls` lists the runs.")
    plain = [place.name for place in places]
    names = [f"{place.parent.name}/{place.name}" if plain.count(place.name) > 1 else place.name for place in places]
    views = [View(RunFolder(place), name) for place, name in zip(places, names, strict=True)]
    for view in views:
        _ = view.identity  # refuses what is no run
        view.run.pull()
    return views


def number(found: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a mapping, or None."""
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        return None
    return float(value)


def fingerprint_of(views: Sequence[View]) -> str:
    """Text that is equal where a report of these runs would be."""
    return json.dumps(
        [
            [v.label, v.identity, v.settings, v.links, v.summary, {n: v.part(n) is not None for n in v.links}]
            for v in views
        ],
        sort_keys=True,
    )
