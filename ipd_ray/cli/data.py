"""Logs: looking at them, bringing one's own, the demo's, and what a run imagined as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ipd_ray.cli.app import Dataset, Json, RunsDir, answers, app, confirm
from ipd_ray.text import answer, answer_json, readable, table

data_app = typer.Typer(no_args_is_help=True, help="Look at logs, bring your own, make the demo's, export segments.")
app.add_typer(data_app, name="data")


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
    answer(f"{name} lies in {near(root)}; train on it with `ipd-ray run demo --preset demo`.")


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
        answer_json(found)
    answer(_log_table(found), to_stderr=as_json)
    if plot is not None:
        answer(f"\nplot in {plot}", to_stderr=as_json)


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
        table(["", "mean", "std", "min", "median", "90 %", "max"], rows),
    ]
    if found["normalised"]:
        scores = found["normalised"]
        references = f"0 is {readable(found['ref_min_score'])}, 100 is {readable(found['ref_max_score'])}"
        score = f"mean {readable(scores['mean'])}, 90 % {readable(scores['p90'])}, best {readable(scores['max'])}"
        lines += ["", f"normalised return: {score} ({references})"]
    columns = zip(found["observation_min"], found["observation_max"], found["observation_std"], strict=True)
    shown = [[str(i), *map(readable, column)] for i, column in enumerate(columns)]
    lines += ["", table(["observation", "min", "max", "std"], shown[:12])]
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
    answer(_preview_table(name, importer.preview(log)))
    if dry_run:
        answer("\nnothing was written")
        return
    confirm("write it?", yes)
    importer.write(log, name, ref_min_score=ref_min_score, ref_max_score=ref_max_score)
    answer(f"{name} lies in {datasets_path()}: look at it with `ipd-ray data show {name}`")


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


@data_app.command("export")
@answers
def data_export(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name in --runs-dir.", metavar="RUN")],
    name: Annotated[str, typer.Option("--id", help="Minari id to write: (namespace/)name-vN.")],
    only_imagined: Annotated[
        bool, typer.Option("--only-imagined", help="The accepted segments alone, without the log's episodes.")
    ] = False,
    runs_dir: RunsDir = "runs",
) -> None:
    """Write a run's log and its accepted imagined segments as one Minari dataset, each segment an episode."""
    from ipd_ray.api import export
    from ipd_ray.data.export import check_id
    from ipd_ray.runs import open_run
    from ipd_ray.storage import near

    check_id(name)
    folder, segments = export(open_run(run, runs_dir), name, with_log=not only_imagined)
    answer(f"{name}: {segments:,} imagined segments{'' if only_imagined else ' and the log'} in {near(folder)}")
