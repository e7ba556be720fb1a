"""The command line. Nothing heavy is imported before a command needs it: `ipd-ray --help` answers at once."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from ipd_ray.text import answer as _print
from ipd_ray.text import answer_json as _print_json
from ipd_ray.text import counted, readable
from ipd_ray.text import say as _say
from ipd_ray.text import table as _table

if TYPE_CHECKING:
    from ipd_ray.config import RunConfig

F = TypeVar("F", bound=Callable[..., Any])

EPILOG = "Exit codes: 0 done, 2 a user's mistake, 3 done in part, 130 interrupted (143 by SIGTERM), 1 anything else."

app = typer.Typer(
    name="ipd-ray", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, epilog=EPILOG,
    help="""Offline RL that plans: learn values and a world model from a log, imagine better segments where the log
    disappoints, and distil both into a policy.

    Begin with `ipd-ray run demo --preset demo`.""",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at logs, bring your own, make the demo's, export segments.")
runs_app = typer.Typer(no_args_is_help=True, help="List, compare and remove runs.")
store_app = typer.Typer(no_args_is_help=True, help="The artifacts that runs share.")
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")
app.add_typer(store_app, name="store")
jobs_app = typer.Typer(no_args_is_help=True, help="List, follow and stop what was submitted to a Ray cluster.")
app.add_typer(jobs_app, name="jobs")


# ---- errors and exit codes


class Terminated(BaseException):
    """SIGTERM."""


def _on_sigterm(*_: Any) -> NoReturn:
    raise Terminated


def answers(command: F) -> F:
    """Turn what a command raises into a message and an exit code."""

    @functools.wraps(command)
    def answering(*args: Any, **kwargs: Any) -> Any:
        logging.basicConfig(format="note: %(message)s", level=logging.WARNING, stream=sys.stderr)
        with suppress(ValueError):  # not in the main thread: somebody embeds this
            signal.signal(signal.SIGTERM, _on_sigterm)
        try:
            return command(*args, **kwargs)
        except BaseException as error:
            notes = vars(error).pop("__notes__", [])  # said last, not in the midst of a traceback
            # What a signal raises inside Ray's compiled code comes out as the cause of a SystemError.
            reason = error.__cause__ if isinstance(error, SystemError) else error
            if isinstance(reason, (KeyboardInterrupt, Terminated)):
                _say(
                    "\nStopped. What is finished is kept; the same command goes on from there:\n  "
                    f"{shlex.join(['ipd-ray', *sys.argv[1:]])}"
                )
                _say_all(notes)
                raise typer.Exit(130 if isinstance(reason, KeyboardInterrupt) else 143) from None
            if not isinstance(error, Exception):
                raise
            if isinstance(error, BrokenPipeError):  # who reads has gone, such as `| head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(128 + signal.SIGPIPE) from None
            code = _explain(error)
            _say_all(notes)
            raise typer.Exit(code) from None

    return answering  # type: ignore[return-value]


def _say_all(texts: Sequence[str]) -> None:
    for text in texts:
        _say(text)


def _explain(error: Exception) -> int:
    """Say what went wrong and what helps; return the exit code."""
    from ipd_ray.errors import PartialError, TaskError, UserError

    if isinstance(error, (typer.Exit, typer.Abort)):
        raise error
    if isinstance(error, UserError):
        _say(f"error: {error}")
        return 2
    if isinstance(error, PartialError):
        _say(f"incomplete: {error}")
        return 3
    if isinstance(error, OSError):
        from ipd_ray.checks import explain_os_error

        if (plain := explain_os_error(error)) is not None:
            _say(f"error: {plain}")
            return 2
    if isinstance(error, TaskError):  # its traceback is the worker's, for who wants to know more
        _say(f"{error}\nerror: {error.reason.removeprefix('FloatingPointError: ')}")
        return 1
    _say(traceback.format_exc())
    return 1


# ---- run, and its steps

Dataset = Annotated[
    str, typer.Argument(help="Minari id, local or remote (bench/hopper/mixed-v0), or `demo`.", metavar="DATASET")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings by dotted name, such as planner.horizon=8 or seed=1. They win over --config and --preset.",
        metavar="[SECTION.FIELD=VALUE]",
    ),
]
Preset = Annotated[str | None, typer.Option(help="Settings to start from: demo, gym-small or gym.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of settings, over the preset's; `ipd-ray config` writes one to edit."),
]
RunDir = Annotated[
    str | None,
    typer.Option(help="Folder of the run or its URI (s3://bucket/runs/mine, gs://...); runs/<dataset>-seed<seed> where "
                 "not given. What runs share lies in `store` beside it.", metavar="PATH|URI"),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Do nothing; say what would be reused and done, in what time, memory and disk."),
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on standard output; everything else on standard error.")
]


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
        _print_json(summary)
    _print(_summary_table(summary), to_stderr=as_json)


def _dry_run(dataset: str, settings: RunConfig, run_dir: str | None, until: str, as_json: bool) -> None:
    from ipd_ray.api import plan
    from ipd_ray.runs import human_bytes
    from ipd_ray.storage import near

    planned = plan(dataset, settings, run_dir=run_dir, until=until)
    if as_json:
        _print_json(planned)
        return

    def amount(value: float, show: Callable[[float], str]) -> str:
        return show(value) if value else "-"

    rows = [
        [row["step"], row["state"], amount(row["seconds"], _seconds), amount(row["memory"], human_bytes),
         amount(row["disk"], human_bytes), row["key"][:12]]
        for row in planned["steps"]
    ]
    whole = planned["total"]
    space = [amount(whole[name], human_bytes) for name in ("memory", "disk")]
    rows.append(["in all", "", amount(whole["seconds"], _seconds), *space, ""])
    folder, store = (near(planned[name]) for name in ("run_dir", "store"))
    print(f"{planned['dataset']}, run folder {folder}, store {store}\n")
    print(_table(["step", "state", "time", "memory", "disk", "key"], rows))
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
    from ipd_ray.runs import plans_in
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
        rows.append(("time", ", ".join(f"{name} {_seconds(value)}" for name, value in summary["seconds"].items())))
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


def _seconds(value: float) -> str:
    from ipd_ray.runs import human_seconds

    return human_seconds(value)


# ---- sweeps


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
    answer = sweep(asked, dataset, common, sweep_dir=folder, listener=terminal)
    if as_json:
        _print_json(answer)
    _print(_sweep_table(answer), to_stderr=as_json)
    if failed := answer["failed"]:
        raise PartialError(
            f"{len(failed)} trials failed; the answer stands without them, the report has their tracebacks, and "
            "the same command tries them again:\n" + "\n".join(f"{name}: {why}" for name, why in failed.items())
        )


def _sweep_table(answer: Mapping[str, Any]) -> str:
    """Points from best to worst, what was reused, and what to do with the best."""
    from ipd_ray.storage import near

    def score(row: Mapping[str, Any] | None) -> str:
        if row is None:
            return "–"
        return readable(row["mean"]) + (f" ± {readable(row['half'])}" if row["half"] is not None else "")

    names = list(answer["points"][0]["settings"]) if answer["points"] else []
    by_number = {row["point"]: row for row in answer["points"]}
    order = [*answer["ranking"], *(n for n in by_number if n not in answer["ranking"])]
    rows = [
        [str(n), *(str(row["settings"][name]) for name in names), score(row), score(row["fresh"]),
         "–" if row["accepted"] is None else f"{100 * row['accepted']:.1f} %",
         row["state"] + (f" at {row['stopped_at']}" if row["stopped_at"] else "")]
        for n in order for row in [by_number[n]]
    ]
    over = answer["points"][0]["over"] if answer["points"] else "seeds"
    lines = [
        _table(["point", *names, answer["objective"], "on fresh seeds", "accepted", "state"], rows),
        f"\n{answer['objective']}: mean and 95 % interval over {over}; best first, by the lower bound on fresh "
        "environment seeds, then by the lower bound",
    ]
    for name, value in answer["agreement"].items():
        lines.append(f"{name} ranks the points like {answer['objective']} with a rank correlation of {value:.2f}")
    lines += ["", _table(
        ["step", "needed by trials", "made", "reused", "time", "saved"],
        [[r["step"], str(r["needed"]), str(r["made"]), str(r["reused"]), _seconds(r["seconds"]), _seconds(r["saved"])]
         for r in answer["reuse"]],
    )]
    folder = near(answer["sweep_dir"])
    saved = sum(r["saved"] for r in answer["reuse"])
    lines += ["", f"{_seconds(answer['seconds'])} now; apart, the trials would have taken {_seconds(saved)} more"]
    if answer["best"]:
        lines.append(f"best        ipd-ray run {answer['dataset']} --config {folder}/best.yaml --run-dir {folder}-best")
    lines.append(f"report      {folder}/report.html")
    return "\n".join(lines)


# ---- config


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
        _print_json(config_module.flatten(settings.model_dump(mode="json")))
    else:
        print(config_module.as_yaml(settings), end="")


# ---- data


@data_app.command("demo")
@answers
def data_demo(
    force: Annotated[bool, typer.Option("--force", help="Make it again where it is there.")] = False,
) -> None:
    """Make the demo's log: Pendulum by a scripted controller of mixed skill. Needs no download."""
    from ipd_ray.data.demo import demo_root, make_demo
    from ipd_ray.storage import near

    root = demo_root()
    name = make_demo(root, force=force)
    _print(f"{name} lies in {near(root)}; train on it with `ipd-ray run demo --preset demo`.")


