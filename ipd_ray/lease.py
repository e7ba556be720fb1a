"""Ownership of a folder, so that two processes never work in one."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ipd_ray.storage import LOST, Folder


class Lease:
    """Ownership of a folder: a file with host, process and token, renewed while held.

    Free when older than EXPIRES, or at once when its process is dead where this one would see it. The owner is whose
    token the file holds. Who finds another's at a renewal, after a stall that outlasted its lease, is refused what it
    writes to the folder from then on (`LOST`).
    """

    RENEW = 10.0
    EXPIRES = 60.0
    SETTLE = 1.0
    """Seconds after which two that write to an object store at once both see the later one's file."""
    FILE = "lease.json"
    TAKEOVER = ".lease.takeover"
    """Held by the one that takes a free lease over, on a file system; written like FILE, and free like it."""

    def __init__(self, place: str | Path | Folder):
        self._folder = Folder.of(place)
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> dict[str, Any] | None:
        """Take the lease; return None, or who holds it."""
        if (owner := self._take()) is None:
            self._thread = threading.Thread(target=self._renew, daemon=True)
            self._thread.start()
        return owner

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        if self._thread:
            self._thread.join()
            LOST.pop(self._folder.uri, None)
        if self._read(self.FILE)[1]["token"] == self._token:
            self._folder.remove_file(self.FILE)

    def _take(self) -> dict[str, Any] | None:
        """Make the file, or replace a free one; return None, or who holds it.

        On a file system one process at a time replaces it, and only what it judged: one that judged before another's
        takeover finds that one's file. Moving a free file away and making a new one would not do: who is late moves a
        held one, and a third makes its own before that is back.
        """
        while True:
            if not self._folder.remote:
                self._folder.path.mkdir(parents=True, exist_ok=True)
            try:
                self._create(self.FILE)
                return None
            except FileExistsError:
                text, owner = self._read(self.FILE)
            if text is None:  # given back just now
                continue
            if not self._free(owner):
                return owner
            if self._folder.remote:
                return self._overwrite()
            try:
                self._create(self.TAKEOVER)
            except FileExistsError:
                other, owner = self._read(self.TAKEOVER)
                if other is not None and not self._free(owner):
                    return owner
                if other is not None:  # it died while it took over
                    self._folder.remove_file(self.TAKEOVER)
                continue
            try:
                if self._folder.read_text(self.FILE) == text:
                    self._folder.write_text(self.FILE, self._content())
                    return None
            finally:
                self._folder.remove_file(self.TAKEOVER)

    def _create(self, name: str) -> None:
        """Make a file that is not there, in a folder that is. Raises FileExistsError.

        By a hard link, whole at once. Many mounts (SMB, object stores through FUSE) have none; readers may see an empty
        file there for a moment.
        """
        if self._folder.remote:
            if self._folder.exists(name) or self._overwrite() is not None:
                raise FileExistsError
            return
        file = self._folder.path / name
        temporary = file.with_name(f".lease.{self._token}")
        try:
            temporary.write_text(self._content())
            try:
                os.link(temporary, file)
            except FileExistsError:
                raise
            except OSError:  # no hard links: EPERM, ENOTSUP, ENOSYS, ...; whatever else is wrong is so for this, too
                file.open("x").close()
                os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    def _overwrite(self) -> dict[str, Any] | None:
        """Write over a free lease in an object store; return None, or who did so at the same time.

        The later write wins. pyarrow has no conditional writes: two own the folder if one judges the lease and then
        takes longer than SETTLE to write, until the next renewal of the earlier one.
        """
        self._folder.write_text(self.FILE, self._content())
        time.sleep(self.SETTLE)
        owner = self._read(self.FILE)[1]
        return None if owner["token"] == self._token else owner

    def _content(self) -> str:
        return json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "pids": _pids(),
                "born": _born(os.getpid()),
                "token": self._token,
                "time": time.time(),
            }
        )

    def _read(self, name: str) -> tuple[str | None, dict[str, Any]]:
        """Return a file's text, None where there is none, and the owner that it names.

        One that cannot be read is damaged or just being made: it has an unknown owner, and the time of its last change.
        """
        text = self._folder.read_text(name)
        try:
            return text, dict(json.loads(text or ""))
        except (ValueError, TypeError):
            changed = 0.0
            with suppress(FileNotFoundError):
                changed = 0.0 if self._folder.remote else (self._folder.path / name).stat().st_mtime
            return text, {"host": "unknown", "pid": "unknown", "token": "", "time": changed}

    def _free(self, owner: Mapping[str, Any]) -> bool:
        if time.time() - float(owner["time"]) > self.EXPIRES:
            return True
        here = _pids()
        return bool(here) and owner.get("pids") == here and _born(int(owner["pid"])) != owner["born"]

    def _renew(self) -> None:
        while not self._stop.wait(self.RENEW):
            with suppress(OSError):  # the next time, then
                text, owner = self._read(self.FILE)
                if text is None:
                    self._create(self.FILE)
                elif owner["token"] == self._token:
                    self._folder.write_text(self.FILE, self._content())
                elif owner["token"]:
                    LOST[self._folder.uri] = (
                        f"{self._folder} belongs to process {owner['pid']} on host {owner['host']} by now, since this "
                        f"process gave no sign of life for {self.EXPIRES:.0f} s: wait for it or end it, then run the "
                        "same command again; it goes on."
                    )
                    return


def _pids() -> str:
    """Return what processes have in common whose numbers mean the same; empty where that is not known.

    Containers of one machine may share its name, and have numbers of their own.
    """
    host, proc = socket.gethostname(), Path("/proc")
    if not proc.exists():  # a system without such containers
        return host
    try:
        boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
        return f"{host} {boot} {os.readlink(proc / 'self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """Return when a process began, in the kernel's ticks; empty where it does not run or is not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc").exists():
        return ""
    try:
        os.kill(pid, 0)
        return "alive"
    except ProcessLookupError:
        return ""
    except OSError:
        return "alive"
