"""Where runs and artifacts lie: a path, or the URI of an object store behind a mirror on each machine.

Steps read and write files. Under a path (of this machine, or of a mount that all nodes share) those are the files
themselves. Under s3:// or gs:// each machine has a mirror: what is read is fetched into it, what is written is pushed
from it. An object store has no rename, so what counts is said by one small file that is pushed last: artifact.json of
an artifact, the entry of a shard.

The filesystem is Arrow's, which Ray uses too. Credentials and endpoints come from the environment that its clients know
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, ...) or from the machine's role; options may stand
in the URI: s3://bucket/runs?region=eu-central-1.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from ipd_ray.errors import UserError
from ipd_ray.files import write_atomic

ARTIFACT = "artifact.json"
"""The file that makes a folder of the store an artifact."""
METRICS = "metrics.jsonl"
"""An artifact's learning curve."""
SCHEMES = {"s3": "AWS_ACCESS_KEY_ID", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}
"""Kinds of object stores, each with a variable in which its client looks for credentials."""
ATTEMPTS = 5
"""Requests to S3 that may fail in a row; Arrow's own rule lets one that is never answered take five minutes."""
RETRY_SECONDS = 30
"""How long a request to Google is tried again; its client's own 15 minutes pass without a word."""
CONNECTIONS = 16
"""Files that are on the way at the same time."""
LOST: dict[str, str] = {}
"""Why this process may write to a folder no more, by the folder's URI: its lease is another's by now."""


def mirrors() -> Path:
    """Where this machine mirrors object stores: IPD_RAY_CACHE, or the user's cache folder."""
    base = os.environ.get("IPD_RAY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(base) / "ipd_ray"


@lru_cache(maxsize=8)
def _filesystem(scheme: str, bucket: str, query: str) -> fs.FileSystem:
    # s3: a small file in one request, not in three
    option, value = ("allow_delayed_open", "true") if scheme == "s3" else ("retry_limit_seconds", RETRY_SECONDS)
    if option not in query:
        query = "&".join([*filter(None, [query]), f"{option}={value}"])
    found = fs.FileSystem.from_uri(f"{scheme}://{bucket}?{query}")[0]
    if scheme == "gs":
        return found
    _, (options,) = found.__reduce__()  # a URI cannot say how often, and this is how Arrow sends one elsewhere
    return fs.S3FileSystem(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS))


