"""Requests to an object store that a shard costs: counted in the access log of an S3-compatible server on loopback.

    python benchmarks/scale/storage.py --shards 200
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

from record import RESULTS, write

from ipd_ray import testing
from ipd_ray.data.shards import read_entries
from ipd_ray.storage import Folder

REQUEST = re.compile(r'"(?:\x1b\[[0-9;]*m)*(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP')  # some answers are logged in colour


class Log:
    """The server's access log, in parts."""

    def __init__(self, file: Path):
        self._file, self._read = file, 0

    def since(self) -> dict[str, int]:
        """Requests since the last time, by kind."""
        time.sleep(0.3)  # the log is written after the answer
        text = self._file.read_text()
        new, self._read = text[self._read :], len(text)
        found: Counter[str] = Counter()
        for method, path in REQUEST.findall(new):
            found["LIST" if method == "GET" and "list-type" in path else method] += 1
        return dict(found)


def main() -> None:
    """Write, look for and read shards; count, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("runs/storage"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    root = args.work.absolute()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    file = root / "server.log"
    with testing.s3_server(file) as address:
        os.environ.update(testing.s3_bucket(address, "bucket"), IPD_RAY_CACHE=str(root / "mirror"))
        work, log = Folder.of("s3://bucket/imagine"), Log(file)
        work.path.mkdir(parents=True)
        testing.trivial_shard(str(work), 0)  # what a process asks once
        log.since()
        for shard in range(1, args.shards):
            testing.trivial_shard(str(work), shard)
        wrote = log.since()
        entries = read_entries(work)
        looked = log.since()
        work.pull([f"shard-{i:05d}.parquet" for i in range(args.shards)])
        read = log.since()
    assert len(entries) == args.shards
    found = {"shards": args.shards}
    counted = (("write", wrote, args.shards - 1), ("look", looked, args.shards), ("read", read, args.shards))
    for name, counts, of in counted:
        found[f"{name}_requests_a_shard"] = {kind: round(n / of, 3) for kind, n in counts.items()}
    write("storage", found, args.out)
    shutil.rmtree(root)
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")


if __name__ == "__main__":
    main()
