"""The report of run folders that are written by hand here: nothing is trained."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from ipd_ray.artifacts import prefixed, save_tensors, tensor_digest
from ipd_ray.config import PolicyConfig, RunConfig, ValuesConfig, as_yaml
from ipd_ray.data.columns import write_columns
from ipd_ray.data.shards import Segments, write_shard
from ipd_ray.data.transitions import Spec, Transitions
from ipd_ray.distill.policy import TransformerPolicy
from ipd_ray.errors import UserError
from ipd_ray.report import build_report, figures
from ipd_ray.report.film import Film, film, record_or_reason
from ipd_ray.report.findings import findings
from ipd_ray.report.sections import SECTIONS
from ipd_ray.report.source import open_views
from ipd_ray.storage import Folder
from ipd_ray.values.networks import ValueFunctions

HOSTILE = "<script>alert('x')</script>&\"mine\"/v0"
PENDULUM = gym.spec("Pendulum-v1").to_json()
L = 3


def transitions(dataset: str) -> Transitions:
    rng = np.random.default_rng(0)
    observation = rng.normal(size=(40, 3)).astype(np.float32)
    return Transitions(
        observation=observation, action=np.zeros((40, 1), np.float32), reward=rng.normal(size=40).astype(np.float32),
        next_observation=observation + 0.1, terminal=np.zeros(40, bool), episode_start=np.arange(0, 41, 10),
        spec=Spec(dataset, {"type": "Box", "shape": [3], "dtype": "float32"}, [-2.0], [2.0], [1], "float32", PENDULUM),
    )


def segments(data: Transitions) -> Segments:
    index = np.array([0, 4, 11, 15, 22, 30])
    S = len(index)
    zeros = np.zeros((S, L), np.float32)
    return Segments(
        index=index, episode=index // 10, timestep=index % 10, control=index > 20,
        observation=np.repeat(data.observation[index][:, None], L + 1, 1), action=zeros[..., None],
        imitated=zeros[..., None],
        reward=zeros, terminal=zeros > 0, uncertainty=zeros + 0.1, value=np.tile(np.linspace(-1, 1, S)[:, None], L + 1),
        own_reward=zeros, own_terminal=zeros > 0, own_length=np.full(S, L), own_value=np.zeros((S, L + 1), np.float32),
    )


IMAGINED = {
    "segments": 6, "accepted": 3, "accept_rate": 0.5, "accepted_steps": 9, "accept_rate_control": 0.4, "kappa": 0.2,
    "accept_rate_flagged": 0.6, "imagined_mean": 1.5, "own_mean": 1.0, "survival_by_depth": [1.0, 0.9, 0.8],
    "by_distance_to_termination": {"ends_within_10": {"starts": 2, "accept_rate": 0.1, "gain": 1.0},
                                   "later_or_never": {"starts": 4, "accept_rate": 0.6, "gain": 1.0}},
    "rejections": {"too_short": 0.1, "not_over_log": 0.3},
}
HEALTHY = {
    "values": {
        "mc_rows": 40, "rank_correlation": 0.8, "rank_correlation_q": 0.8, "rank_correlation_linear": 0.5,
        "rank_correlation_timestep": 0.2, "gap_by_decile": [0.4, 0.2, 0.1, -0.1], "v_std": 1.0,
        "sample": {"value": [1.0, 2.0, 3.0], "return": [1.1, 1.9, 3.2]},
    },
    "world_model": {
        "rmse": 0.1, "rmse_linear": 0.5, "rmse_constant": 1.0, "reward_rmse": 0.1, "share_at_variance_floor": 0.3,
        "uncertainty_rank_correlation": {"spread": 0.7, "primal": 0.4, "dual": 0.3},
        "rollout_rmse_by_depth": {"model": [0.1, 0.2, 0.3], "still": [0.3, 0.5, 0.7]},
        "termination": {"true": 0, "found": 0, "false_alarms": 0, "steps": 10},
        "sample": {"uncertainty": [0.1, 0.2, 0.4], "error": [0.1, 0.3, 0.5]},
    },
    "imagine": {"shards": 1, "segments": 6, "steps": 18},
    "distill": {"imagined_ratio": 0.5, "imagined": IMAGINED},
    "evaluate": {"returns": [10.0, 11.0, 12.0]},
    "distill:bc": {"imagined_ratio": 0.0, "imagined": {}},
    "evaluate:bc": {"returns": [4.0, 5.0, 6.0]},
}


def scores(mean: float) -> dict[str, float]:
    return {"return_mean": mean, "return_std": 1.0, "episodes": 20, "normalised": 50.0, "discounted_mean": 1.0,
            "value_at_start": 1.0}


def write_run(
    folder: Path, *, dataset: str = "test/run-v0", seed: int = 0, changes: dict[str, dict] | None = None,
    config: RunConfig | None = None,
) -> Path:
    """A run folder with all parts; `changes` updates their diagnostics."""
    store = folder.parent / f"store-{folder.name}"
    data = transitions(dataset)
    write_columns(store / "data" / f"{data.content_hash[:24]}.safetensors", data)
    links = {}
    for name, diagnostics in HEALTHY.items():
        step, key = name.partition(":")[0], name.replace(":", "-").ljust(24, "0")
        path = store / step / key
        path.mkdir(parents=True)
        content = {**diagnostics, **(changes or {}).get(name, {})}
        described = {"schema": 1, "step": step, "key": key, "diagnostics": content, "seconds": 1.0, "reward_scale": 1.0}
        (path / "artifact.json").write_text(json.dumps(described))
        links[name] = {"key": key, "path": str(path)}
    imagine = Path(links["imagine"]["path"])
    write_shard(Folder.of(imagine), 0, segments(data), {"reward_gain": 0.5, "steps": 18})
    folder.mkdir()
    rows = [{"part": p, "step": i, "total": 20, "loss": 1 / i, "advantage": i - 5.0}
            for p in ("values", "world_model", "distill", "distill:bc") for i in (5, 10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "dataset": dataset, "seed": seed, "policy": scores(11.0), "bc": scores(5.0), "imagined": IMAGINED,
        "seconds": {"values": 60.0, "distill": 30.0},
        "data": {"return_mean": 3.0, "return_std": 2.0, "return_max": 7.0, "episodes": 4, "steps": 40},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "links.json").write_text(json.dumps(links))
    (folder / "config.yaml").write_text(as_yaml(config or RunConfig(seed=seed)))
    (folder / "run.json").write_text(json.dumps(
        {"schema": 1, "dataset": dataset, "content_hash": data.content_hash, "seed": seed, "store": str(store)}
    ))
    return folder


def write_policy(path: Path) -> Path:
    """A policy artifact with random weights."""
    values, policy = ValuesConfig(width=8), PolicyConfig(context=2, layers=1, heads=1, width=8)
    tensors = {
        **prefixed("policy", TransformerPolicy(3, 1, policy, prompted=True).state_dict()),
        **prefixed("values", ValueFunctions(3, 1, values).state_dict()),
    }
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(path / "tensors.safetensors", tensors)
    (path / "artifact.json").write_text(json.dumps({
        "schema": 1, "step": "distill", "digest": tensor_digest(tensors),
        "spec": json.loads(transitions("test/run-v0").spec.to_json()),
        "reward_scale": 1.0, "prompt": "value", "discount": 0.99, "target_return": None,
        "policy": policy.model_dump(mode="json"),
        "values": {"values": values.model_dump(mode="json"), "observation_dim": 3, "action_dim": 1},
    }))
    return path


def page_of(*folders: Path) -> str:
    return build_report(folders, folders[0].parent / "report.html").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The report of a whole run with a policy that can be filmed."""
    folder = write_run(tmp_path_factory.mktemp("whole") / "run", config=RunConfig.model_validate(
        {"evaluate": {"max_steps": 12}}
    ))
    write_policy(folder / "policy")
    return page_of(folder)


