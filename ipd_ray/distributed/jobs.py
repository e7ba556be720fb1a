"""Runs as jobs of a Ray cluster: what travels there, and how they are listed, followed and stopped."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import subprocess
import time
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from packaging.requirements import Requirement
from packaging.version import Version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

import ipd_ray
from ipd_ray.distributed import credentials
from ipd_ray.distributed.cluster import knock
from ipd_ray.environment import variables
from ipd_ray.errors import UserError, first_line, near_name
from ipd_ray.runs import IDENTITY, human_bytes

UPLOAD_BYTES = 100 * 2**20
"""Largest body that Ray's job server accepts."""
STOP_SECONDS = 60
"""A stopped job has this long to end by itself, as after Ctrl-C, before it is killed. Ray's own default is 3."""
SETUP_SECONDS = 1800
"""For a node to install what is pinned; torch alone may take longer than Ray's 600."""
RAY_VERSION = importlib.metadata.version("ray")
OPTIONAL = ("mujoco", "tensorboard")
"""Optional parts of ipd_ray that a run may need."""
LOOK_SECONDS = 1.0
RECONNECTS = 5
"""Times in a row that following a log begins again without having read anything."""


# ---- what travels


def pins() -> list[str]:
    """Return what ipd_ray requires in exactly the versions installed here, optional parts where they are installed.

    ray itself is left out: a job runs on the cluster's own.
    """
    try:
        wanted = importlib.metadata.requires("ipd_ray") or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "--pins: ipd_ray is not installed here, so nothing says what it needs: `pip install` it, or add --no-pins "
            "where the cluster's image holds all of it."
        ) from None
    found = []
    for requirement in map(Requirement, wanted):
        plain = _applies(requirement, "")
        optional = any(_applies(requirement, extra) for extra in OPTIONAL) and _whole(requirement)
        if requirement.name != "ray" and (plain or optional):
            version = Version(importlib.metadata.version(requirement.name)).public  # 2.13.0+cpu is 2.13.0 elsewhere
            extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            found.append(f"{requirement.name}{extras}=={version}")
    return sorted(found)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _whole(requirement: Requirement) -> bool:
    """Whether a requirement is installed here with all that its extras bring."""
    try:
        parts = [Requirement(text) for text in importlib.metadata.requires(requirement.name) or []]
        for part in parts:
            if any(_applies(part, extra) for extra in requirement.extras):
                importlib.metadata.version(part.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


LEFT_FOLDERS = (".git", ".hg", ".svn", "__pycache__", "node_modules", ".venv", "venv", "wandb")
LEFT_FILES = (
    "*.hdf5", "*.h5", "*.npz", "*.npy", "*.parquet", "*.arrow", "*.safetensors",  # logs and weights
    ".git", ".env", ".env.*", ".netrc", "*.pem", "*.key", "id_rsa*", "id_ed25519*",  # a work tree's link, credentials
)


def left_here(folder: Path) -> str:
    """Return why a folder does not travel with a job: what it is; empty for one that does."""
    if folder.name in LEFT_FOLDERS or (folder / "CACHEDIR.TAG").exists():
        return "cache or version control"
    if (folder / "pyvenv.cfg").exists() or (folder / "conda-meta").exists():
        return "environment"
    if (folder / IDENTITY).exists():
        return "run"
    if any(True for pattern in ("*/*/artifact.json", "*/*/lease.json") for _ in folder.glob(pattern)):
        return "store"
    data = folder / "data"  # Minari's, in either of its formats
    if (data / "metadata.json").exists() and ((data / "main_data.hdf5").exists() or (data / "0").is_dir()):
        return "dataset"
    return ""


@dataclass(frozen=True)
class Parcel:
    """What of a working directory travels."""

    root: Path
    files: tuple[Path, ...]
    """Relative to root."""
    left: Mapping[str, str]
    """Folders that stay here, and what they are."""

    @classmethod
    def of(cls, root: Path, exclude: Sequence[str] = (), always: Sequence[Path] = ()) -> Parcel:
        """Look through a working directory. exclude: globs, of names or of paths relative to it; always: files in it.

        Datasets, runs, stores, environments, caches, version control and what looks like a credential stay; so does
        what git ignores. Links to folders are not followed.
        """
        if not root.is_dir():
            raise UserError(f"--working-dir {root} is no folder: name the one that the command is to be run in.")
        known, files, left = _known_to_git(root), [], {}
        for place, folders, names in os.walk(root):
            here = Path(place).relative_to(root)
            for name in list(folders):
                path = here / name
                why = "excluded" if _matches(path, exclude) else left_here(root / path)
                if why or (root / path).is_symlink():
                    folders.remove(name)
                if why:
                    left[str(path)] = why
            for name in names:
                path = here / name
                if _matches(path, (*LEFT_FILES, *exclude)) or not (root / path).is_file():
                    continue
                if known is None or any(p in known for p in (path, *path.parents)):
                    files.append(path)
        return cls(root, tuple(sorted({*files, *always})), left)

    def write(self, target: Path) -> None:
        """Write the files and this very ipd_ray as a zip file. Raises UserError where the cluster would refuse it."""
        source = Path(ipd_ray.__file__).parent
        package = (p for p in sorted(source.rglob("*")) if p.is_file() and "__pycache__" not in p.parts)
        entries = [(source.parent, path.relative_to(source.parent)) for path in package]
        entries += [(self.root, path) for path in self.files if path.parts[0] != source.name]
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for root, path in entries:
                entry = zipfile.ZipInfo(str(path))  # no times: what has not changed is not sent twice
                entry.external_attr = ((root / path).stat().st_mode & 0o777) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                with (root / path).open("rb") as file, archive.open(entry, "w") as out:
                    while block := file.read(2**20):
                        out.write(block)
                        if target.stat().st_size > UPLOAD_BYTES:
                            raise UserError(self._too_big())
        if target.stat().st_size > UPLOAD_BYTES:
            raise UserError(self._too_big())

    def _too_big(self) -> str:
        sizes: Counter[str] = Counter()
        for path in self.files:
            sizes[path.parts[0] + "/" * (len(path.parts) > 1)] += (self.root / path).stat().st_size
        biggest = ", ".join(f"{name} ({human_bytes(size)})" for name, size in sizes.most_common(3))
        return (
            f"--working-dir {self.root} is larger than {human_bytes(UPLOAD_BYTES)} compressed, which is what Ray's job "
            f"server accepts; most is in {biggest}: leave it out with --exclude NAME, or give a smaller --working-dir."
        )


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path.name, p) or fnmatch(str(path), p.rstrip("/")) for p in patterns)


