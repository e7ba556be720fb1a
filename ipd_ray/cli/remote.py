"""What the commands around a Ray cluster do: submit, jobs, doctor."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
import typer.main

from ipd_ray import config as config_module
from ipd_ray.config import RunConfig
from ipd_ray.errors import UserError, near_name
from ipd_ray.on_ray import ray_part
from ipd_ray.runs import human_bytes, human_seconds
from ipd_ray.text import answer, answer_json, say, table

UsageError: Any = typer.BadParameter.__base__
"""Of the click that typer brings, or builds on."""
NOT_AS_JOB = ("submit", "jobs")


def submit(
    app: typer.Typer, words: Sequence[str], *, address: str | None, working_dir: Path, env: Sequence[str],
    pinned: bool, exclude: Sequence[str], follow: bool, submission_id: str | None, as_json: bool,
) -> int:
    """Check a command, send it to the cluster, follow it; return the exit code. See `ipd-ray submit --help`."""
    root = working_dir.absolute()
    words, settings, files = _checked(app, words, root)
    jobs = ray_part("jobs", "ipd-ray submit")
    environment, pins = jobs.values_of(env), jobs.pins() if pinned else []
    parcel = jobs.Parcel.of(root, exclude, always=files)
    server = _server(address)
    if settings and settings.runtime.wandb == "online" and "WANDB_API_KEY" not in env:
        say("note: runtime.wandb=online, and no --env WANDB_API_KEY: the cluster must provide it itself")
    if server.ray_version != jobs.RAY_VERSION:
        say(f"note: the cluster runs ray {server.ray_version}, here is {jobs.RAY_VERSION}; the job takes the cluster's")
    size = human_bytes(sum((root / path).stat().st_size for path in parcel.files))
    left = ", ".join(f"{name} ({what})" for name, what in parcel.left.items())
    say(f"sending {len(parcel.files):,} files, {size}, of {root}" + (f"; left here: {left}" if left else ""))
    entrypoint = shlex.join(["python", "-m", "ipd_ray.cli", *words])
    name = server.submit(
        entrypoint, parcel, pinned=pins, environment=environment, submission_id=submission_id
    )
    if as_json:
        answer_json({
            "submission_id": name, "address": server.address, "entrypoint": entrypoint, "pins": pins,
            "env": sorted(environment), "files": len(parcel.files), "left": dict(parcel.left),
        })
    else:
        answer(name)
    if follow:
        return _follow(server, name, to_stderr=as_json)
    say(f"follow it with `ipd-ray jobs logs {name} --follow --address {server.address}`")
    return 0


def _checked(app: typer.Typer, words: Sequence[str], root: Path) -> tuple[list[str], RunConfig | None, list[Path]]:
    """Return the command as it will run, its settings where it has some, and the files that it reads.

    Parsed as it would be here; run on Ray where it does not say. Raises UserError for what would fail at once.
    """
    from ipd_ray.sweep import Sweep, check_points, common_settings, read_question

    group: Any = typer.main.get_command(app)
    try:
        command, rest = group, list(words)
        path: list[str] = []
        while hasattr(command, "commands"):
            name = rest[0] if rest else ""
            valid = [known for known in command.commands if path or known not in NOT_AS_JOB]
            if name not in valid:
                raise UserError(
                    f"{' '.join(['ipd-ray', *path, name])!r} is no command that a job can run: it must be one of "
                    f"{', '.join(valid)}.{near_name(name, valid)}"
                )
            command, rest, path = command.commands[name], rest[1:], [*path, name]
        values = command.make_context(" ".join(["ipd-ray", *path]), list(rest)).params
    except UsageError as error:
        raise UserError(f"{' '.join(['ipd-ray', *words])}: {error.format_message()}") from None
    if "overrides" not in values:
        return list(words), None, []
    named = {"--config": values["config"], "QUESTION": values.get("question")}
    files = {what: _travelling(what, file, root) for what, file in named.items() if file is not None}
    config = root / files["--config"] if "--config" in files else None
    overrides = list(values["overrides"] or ())
    question = None
    if "QUESTION" in files:
        question = read_question(root / files["QUESTION"])
        preset = config_module.given(values["preset"])
        given = common_settings(question, preset, config, config_module.parse_overrides(overrides))
    else:
        given = config_module.given(values["preset"], config, overrides)
    added = {} if "runtime.engine" in given else {"runtime.engine": "ray"}
    if {**given, **added}["runtime.engine"] == "ray" and "runtime.address" not in given:
        added["runtime.address"] = "auto"
    if question is not None:
        check_points(question, {**given, **added})
        Sweep.of(values["sweep_dir"] or "")
    settings = config_module.build(given, added)
    if not values.get("dry_run"):
        folder = next((name for name in ("run_dir", "sweep_dir") if name in values), None)
        _check_places(f"--{folder.replace('_', '-')}" if folder else "", values.get(folder or ""), settings)
    return [*words, *(f"{name}={value}" for name, value in added.items())], settings, list(files.values())


def _travelling(what: str, path: Path, root: Path) -> Path:
    """A file that the command names, relative to the working directory, with which it travels."""
    if path.is_absolute() or not (root / path).resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"{what} {path} must lie in the --working-dir {root} and be named relative to it: the job sees nothing "
            "else of this machine."
        )
    return path


def _check_places(option: str, folder: str | Path | None, settings: RunConfig) -> None:
    """Raise UserError where results would lie in the job's own folder, which Ray deletes. option: what names them."""
    for name, place in ((option, str(folder or "")), ("runtime.store", settings.runtime.store)):
        if name and place is not None and "://" not in place and not Path(place).is_absolute():
            raise UserError(
                f"{name}{f'={place}' * bool(place)}: a job's own folder lies on one node and is deleted after it: give "
                f"{name} an absolute path on storage that every node sees."
            )