def section_of(run: Path, name: str) -> str:
    """One section, without drawing the others."""
    return next(s for s in SECTIONS if s.id == name).make(open_views([run])[0])


def section(page: str, name: str) -> str:
    return re.search(rf'<section><h2 id="{name}">.*?</section>', page, re.S).group(0)


def count_figures(page: str) -> dict[str, int]:
    return {s.id: section(page, s.id).count("<svg") for s in SECTIONS}


def test_a_whole_run_has_every_section_with_its_figures(page):
    # curves: values and world model, positive and signed; imagine; distill, each metric
    assert count_figures(page) == {
        "curves": 7, "returns": 1, "values": 3, "world-model": 4, "imagination": 4, "film": 0,
    }
    assert section(page, "film").count("<img") == 10
    assert "11 ± 1" in section(page, "headline")
    assert "1 min 30 s" in section(page, "headline")
    assert all("<b>Bad:</b>" in section(page, s.id) for s in SECTIONS)


class Balance(html.parser.HTMLParser):
    """Checks that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == []


def test_the_verdict_on_segments_is_that_of_acceptance(tmp_path):
    # I = gamma^3 V(s_3) must exceed B = 0 and V(s_0), by 0.1 spreads of V = 1. V is constant along a segment, so
    # I = 0.97 V is never over V(s_0): nothing passes.
    view = open_views([write_run(tmp_path / "run")])[0]
    assert view.judged.accepted.sum() == 0
    np.testing.assert_allclose(view.judged.imagined, 0.99**3 * np.linspace(-1, 1, 6), rtol=1e-5)


def test_a_healthy_run_has_no_warning(tmp_path):
    assert [f for f in findings(open_views([write_run(tmp_path / "run")])[0]) if f.warning] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"values": {"rank_correlation": 0.1}}, "no better (0.10) than the time step alone (0.20)"),
        ({"values": {"gap_by_decile": [0.0, 1.5]}}, "overestimates"),
        ({"world_model": {"rmse": 0.5}}, "no better (error 0.500) than a linear fit (0.500)"),
        ({"world_model": {"uncertainty_rank_correlation": {"spread": 0.19}}}, "hardly follows the true error"),
        ({"world_model": {"rollout_rmse_by_depth": {"model": [1.0, 2.0], "still": [1.5, 2.0]}}}, "At depth 2"),
        ({"world_model": {"termination": {"true": 10, "found": 4}}}, "4 of 10 held-out terminations"),
        ({"distill": {"imagined": {**IMAGINED, "accept_rate": 0.019}}}, "accepted (1.9 %)"),
        ({"distill": {"imagined": {**IMAGINED, "imagined_mean": 4.1}}}, "3.1 spreads of V more"),
    ],
)
def test_a_failed_diagnostic_is_read_first(tmp_path, changes, said):
    warnings = [f.text for f in findings(open_views([write_run(tmp_path / "run", changes=changes)])[0]) if f.warning]
    assert len(warnings) == 1
    assert said in warnings[0]


@pytest.mark.parametrize(
    ("got", "said"),
    [
        (0.2, "never more than the share of segments that passed, 20 %"),
        (0.1, "no imagined step is drawn more often than distill.reuse_cap allows"),
    ],
)
def test_what_kept_imagination_out_of_the_mixture_is_named(tmp_path, got, said):
    changes = {"distill": {"imagined_ratio": got, "imagined": {**IMAGINED, "accept_rate": 0.2}}}
    run = write_run(tmp_path / "run", changes=changes)
    assert said in " ".join(f.text for f in findings(open_views([run])[0]))


def test_the_value_without_an_environment_is_on_the_page(tmp_path):
    run = write_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    for sem, shown in ((0.5, "0.5"), (None, "–")):
        offline = {"value_mean": 12.2, "value_sem": sem, "log_value": 9.75}
        (run / "summary.json").write_text(json.dumps({**summary, "fitted_q": offline}))
        page = build_report([run], tmp_path / "page.html").read_text()
        assert f"12.2 ± {shown}, the log's 9.75" in page


def test_what_nothing_accepted_is_worth_is_a_dash_on_the_page(tmp_path):
    run = write_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    nothing = {**IMAGINED, "accepted": 0, "imagined_mean": None, "own_mean": None}
    (run / "summary.json").write_text(json.dumps({**summary, "imagined": nothing}))
    page = build_report([run], tmp_path / "page.html").read_text()
    assert 'imagined I against the log\'s B</th><td>–</td>' in page


@pytest.mark.parametrize(
    ("diagnostics", "warning", "said"),
    [
        ({"round": 9, "reach": 0.1, "behaviour_return": 5.0, "return_mean": 8.0}, False,
         "of reach 0.1 earns 8, the behaviour policy that it changes 5."),
        ({"round": 9, "reach": 0.1, "behaviour_return": 5.0, "return_mean": 8.0, "reaches": {"0.2": 6.0, "0.1": 8.0}},
         False, "changes 5; 6 with 0.2. It is the smallest one: actor.reaches may go on there."),
        ({"round": 9, "reach": 0.2, "behaviour_return": 5.0, "return_mean": 8.0,
          "reaches": {"0.1": 7.0, "0.4": 6.0, "0.2": 8.0}}, False, "changes 5; 7 with 0.1, 6 with 0.4."),
        ({"round": 0, "behaviour_return": 5.0, "return_mean": 5.0}, True, "no round of the actor earned more"),
    ],
)
def test_what_an_actor_came_to_is_said(tmp_path, monkeypatch, diagnostics, warning, said):
    monkeypatch.setitem(HEALTHY, "actor", diagnostics)
    found = findings(open_views([write_run(tmp_path / "run")])[0])
    assert [f.warning for f in found if said in f.text] == [warning]


@pytest.mark.parametrize(
    ("errors", "warning", "said"),
    [
        ((0.124, 0.045), False, "they were 0.124 and then 0.045 from what their actor would have done there"),
        ((0.124, 0.2), True, "They do not come closer: raise correct.updates"),
        ((0.124,), False, "11 % ended and 5 % left what is known."),
    ],
)
def test_how_far_drafts_were_from_their_actor_is_said(tmp_path, monkeypatch, errors, warning, said):
    for k, error in enumerate(errors, 1):
        monkeypatch.setitem(HEALTHY, f"walk:{k}", {"imitation_rmse": error, "ended": 0.11, "left": 0.05})
    found = findings(open_views([write_run(tmp_path / "run")])[0])
    assert [f.warning for f in found if said in f.text] == [warning]


def test_no_line_has_the_colour_of_what_has_one_of_its_own():
    names = ["draft 1", "policy", "no imagination", "draft 2"]
    of = dict(zip(names, figures._colours(names), strict=True))
    assert (of["policy"], of["no imagination"]) == (figures.BLUE, figures.GREEN)
    assert len(set(of.values())) == 4


def test_the_bounds_at_which_episodes_end_are_on_the_page(tmp_path):
    ends = {"below": {"0": 0.7, "1": -0.2}, "above": {"1": 0.2}, "within": 0.25}
    run = write_run(tmp_path / "run", changes={"world_model": {"ends": ends}})
    said = build_report([run], tmp_path / "page.html").read_text().partition("Every logged episode ended")[2]
    for part in ("observation 0 below", "or observation 1 below", "or observation 1 above", "explains 75 % of all"):
        assert part in said[:250]


@pytest.mark.parametrize(("halted", "warned"), [((0.9, 0.4), False), ((0.9, 0.6), True)])
def test_a_choice_between_policies_that_are_all_halted_is_said_to_be_blind(tmp_path, monkeypatch, halted, warned):
    rows = [{"variant": "ipd", "step": 10 * i, "return_mean": 1.0, "halted": h} for i, h in enumerate(halted)]
    monkeypatch.setitem(HEALTHY, "choose", {"candidates": rows, "variant": "ipd", "step": 10})
    found = findings(open_views([write_run(tmp_path / "run")])[0])
    assert any("at least 60 % of each policy's episodes" in f.text and f.warning for f in found) == warned


def test_a_policy_below_its_data_or_its_ablation_is_read_first(tmp_path):
    run = write_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "policy": {**scores(2.0), "value_at_start": 50.0}}))
    first = " ".join(f.text for f in findings(open_views([run])[0]) if f.warning)
    assert "The policy (2) is no better than the mean of its data (3)" in first
    assert "is behind its ablation BC (5)" in first
    assert "V promises more than the policy collects" in first


@pytest.mark.parametrize(("length", "said"), [(10.0, False), (11.0, False), (12.0, True)])
def test_returns_of_longer_episodes_are_not_compared_with_the_data_s(tmp_path, length, said):
    run = write_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["data"].update(longest_cut=10, time_limit=10)
    (run / "summary.json").write_text(json.dumps({**summary, "policy": {**scores(2.0), "length_mean": length}}))
    first = " ".join(f.text for f in findings(open_views([run])[0]) if f.warning)
    assert ("last 12 steps, the log's 10 at most: set evaluate.max_steps=10" in first) == said
    assert ("no better than the mean of its data" in first) != said


def test_the_share_of_episodes_that_succeed_is_beside_the_return(tmp_path, monkeypatch):
    monkeypatch.setattr("ipd_ray.report.page.SECTIONS", ())
    run = write_run(tmp_path / "run")
    assert "succeed" not in section(page_of(run), "headline")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "policy": {**scores(2.0), "success": 0.45}}))
    assert "Episodes that succeed" in (text := section(page_of(run), "headline")) and "45 %" in text


@pytest.mark.parametrize(
    ("part", "where", "said"),
    [
        ("values", "values", "No values:"),
        ("world_model", "world-model", "No world model:"),
        ("imagine", "imagination", "the shards or the log are not in the store"),
        ("distill", "imagination", "Nothing to say of imagined segments:"),
        ("distill", "film", "No policy to show:"),
        ("evaluate", "returns", "No evaluation: skipped, since no environment"),
    ],
)
def test_a_pruned_part_is_said(tmp_path, part, where, said):
    run = write_run(tmp_path / "run")
    shutil.rmtree(json.loads((run / "links.json").read_text())[part]["path"])
    assert said in section_of(run, where)


def test_a_run_that_has_hardly_begun_has_a_report(tmp_path):
    run = write_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "store-run")
    for name in ("links.json", "summary.json", "metrics.jsonl"):
        (run / name).unlink()
    page = page_of(run)
    assert sum(count_figures(page).values()) == 0
    assert "the run has not ended" in page
    assert page.count("it ended before that step") >= 6


def test_an_artifact_of_another_schema_is_said_without_its_path(tmp_path):
    run = write_run(tmp_path / "run")
    path = Path(json.loads((run / "links.json").read_text())["values"]["path"])
    (path / "artifact.json").write_text(json.dumps({"schema": 99}))
    assert "of another version of ipd_ray" in section_of(run, "values")


def test_nothing_is_loaded_from_anywhere(page):
    targets = re.findall(r'(?:src|href|action)\s*=\s*["\']?([^"\'> ]*)', page)
    assert [t[:60] for t in targets if not t.startswith(("#", "data:"))] == []
    assert "@import" not in page and not re.search(r"url\((?![\"']?#)", page)
    assert "<script" not in page
    # what is left of http names a namespace, which nobody fetches
    assert set(re.findall(r"https?://[^\"'<> ]+", page)) <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}


def test_where_things_lie_is_not_told(page, tmp_path):
    assert str(tmp_path.parent) not in page


def test_what_users_write_is_text(tmp_path):
    config = RunConfig.model_validate({"evaluate": {"environment": "<b>mine:make</b>"}})
    run = write_run(tmp_path / "<i>$run", dataset=HOSTILE, config=config)
    shutil.rmtree(tmp_path / "store-<i>$run")
    page = page_of(run)
    assert "<script>" not in page and "<i>" not in page and "<b>mine" not in page
    assert "&lt;i&gt;$run" in page and "&lt;b&gt;mine:make" in page


def test_runs_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr("ipd_ray.report.page.SECTIONS", [s for s in SECTIONS if s.id == "values"])
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", seed=1, config=RunConfig.model_validate({"seed": 1, "planner": {"horizon": 9}}))
    page = page_of(one, two)
    rows = re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td>', section(page, "differences"))
    assert rows == [("seed", "0", "1"), ("planner.horizon", "5", "9")]
    assert section(page, "headline").count("<td>11 ± 1</td>") == 2
    assert section(page, "headline").count("<svg") == 1
    assert section(page, "values").count("<svg") == 6


def test_runs_of_one_name_are_told_apart(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    views = open_views([write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")])
    assert [view.label for view in views] == ["a/run", "b/run"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        build_report([tmp_path], tmp_path / "report.html")


def test_an_unchanged_run_is_not_drawn_again(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    monkeypatch.setattr("ipd_ray.report.page.SECTIONS", ())
    page = build_report([run], run / "report.html")
    before = page.stat().st_mtime_ns
    assert build_report([run], page).stat().st_mtime_ns == before
    (run / "summary.json").write_text((run / "summary.json").read_text().replace("60.0", "61.0"))
    assert build_report([run], page).stat().st_mtime_ns != before


def test_a_figure_is_the_same_text_each_time():
    def draw() -> str:
        return figures.depth_lines({"a": [1.0, 2.0]}, y="error", alt="<b>")

    assert draw() == draw()
    assert 'aria-label="&lt;b&gt;"' in draw()


def test_a_film_shows_the_policy_in_its_environment(tmp_path):
    found = film(write_policy(tmp_path / "policy"), None, seed=3, max_steps=12)
    assert isinstance(found, Film)
    assert (found.length, found.whole, found.seed) == (12, True, 3)
    assert found.steps[0] == 0 and found.steps[-1] == 12 and len(found.frames) == 10
    assert found.collected == sorted(found.collected, reverse=True)  # Pendulum's rewards are costs


def test_no_film_has_a_reason(tmp_path):
    policy = write_policy(tmp_path / "policy")
    assert "UserError: evaluate.environment=no_such_module:make" in record_or_reason(policy, "no_such_module:make")
    described = json.loads((policy / "artifact.json").read_text())
    (policy / "tensors.safetensors").unlink()
    assert "tensors.safetensors cannot be read" in record_or_reason(policy, None)
    described["spec"]["env_spec"] = None
    (policy / "artifact.json").write_text(json.dumps(described))
    assert "names no environment" in film(policy, None, seed=0, max_steps=None)


def test_an_environment_that_may_crash_is_filmed_in_a_process_of_its_own(tmp_path):
    gym.register("IpdTestFilm-v0", entry_point="gymnasium:make", kwargs={"id": "Pendulum-v1"})  # in this process alone
    found = film(write_policy(tmp_path / "policy"), "IpdTestFilm-v0", seed=3, max_steps=5)
    del gym.registry["IpdTestFilm-v0"]
    assert isinstance(found, Film), found
    assert found.steps == [0, 1, 2, 3, 4, 5]


def test_max_steps_ends_the_film_of_a_users_own_environment(tmp_path):
    found = record_or_reason(write_policy(tmp_path / "policy"), "gymnasium.envs.classic_control:PendulumEnv", 3, 5)
    assert isinstance(found, Film), found
    assert (found.length, found.whole) == (5, True)


@pytest.mark.browser
def test_the_page_renders_in_a_browser(page, tmp_path):
    """A copy of the page with a probe appended: it writes what it measured into the title, which --dump-dom prints."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"NO BROWSER: none of {', '.join(names)} is installed, so nobody has looked at the report")
    probe = """<script>addEventListener("load", () => {
      const empty = e => { const b = e.getBoundingClientRect(); return b.width < 40 || b.height < 40; };
      const all = [...document.querySelectorAll("svg, img")];
      const broken = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
      const wide = document.documentElement.scrollWidth > innerWidth;
      console.log("probe ran");
      document.title = JSON.stringify({all: all.length, empty: all.filter(empty).length, broken, wide});
    });</script>"""
    copy = tmp_path / "probed.html"
    copy.write_text(page.replace("</body>", probe + "</body>"))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--window-size=1200,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1 and "probe ran" in said[0]
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout).group(1).replace("&quot;", '"'))
    assert found == {"all": page.count("<svg") + page.count("<img"), "empty": 0, "broken": 0, "wide": False}
