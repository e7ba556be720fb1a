"""A GPU where there is none: tensors that say they are on cuda:0, compute on the CPU, and refuse what CUDA refuses.

Refused: tensors of two devices in one operation (a 0-dim CPU tensor may take part where torch lets it), a cuda index
into a CPU tensor, a generator of another device, `.numpy()`. Values are those of the CPU's kernels, so what is learned
under it must equal, bit for bit, what is learned on the CPU. SYNCS counts, by line of ipd_ray, where a GPU would be
waited for: a number that is read, a copy from or to the host, an index whose size depends on values.

It does not see: CUDA's kernels, their rounding, their determinism and what they do not take; which operations autocast
lowers there (the CPU's list is used); memory, streams, a second GPU, NCCL; other processes. `zeros_like` and the like
with device="cpu" stay on cuda, and a gradient that crosses `.to()` stays on the device it comes from.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ipd_ray import cuda_graphs
from ipd_ray.cuda_graphs import Replay, Told

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
SYNCS: Counter[tuple[str, str]] = Counter()
"""By (line, what for)."""
_moving: list[bool] = []  # not empty where the test's code asks for another device, and not torch's own
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
_TAKE_NUMBERS = ("where", "fill_", "masked_fill", "masked_fill_")
_READ = ("nonzero", "masked_select", "repeat_interleave", "_unique2", "equal", "_local_scalar_dense")


class Pretended(Tensor):
    """A tensor on cuda:0; `held` has its values. To torch's C++ it is on the CPU: autograd then needs no GPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda = property(lambda self: CUDA), property(lambda self: True)
    data = property(lambda self: self.detach(), lambda self, value: setattr(self, "held", value.held))

    @staticmethod
    def __new__(cls, real: Tensor) -> Any:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype
        )
        made.held = real
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy: Any = memo.setdefault(id(self), Pretended(self.held.clone()))
        copy._is_param = getattr(self, "_is_param", False)
        return copy.requires_grad_(self.requires_grad)


def _on_cuda(x: Any) -> bool:
    return isinstance(x, Pretended)


def _indexed(x: Any) -> Any:
    return CUDA if isinstance(x, (str, torch.device)) and str(x) == "cuda" else x


def _wait(what: str) -> None:
    frame = sys._getframe(2)
    while frame.f_back and "/ipd_ray/" not in frame.f_code.co_filename:
        frame = frame.f_back
    SYNCS[f"{frame.f_code.co_filename.rpartition('/ipd_ray/')[2]}:{frame.f_lineno}", what] += 1


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation: look at the devices, compute on the CPU, say where the result is."""
    leaves, schema, name = tree_leaves((args, kwargs)), func._schema, func._schema.name.removeprefix("aten::")
    tensors, asked = [x for x in leaves if isinstance(x, Tensor)], kwargs.get("device")
    cuda = any(_on_cuda(x) for x in tensors)
    to_cuda = torch.device(asked).type == "cuda" if asked and (_moving or not cuda) else cuda
    if not cuda and not to_cuda:
        return func(*args, **kwargs)
    if any((x.device.type == "cuda") != to_cuda for x in leaves if isinstance(x, torch.Generator)):
        raise RuntimeError("Expected a generator of the tensor's device type")
    strangers = [x for x in tensors if not _on_cuda(x)]
    inputs = {s.name: s.alias_info for s in schema.arguments}
    given = {**dict(zip(inputs, args, strict=False)), **kwargs}
    written = {str(a.before_set): given[n] for n, a in inputs.items() if a and a.is_write and n in given}
    if name in ("_to_copy", "copy_"):
        if strangers or not to_cuda:
            _wait("to the device" if _on_cuda(args[0]) == (name == "copy_") else "to the host")
        strangers = []
    elif name in _INDEXED:
        if any(_on_cuda(i) for i in args[1]) and not _on_cuda(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        for index in (i for i in args[1] if i is not None):
            if index.dtype == torch.bool or not _on_cuda(index):
                _wait("size" if index.dtype == torch.bool else "to the device")
        strangers = [x for x in args[2:3] if x.dim() and not _on_cuda(x)]
    elif torch.Tag.pointwise in func.tags or name in _TAKE_NUMBERS:
        strangers = [x for x in strangers if x.dim() or any(x is w for w in tree_leaves(written))]
    elif name in _READ:
        _wait("number" if name == "_local_scalar_dense" else "size")
    if strangers:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({func})")
    plain_args, plain = tree_map(lambda x: x.held if _on_cuda(x) else x, (args, kwargs))
    out = func(*plain_args, **({**plain, "device": CPU} if asked else plain))

    def told(part: Any, returned: Any) -> Any:
        if returned.alias_info and returned.alias_info.is_write:
            return written[str(returned.alias_info.before_set)]
        return tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) and to_cuda else x, part)

    if isinstance(out, tuple):
        return tuple(told(part, s) for part, s in zip(out, schema.returns, strict=True))
    return told(out, schema.returns[0]) if schema.returns else None


class _Operations(TorchDispatchMode):
    """Sees what makes tensors of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Sees what torch's C++ would leave undone, the tensor being on the CPU already."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [_indexed(x) for x in args]
        kwargs = {name: _indexed(x) for name, x in (kwargs or {}).items()}
        if func in (Tensor.tolist, Tensor.numpy) and _on_cuda(args[0]):
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
            _wait("number")
            return args[0].held.tolist()
        if func not in (Tensor.to, Tensor.cpu):
            return func(*args, **kwargs)
        if func is Tensor.cpu:
            args = [args[0], CPU]
        elif isinstance(args[-1], Tensor) and len(args) > 1:
            args = [args[0], args[-1].device, args[-1].dtype]
        device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
        moves = device is not None and device.type != args[0].device.type
        if not moves and dtype in (None, args[0].dtype):
            return args[0]
        _moving.extend([True] * moves)
        try:
            return torch.ops.aten._to_copy(args[0], dtype=dtype, **({"device": device} if moves else {}))
        finally:
            _moving.clear()


