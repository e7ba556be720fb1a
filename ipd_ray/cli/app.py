"""What all commands share: the application, options, how mistakes are told, exit codes."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from ipd_ray.text import say

F = TypeVar("F", bound=Callable[..., Any])

EPILOG = "Exit codes: 0 done, 2 a user's mistake, 3 done in part, 130 interrupted (143 by SIGTERM), 1 anything else."

app = typer.Typer(
    name="ipd-ray", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, epilog=EPILOG,
    help="""Offline RL that plans: learn values and a world model from a log, imagine better segments where the log
    disappoints, and distil both into a policy.

    Begin with `ipd-ray run demo --preset demo`.""",
)


# ---- options

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
RunsDir = Annotated[str, typer.Option(help="Where runs lie: a folder or a URI.", metavar="PATH|URI")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


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
                say(
                    "\nStopped. What is finished is kept; the same command goes on from there:\n  "
                    f"{shlex.join(['ipd-ray', *sys.argv[1:]])}"
                )
                say_all(notes)
                raise typer.Exit(130 if isinstance(reason, KeyboardInterrupt) else 143) from None
            if not isinstance(error, Exception):
                raise
            if isinstance(error, BrokenPipeError):  # who reads has gone, such as `| head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(128 + signal.SIGPIPE) from None
            code = _explain(error)
            say_all(notes)
            raise typer.Exit(code) from None

    return answering  # type: ignore[return-value]


def say_all(texts: Sequence[str]) -> None:
    for text in texts:
        say(text)


def _explain(error: Exception) -> int:
    """Say what went wrong and what helps; return the exit code."""
    from ipd_ray.errors import PartialError, TaskError, UserError

    if isinstance(error, (typer.Exit, typer.Abort)):
        raise error
    if isinstance(error, UserError):
        say(f"error: {error}")
        return 2
    if isinstance(error, PartialError):
        say(f"incomplete: {error}")
        return 3
    if isinstance(error, OSError):
        from ipd_ray.checks import explain_os_error

        if (plain := explain_os_error(error)) is not None:
            say(f"error: {plain}")
            return 2
    if isinstance(error, TaskError):  # its traceback is the worker's, for who wants to know more
        say(f"{error}\nerror: {error.reason.removeprefix('FloatingPointError: ')}")
        return 1
    say(traceback.format_exc())
    return 1


def confirm(question: str, yes: bool) -> None:
    """Ask, unless --yes. Raises UserError where nobody can answer."""
    from ipd_ray.errors import UserError

    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{question} Nobody can answer here (standard input is no terminal): add --yes.")
    if not typer.confirm(question):
        say("nothing was changed")
        raise typer.Exit(0)
