"""A second device that computes on the CPU, for proofs that code runs on the device of its inputs.

Its tensors hold a tensor of the CPU and say that they are on ``DEVICE``. Every operation of torch on them comes to ``_run``,
which computes it on the CPU: results equal those of the CPU to the bit. As on a GPU, an operation refuses tensors of two
devices (single values and indices of the CPU go with any), and ``numpy()`` and files take tensors of the CPU alone.

This is torch's way to write a device in Python (``torch.utils.backend_registration``); the key it uses is free in builds
without another such device. Weaker than a GPU: memory has no limit of its own, nothing runs later than it was called, and
products are those of the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second:0"
_setup_privateuseone_for_python_backend("second")
DEVICE = torch.device(NAME)
aten = torch.ops.aten
# What torch calls by itself, below the place where it asks the tensors: what makes tensors, copies, and what it would take
# apart for a device that has no function for it.
_MAKING = (
    *(aten.empty.memory_format, aten.empty_strided.default, aten._copy_from.default, aten.copy_.default),
    *(aten._to_copy.default, aten.zeros.default, aten.ones.default, aten.full.default, aten.scalar_tensor.default),
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m),
    *(aten.silu_backward.default, aten.native_layer_norm.default, aten.native_layer_norm_backward.default),
)
_COPIES = (aten._to_copy.default, aten.copy_.default)
_INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class Second(Tensor):
    """A tensor on the second device. held: where its values are"""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Second:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> Any:  # tells modules to swap such parameters, and not to write into them
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(held: Any, *_: Any) -> Second:
        return Second(held["held"])

    @property
    def data(self) -> Any:
        return Second(self.held)

    @data.setter
    def data(self, value: Any) -> None:
        assert isinstance(value, Second) and value.shape == self.shape
        if value.dtype != self.dtype:
            torch.utils.swap_tensors(self, torch.nn.Parameter(value, requires_grad=False))
        else:
            self.held = value.held

    def __repr__(self) -> str:
        return f"Second({self.held})"


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    seconds = [x for x in tensors if isinstance(x, Second)]
    names = [a.name for a in func._schema.arguments]
    if "device" in names[: len(args)]:
        args, kwargs = args[:1], {**kwargs, **dict(zip(names[1:], args[1:], strict=False))}
    if func is aten._copy_from.default:
        return args[1].copy_(args[0])
    if func not in (*_COPIES, *_INDEXED) and seconds and any(not isinstance(x, Second) and x.dim() for x in tensors):
        raise RuntimeError(f"{func}: tensors of two devices")
    to = kwargs.get("device")
    there = bool(seconds) if to is None else torch.device(to).type == DEVICE.type
    kwargs = kwargs if to is None else {**kwargs, "device": torch.device("cpu")}
    if func is aten.copy_.default:
        there = isinstance(args[0], Second)
    if func is aten.histc.default:  # a GPU counts integers, a CPU does not
        args = (args[0].float(), *args[1:])
    values = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    known = {id(x.held): x for x in seconds}
    # A view of a tensor that gradients may need is one, too.
    in_inference = torch.is_inference_mode_enabled() and (not seconds or seconds[0].is_inference())

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, Second):
            return x
        if id(x) in known:
            return known[id(x)] if there else x.clone()
        with torch.inference_mode(in_inference):
            return Second(x) if there else x

    return tree_map(wrapped, values)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Second) else x


def _registered(func: Any) -> Any:
    return lambda *args, **kwargs: _run(func, args, kwargs)


_LIBRARY = torch.library.Library("aten", "IMPL")
for _func in _MAKING:
    _LIBRARY.impl(_func, _registered(_func), "PrivateUse1")
