"""The config: what it refuses, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ipd_ray.config import RunConfig, as_yaml, build, field_names, flatten, label_selector, load, preset_names
from ipd_ray.errors import UserError


def in_file(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("word", "near"),
    [("planner.horizn=8", "planner.horizon"), ("planer.horizon=8", "planner.horizon"), ("sed=1", "seed")],
)
def test_a_mistyped_word_names_the_near_field(word: str, near: str):
    with pytest.raises(UserError, match=f"Did you mean .*'{near}'"):
        load(overrides=[word])


@pytest.mark.parametrize("text", ["planner: {horizn: 8}", "planer:\n  horizon: 8\n"])
def test_a_mistyped_name_in_a_file_names_the_near_field(text: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"Did you mean .*'planner\.horizon'"):
        load(path=in_file(tmp_path, text))


def test_a_mistyped_preset_names_the_near_one():
    with pytest.raises(UserError, match="Did you mean 'demo'"):
        load("dmo")


def test_a_word_without_a_value_shows_how_to_write_one():
    with pytest.raises(UserError, match=r"such as planner\.horizon=8"):
        load(overrides=["planner.horizon"])


def test_a_section_given_a_plain_value_is_told_to_be_a_section():
    with pytest.raises(UserError, match=r"planner is a section, its fields are named planner\.<field>"):
        load(overrides=["planner=8"])


def test_a_value_out_of_bounds_is_shown_with_its_field_and_bound():
    with pytest.raises(UserError, match=r"values\.expectile=1\.5 is not valid: input should be less than 1"):
        load(overrides=["values.expectile=1.5"])


def test_every_wrong_value_is_told_at_once():
    with pytest.raises(UserError) as error:
        load(overrides=["values.width=0", "distill.prompt=valeu"])
    assert "values.width=0" in str(error.value) and "distill.prompt='valeu'" in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["accept.min_length=11"], r"accept\.min_length=11 must lie in \[1, imagine\.length=10\]"),
        (["world_model.elites=8"], r"world_model\.elites=8 must be at most world_model\.members=7"),
        (["policy.width=30"], r"policy\.width=30 must be a multiple of policy\.heads=4"),
        (["runtime.workers=2"], r"runtime\.workers=2 needs runtime\.engine=ray"),
        (["runtime.actors=2", "runtime.min_actors=3"], r"runtime\.min_actors=3 must be at most runtime\.actors=2"),
        (
            ["runtime.engine=ray", "runtime.workers=20", "distill.batch_size=16"],
            r"runtime\.workers=20 must be at most distill\.batch_size=16",
        ),
        (["actor.reaches=[3]"], r"^actor\.reaches\.0=3 is not valid: input should be less than or equal to 2\.[^\n]*$"),
        (["runtime.engine=ray", "runtime.workers=65"], r"runtime\.workers=65 is not valid: .*less than or equal to 64"),
        (
            ["runtime.engine=ray", "runtime.workers=2", "runtime.min_workers=3"],
            r"runtime\.min_workers=3 must be at most runtime\.workers=2",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_both_named(words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        load(overrides=words)


def test_not_a_number_is_no_value():
    with pytest.raises(UserError, match=r"values\.learning_rate=nan"):
        load(overrides=["values.learning_rate=.nan"])


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_changes_only_what_it_names(name: str):
    assert load(name) == build(flatten(yaml.safe_load(as_yaml(load(name)))))


@pytest.mark.parametrize("labels", ["spot", "a=b,", "a=!b", "a=b, c=d", "a=b=c", "-a=b", "a/b/c=d"])
@pytest.mark.parametrize("name", ["actor_labels", "worker_labels"])
def test_labels_that_no_node_could_have_are_refused(name: str, labels: str):
    with pytest.raises(UserError, match=rf"runtime\.{name}='{labels}' must be name=value pairs .* ray\.io/market"):
        load(overrides=[f"runtime.{name}={labels}"])


def test_labels_are_pairs():
    assert load(overrides=["runtime.actor_labels=ray.io/market-type=spot,zone=a-1"]).runtime.actor_labels
    assert label_selector("ray.io/market-type=spot,zone=a-1") == {"ray.io/market-type": "spot", "zone": "a-1"}
    assert label_selector("") == {}


def test_later_layers_win(tmp_path: Path):
    # preset < file < words
    name = next(n for n in preset_names() if load(n).planner.horizon != RunConfig().planner.horizon)
    path = in_file(tmp_path, "planner: {horizon: 3, candidates: 7}")
    config = load(name, path, ["planner.candidates=9"])
    assert (config.planner.horizon, config.planner.candidates) == (3, 9)
    assert config.values == load(name).values


def test_what_is_printed_reads_back_as_the_same_config(tmp_path: Path):
    words = [
        "values.learning_rate=1e-5", "ablations=[bc, no_imagination]", "accept.threshold=0.25", "runtime.wandb='off'",
        "evaluate.environment=Pendulum-v1", "distill.prompt=fixed", "distill.target_return=-150", "seed=7",
    ]
    config = load(overrides=words)
    assert config != RunConfig()
    assert load(path=in_file(tmp_path, as_yaml(config))) == config


def test_every_knob_is_printed_under_its_meaning():
    lines = as_yaml(RunConfig()).splitlines()
    for name in field_names():
        leaf = name.split(".")[-1]
        at = [i for i, line in enumerate(lines) if line.strip().startswith(f"{leaf}:")]
        assert at and all(lines[i - 1].strip().startswith("# ") for i in at), name


def test_scientific_notation_is_a_number(tmp_path: Path):
    # YAML 1.1 reads 3e-4, which has no dot, as text.
    assert load(overrides=["values.learning_rate=3e-4"]).values.learning_rate == 0.0003
    assert load(overrides=["values.updates=1e5"]).values.updates == 100_000
    assert load(path=in_file(tmp_path, "values: {learning_rate: 3e-4}")).values.learning_rate == 0.0003


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().planner.horizon = 3  # type: ignore[misc]


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="must hold a mapping of sections, not list"):
        load(path=in_file(tmp_path, "- planner\n"))
    with pytest.raises(UserError, match="does not exist"):
        load(path=tmp_path / "none.yaml")
    assert load(path=in_file(tmp_path, "# nothing\n")) == RunConfig()


def test_the_word_off_is_a_value(tmp_path: Path):
    assert load(overrides=["runtime.wandb=off"]).runtime.wandb == "off"
    assert load(path=in_file(tmp_path, "runtime: {wandb: off}")).runtime.wandb == "off"


def test_a_key_that_is_no_text_is_refused_as_a_name(tmp_path: Path):
    with pytest.raises(UserError):
        load(path=in_file(tmp_path, "planner: {1: 2}"))


def test_an_empty_section_changes_nothing(tmp_path: Path):
    assert load(path=in_file(tmp_path, "planner:\n  # horizon: 8\nseed: 3\n")) == RunConfig(seed=3)
