"""Leases: who works in a folder, and who does when that one is gone."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ipd_ray.artifacts import Store, Workspace
from ipd_ray.errors import UserError
from ipd_ray.lease import Lease, _born, _pids
from ipd_ray.storage import LOST

KEY = "0123456789abcdef" * 4
EXPIRED = {"time": time.time() - Lease.EXPIRES - 1.0}

HOLD = """
import sys, time
from pathlib import Path
from ipd_ray.lease import Lease
assert Lease(Path(sys.argv[1])).acquire() is None
print("held", flush=True)
time.sleep(60)
"""


def written(folder: Path, **changes: Any) -> None:
    """A lease file as another process of another host would have written it just now."""
    owner = {"host": "elsewhere", "pid": 1, "born": "1", "token": "theirs", "time": time.time()}
    folder.mkdir(exist_ok=True)
    (folder / "lease.json").write_text(json.dumps({**owner, **changes}))


def test_a_second_lease_is_refused_until_the_first_is_released(tmp_path: Path):
    first, second = Lease(tmp_path), Lease(tmp_path)
    assert first.acquire() is None
    owner = second.acquire()
    assert owner is not None and (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
    first.release()
    assert second.acquire() is None
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lease_of_a_killed_process_of_this_host_is_free_at_once(tmp_path: Path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        owner = Lease(tmp_path).acquire()
        assert owner is not None and owner["pid"] == holder.pid  # alive: refused
    finally:
        os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    mine = Lease(tmp_path)
    assert mine.acquire() is None
    mine.release()


def test_another_host_keeps_its_lease_until_it_expires(tmp_path: Path):
    written(tmp_path)
    assert Lease(tmp_path).acquire() is not None
    written(tmp_path, time=time.time() - Lease.EXPIRES - 1.0)
    mine = Lease(tmp_path)
    assert mine.acquire() is None
    mine.release()


def test_a_process_number_used_again_is_not_the_owner(tmp_path: Path):
    written(tmp_path, host=socket.gethostname(), pid=os.getpid(), pids=_pids(), born="0")
    mine = Lease(tmp_path)
    assert mine.acquire() is None
    mine.release()


@pytest.mark.parametrize(
    "more", [{}, {"pids": ""}, {"pids": _pids().replace("pid:[", "pid:[9")}],
    ids=["of an older version", "not known", "of another container"],
)  # fmt: skip
def test_a_process_that_cannot_be_seen_from_here_is_not_dead(tmp_path: Path, more: dict[str, str]):
    written(tmp_path, host=socket.gethostname(), pid=os.getpid(), born="0", **more)
    assert Lease(tmp_path).acquire() is not None
    written(tmp_path, host=socket.gethostname(), **more, **EXPIRED)
    mine = Lease(tmp_path)
    assert mine.acquire() is None
    mine.release()


def test_a_lease_is_renewed_while_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Lease, "RENEW", 0.05)
    lease = Lease(tmp_path)
    lease.acquire()
    begun = json.loads((tmp_path / "lease.json").read_text())["time"]
    deadline = time.monotonic() + 20.0
    while json.loads((tmp_path / "lease.json").read_text())["time"] == begun and time.monotonic() < deadline:
        time.sleep(0.02)
    assert json.loads((tmp_path / "lease.json").read_text())["time"] > begun
    lease.release()


def test_a_lease_taken_over_is_not_taken_back(tmp_path: Path):
    lease = Lease(tmp_path)
    lease.acquire()
    written(tmp_path)
    lease.release()
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == "theirs"


def test_two_that_come_at_once_do_not_both_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = Lease(tmp_path), Lease(tmp_path)
    answers: list[Any] = []
    content = first._content

    def interrupted() -> str:
        if not answers:  # the second comes between the first's creating its file and writing it
            answers.append("asked")
            answers.append(second.acquire())
        return content()

    monkeypatch.setattr(first, "_content", interrupted)
    try:
        answers.append(first.acquire())
        assert answers[1:].count(None) == 1
    finally:
        first.release()
        second.release()


def taken(folder: Path) -> str:
    return str(json.loads((folder / "lease.json").read_text())["token"])


def test_of_two_that_find_a_lease_expired_one_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(tmp_path, **EXPIRED)
    first, second = Lease(tmp_path), Lease(tmp_path)
    answers: list[Any] = []
    free = second._free

    def overtaken(owner: dict[str, Any]) -> bool:
        judged = free(owner)
        if not answers:  # the first takes the lease between the second's reading it and taking it
            answers.append(first.acquire())
        return judged

    monkeypatch.setattr(second, "_free", overtaken)
    owner = second.acquire()
    assert answers == [None] and owner is not None and owner["token"] == taken(tmp_path) == first._token
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_find_a_lease_expired_one_takes_it(tmp_path: Path):
    for _ in range(20):
        written(tmp_path, **EXPIRED)
        leases = [Lease(tmp_path) for _ in range(6)]
        with ThreadPoolExecutor(len(leases)) as threads:
            owners = list(threads.map(Lease.acquire, leases))
        assert owners.count(None) == 1
        leases[owners.index(None)].release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("changes", "got"), [({}, False), ({"born": "0"}, True)])
def test_a_takeover_that_was_killed_bars_nobody(tmp_path: Path, changes: dict[str, str], got: bool):
    here = {"pid": os.getpid(), "pids": _pids(), "born": _born(os.getpid()), **changes}
    written(tmp_path, **here, token="taking over")
    (tmp_path / "lease.json").rename(tmp_path / Lease.TAKEOVER)
    written(tmp_path, **EXPIRED)
    lease = Lease(tmp_path)
    owner = lease.acquire()
    assert owner is None if got else owner is not None and owner["token"] == "taking over"
    lease.release()
    assert list(tmp_path.iterdir()) == [] or not got


def test_who_lost_a_lease_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Lease, "RENEW", 0.02)
    store = Store(tmp_path)
    with pytest.raises(UserError, match="process 1 on host elsewhere"), store.claim("values", KEY) as folder:
        workspace = Workspace(folder)
        workspace.finish({"w": torch.tensor([1.0])}, {})
        deadline = time.monotonic() + 20.0
        while folder.uri not in LOST and time.monotonic() < deadline:
            written(workspace.path)
            time.sleep(0.05)
        store.commit("values", KEY, version=3, parts={})
    assert store.find("values", KEY) is None and taken(workspace.path) == "theirs"
    (workspace.path / "lease.json").unlink()
    with store.claim("values", KEY):  # it is this process's again
        store.commit("values", KEY, version=3, parts={})


def test_a_lease_that_was_removed_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Lease, "RENEW", 0.02)
    lease = Lease(tmp_path)
    lease.acquire()
    (tmp_path / "lease.json").unlink()
    deadline = time.monotonic() + 20.0
    while not (tmp_path / "lease.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert taken(tmp_path) == lease._token
    lease.release()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_lease_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def link(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    first, second = Lease(tmp_path), Lease(tmp_path)
    assert first.acquire() is None
    owner = second.acquire()
    assert owner is not None and owner["token"] == taken(tmp_path) == first._token
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_is_being_made_is_not_free(tmp_path: Path):
    file = tmp_path / "lease.json"
    file.write_text("")
    owner = Lease(tmp_path).acquire()
    assert owner is not None and owner["host"] == "unknown"
    os.utime(file, (time.time(), EXPIRED["time"]))  # who made it was killed before writing it
    lease = Lease(tmp_path)
    assert lease.acquire() is None
    lease.release()
