"""Runs that are there, the store that they share, and reports on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ipd_ray.cli.app import Json, RunsDir, Yes, answers, app, confirm
from ipd_ray.text import answer, answer_json, readable, say, table

runs_app = typer.Typer(no_args_is_help=True, help="List, compare and remove runs.")
store_app = typer.Typer(no_args_is_help=True, help="The artifacts that runs share.")
app.add_typer(runs_app, name="runs")
app.add_typer(store_app, name="store")
StoreDir = Annotated[
    str | None,
    typer.Option("--store", help="The store; `store` in --runs-dir where not given.", metavar="PATH|URI"),
]


@runs_app.command("ls")
@answers
def runs_ls(runs_dir: RunsDir = "runs", as_json: Json = False) -> None:
    """List the runs with their scores."""
    from ipd_ray.runs import human_seconds, list_runs, row
    from ipd_ray.storage import Folder

    rows = [row(run) for run in list_runs(runs_dir)]
    if as_json:
        answer_json(rows)
        return
    if not rows:
        say(f"no runs in {runs_dir}/: `ipd-ray run demo --preset demo` makes one, --runs-dir names another place")
        return

    numbers = ("data_mean", "policy_mean", "policy_std", "normalised", "accepted")
    shown = [
        [Folder.of(r["run"]).name, r["dataset"], str(r["seed"]), *(readable(r[name]) for name in numbers),
         "–" if r["seconds"] is None else human_seconds(r["seconds"]), r["state"]]
        for r in rows
    ]
    print(table(
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
        answer_json(found)
        return
    names = [Folder.of(path).name for path in found["runs"]]
    if found["dataset"][0] != found["dataset"][1]:
        print(f"datasets: {found['dataset'][0]} and {found['dataset'][1]}\n")
    elif not found["same_data"]:
        print(f"the content of {found['dataset'][0]} differs\n")

    def text(value: Any) -> str:
        return f"{value:,.4g}" if isinstance(value, float) else "-" if value is None else str(value)

    if found["config"]:
        print(table(["setting", *names], [[name, *map(text, pair)] for name, pair in found["config"].items()]))
    else:
        print("no setting differs")
    shared, different = (", ".join(found[name]) or "nothing" for name in ("shared", "different"))
    print(f"\nshared: {shared}; different: {different}")
    if found["scores"]:
        rows = [[name, *map(readable, pair)] for name, pair in found["scores"].items()]
        print("\n" + table(["score", *names], rows))


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
    confirm(f"delete {near(found.folder)} ({human_bytes(found.folder.bytes)}, policy included)?", yes)
    with holding(found.folder):
        remove(found)
    answer(f"deleted {found.folder}; `ipd-ray store prune` frees what no run uses any more")


@store_app.command("ls")
@answers
def store_ls(runs_dir: RunsDir = "runs", store: StoreDir = None, as_json: Json = False) -> None:
    """List what runs share, with sizes and the runs that use it."""
    from ipd_ray.runs import human_bytes, list_store
    from ipd_ray.storage import Folder, near

    place = store or Folder.of(runs_dir) / "store"
    items = list_store(place, runs_dir)
    if as_json:
        answer_json([
            {"step": i.step, "name": i.name, "state": i.state, "bytes": i.bytes, "runs": list(i.runs),
             "path": str(i.folder)}
            for i in items
        ])
        return
    if not items:
        say(f"nothing in {near(place)}: --store or --runs-dir names another place")
        return
    rows = [[i.step, i.name[:12], i.state, human_bytes(i.bytes), ", ".join(i.runs) or "-"] for i in items]
    print(table(["step", "key", "state", "size", "used by"], rows))
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
        answer("nothing to prune")
        return
    rows = [[i.step, i.name[:12], i.state, human_bytes(i.bytes)] for i in items]
    print(table(["step", "key", "state", "size"], rows))
    size = human_bytes(sum(i.bytes for i in items))
    if dry_run:
        answer(f"\n{size} would be freed; nothing was deleted")
        return
    confirm(f"delete these, {size}?", yes)
    freed = prune(items, place, runs_dir)
    kept = f"; the other {len(items) - len(freed)} are in use or gone by now" if len(freed) < len(items) else ""
    answer(f"freed {human_bytes(sum(i.bytes for i in freed))}{kept}")


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
        answer(f"report in {near(build_sweep_report(sweep.folder, output or sweep.folder / 'report.html'))}")
        return
    folders = [open_run(name, runs_dir).folder for name in run]
    name = "report.html" if len(folders) == 1 else "comparison.html"
    written = build_report(folders, output or folders[0].path / name)
    if output is None:
        folders[0].push([name])
    answer(f"report in {near(written if output else folders[0] / name)}")
