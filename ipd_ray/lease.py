"""Ownership of a folder, so that two processes never work in one."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipd_ray.storage import Folder


class Lease:
    """Ownership of a folder: a file with host, process and token, renewed while held.

    Free when older than EXPIRES, or at once when its process is dead on this host.
    """

    RENEW = 10.0
    EXPIRES = 60.0
    SETTLE = 1.0
    """Seconds after which two that write to an object store at once both see the later one's file."""
    FILE = "lease.json"

    def __init__(self, place: str | Path | Folder):
        self._folder = Folder.of(place)
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> dict[str, Any] | None:
        """Take the lease; return None, or who holds it."""
        try:
            self._create()
        except FileExistsError:
            owner = self._read()
            if owner is not None and not self._free(owner):
                return owner
            if (owner := self._overwrite()) is not None:
                return owner
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return None

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        owner = self._read()
        if owner and owner["token"] == self._token:
            self._folder.remove_file(self.FILE)

    def _create(self) -> None:
        """Make the file, whole at once. Raises FileExistsError."""
        if self._folder.remote:  # no exclusive writes there
            if self._folder.exists(self.FILE) or self._overwrite() is not None:
                raise FileExistsError
            return
        file = self._folder.path / self.FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".lease.{self._token}")
        try:
            temporary.write_text(self._content())
            os.link(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    def _overwrite(self) -> dict[str, Any] | None:
        """Write over a free lease; return None, or who did so at the same time: the later write wins."""
        self._folder.write_text(self.FILE, self._content())
        time.sleep(self.SETTLE if self._folder.remote else 0.05)
        owner = self._read()
        return None if owner is not None and owner["token"] == self._token else owner or {}

    def _content(self) -> str:
        return json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "born": _born(os.getpid()),
                "token": self._token,
                "time": time.time(),
            }
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self._folder.read_text(self.FILE) or ""))
        except (ValueError, TypeError):
            return None

    def _free(self, owner: Mapping[str, Any]) -> bool:
        if time.time() - float(owner["time"]) > self.EXPIRES:
            return True
        return owner["host"] == socket.gethostname() and _born(int(owner["pid"])) != owner["born"]

    def _renew(self) -> None:
        while not self._stop.wait(self.RENEW):
            owner = self._read()
            if owner is None or owner["token"] != self._token:
                return  # taken over after a long stall: what we write stays valid, keys make it the same
            try:
                self._folder.write_text(self.FILE, self._content())
            except OSError:
                continue


def _born(pid: int) -> str:
    """Return when a process of this host began, in the kernel's ticks; empty where it does not run or is not known."""
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
