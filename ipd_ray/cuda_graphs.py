"""An update's kernels launched as one: small networks leave a GPU waiting for Python, a captured update does not."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

Told = dict[str, Tensor]
Replay = Callable[[], Told]
logger = logging.getLogger(__name__)
PLAIN_CALLS = 10
"""Calls of a variant before it is captured: libraries choose their kernels, optimisers make their state."""
RATE_TYPE = torch.float32
"""Of step sizes, as CUDA's fused Adam reads them."""
_UNLIKE = 0.01
"""How far from the plain call a replay may end, as a share of how far that one went, in each tensor of the state."""


class Recorder(Protocol):
    """What captures kernels."""

    def plain(self, call: Callable[[], Told]) -> Told:
        """Call what is captured later."""

    def capture(self, call: Callable[[], Told]) -> Replay:
        """Return what runs the call's kernels again. Whether the call itself takes effect is left open."""


class CudaRecorder:
    """CUDA graphs, from a stream of their own, as they need it of what goes through autograd."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def plain(self, call: Callable[[], Told]) -> Told:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            told = call()
        torch.cuda.current_stream().wait_stream(self._stream)
        return told

    def capture(self, call: Callable[[], Told]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(self._stream), capture:  # a capture that fails would not leave the stream by itself
            told = call()

        def replay() -> Told:
            graph.replay()
            return told

        return replay


class Captured:
    """Calls `compute(*variant)`, an update of a state; on CUDA, from some calls on, by replaying its kernels.

    After the capture one update is done both ways. Where the replay does not end where the plain call does, or where
    the capture failed, that is told, and all calls are plain.
    """

    def __init__(
        self,
        compute: Callable[..., Told],
        state: Callable[[], Mapping[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        device: str,
    ):
        """compute: reads its inputs from tensors that stay where they are, so that a replay finds what was copied there
        since; draws no random numbers and looks at no value. state: the state's own tensors by name, not copies.
        optimizer: a fused Adam of torch that `compute` steps, before its first step; see `set_rate`."""
        self._compute, self._state = compute, state
        self._recorder: Recorder | None = None
        if device.startswith("cuda"):
            self._recorder = CudaRecorder()
            for group in optimizer.param_groups:
                group.update(capturable=True, lr=torch.tensor(group["lr"], dtype=RATE_TYPE, device=device))
        self._calls: Counter[tuple[bool, ...]] = Counter()
        self._replays: dict[tuple[bool, ...], Replay] = {}

    def __call__(self, *variant: bool) -> Told:
        """Do an update; what it tells holds until the next."""
        recorder = self._recorder
        if recorder is None:
            return self._compute(*variant)
        self._calls[variant] += 1
        beyond = self._calls[variant] - PLAIN_CALLS
        if beyond > 1:
            return self._replays[variant]()
        if beyond == 1:
            return self._both_ways(recorder, variant)
        if beyond == 0:
            self._capture(recorder, variant)
        return recorder.plain(lambda: self._compute(*variant))

    def _capture(self, recorder: Recorder, variant: tuple[bool, ...]) -> None:
        before = self._copy()
        try:
            self._replays[variant] = recorder.capture(lambda: self._compute(*variant))
        except RuntimeError as error:
            self._give_up(f"the capture failed: {error}")
        self._put_back(before)

    def _both_ways(self, recorder: Recorder, variant: tuple[bool, ...]) -> Told:
        before = self._copy()
        told = recorder.plain(lambda: self._compute(*variant))
        plain = self._copy()
        self._put_back(before)
        self._replays[variant]()
        unlike = [name for name, x in self._state().items() if not _alike(before[name], plain[name], x)]
        if unlike:
            self._put_back(plain)
            self._give_up(f"it updates {', '.join(unlike[:3])} otherwise than plain calls do")
        return told

    def _give_up(self, reason: str) -> None:
        self._recorder = None
        self._replays.clear()
        logger.warning("CUDA graph not used, updates are slower: %s", reason)

    def _copy(self) -> dict[str, Tensor]:
        return {name: x.detach().clone() for name, x in self._state().items()}

    @torch.no_grad()
    def _put_back(self, copies: Mapping[str, Tensor]) -> None:
        for name, x in self._state().items():
            x.copy_(copies[name])


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the step size of an optimiser's parameter group, in place where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _alike(before: Tensor, plain: Tensor, replayed: Tensor) -> bool:
    before, plain, replayed = (x.double() for x in (before, plain, replayed))
    return bool((replayed - plain).norm() <= _UNLIKE * (plain - before).norm())
