"""The command line. Nothing heavy is imported before a command needs it: `ipd-ray --help` answers at once."""

from __future__ import annotations

import functools
import json
import logging
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    from ipd_ray.config import RunConfig

F = TypeVar("F", bound=Callable[..., Any])

EPILOG = """Exit codes: 0 done, 2 a mistake of the user's, 3 done in part, 130 interrupted (143 by SIGTERM), 1 anything else."""

app = typer.Typer(
    name="ipd-ray", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, epilog=EPILOG,
    help="""Offline RL that plans: learn values and a world model from a log, imagine better segments where the log
    disappoints, and distil both into a policy.

    Begin with `ipd-ray run demo --preset demo`.""",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at logs, bring your own, make the demo's, export imagined ones.")
runs_app = typer.Typer(no_args_is_help=True, help="List, compare and remove runs.")
store_app = typer.Typer(no_args_is_help=True, help="The artifacts that runs share.")
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")
app.add_typer(store_app, name="store")


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
        try:
            signal.signal(signal.SIGTERM, _on_sigterm)
        except ValueError:  # not the main thread: a test's, or somebody's who embeds this
            pass
        try:
            return command(*args, **kwargs)
        except (KeyboardInterrupt, Terminated) as error:
            _say(
                "\nStopped. What is finished is kept; the same command goes on from there:\n  "
                f"{shlex.join(['ipd-ray', *sys.argv[1:]])}"
            )
            raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 143) from None
        except Exception as error:
            raise typer.Exit(_explain(error)) from None

    return answering  # type: ignore[return-value]


def _explain(error: Exception) -> int:
    """Say what went wrong and what helps; return the exit code."""
    from ipd_ray.errors import PartialError, UserError

    if isinstance(error, (typer.Exit, typer.Abort)):
        raise error
    if isinstance(error, UserError):
        _say(f"error: {error}")
        return 2
    if isinstance(error, PartialError):
        _say(f"incomplete: {error}")
        return 3
    if isinstance(error, OSError):
        from ipd_ray.api import explain_os_error

        if (plain := explain_os_error(error)) is not None:
            _say(f"error: {plain}")
            return 2
    if type(error).__name__ == "TaskError":
        return _explain_task(str(error))
    _say(traceback.format_exc())
    return 1


def _explain_task(text: str) -> int:
    """A worker's error: its last line says it, the traceback is for who wants to know more."""
    last = text.strip().splitlines()[-1]
    kind, _, message = last.partition(": ")
    kind = kind.rpartition(".")[2]
    if kind == "UserError":
        _say(f"error: {message}")
        return 2
    if kind == "OSError" and ("No space left" in message or "[Errno 28]" in message):
        _say(f"error: {message}: free some space (`ipd-ray store prune`), then run the same command again; it goes on.")
        return 2
    _say(text)
    _say(f"error: {message if kind == 'FloatingPointError' else last}")
    return 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(text: str, to_stderr: bool = False) -> None:
    print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, default=str), flush=True)


# ---- run, and its steps

Dataset = Annotated[str, typer.Argument(help="Minari id, local or remote (bench/hopper/mixed-v0), or `demo`.", metavar="DATASET")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings by dotted name: planner.horizon=8 seed=1. They win over --config and --preset.",
                   metavar="[SECTION.FIELD=VALUE]..."),
]
Preset = Annotated[str | None, typer.Option(help="Settings to start from: demo, gym-small or gym.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file of settings, over the preset's; `ipd-ray config` writes one to edit.")
]
RunDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the run; runs/<dataset>-seed<seed> where not given. Artifacts go to `store` beside it."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be reused and done, in what time, memory and disk.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output; everything else on standard error.")]


def _run_command(until: str, dataset: str, overrides: Sequence[str] | None, preset: str | None, config: Path | None,
                 run_dir: Path | None, dry_run: bool, as_json: bool) -> None:
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


def _dry_run(dataset: str, settings: RunConfig, run_dir: Path | None, until: str, as_json: bool) -> None:
    raise NotImplementedError


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
_step_command("imagine", "imagine", "A run up to steps 3 and 4: start states, and segments imagined from them.")
_step_command("distill", "distill", "A run up to step 5: the policy.")
_step_command("evaluate", "evaluate", "A run up to step 6, the scores: the same as `run`.")


def _summary_table(summary: Mapping[str, Any]) -> str:
    """The last table: what the data held, what the policy reached, what was imagined."""
    data = summary["data"]
    rows = [
        ("dataset", f"{summary['dataset']}, {data['episodes']:,} episodes, {data['steps']:,} steps; seed {summary['seed']}"),
        ("data", f"return mean {data['return_mean']:,.1f}, best {data['return_max']:,.1f}{_normalised(data)}"),
    ]
    for name in ("policy", "bc", "no_imagination"):
        if name in summary:
            s = summary[name]
            rows.append((name.replace("_", " "), f"return {s['return_mean']:,.1f} ± {s['return_std']:,.1f} over "
                         f"{s['episodes']} episodes{_normalised(s)}"))
    if "policy" not in summary and "distill" in summary["seconds"]:
        rows.append(("policy", "not evaluated"))
    if imagined := summary.get("imagined"):
        rows.append(("imagined", f"{imagined['accepted']:,} of {imagined['segments']:,} segments accepted "
                     f"({100 * imagined['accept_rate']:.1f} %), {imagined['accepted_steps']:,} steps"))
        if imagined["accepted"]:
            rows.append(("", f"their return {imagined['imagined_mean']:,.1f} imagined, {imagined['own_mean']:,.1f} in the log "
                         "(discounted, transformed)"))
    if "policy" in summary:
        s = summary["policy"]
        rows.append(("V(start)", f"{s['value_at_start']:,.1f} expected, {s['discounted_mean']:,.1f} collected (discounted)"))
    rows.append(("time", ", ".join(f"{name} {_seconds(value)}" for name, value in summary["seconds"].items())))
    folder = _near(Path(summary["run_dir"]))
    if (Path(summary["run_dir"]) / "policy").exists():
        rows.append(("policy at", f'{folder / "policy"}   Policy.load("{folder}")'))
    if (Path(summary["run_dir"]) / "report.html").exists():
        rows.append(("report", str(folder / "report.html")))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _normalised(scores: Mapping[str, Any]) -> str:
    value = scores.get("normalised")
    return f"   normalised {value:.1f}" if value is not None else ""


def _seconds(value: float) -> str:
    from ipd_ray.runs import human_seconds

    return human_seconds(value)


def _near(path: Path) -> Path:
    """The path as a user would type it."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


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

    root = demo_root()
    name = make_demo(root, force=force)
    _print(f"{name} lies in {_near(root)}; train on it with `ipd-ray run demo --preset demo`.")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