@data_app.command("show")
@answers
def data_show(
    dataset: Dataset,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw returns, lengths and actions into this file (png, svg, pdf).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a log holds: sizes, returns, lengths, rewards, actions and observations."""
    from ipd_ray.data import describe as description
    from ipd_ray.data.minari_source import load

    if plot is not None:
        _check_plot(plot)
    transitions = load(dataset)
    found = description.describe(transitions)
    if plot is not None:
        description.plot(transitions, plot)
    if as_json:
        _print_json(found)
    _print(_log_table(found), to_stderr=as_json)
    if plot is not None:
        _print(f"\nplot in {plot}", to_stderr=as_json)


def _check_plot(path: Path) -> None:
    from ipd_ray.errors import UserError

    formats = ("png", "svg", "pdf", "jpg")
    if path.suffix.lstrip(".").lower() not in formats:
        raise UserError(f"--plot {path}: its suffix must be one of {', '.join(formats)}: it sets the format.")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: the folder {path.parent} does not exist: make it, or name another.")


def _log_table(found: Mapping[str, Any]) -> str:
    def spread(values: Mapping[str, float]) -> list[str]:
        return [readable(values[name]) for name in ("mean", "std", "min", "p50", "p90", "max")]

    rows = [[name, *spread(found[name])] for name in ("return", "length", "reward")]
    lines = [
        f"{found['dataset']}: {found['episodes']:,} episodes, {found['steps']:,} steps; {found['observation_dim']} "
        f"observation and {found['action_dim']} action dimensions",
        f"{found['terminated']:,} episodes terminated, {found['truncated']:,} truncated; "
        f"{100 * found['action_saturation']:.1f} % of the actions at a bound; "
        f"{100 * found['reward']['zero_share']:.1f} % of the rewards are 0",
        f"data.discount=auto is {found['discount']:g}",
        "",
        _table(["", "mean", "std", "min", "median", "90 %", "max"], rows),
    ]
    if found["normalised"]:
        scores = found["normalised"]
        references = f"0 is {readable(found['ref_min_score'])}, 100 is {readable(found['ref_max_score'])}"
        score = f"mean {readable(scores['mean'])}, 90 % {readable(scores['p90'])}, best {readable(scores['max'])}"
        lines += ["", f"normalised return: {score} ({references})"]
    columns = zip(found["observation_min"], found["observation_max"], found["observation_std"], strict=True)
    shown = [[str(i), *map(readable, column)] for i, column in enumerate(columns)]
    lines += ["", _table(["observation", "min", "max", "std"], shown[:12])]
    if len(shown) > 12:
        lines.append(f"... and {len(shown) - 12} more, with --json")
    lines += [f"\nnote: {remark}" for remark in found["remarks"]]
    return "\n".join(lines)


@data_app.command("import")
@answers
def data_import(
    file: Annotated[
        Path, typer.Argument(help=".npz, .parquet (or a folder of them), or D4RL's .hdf5.", metavar="FILE")
    ],
    name: Annotated[str, typer.Option("--id", help="Minari id to write: (namespace/)name-vN, such as my/robot-v0.")],
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", help="FIELD=COLUMN where the file's name differs, such as observations=obs. Repeatable."),
    ] = None,
    env: Annotated[
        str | None, typer.Option(help="Gymnasium id of the environment it comes from, for evaluation.")
    ] = None,
    action_low: Annotated[
        str | None, typer.Option(help="Lower action bound: one number, or one a dimension (-1,-2).")
    ] = None,
    action_high: Annotated[str | None, typer.Option(help="Upper action bound.")] = None,
    ref_min_score: Annotated[
        float | None, typer.Option(help="Raw return that counts as 0 in normalised scores.")
    ] = None,
    ref_max_score: Annotated[float | None, typer.Option(help="Raw return that counts as 100.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read, check and preview; write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Write without asking.")] = False,
) -> None:
    """Bring your own log in: read, check, preview, and after a yes write it as a Minari dataset.

    The file has one row a step, episode after episode, in columns (arrays) of these names:

      observations, actions, rewards, terminals (or terminations): required

      timeouts (or truncations), next_observations, episode_ids: where there are

    An episode ends at a terminal, a timeout, a change of episode_ids, or the last row.
    """
    from ipd_ray.data import importer
    from ipd_ray.data.export import check_id, datasets_path
    from ipd_ray.errors import UserError

    check_id(name)
    if (datasets_path() / name).exists():
        raise UserError(f"--id {name} exists in {datasets_path()}: choose another id, such as the next -v number.")
    importer.check_scores(ref_min_score, ref_max_score)
    log = importer.read(
        file, mapping=importer.parse_mapping(",".join(mapping or ())), env_id=env,
        action_low=_numbers("--action-low", action_low), action_high=_numbers("--action-high", action_high),
    )
    _print(_preview_table(name, importer.preview(log)))
    if dry_run:
        _print("\nnothing was written")
        return
    _confirm("write it?", yes)
    importer.write(log, name, ref_min_score=ref_min_score, ref_max_score=ref_max_score)
    _print(f"{name} lies in {datasets_path()}: look at it with `ipd-ray data show {name}`")


def _numbers(option: str, text: str | None) -> list[float] | float | None:
    from ipd_ray.errors import UserError

    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r} must be a number, or one a dimension with commas between: -1,-2.") from None
    return values[0] if len(values) == 1 else values


def _preview_table(name: str, found: Mapping[str, Any]) -> str:
    def spread(values: Mapping[str, float]) -> str:
        return f"mean {readable(values['mean'])}, min {readable(values['min'])}, max {readable(values['max'])}"

    def bound(values: Sequence[float]) -> str:
        same = len(set(values)) == 1 and len(values) > 1
        return f"{values[0]:g} (all {len(values)})" if same else ", ".join(f"{v:g}" for v in values)

    rows = [
        ("dataset", name),
        ("from", found["source"]),
        ("episodes", f"{found['episodes']:,}, {found['terminated']:,} terminated"),
        ("steps", f"{found['steps']:,}"),
        ("length", spread(found["length"])),
        ("return", spread(found["return"])),
        ("observations", f"shape {tuple(found['observation_shape'])}"),
        ("actions", f"shape {tuple(found['action_shape'])}"),
        ("action low", f"{bound(found['action_low'])} (from {found['action_bounds_from']})"),
        ("action high", bound(found["action_high"])),
        ("environment", "recorded" if found["environment"] else "none: evaluate.environment can name one"),
    ]
    lines = [f"{label:<13} {text}" for label, text in rows]
    return "\n".join([*lines, *(f"note: {warning}" for warning in found["warnings"])])


def _confirm(question: str, yes: bool) -> None:
    """Ask, unless --yes. Raises UserError where nobody can answer."""
    from ipd_ray.errors import UserError

    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{question} Nobody can answer here (standard input is no terminal): add --yes.")
    if not typer.confirm(question):
        _say("nothing was changed")
        raise typer.Exit(0)


@data_app.command("export")
@answers
def data_export(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name in --runs-dir.", metavar="RUN")],
    name: Annotated[str, typer.Option("--id", help="Minari id to write: (namespace/)name-vN.")],
    only_imagined: Annotated[
        bool, typer.Option("--only-imagined", help="The accepted segments alone, without the log's episodes.")
    ] = False,
    runs_dir: Annotated[str, typer.Option(help="Where runs lie: a folder or a URI.", metavar="PATH|URI")] = "runs",
) -> None:
    """Write a run's log and its accepted imagined segments as one Minari dataset, each segment an episode."""
    from ipd_ray.api import export
    from ipd_ray.data.export import check_id
    from ipd_ray.runs import open_run
    from ipd_ray.storage import near

    check_id(name)
    folder, segments = export(open_run(run, runs_dir), name, with_log=not only_imagined)
    _print(f"{name}: {segments:,} imagined segments{'' if only_imagined else ' and the log'} in {near(folder)}")


# ---- runs and store

RunsDir = Annotated[str, typer.Option(help="Where runs lie: a folder or a URI.", metavar="PATH|URI")]
StoreDir = Annotated[
    str | None,
    typer.Option("--store", help="The store; `store` in --runs-dir where not given.", metavar="PATH|URI"),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@runs_app.command("ls")
@answers
def runs_ls(runs_dir: RunsDir = "runs", as_json: Json = False) -> None:
    """List the runs with their scores."""
    from ipd_ray.runs import list_runs, row
    from ipd_ray.storage import Folder

    rows = [row(run) for run in list_runs(runs_dir)]
    if as_json:
        _print_json(rows)
        return
    if not rows:
        _say(f"no runs in {runs_dir}/: `ipd-ray run demo --preset demo` makes one, --runs-dir names another place")
        return

    numbers = ("data_mean", "policy_mean", "policy_std", "normalised", "accepted")
    shown = [
        [Folder.of(r["run"]).name, r["dataset"], str(r["seed"]), *(readable(r[name]) for name in numbers),
         "–" if r["seconds"] is None else _seconds(r["seconds"]), r["state"]]
        for r in rows
    ]
    print(_table(
        ["run", "dataset", "seed", "data mean", "policy mean", "std", "normalised", "accepted", "time", "state"], shown
    ))


@runs_app.command("diff")
@answers
def runs_diff(
    a: Annotated[str, typer.Argument(help="A run's folder, or its name in --runs-dir.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Another.", metavar="B")],
    runs_dir: RunsDir = "runs", as_json: Json = False,
) -> None:
    """Compare two runs: settings that differ, artifacts they share, scores."""
    from ipd_ray.runs import difference, open_run
    from ipd_ray.storage import Folder

    found = difference(open_run(a, runs_dir), open_run(b, runs_dir))
    if as_json:
        _print_json(found)
        return
    names = [Folder.of(path).name for path in found["runs"]]
    if found["dataset"][0] != found["dataset"][1]:
        print(f"datasets: {found['dataset'][0]} and {found['dataset'][1]}\n")
    elif not found["same_data"]:
        print(f"the content of {found['dataset'][0]} differs\n")

    def text(value: Any) -> str:
        return f"{value:,.4g}" if isinstance(value, float) else "-" if value is None else str(value)

    if found["config"]:
        print(_table(["setting", *names], [[name, *map(text, pair)] for name, pair in found["config"].items()]))
    else:
        print("no setting differs")
    shared, different = (", ".join(found[name]) or "nothing" for name in ("shared", "different"))
    print(f"\nshared: {shared}; different: {different}")
    if found["scores"]:
        rows = [[name, *map(readable, pair)] for name, pair in found["scores"].items()]
        print("\n" + _table(["score", *names], rows))


@runs_app.command("rm")
@answers
def runs_rm(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name in --runs-dir.", metavar="RUN")],
    yes: Yes = False, runs_dir: RunsDir = "runs",
) -> None:
    """Delete a run's folder, its policy included. What it has in the store stays until `store prune`."""
    from ipd_ray.api import holding
    from ipd_ray.runs import human_bytes, open_run, remove
    from ipd_ray.storage import near

    found = open_run(run, runs_dir)
    _confirm(f"delete {near(found.folder)} ({human_bytes(found.folder.bytes)}, policy included)?", yes)
    with holding(found.folder):
        remove(found)
    _print(f"deleted {found.folder}; `ipd-ray store prune` frees what no run uses any more")


@store_app.command("ls")
@answers
def store_ls(runs_dir: RunsDir = "runs", store: StoreDir = None, as_json: Json = False) -> None:
    """List what runs share, with sizes and the runs that use it."""
    from ipd_ray.runs import human_bytes, list_store
    from ipd_ray.storage import Folder, near

    place = store or Folder.of(runs_dir) / "store"
    items = list_store(place, runs_dir)
    if as_json:
        _print_json([
            {"step": i.step, "name": i.name, "state": i.state, "bytes": i.bytes, "runs": list(i.runs),
             "path": str(i.folder)}
            for i in items
        ])
        return
    if not items:
        _say(f"nothing in {near(place)}: --store or --runs-dir names another place")
        return
    rows = [[i.step, i.name[:12], i.state, human_bytes(i.bytes), ", ".join(i.runs) or "-"] for i in items]
    print(_table(["step", "key", "state", "size", "used by"], rows))
    print(f"\n{len(items)} in all, {human_bytes(sum(i.bytes for i in items))}")


@store_app.command("prune")
@answers
def store_prune(
    runs_dir: RunsDir = "runs", store: StoreDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Yes = False,
) -> None:
    """Delete what no run uses: neither those in --runs-dir nor any other that has used this store and still exists.

    What a live process works on stays. A run that needs a deleted artifact again computes it again.
    """
    from ipd_ray.runs import human_bytes, list_store, prunable, prune
    from ipd_ray.storage import Folder

    place = store or Folder.of(runs_dir) / "store"
    items = prunable(list_store(place, runs_dir))
    if not items:
        _print("nothing to prune")
        return
    rows = [[i.step, i.name[:12], i.state, human_bytes(i.bytes)] for i in items]
    print(_table(["step", "key", "state", "size"], rows))
    size = human_bytes(sum(i.bytes for i in items))
    if dry_run:
        _print(f"\n{size} would be freed; nothing was deleted")
        return
    _confirm(f"delete these, {size}?", yes)
    freed = prune(items, place, runs_dir)
    kept = f"; the other {len(items) - len(freed)} are in use or gone by now" if len(freed) < len(items) else ""
    _print(f"freed {human_bytes(sum(i.bytes for i in freed))}{kept}")


@app.command("report")
@answers
def report(
    run: Annotated[list[str], typer.Argument(help="One run, or several to compare.", metavar="RUN...")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file; report.html in the first run's folder where not given."),
    ] = None,
    runs_dir: RunsDir = "runs",
) -> None:
    """Write one HTML page on a run, on a sweep's folder, or one that compares several runs. It needs no network."""
    from ipd_ray.report import build_report, build_sweep_report
    from ipd_ray.runs import open_run
    from ipd_ray.storage import near
    from ipd_ray.sweep import Sweep

    if len(run) == 1 and (sweep := Sweep(Path(run[0]))).exists:
        _print(f"report in {near(build_sweep_report(sweep.folder, output or sweep.folder / 'report.html'))}")
        return
    folders = [open_run(name, runs_dir).folder for name in run]
    name = "report.html" if len(folders) == 1 else "comparison.html"
    written = build_report(folders, output or folders[0].path / name)
    if output is None:
        folders[0].push([name])
    _print(f"report in {near(written if output else folders[0] / name)}")


# ---- clusters

Address = Annotated[
    str | None,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, such as http://HOST:8265."),
]
JobId = Annotated[str, typer.Argument(help="As `ipd-ray jobs ls` shows it.", metavar="JOB")]


@app.command("submit", context_settings={"allow_interspersed_args": False})
@answers
def submit(
    command: Annotated[
        list[str], typer.Argument(help="A command of ipd-ray: run DATASET --run-dir DIR ...", metavar="-- COMMAND")
    ],
    address: Address = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder that the command runs in; a copy travels, without datasets and runs.")
    ] = Path(),
    exclude: Annotated[
        list[str] | None, typer.Option(help="More that stays here: a name or glob. Repeatable.", metavar="NAME")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="Environment variable to hand over, such as WANDB_API_KEY: its name. Repeatable.",
                     metavar="NAME"),
    ] = None,
    pins: Annotated[
        bool,
        typer.Option("--pins/--no-pins", help="Have every node install what ipd_ray needs in the versions installed "
                     "here, where it has others; --no-pins takes the image as it is."),
    ] = True,
    follow: Annotated[
        bool, typer.Option("--follow/--detach", help="Print the log until the job ends, or return at once.")
    ] = True,
    submission_id: Annotated[
        str | None, typer.Option(help="Name of the job; Ray makes one up where not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a command of ipd-ray as a job of a Ray cluster: `ipd-ray submit --address http://HOST:8265 -- run DATASET`.

    The command is checked first, as it would be here. It runs with runtime.engine=ray and runtime.address=auto where it
    does not say otherwise, in a copy of --working-dir, with this very version of ipd_ray. Datasets, runs, stores,
    environments, version control, what git ignores and what looks like a credential stay here. Results must go to
    storage that every node sees: --run-dir is an absolute path or a URI, and so is runtime.store where it is given.

    With --follow the exit code is the job's (143 for one that was stopped); Ctrl-C leaves the job running.

    --env reads the value here and hands it to the job in the memory of the cluster's head until the job ends; it is in
    no file, log or list of jobs. Whoever holds the cluster's token can read it there meanwhile, and plain http carries
    it in clear, as it does the token. Where that is too much, let the cluster provide it (a Kubernetes Secret, an
    instance's role) and leave --env out.

    The token of a cluster that asks for one: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    """
    from ipd_ray import cli_cluster

    raise typer.Exit(cli_cluster.submit(
        app, command, address=address, working_dir=working_dir, env=env or (), pinned=pins, exclude=exclude or (),
        follow=follow, submission_id=submission_id, as_json=as_json,
    ))


@jobs_app.command("ls")
@answers
def jobs_ls(address: Address = None, as_json: Json = False) -> None:
    """List the jobs of the cluster, the last one first."""
    from ipd_ray import cli_cluster

    cli_cluster.jobs_ls(address, as_json)


@jobs_app.command("status")
@answers
def jobs_status(job: JobId, address: Address = None, as_json: Json = False) -> None:
    """Say how a job stands: command, start, duration, exit code."""
    from ipd_ray import cli_cluster

    cli_cluster.jobs_status(job, address, as_json)


@jobs_app.command("logs")
@answers
def jobs_logs(
    job: JobId, address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job ends; the exit code is then the job's.")
    ] = False,
) -> None:
    """Print what a job has printed."""
    from ipd_ray import cli_cluster

    raise typer.Exit(cli_cluster.jobs_logs(job, address, follow))


@jobs_app.command("stop")
@answers
def jobs_stop(job: JobId, address: Address = None, as_json: Json = False) -> None:
    """Stop a job as Ctrl-C would: what is finished is kept, and the same command goes on from there."""
    from ipd_ray import cli_cluster

    cli_cluster.jobs_stop(job, address, as_json)


@app.command("doctor")
@answers
def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="A dataset, for what each step would take; settings, such as runtime.actors=4.",
                       metavar="[DATASET] [SECTION.FIELD=VALUE]"),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to look at: auto, HOST:PORT, ray://HOST:PORT. Short for "
                                 "runtime.engine=ray runtime.address=...")
    ] = None,
    preset: Preset = None, config: ConfigFile = None, run_dir: RunDir = None, as_json: Json = False,
) -> None:
    """Say whether the machines are fit for a run: this one, or every node of a Ray cluster.

    Looks at what they have, versions and numeric platform (equal everywhere?), storage (does every node see and write
    what the others write?), threads, and settings that would never be scheduled. With a dataset: time and memory of
    each step, after ten seconds of measuring on the nodes that would do it.

    Exit code: 0 all well, 2 something must be mended, 3 warnings only.
    """
    from ipd_ray import cli_cluster

    raise typer.Exit(cli_cluster.doctor(
        words or (), address=address, preset=preset, config=config, run_dir=run_dir, as_json=as_json
    ))


def main() -> None:
    """Entry point of the console script."""
    if os.environ.get("IPD_RAY_CREDENTIALS"):  # a job that was handed some
        from ipd_ray.distributed.credentials import held

        with held():
            app()
    else:
        app()


if __name__ == "__main__":
    main()