def _known_to_git(root: Path) -> set[Path] | None:
    """Files that git tracks or would, and submodules, relative to root; None where this is no work tree of git's."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True, check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {Path(name) for name in os.fsdecode(listed.stdout).split("\0") if name}


def values_of(names: Sequence[str]) -> dict[str, str]:
    """Return the named environment variables. Raises UserError for one that is not set; says no value."""
    for name in names:
        if "=" in name:
            raise UserError(
                f"--env {name.partition('=')[0]}=...: give the name alone: the value is read from the environment, so "
                "that it gets into no history and no list of processes."
            )
        if name not in os.environ:
            raise UserError(f"--env {name} is not set here: `export {name}=...` first, or leave it out.")
    return {name: os.environ[name] for name in names}


# ---- the job server


@dataclass(frozen=True)
class Job:
    """A submitted job. Of its environment the names alone."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    entrypoint: str
    start: float | None
    """Unix seconds."""
    end: float | None
    code: int | None
    """Exit code of the command, once it has ended by itself."""
    message: str
    """What Ray says of the status; the end of the log after a failure."""
    credentials: str = ""
    """Name under which it was handed values."""

    @classmethod
    def of(cls, found: JobDetails) -> Job:
        variables = (found.runtime_env or {}).get("env_vars", {})
        return cls(
            id=str(found.submission_id or found.job_id), status=found.status.value, entrypoint=found.entrypoint,
            start=found.start_time / 1000 if found.start_time else None,
            end=found.end_time / 1000 if found.end_time else None, code=found.driver_exit_code,
            message=found.message or "", credentials=variables.get(credentials.VARIABLE, ""),
        )

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_code(self) -> int:
        """What a shell would have returned: the command's own code, 143 where it was stopped, else 1 for a failure."""
        if self.status == "STOPPED":
            return 143
        return self.code if self.code is not None else int(self.status == "FAILED")

    @property
    def seconds(self) -> float | None:
        """How long it has run."""
        return None if self.start is None else (self.end or time.time()) - self.start