class Operators(TorchDispatchMode):
    """All operators called inside, with what they were given and what they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            held, given = tree_leaves(out), tree_leaves((args, kwargs))
            fresh = [] if func.is_view else tree_leaves(func(*args, **kwargs))
            for old, new in zip(held, fresh, strict=not func.is_view):
                if isinstance(old, Tensor) and not any(old is x for x in given):
                    old.copy_(new)


class Recorder:
    """For `ipd_ray.cuda_graphs`: replays operators as a CUDA graph replays kernels, into the memory of the first time.

    So a number of Python's that was kept, an input that moved, a value that was looked at do what they do to a graph.
    """

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def plain(self, call: Callable[[], Told]) -> Told:
        return call()

    def capture(self, call: Callable[[], Told]) -> Replay:
        with Operators() as operators:
            told = call()
        self.captured += 1

        def replay() -> Told:
            self.replayed += 1
            with torch.no_grad():
                operators.replay()
            return told

        return replay


@contextmanager
def pretend_cuda() -> Iterator[None]:
    """Have a GPU meanwhile, in this process."""
    apply, autocast, groups = torch.nn.Module._apply, torch.autocast, torch._C._group_tensors_by_device_and_dtype
    future = torch.__future__

    def swapping(*args: Any) -> Any:  # a parameter that moves becomes a tensor of another class
        before = future.get_swap_module_params_on_conversion()
        future.set_swap_module_params_on_conversion(True)
        try:
            return apply(*args)
        finally:
            future.set_swap_module_params_on_conversion(before)

    def grouped(*args: Any) -> Any:
        return {(x[0][0][0].device, dtype): x for (_, dtype), x in groups(*args).items()}

    changes: list[tuple[Any, dict[str, Any]]] = [
        (torch.cuda, {"is_available": lambda: True, "_lazy_init": lambda: None, "manual_seed_all": lambda seed: None,
                      "synchronize": lambda device: None, "get_device_name": lambda device: "Pretended GPU"}),
        (torch, {"autocast": lambda kind, *a, **k: autocast("cpu", *a, **k) if kind == "cuda" else nullcontext()}),
        (cuda_graphs, {"CudaRecorder": Recorder, "RATE_TYPE": torch.float64}),  # step sizes that round as a CPU's do
        (torch.nn.Module, {"_apply": swapping}), (torch._C, {"_group_tensors_by_device_and_dtype": grouped}),
    ]  # fmt: skip
    with ExitStack() as stack:
        for place, new in changes:
            stack.enter_context(mock.patch.multiple(place, **new))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda"): made on the CPU, then copied
        SYNCS.clear()
        with _Operations(), _Calls():
            yield
