"""What steps leave behind: keys, atomic files, the store."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ipd_ray.artifacts import (
    CHECKPOINT,
    SCHEMA,
    Artifact,
    Store,
    Workspace,
    load_checkpoint,
    load_optimizer,
    make_key,
    optimizer_tensors,
    prefixed,
    read_jsonl,
    stripped,
    tensor_digest,
)
from ipd_ray.config import ActorConfig, PlannerConfig, RunConfig, ValuesConfig, load
from ipd_ray.data.transitions import Spec
from ipd_ray.errors import UserError
from ipd_ray.files import write_atomic
from ipd_ray.pipeline import Parts

KEY = "0123456789abcdef" * 4


def key(**changes: Any) -> str:
    plain: dict[str, Any] = {
        "step": "values", "version": 1, "seed": 0, "sections": {"values": ValuesConfig()}, "upstream": {"data": "d"},
    }
    given = {**plain, **changes}
    return make_key(given.pop("step"), given.pop("version"), **given)


def test_a_key_changes_with_everything_that_it_is_made_of():
    changed = [
        key(), key(step="distill"), key(version=2), key(seed=1), key(sections={"values": ValuesConfig(width=8)}),
        key(upstream={"data": "e"}), key(upstream={"data": "d", "more": "f"}),
    ]
    assert len(set(changed)) == len(changed)
    assert key() == key(sections={"values": ValuesConfig(width=256)})


SPEC = Spec("some/log-v0", {"type": "Box", "shape": [3], "dtype": "float32"}, [-1.0], [1.0], [1], "float32")


def keys_of(config: RunConfig, content: str = "log", spec: Spec = SPEC) -> dict[str, str]:
    return {part.name: part.key for part in Parts(config, content, spec).until("evaluate")}


REACHES = {f"reach:{reach}" for reach in ActorConfig().reaches}
CORRECTED = ("distill:draft-1", "walk:1", "distill:draft-2", "walk:2", "distill")
POLICIES = {"distill", "distill:no_imagination", "choose", "evaluate"}


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("values.width=8", {"values", "imagine", *POLICIES}),
        ("values.precision=bfloat16", {"values", "imagine", *POLICIES}),
        ("world_model.width=8", {"world_model", "imagine", "distill", "choose", "evaluate"}),
        ("planner.horizon=3", {"imagine", "distill", "choose", "evaluate"}),
        ("planner.precision=bfloat16", {"imagine", "distill", "choose", "evaluate"}),
        ("accept.margin=0.5", {"distill", "choose", "evaluate"}),
        ("distill.eta=0.1", POLICIES),
        ("choose.noise_std=0.2", {"choose", "evaluate"}),
        ("evaluate.episodes=3", {"evaluate"}),
        ("data.discount=0.9", {"values", "world_model", "imagine", *POLICIES}),
        ("seed=1", {"values", "world_model", "imagine", *POLICIES}),
        ("runtime.threads=7", set()),
        ("runtime.device=cuda", set()),
    ],
)
def test_a_change_makes_anew_what_stands_on_it_and_nothing_else(word: str, changed: set[str]):
    before, after = keys_of(load()), keys_of(load(overrides=[word]))
    assert {name for name in before if before[name] != after[name]} == changed


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("actor.rounds=3", {*REACHES, "actor", "imagine", *CORRECTED, "choose", "evaluate"}),
        ("choose.known=0.9", {*REACHES, "actor", "imagine", *CORRECTED, "choose", "evaluate"}),
        ("accept.range_margin=0.5", {*REACHES, "actor", "imagine", *CORRECTED, "choose", "evaluate"}),
        ("world_model.width=8", {"world_model", *REACHES, "actor", "imagine", *CORRECTED, "choose", "evaluate"}),
        ("imagine.length=20", {"imagine", *CORRECTED, "choose", "evaluate"}),
        ("accept.margin=0.5", {*CORRECTED, "choose", "evaluate"}),
        ("correct.length=9", {*CORRECTED[1:], "choose", "evaluate"}),
        ("correct.updates=0.5", {*CORRECTED[2:], "choose", "evaluate"}),
        ("actor.noise_std=0.2", {*REACHES, "actor", "imagine", *CORRECTED, "choose", "evaluate"}),
    ],
)
def test_an_actor_stands_between_the_world_model_and_its_imagination(word: str, changed: set[str]):
    before, after = (keys_of(load(overrides=["planner.kind=actor", *words])) for words in ((), (word,)))
    assert {name for name in before if before[name] != after[name]} == changed


@pytest.mark.parametrize(
    ("kind", "ignored"),
    [
        ("actor", ["candidates=7", "noise_std=0.3", "temperature=1", "disagreement_penalty=1", "reach=0.1",
                   "iterations=2", "precision=bfloat16"]),
        ("gradient", ["candidates=7", "noise_std=0.3", "temperature=1"]),
        ("mpc", ["reach=0.1", "iterations=2"]),
        ("greedy_q", ["horizon=2", "temperature=1", "disagreement_penalty=1", "reach=0.1", "iterations=2"]),
    ],
)
def test_what_a_kind_of_plans_does_not_read_makes_nothing_anew(kind: str, ignored: list[str]):
    words = [f"planner.kind={kind}"]
    before = keys_of(load(overrides=words))
    assert before == keys_of(load(overrides=[*words, *(f"planner.{word}" for word in ignored)]))
    for name in set(PlannerConfig.model_fields) - {word.partition("=")[0] for word in ignored} - {"kind"}:
        value = {"precision": "bfloat16", "candidates": 7, "iterations": 2, "horizon": 2}.get(name, 0.5)
        assert before != keys_of(load(overrides=[*words, f"planner.{name}={value}"])), name


def test_what_an_actor_is_told_changes_no_other_plans():
    assert keys_of(load()) == keys_of(load(overrides=["actor.rounds=3", "correct.rounds=2", "correct.updates=0.5"]))


def test_a_draft_is_what_would_be_kept_without_corrections():
    words = ["planner.kind=actor", "correct.rounds="]
    none, one, two = (keys_of(load(overrides=[words[0], words[1] + str(rounds)])) for rounds in range(3))
    assert none["distill"] == one["distill:draft-1"] == two["distill:draft-1"]
    assert one["distill"] == two["distill:draft-2"] and one["walk:1"] == two["walk:1"] != two["walk:2"]
    assert len({k["distill"] for k in (none, one, two)}) == 3


def test_another_log_makes_everything_anew():
    before, after = keys_of(load(), "log"), keys_of(load(), "another")
    assert not set(before.values()) & set(after.values())


def test_an_environment_that_is_named_later_is_evaluated_in_and_nothing_is_learned_anew():
    before, after = keys_of(load()), keys_of(load(), spec=replace(SPEC, env_spec="{}", ref_max_score=100.0))
    assert {name for name in before if before[name] != after[name]} == {"evaluate"}


def test_the_digest_sees_name_dtype_shape_and_values():
    one = torch.tensor([1.0, 2.0])
    others = [
        {"a": one}, {"b": one}, {"a": one.double()}, {"a": one[None]}, {"a": torch.tensor([1.0, 2.5])},
        {"a": one, "b": torch.zeros(0)},
    ]
    assert len({tensor_digest(o) for o in others}) == len(others)
    assert tensor_digest({"b": one, "a": -one}) == tensor_digest({"a": -one, "b": one.clone()})


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "artifact.json"
    write_atomic(path, "old")

    def broken(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["artifact.json"]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_restoring_drops_the_metrics_after_the_checkpoint(tmp_path: Path):
    workspace = Workspace(tmp_path / "values" / "k")
    for step in (10, 20, 30):
        workspace.log(step, 40, {"loss": 1.0 / step})
        if step == 20:
            workspace.checkpoint(step, {"w": torch.tensor([2.0])}, {"note": "kept"})
    restored = Workspace(workspace.path).restore()
    assert restored is not None
    assert restored[0]["w"].tolist() == [2.0] and (restored[1]["step"], restored[1]["note"]) == (20, "kept")
    assert [row["step"] for row in read_jsonl(workspace.path / "metrics.jsonl")] == [10, 20]


def test_without_a_checkpoint_the_curve_begins_anew(tmp_path: Path):
    workspace = Workspace(tmp_path / "values" / "k")
    workspace.log(10, 40, {"loss": 1.0})
    assert Workspace(workspace.path).restore() is None
    assert read_jsonl(workspace.path / "metrics.jsonl") == []


def test_a_damaged_checkpoint_is_none(tmp_path: Path):
    Workspace(tmp_path).checkpoint(5, {"w": torch.ones(3)})
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[:-4])
    assert load_checkpoint(tmp_path) is None
    assert not (tmp_path / CHECKPOINT).exists()


def test_time_spent_counts_over_resumes(tmp_path: Path):
    later = Workspace(tmp_path)
    later.rewind({"step": 5, "seconds": 100.0})
    assert later.seconds >= 100.0


def test_nothing_non_finite_is_saved(tmp_path: Path):
    workspace = Workspace(tmp_path / "values" / "k")
    bad = {"w": torch.tensor([1.0, float("nan"), float("inf")])}
    with pytest.raises(FloatingPointError, match="2 of 3 values of w"):
        workspace.checkpoint(5, bad)
    with pytest.raises(FloatingPointError, match="2 of 3 values of w"):
        workspace.finish(bad, {})
    with pytest.raises(FloatingPointError, match=r"values: q_loss not finite at step 5: lower the learning rate"):
        workspace.log(5, 10, {"q_loss": float("nan"), "v_loss": 1.0})
    assert list(workspace.path.iterdir()) == []


# --- the store --------------------------------------------------------------------------------------------------------


def finished(store: Store, step: str = "values", value: float = 1.0) -> Artifact:
    """Claim, make and commit an artifact."""
    with store.claim(step, KEY) as folder:
        workspace = Workspace(folder)
        workspace.log(1, 1, {"loss": 0.5})
        workspace.checkpoint(1, {"w": torch.tensor([value])})
        (workspace.path / "ray").mkdir()
        (workspace.path / "ray" / "state.bin").write_bytes(b"of an engine")
        workspace.finish({"w": torch.tensor([value])}, {"rmse": 0.25}, more="described")
        return store.commit(step, KEY, version=3, parts={"seed": 0})


def test_a_committed_artifact_is_found_by_its_key(tmp_path: Path):
    store = Store(tmp_path)
    assert store.find("values", KEY) is None
    made = finished(store)
    found = store.find("values", KEY)
    assert found is not None and found.path == made.path
    assert found.diagnostics == {"rmse": 0.25} and found.tensors()["w"].tolist() == [1.0]
    stated = {"schema": SCHEMA, "step": "values", "version": 3, "key": KEY, "parts": {"seed": 0}, "more": "described"}
    assert stated.items() <= found.described.items()
    assert found.digest == tensor_digest({"w": torch.tensor([1.0])})
    assert [row["loss"] for row in found.curve()] == [0.5]
    assert sorted(p.name for p in found.path.iterdir()) == ["artifact.json", "metrics.jsonl", "tensors.safetensors"]


def test_what_is_done_is_not_claimed_again(tmp_path: Path):
    store = Store(tmp_path)
    finished(store)
    with store.claim("values", KEY) as done, store.claim("distill", KEY) as other:
        assert done is None and other == store.folder("distill", KEY)


def test_a_second_claim_waits_and_reuses(tmp_path: Path):
    store = Store(tmp_path)
    waiting, owned = threading.Event(), []
    told: list[tuple[str, int]] = []

    def tell(step: str, owner: dict[str, Any]) -> None:
        told.append((step, owner["pid"]))
        waiting.set()

    def second() -> None:
        with store.claim("values", KEY, waiting=tell) as folder:
            owned.append(folder)

    with store.claim("values", KEY) as folder:
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(20.0) and not owned
        Workspace(folder).finish({"w": torch.ones(1)}, {})
        store.commit("values", KEY, version=1, parts={})
    thread.join(20.0)
    assert owned == [None] and told == [("values", os.getpid())]
    assert store.find("values", KEY) is not None


def test_a_claim_given_up_is_free_with_its_checkpoint(tmp_path: Path):
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.claim("values", KEY) as folder:
        Workspace(folder).checkpoint(7, {"w": torch.ones(1)})
        raise KeyboardInterrupt
    with store.claim("values", KEY) as folder:
        restored = load_checkpoint(folder.path)
        assert restored is not None and restored[1]["step"] == 7


def test_an_unknown_schema_is_refused_with_the_remedy(tmp_path: Path):
    made = finished(Store(tmp_path))
    path = made.path / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(UserError, match=rf"schema 99, this version of ipd_ray reads {SCHEMA}: remove the folder"):
        _ = made.diagnostics


def test_damaged_tensors_are_refused_with_the_remedy(tmp_path: Path):
    made = finished(Store(tmp_path))
    path = made.path / "tensors.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="do not match their digest: remove the folder"):
        made.tensors()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot be read .*remove the folder"):
        made.tensors()


def test_an_optimiser_goes_on_bit_for_bit():
    def make() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()

    parameter, optimizer = make()
    for _ in range(3):
        step(parameter, optimizer)
    saved = {**optimizer_tensors(optimizer), "model.w": parameter.detach().clone()}
    saved = {name: value.clone() for name, value in saved.items()}
    again, resumed = make()
    again.data.copy_(saved["model.w"])
    load_optimizer(resumed, saved)
    for _ in range(3):
        step(parameter, optimizer)
        step(again, resumed)
    assert torch.equal(parameter, again)
    assert tensor_digest(optimizer_tensors(optimizer)) == tensor_digest(optimizer_tensors(resumed))


def test_prefixes_come_off_as_they_went_on():
    tensors = {"a.b": torch.ones(1), "ab": torch.zeros(1)}
    assert stripped("p", {**prefixed("p", tensors), "pp.a": torch.ones(2)}) == tensors