@dataclass
class _Tail:
    """The end of a log that has not been written yet. Ray sends a log from its beginning on every time."""

    write: Callable[[str], None]
    seen: int = 0
    """Characters written."""

    async def read(self, log: AsyncIterator[str]) -> None:
        """Write what is new of a log until it ends."""
        position = 0
        async for text in log:
            if position + len(text) > self.seen:
                self.write(text[max(0, self.seen - position):])
                self.seen = position + len(text)
            position += len(text)


class JobServer:
    """The job server of a cluster, at its dashboard's address. What goes wrong there is a UserError with its remedy."""

    def __init__(self, address: str):
        """address: http(s)://HOST:PORT of the dashboard. Raises UserError where no Ray answers, or not to us."""
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"--address {address!r} must be the address of the cluster's dashboard, such as "
                "http://HOST:8265: `ray start --head` prints it."
            )
        self.address = address.rstrip("/")
        for name in ("job.sdk", "dashboard_sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        with self._asking():
            knock(f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}")
            # Ray prefers RAY_ADDRESS to what it is called with.
            with variables({"RAY_API_SERVER_ADDRESS": self.address}):
                self._client = JobSubmissionClient(self.address, headers=_authorisation())

    @property
    def ray_version(self) -> str:
        """The cluster's."""
        return str(self._client._server_ray_version)

    def submit(
        self, entrypoint: str, parcel: Parcel, *, pinned: Sequence[str] = (),
        environment: Mapping[str, str] | None = None, submission_id: str | None = None,
    ) -> str:
        """Send the parcel, hand the environment over, start the command in the parcel's folder; return the job's id.

        pinned: what every node installs first, where it has not got it. environment: values that only the head's memory
        holds, and only while the job runs.
        """
        runtime_env: dict[str, Any] = {
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
            "config": {"setup_timeout_seconds": SETUP_SECONDS},
        }
        if pinned:
            runtime_env["pip"] = {"packages": list(pinned), "pip_check": False}
        with TemporaryDirectory(prefix="ipd-ray-") as folder, self._asking():
            archive = Path(folder) / "working_dir.zip"
            parcel.write(archive)
            if environment:
                name = credentials.new_name()
                self._hand_over(name, environment)
                handed = credentials.runtime_env(name)
                runtime_env = {**runtime_env, **handed, "env_vars": {**runtime_env["env_vars"], **handed["env_vars"]}}
            runtime_env["working_dir"] = str(archive)
            try:
                return self._client.submit_job(
                    entrypoint=entrypoint, runtime_env=runtime_env, submission_id=submission_id or None
                )
            except BaseException:  # refused or interrupted: no job will blank them
                if environment:
                    self._hand_over(name, {})
                raise

    def jobs(self) -> list[Job]:
        """Return the submitted jobs, the last one first."""
        with self._asking():
            found = [Job.of(job) for job in self._client.list_jobs() if job.type == "SUBMISSION"]
        return sorted(found, key=lambda job: -(job.start or time.time()))

    def job(self, name: str) -> Job:
        """Return one job. Raises UserError for an unknown one, with the near name."""
        with self._asking(name):
            return Job.of(self._client.get_job_info(name))

    def logs(self, name: str) -> str:
        """Return all that a job has printed."""
        with self._asking(name):
            return self._client.get_job_logs(name)

    def follow(self, name: str, write: Callable[[str], None]) -> Job:
        """Write what a job has printed and prints until it has ended; return it then.

        A connection that breaks is made again, and goes on where it was.
        """
        self.job(name)  # refuses an unknown one
        tail, failures = _Tail(write), 0
        while True:
            before = tail.seen
            try:
                asyncio.run(tail.read(self._client.tail_job_logs(name)))
            except (RuntimeError, aiohttp.ClientError) as error:
                failures = 0 if tail.seen > before else failures + 1
                if failures > RECONNECTS:
                    raise UserError(
                        f"the log of {name} cannot be followed ({first_line(error)}): `ipd-ray jobs logs {name}` "
                        "prints what there is."
                    ) from error
            if (job := self._settled(name)).ended:
                self.forget(job)
                return job
            time.sleep(LOOK_SECONDS)

    def stop(self, name: str) -> Job:
        """Stop a job as Ctrl-C would, and return it once it has ended."""
        if not (job := self.job(name)).ended:
            with self._asking(name):
                self._client.stop_job(name)
            end = time.monotonic() + STOP_SECONDS + 15.0
            while not (job := self.job(name)).ended and time.monotonic() < end:
                time.sleep(LOOK_SECONDS)
        self.forget(job)
        return job

    def forget(self, job: Job) -> None:
        """Blank what a job was handed; one that ended by itself has done so, one that was killed has not."""
        if job.ended and job.credentials:
            with self._asking(job.id):
                self._hand_over(job.credentials, {})

    def _hand_over(self, name: str, values: Mapping[str, str]) -> None:
        answer = self._client._do_request("PUT", f"/api/packages/gcs/{name}", data=credentials.as_bytes(values))
        if answer.status_code != 200:  # its text is a traceback, and not needed
            raise RuntimeError(f"the credentials were not accepted (status {answer.status_code})")

    def _settled(self, name: str) -> Job:
        """The job, a moment later where its log has ended and its status has not said so yet."""
        end = time.monotonic() + 5.0
        while not (job := self.job(name)).ended and time.monotonic() < end:
            time.sleep(0.2)
        return job

    @contextmanager
    def _asking(self, name: str = "") -> Iterator[None]:
        """Turn what the client raises into UserErrors."""
        try:
            yield
        except UserError:
            raise
        except AuthenticationError as error:
            raise UserError(
                f"--address {self.address}: {first_line(error).rstrip('.')}: set RAY_AUTH_TOKEN, or "
                "RAY_AUTH_TOKEN_PATH to a file that holds it, or write it to ~/.ray/auth_token; on the head `ray "
                "get-auth-token` prints it."
            ) from None
        except (OSError, KeyError, ValueError) as error:  # requests' errors are OSErrors
            raise self._no_dashboard(error) from error
        except RuntimeError as error:
            text = str(error)
            if name and "does not exist" in text:
                known = [job.id for job in self.jobs()]
                raise UserError(
                    f"no job {name!r} on {self.address}.{near_name(name, known)} `ipd-ray jobs ls` lists them."
                ) from None
            if "check returned 404" in text:
                raise self._no_dashboard(error) from error
            if "already exists" in text:
                raise UserError("--submission-id is taken by another job of the cluster: give another one.") from None
            raise UserError(f"--address {self.address}: Ray's job server refuses: {first_line(error)}") from error

    def _no_dashboard(self, error: Exception) -> UserError:
        return UserError(
            f"--address {self.address}: no Ray dashboard answers there ({first_line(error)}): name the one of a "
            "running cluster; `ray start --head --dashboard-host=0.0.0.0` starts one (with ray[default] installed), "
            "`ssh -L 8265:localhost:8265 HEAD` or `kubectl port-forward` reaches one."
        )


def _authorisation() -> dict[str, str]:
    """The header with the token, looked for where Ray looks; its client does so with RAY_AUTH_MODE=token alone."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        try:
            token = Path(path or Path.home() / ".ray" / "auth_token").read_text().strip()
        except OSError as error:
            if path:
                raise UserError(
                    f"RAY_AUTH_TOKEN_PATH={path} cannot be read ({error.strerror}): let it name the file that holds "
                    "the cluster's token, or unset it."
                ) from None
    return {"Authorization": f"Bearer {token}"} if token else {}


__all__ = ["Job", "JobServer", "Parcel", "pins", "values_of"]