# ---- jobs


def jobs_ls(address: str | None, as_json: bool) -> None:
    """List the jobs."""
    found = _server(address).jobs()
    if as_json:
        answer_json([_document(job) for job in found])
    elif found:
        print(table(["job", "status", "started", "time", "command"],
                    [[job.id, job.status, *_when(job), _shown(job.entrypoint)] for job in found]))
    else:
        say("no jobs: `ipd-ray submit` makes one")


def jobs_status(name: str, address: str | None, as_json: bool) -> None:
    """Say how a job stands."""
    job = _server(address).job(name)
    if as_json:
        answer_json(_document(job))
        return
    started, seconds = _when(job)
    rows = [("job", job.id), ("status", job.status), ("command", job.entrypoint), ("started", started),
            ("time", seconds), ("exit code", "-" if job.code is None else str(job.code)), ("message", job.message)]
    print("\n".join(f"{label:<10} {text}" for label, text in rows))


def jobs_logs(name: str, address: str | None, follow: bool) -> int:
    """Print a job's log; with `follow` until it ends, and return its exit code."""
    server = _server(address)
    if follow:
        return _follow(server, name)
    sys.stdout.write(server.logs(name))
    return 0


def jobs_stop(name: str, address: str | None, as_json: bool) -> None:
    """Stop a job."""
    server = _server(address)
    before = server.job(name)
    if not before.ended:
        say(f"stopping {name} ...")
    job = server.stop(name)
    if as_json:
        answer_json(_document(job))
    else:
        had = "had ended before" if before.ended else "what is finished is kept" if job.ended else "has not ended yet"
        answer(f"{name}: {job.status}; {had}")


def _follow(server: Any, name: str, to_stderr: bool = False) -> int:
    """Print a job's log until it ends, and how it ended; return its exit code. Ctrl-C leaves it running."""
    stream = sys.stderr if to_stderr else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        job = server.follow(name, write)
    except BaseException as stopped:
        if isinstance(stopped, Exception):
            raise
        say(
            f"\nThe job goes on. `ipd-ray jobs logs {name} --follow` follows it again, `ipd-ray jobs stop {name}` "
            f"stops it (--address {server.address})."
        )
        return 130 if isinstance(stopped, KeyboardInterrupt) else 143
    if job.code is None and job.message:  # it never began, or was ended from outside: its log does not say why
        say(job.message)
    say(f"{name}: {job.status}" + (f", exit code {job.code}" if job.code else "") + f", after {_when(job)[1]}")
    return int(job.exit_code)


# ---- doctor


def doctor(
    words: Sequence[str], *, address: str | None, preset: str | None, config: Path | None, run_dir: str | None,
    as_json: bool,
) -> int:
    """Examine the machines that a run would use, and say what was found; return the exit code."""
    from ipd_ray.doctor import examine

    named = [word for word in words if "=" not in word]
    if len(named) > 1:
        raise UserError(f"{' '.join(named)}: name one dataset; settings are written as section.field=value.")
    engine = ["runtime.engine=ray", f"runtime.address={address}"] if address else []
    settings = config_module.load(preset, config, [*engine, *(word for word in words if "=" in word)])
    report = examine(named[0] if named else None, settings, run_dir)
    if as_json:
        answer_json(report.document())
        return report.exit_code
    rows = [[m.name, f"{m.cpus:g}", f"{m.gpus:g}", human_bytes(m.memory),
             "-" if m.object_store is None else human_bytes(m.object_store), str(m.actors)] for m in report.machines]
    if rows:
        print(table(["machine", "CPUs", "GPUs", "memory", "object store", "workers"], rows) + "\n")
    for finding in report.findings:
        print(f"{finding.level:<7}  {finding.check}: {finding.text}")
    if report.plan:
        steps = [[row["step"], row["state"], human_seconds(row["seconds"]), human_bytes(row["memory"])]
                 for row in report.plan["steps"]]
        steps.append(["in all", "", human_seconds(report.plan["total"]["seconds"]), ""])
        print("\n" + table(["step", "state", "time", "memory of a worker"], steps))
    return report.exit_code


def _server(address: str | None) -> Any:
    if not address:
        raise UserError("--address is missing: give the address of the cluster's dashboard, such as http://HOST:8265.")
    return ray_part("jobs", "ipd-ray jobs").JobServer(address)


def _document(job: Any) -> dict[str, Any]:
    names = ("id", "status", "entrypoint", "start", "end", "seconds", "code", "message")
    return {name: getattr(job, name) for name in names}


def _when(job: Any) -> tuple[str, str]:
    """When a job began, and how long it has run."""
    started = "-" if job.start is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.start))
    return started, "-" if job.seconds is None else human_seconds(job.seconds)


def _shown(entrypoint: str) -> str:
    """A command as it was typed."""
    return entrypoint.replace("python -m ipd_ray.cli", "ipd-ray", 1)