@dataclass(frozen=True)
class Folder:
    """A folder by its absolute path or its URI. Equal where the text is equal; travels to other machines as text."""

    uri: str

    @classmethod
    def of(cls, place: str | Path | Folder) -> Folder:
        """Return a place as a folder; relative paths begin at the current folder.

        Raises:
            UserError: a URI of an unknown kind, or without a bucket.
        """
        if isinstance(place, Folder):
            return place
        text = str(place)
        if "://" not in text:
            return cls(str(Path(text).absolute()))
        parts = urlsplit(text)
        if parts.scheme == "file":
            return cls(str(Path(parts.path)))
        if parts.scheme not in SCHEMES:
            known = " or ".join(f"{scheme}://bucket/path" for scheme in SCHEMES)
            raise UserError(f"{text!r}: {parts.scheme}:// is not known: give a path, or {known}.")
        path = parts.path.strip("/")
        if not parts.netloc or ".." in path.split("/"):
            raise UserError(f"{text!r} must name a bucket and a path in it: {parts.scheme}://bucket/path.")
        return cls(f"{parts.scheme}://{parts.netloc}/{path}{parts.query and '?' + parts.query}")

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Folder:
        if not self.remote:
            return Folder(str(Path(self.uri) / name))
        plain, _, query = self.uri.partition("?")
        return Folder(f"{plain.rstrip('/')}/{name}{query and '?' + query}")

    @property
    def parent(self) -> Folder:
        if not self.remote:
            return Folder(str(Path(self.uri).parent))
        plain, _, query = self.uri.partition("?")
        head, _, last = plain.rpartition("/")
        return Folder(f"{head if last else head.rpartition('/')[0]}{query and '?' + query}")

    @property
    def name(self) -> str:
        return self.uri.partition("?")[0].rstrip("/").rpartition("/")[2]

    @property
    def remote(self) -> bool:
        """Whether `path` is but a mirror."""
        return "://" in self.uri

    @property
    def credentials(self) -> str:
        """Variable of the environment in which an object store's client looks for them first."""
        return SCHEMES[self.uri.partition("://")[0]]

    @cached_property
    def path(self) -> Path:
        """Where its files are on this machine."""
        if not self.remote:
            return Path(self.uri)
        parts = urlsplit(self.uri)
        server = f"{parts.scheme}/{parts.netloc}{parts.query and '-' + sha256(parts.query.encode()).hexdigest()[:8]}"
        return mirrors() / server / parts.path.strip("/")

    @cached_property
    def _fs(self) -> fs.FileSystem:
        parts = urlsplit(self.uri)
        try:
            return _filesystem(parts.scheme, parts.netloc, parts.query)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{self.uri} cannot be opened: {error}.") from error

    @property
    def arrow(self) -> tuple[fs.FileSystem, str]:
        """The filesystem and the path in it: what Ray Train takes."""
        if not self.remote:
            return fs.LocalFileSystem(), self.uri
        return self._fs, self._key()

    def _key(self, name: str = "") -> str:
        parts = urlsplit(self.uri)
        return "/".join(part for part in (parts.netloc, parts.path.strip("/"), name) if part)

    # ---- small files, always as they are in the store itself

    def read_text(self, name: str) -> str | None:
        """Return a file's content, or None where there is none."""
        try:
            if not self.remote:
                return (self.path / name).read_text()
            with self._fs.open_input_stream(self._key(name)) as file:
                return str(file.read().decode())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_text(self, name: str, text: str) -> None:
        """Replace a file, the folder made where it is missing; readers see the old one or the new one.

        Raises:
            UserError: this process had a lease on the folder, and lost it.
        """
        if reason := LOST.get(self.uri):
            raise UserError(reason)
        if not self.remote:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / name, text)
            return
        with self._fs.open_output_stream(self._key(name)) as file:
            file.write(text.encode())

    def remove_file(self, name: str) -> None:
        """Remove a file, which may be missing."""
        (self.path / name).unlink(missing_ok=True)
        if self.remote:
            with suppress(FileNotFoundError):
                self._fs.delete_file(self._key(name))

    def exists(self, name: str = "") -> bool:
        """Whether there is such a file; without a name, whether there is anything in this folder."""
        if not self.remote:
            return (self.path / name).exists()
        return bool(self._fs.get_file_info(self._key(name)).type != fs.FileType.NotFound)

    # ---- what is there

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file in it, by name; those in folders below, too."""
        if not self.remote:
            found: dict[str, int] = {}
            for path in self.path.rglob("*"):
                with suppress(FileNotFoundError):  # renamed or removed meanwhile
                    if stat.S_ISREG((status := path.stat()).st_mode):
                        found[path.relative_to(self.path).as_posix()] = status.st_size
            return found
        infos = self._fs.get_file_info(fs.FileSelector(self._key(), recursive=True, allow_not_found=True))
        begin = len(self._key()) + 1
        return {info.path[begin:]: int(info.size) for info in infos if info.type == fs.FileType.File}

    def folders(self) -> list[Folder]:
        """Return the folders right below."""
        if not self.remote:
            return [Folder(str(p)) for p in sorted(self.path.iterdir()) if p.is_dir()] if self.path.is_dir() else []
        found = self._fs.get_file_info(fs.FileSelector(self._key(), allow_not_found=True))
        names = sorted(info.base_name for info in found if info.type == fs.FileType.Directory)
        return [self / name for name in names]

    @property
    def bytes(self) -> int:
        return sum(self.sizes().values())

    # ---- between store and mirror; nothing to do under a path

    def push(self, names: Sequence[str]) -> None:
        """Send files of this machine to the store, side by side."""
        if self.remote:
            _each(lambda name: self._copy(_LOCAL, str(self.path / name), self._fs, self._key(name)), names)

    def pull(self, names: Sequence[str]) -> None:
        """Fetch files from the store, side by side; those that are not there are not here afterwards either."""
        if self.remote:
            _each(self._fetch, names)

    def have(self, names: Sequence[str]) -> None:
        """Fetch what this machine has not, once for all of its processes: for files that never change."""
        if self.remote:
            with self.locked():
                self.pull([name for name in names if not (self.path / name).exists()])

    def remove(self) -> None:
        """Remove it with all that it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.remote:
            with suppress(FileNotFoundError):
                self._fs.delete_dir(self._key())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this machine from fetching the same at the same time."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _fetch(self, name: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            self._copy(self._fs, self._key(name), _LOCAL, str(temporary))
            os.replace(temporary, target)
        except FileNotFoundError:
            target.unlink(missing_ok=True)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def _copy(source: fs.FileSystem, begin: str, target: fs.FileSystem, end: str) -> None:
        with source.open_input_stream(begin) as reads, target.open_output_stream(end) as writes:
            while block := reads.read(8 * 2**20):
                writes.write(block)


_LOCAL = fs.LocalFileSystem()


def _each(function: Callable[[str], None], names: Sequence[str]) -> None:
    if len(names) < 2:
        for name in names:
            function(name)
        return
    with ThreadPoolExecutor(min(CONNECTIONS, len(names))) as threads:
        for _ in threads.map(function, names):
            pass


def near(place: str | Path | Folder) -> str:
    """Return a path as a user would type it here; a URI as it is."""
    folder = Folder.of(place)
    with suppress(ValueError):
        return folder.uri if folder.remote else str(folder.path.relative_to(Path.cwd()))
    return folder.uri


def probe(place: str) -> None:
    """Write, read back and remove a small file. Raises OSError or UserError where that fails."""
    folder, name = Folder.of(place), f".write-{uuid.uuid4().hex[:8]}"
    folder.write_text(name, "?")
    back = folder.read_text(name)
    folder.remove_file(name)
    if back != "?":
        raise OSError(f"{place}: a file that was just written cannot be read back")


@contextmanager
def marked(places: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield {place: a file in it}, which other machines should see; gone afterwards, as are folders made for it."""
    files: dict[str, str] = {}
    made = []
    try:
        for place in places:
            folder, name = Folder.of(place), f".seen-{uuid.uuid4().hex}"
            if not folder.remote:
                made += [path for path in (folder.path, *folder.path.parents) if not path.exists()]
            try:
                folder.write_text(name, "")
                files[place] = name
            except OSError:  # each machine's own look says why
                files[place] = ""
        yield files
    finally:
        for place, name in files.items():
            if name:
                Folder.of(place).remove_file(name)
        for path in sorted(set(made), key=lambda path: -len(path.parts)):
            with suppress(OSError):
                path.rmdir()


def troubles(marks: Mapping[str, str], probe: Callable[[str], None] = probe) -> dict[str, str]:
    """Return {place: what is wrong with it on this machine, or ""}. marks: what `marked` yields on another one."""
    return {place: _trouble(place, file, probe) for place, file in marks.items()}


def _trouble(place: str, file: str, probe: Callable[[str], None]) -> str:
    try:
        if file and not Folder.of(place).exists(file):
            return "does not see what is written to it elsewhere: it is no storage that the nodes share"
        probe(place)
    except (OSError, UserError) as error:
        return str(error)
    return ""
