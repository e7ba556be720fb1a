"""A run, its steps and their settings, and sweeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ipd_ray.cli.app import ConfigFile, Dataset, DryRun, Json, Overrides, Preset, RunDir, answers, app
from ipd_ray.text import answer, answer_json, counted, readable, table

if TYPE_CHECKING:
    from ipd_ray.config import RunConfig


def _run_command(until: str, dataset: str, overrides: Sequence[str] | None, preset: str | None, config: Path | None,
                 run_dir: str | None, dry_run: bool, as_json: bool) -> None:
    from ipd_ray import config as config_module

    settings = config_module.load(preset, config, overrides or ())
    if dry_run:
        _dry_run(dataset, settings, run_dir, until, as_json)
        return
    from ipd_ray.api import run
    from ipd_ray.listeners import terminal

    summary = run(dataset, settings, run_dir=run_dir, until=until, listeners=[terminal()])
    if as_json:
        answer_json(summary)
    answer(_summary_table(summary), to_stderr=as_json)


def _dry_run(dataset: str, settings: RunConfig, run_dir: str | None, until: str, as_json: bool) -> None:
    from ipd_ray.api import plan
    from ipd_ray.runs import human_bytes, human_seconds
    from ipd_ray.storage import near

    planned = plan(dataset, settings, run_dir=run_dir, until=until)
    if as_json:
        answer_json(planned)
        return

    def amount(value: float, show: Callable[[float], str]) -> str:
        return show(value) if value else "-"

    rows = [
        [row["step"], row["state"], amount(row["seconds"], human_seconds), amount(row["memory"], human_bytes),
         amount(row["disk"], human_bytes), row["key"][:12]]
        for row in planned["steps"]
    ]
    whole = planned["total"]
    space = [amount(whole[name], human_bytes) for name in ("memory", "disk")]
    rows.append(["in all", "", amount(whole["seconds"], human_seconds), *space, ""])
    folder, store = (near(planned[name]) for name in ("run_dir", "store"))
    print(f"{planned['dataset']}, run folder {folder}, store {store}\n")
    print(table(["step", "state", "time", "memory", "disk", "key"], rows))
    for remark in planned["remarks"]:
        print(f"\nnote: {remark}")
    print("\nEstimates, right within a factor of two or so, for this machine as busy as it is now; nothing was run.")


def _step_command(name: str, until: str, text: str) -> None:
    @app.command(name, help=text)
    @answers
    def command(
        dataset: Dataset, overrides: Overrides = None, preset: Preset = None, config: ConfigFile = None,
        run_dir: RunDir = None, dry_run: DryRun = False, as_json: Json = False,
    ) -> None:
        _run_command(until, dataset, overrides, preset, config, run_dir, dry_run, as_json)


_step_command("run", "evaluate", """The whole method: values, world model, imagination, distillation, evaluation.

