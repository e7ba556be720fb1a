"""The least that Ray can do: ray.init and a TorchTrainer whose loop is empty.

    python benchmarks/speed/bare_ray.py FILE

Writes the time at which the loop began into FILE.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path


def main(file: str) -> None:
    import ray
    import ray.train
    import ray.train.torch

    ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)

    def loop() -> None:
        Path(file).write_text(repr(time.time()))

    with tempfile.TemporaryDirectory() as folder:
        ray.train.torch.TorchTrainer(
            loop,
            torch_config=ray.train.torch.TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=1),
            run_config=ray.train.RunConfig(name="empty", storage_path=folder),
        ).fit()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
