"""Jobs of Ray clusters, and whether machines are fit. What the commands do is in `remote`, imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ipd_ray.cli.app import ConfigFile, Json, Preset, RunDir, answers, app

jobs_app = typer.Typer(no_args_is_help=True, help="List, follow and stop what was submitted to a Ray cluster.")
app.add_typer(jobs_app, name="jobs")
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
    from ipd_ray.cli import remote

    raise typer.Exit(remote.submit(
        app, command, address=address, working_dir=working_dir, env=env or (), pinned=pins, exclude=exclude or (),
        follow=follow, submission_id=submission_id, as_json=as_json,
    ))


@jobs_app.command("ls")
@answers
def jobs_ls(address: Address = None, as_json: Json = False) -> None:
    """List the jobs of the cluster, the last one first."""
    from ipd_ray.cli import remote

    remote.jobs_ls(address, as_json)


@jobs_app.command("status")
@answers
def jobs_status(job: JobId, address: Address = None, as_json: Json = False) -> None:
    """Say how a job stands: command, start, duration, exit code."""
    from ipd_ray.cli import remote

    remote.jobs_status(job, address, as_json)


@jobs_app.command("logs")
@answers
def jobs_logs(
    job: JobId, address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job ends; the exit code is then the job's.")
    ] = False,
) -> None:
    """Print what a job has printed."""
    from ipd_ray.cli import remote

    raise typer.Exit(remote.jobs_logs(job, address, follow))


@jobs_app.command("stop")
@answers
def jobs_stop(job: JobId, address: Address = None, as_json: Json = False) -> None:
    """Stop a job as Ctrl-C would: what is finished is kept, and the same command goes on from there."""
    from ipd_ray.cli import remote

    remote.jobs_stop(job, address, as_json)


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
    from ipd_ray.cli import remote

    raise typer.Exit(remote.doctor(
        words or (), address=address, preset=preset, config=config, run_dir=run_dir, as_json=as_json
    ))