What is finished is reused, what was stopped goes on, and a changed setting redoes only what depends on it.""")
_step_command("values", "values", "Step 1 of a run alone: V, Q and a behaviour policy.")
_step_command("world-model", "world_model", "A run up to step 2: the values and the world model.")
_step_command("actor", "actor", "A run up to the actor that learns inside the world model (planner.kind=actor).")
_step_command("imagine", "imagine", "A run up to steps 3 and 4: start states, and segments imagined from them.")
_step_command("distill", "distill", "A run up to step 5: the policy, and those that it is chosen from.")
_step_command("choose", "choose", "A run up to step 6: the policy that does best inside the world model.")
_step_command("evaluate", "evaluate", "A run up to step 7, the scores: the same as `run`.")


def _summary_table(summary: Mapping[str, Any]) -> str:
    """The last table: what the data held, what the policy reached, what was imagined."""
    from ipd_ray.runs import human_seconds, plans_in
    from ipd_ray.storage import Folder, near

    data, folder = summary["data"], Folder.of(summary["run_dir"])
    size = f"{data['episodes']:,} episodes, {data['steps']:,} steps"
    returns = f"return mean {readable(data['return_mean'])}, best {readable(data['return_max'])}"
    rows = [
        ("dataset", f"{summary['dataset']}, {size}; seed {summary['seed']}"),
        ("data", returns + _normalised(data)),
    ]
    for name in ("policy", "bc", "no_imagination"):
        if name in summary:
            s = summary[name]
            over = counted(s["episodes"], "episode")
            score = f"return {readable(s['return_mean'])} ± {readable(s['return_std'])} over {over}"
            reached = f"   success {100 * s['success']:.0f} %" if s.get("success") is not None else ""
            rows.append((name.replace("_", " "), score + _normalised(s) + reached))
    if chosen := summary.get("chosen"):
        made = f"distilled {plans_in(summary)} plans"
        rows.append(("chosen", f"{made}, {chosen['step']:,} updates; none is clearly better in imagination"))
    if "distill" in summary["seconds"] and "policy" not in summary:
        rows.append(("policy", "not evaluated"))
    if imagined := summary.get("imagined"):
        share = f"{imagined['accepted']:,} of {imagined['segments']:,} segments accepted"
        steps = f"{imagined['accepted_steps']:,} steps"
        rows.append(("imagined", f"{share} ({100 * imagined['accept_rate']:.1f} %), {steps}"))
        if imagined["accepted"]:
            gain = f"{readable(imagined['imagined_mean'])} imagined, {readable(imagined['own_mean'])} in the log"
            rows.append(("", f"their return {gain} (discounted, rewards rescaled)"))
    if "policy" in summary:
        s = summary["policy"]
        kept = f"{readable(s['value_at_start'])} expected at the start, {readable(s['discounted_mean'])} collected"
        rows.append(("value", f"{kept} (discounted, where time was up with V of what follows)"))
    if offline := summary.get("fitted_q"):
        value = f"{readable(offline['value_mean'])} ± {readable(offline['value_sem'])}"
        over = counted(offline["episodes"], "held-out episode")
        rows.append(("fitted Q", f"{value}, {readable(offline['log_value'])} in the log (discounted, {over}; a proxy)"))
    if summary["seconds"]:
        rows.append(("time", ", ".join(f"{name} {human_seconds(value)}" for name, value in summary["seconds"].items())))
    rows.append(("run folder", near(folder)))
    if (folder.path / "policy").exists():
        rows.append(("policy", f'from ipd_ray import Policy; Policy.load("{near(folder)}")'))
    if (folder.path / "report.html").exists():
        rows.append(("report", near(folder / "report.html")))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _normalised(scores: Mapping[str, Any]) -> str:
    value = scores.get("normalised")
    return f"   normalised {readable(value)}" if value is not None else ""


@app.command("tune")
@answers
def tune_command(
    question: Annotated[
        Path, typer.Argument(help="YAML file with the search space; tune_configs/ holds some.", metavar="QUESTION")
    ],
    dataset: Annotated[str, typer.Option(help="Minari id, local or remote, or `demo`.")],
    overrides: Overrides = None, preset: Preset = None, config: ConfigFile = None,
    sweep_dir: Annotated[
        str | None,
        typer.Option(help="Folder of the sweep, on a cluster one that every node mounts; runs/<dataset>-<question> "
                     "where not given. What trials share lies in `store` beside it.", metavar="PATH"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Only go on: refuse to begin a sweep where the folder holds none.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search settings: runs that share all the work they have in common, on Ray Tune.

    The same command again goes on where it stopped, and tries failed trials again.

    The file names fields of the config and the values to try, how often, and what is maximised. At the end there are
    a table, a report, and best.yaml, which `ipd-ray run --config` takes.
    """
    from ipd_ray import config as config_module
    from ipd_ray.checks import ray_engine
    from ipd_ray.errors import PartialError, UserError
    from ipd_ray.sweep import Sweep, common_settings, read_question

    asked = read_question(question)
    common = common_settings(asked, config_module.given(preset), config, config_module.parse_overrides(overrides or ()))
    ray_engine()
    from ipd_ray.distributed.sweep import sweep
    from ipd_ray.listeners import terminal

    folder = sweep_dir or Path("runs") / f"{dataset.replace('/', '_')}-{question.stem}"
    if resume and not Sweep.of(folder).exists:
        raise UserError(f"--resume: {folder} holds no sweep: correct --sweep-dir, or leave --resume out to begin one.")
    found = sweep(asked, dataset, common, sweep_dir=folder, listener=terminal)
    if as_json:
        answer_json(found)
    answer(_sweep_table(found), to_stderr=as_json)
    if failed := found["failed"]:
        raise PartialError(
            f"{len(failed)} trials failed; the answer stands without them, the report has their tracebacks, and "
            "the same command tries them again:\n" + "\n".join(f"{name}: {why}" for name, why in failed.items())
        )


def _sweep_table(found: Mapping[str, Any]) -> str:
    """Points from best to worst, what was reused, and what to do with the best."""
    from ipd_ray.runs import human_seconds
    from ipd_ray.storage import near

    def score(row: Mapping[str, Any] | None) -> str:
        if row is None:
            return "–"
        return readable(row["mean"]) + (f" ± {readable(row['half'])}" if row["half"] is not None else "")

    names = list(found["points"][0]["settings"]) if found["points"] else []
    by_number = {row["point"]: row for row in found["points"]}
    order = [*found["ranking"], *(n for n in by_number if n not in found["ranking"])]
    rows = [
        [str(n), *(str(row["settings"][name]) for name in names), score(row), score(row["fresh"]),
         "–" if row["accepted"] is None else f"{100 * row['accepted']:.1f} %",
         row["state"] + (f" at {row['stopped_at']}" if row["stopped_at"] else "")]
        for n in order for row in [by_number[n]]
    ]
    over = found["points"][0]["over"] if found["points"] else "seeds"
    lines = [
        table(["point", *names, found["objective"], "on fresh seeds", "accepted", "state"], rows),
        f"\n{found['objective']}: mean and 95 % interval over {over}; best first, by the lower bound on fresh "
        "environment seeds, then by the lower bound",
    ]
    for name, value in found["agreement"].items():
        lines.append(f"{name} ranks the points like {found['objective']} with a rank correlation of {value:.2f}")
    lines += ["", table(
        ["step", "needed by trials", "made", "reused", "time", "saved"],
        [[r["step"], *(str(r[name]) for name in ("needed", "made", "reused")),
          *(human_seconds(r[name]) for name in ("seconds", "saved"))] for r in found["reuse"]],
    )]
    folder = near(found["sweep_dir"])
    took, saved = human_seconds(found["seconds"]), human_seconds(sum(r["saved"] for r in found["reuse"]))
    lines += ["", f"{took} now; apart, the trials would have taken {saved} more"]
    if found["best"]:
        lines.append(f"best        ipd-ray run {found['dataset']} --config {folder}/best.yaml --run-dir {folder}-best")
    lines.append(f"report      {folder}/report.html")
    return "\n".join(lines)


@app.command("config")
@answers
def config_command(
    overrides: Overrides = None,
    preset: Preset = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="{dotted name: value} as JSON instead.")] = False,
) -> None:
    """Print every setting with its value, meaning and bounds, as YAML to edit and to give to --config."""
    from ipd_ray import config as config_module

    settings = config_module.load(preset, config, overrides or ())
    if as_json:
        answer_json(config_module.flatten(settings.model_dump(mode="json")))
    else:
        print(config_module.as_yaml(settings), end="")
