"""Follows values through a run of a model's skeleton: the residual stream, and the outputs of its linears.

Every tensor that is followed has a mark: what it is, and which channel each of its values belongs to. An operator that is not
known here drops the marks: what cannot be followed is never claimed. Three kinds of values are followed:

 * stream: an orthogonal matrix Q may be multiplied to it everywhere. It begins at the embeddings. Sums of it and of outputs of
   linears, and products with one factor for each token, are the stream again. A norm with equal weights commutes with Q.
 * normed: what leaves a norm of the stream: the norm's weight is folded into the linears that read it, and nothing else may.
 * linear: what leaves one linear, or the sum of several. A scale of a channel passes through products, and a matrix inside
   each head passes through attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qkit.families.marks import LINEAR, NORMED, STREAM, Mark, attended, moved, reduced, scaled
from qkit.families.matrices import is_norm
from qkit.families.norms import normalizes, offset_of
from qkit.families.stream import Feed, Place, Stream

# Operators by what they do. At the shape and the dtype of a tensor, not at its values:
_LIKE = {
    *(f"{n}_like" for n in ("zeros", "ones", "empty", "full")),
    *(f"new_{n}" for n in ("zeros", "ones", "empty", "full")),
}
_KEEP = {"to", "float", "type", "type_as", "bfloat16", "half", "contiguous", "clone", "dropout", "detach", "data"}
_SPLIT = {"view", "reshape", "unflatten"}  # move values, and may split channels into heads
_MOVE = {
    *_SPLIT,
    *("transpose", "permute", "unsqueeze", "squeeze", "expand", "flatten", "getitem", "movedim", "swapaxes", "narrow"),
    *("repeat_interleave", "repeat", "chunk", "split", "unbind", "select"),
}
_TURN = {"t", "T", "mT", "transpose", "swapaxes"}  # a matrix
_ADD, _MULTIPLY = {"add", "iadd", "radd", "sub", "isub"}, {"mul", "imul", "rmul", "div", "truediv", "idiv", "itruediv"}
_PRODUCTS = {"linear": 1, "matmul": 1, "mm": 1, "bmm": 1, "addmm": 2}  # where the second factor is
_SUM = "a sum with something that no linear layer writes, such as what leaves a norm,"


class StreamTrace(TorchFunctionMode):
    """Watches a run of a model on the meta device. ``found`` is what it saw, complete after ``finish``.

    embeddings: path of the module whose table begins the stream
    """

    def __init__(self, model: nn.Module, embeddings: str) -> None:
        super().__init__()
        self.found = Stream()
        self._table = f"{embeddings}.weight" if embeddings else ""
        self._params = {id(p): (n, False) for n, p in model.named_parameters()}
        self._marks: dict[int, tuple[Tensor, Mark]] = {}
        self._held: list[Tensor] = []
        self._used: set[str] = set()
        self._lost: set[str] = set()
        self._biases: dict[str, str] = {}
        self._inside = 0

    # ---- what hooks of modules call ------------------------------------------------------------------------------

    def watch(self, model: nn.Module) -> list[Any]:
        """Hooks on the norms of the model, each seen as one step."""
        norms = {n: m for n, m in model.named_modules() if is_norm(m) or normalizes(m)}
        alike = {(type(m), repr(m)): m for m in norms.values()}
        offsets = {kind: offset_of(module) for kind, module in alike.items()}
        handles: list[Any] = []
        for name, module in norms.items():
            hook = self._leaves(name, offsets[type(module), repr(module)])
            handles.append(module.register_forward_pre_hook(self._enters, prepend=True))
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return handles

    def watch_block(self, name: str, block: nn.Module) -> list[Any]:
        """Hooks that see where a block gets and returns the stream."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            place = next((k for k, v in items if self._is_stream(v)), None)
            if place is not None:
                self.found.places[name] = Place(place, None, 1)

        def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if name in self.found.places and isinstance(out, (tuple, list)):
                result = next((i for i, x in enumerate(out) if self._is_stream(x)), 0)
                self.found.places[name] = Place(self.found.places[name].argument, result, len(out))

        return [
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(after),
        ]

    def watch_experts(self, name: str, module: nn.Module, first: str, down: str, bias: bool) -> list[Any]:
        """Hooks on what stands for routed experts. name: its path; first, down: its parameters; bias: of the second"""

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            self._inside -= 1
            with torch._C.DisableTorchFunction():
                self._multiply(next(tensors_in((args, kwargs))), f"{name}.{first}")
                self._multiply(None, f"{name}.{down}")
            self._leaves_linear(f"{name}.{down}", f"{name}.{down}_bias" if bias else "", out)

        return [
            module.register_forward_pre_hook(self._enters, prepend=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    def _enters(self, *_: Any) -> None:
        self._inside += 1

    def _leaves(self, name: str, offset: float | None) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self._inside -= 1
            marked = [m for x in tensors_in((args, kwargs)) if (m := self._mark(x)) is not None]
            if not marked:
                return
            first = marked[0]
            if self._inside or len(marked) > 1 or first.kind != STREAM or not isinstance(out, Tensor):
                self._drop(marked, f"{name}, a norm,")
                return
            if offset is None:
                self._refuse(f"{name} does more than divide by the root mean square")
            elif getattr(module, "weight", None) is None:
                self._set(out, first)
            else:
                self.found.offsets[name] = offset
                self._set(out, replace(first, kind=NORMED, names=frozenset([name])))

        return hook

    # ---- operators -------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._inside:
            name = getattr(func, "__name__", "").strip("_")
            if name == "get":  # of a property, such as .T
                name = getattr(getattr(func, "__self__", None), "__name__", name)
            with torch._C.DisableTorchFunction():  # what is done with marks is no part of the run
                self._see(name, args, kwargs, out, func)
        return out

    def _see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, func: Any) -> None:
        if name in _LIKE or (next(tensors_in(out), None) is None and name != "setitem"):  # which writes into a tensor
            return
        if self._see_parameter(name, args, kwargs, out):
            return
        tensors = list(tensors_in(args[:1] if name in _KEEP else (args, kwargs)))
        marks = [m for x in tensors if (m := self._mark(x)) is not None]
        if marks and not self._follow(name, args, kwargs, out, func, tensors, marks):
            self._drop(marks, _SUM if name in _ADD else f"the operator {name}")

    def _follow(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        func: Any,
        tensors: list[Tensor],
        marks: list[Mark],
    ) -> bool:
        """Mark what an operator returns. Returns False for one that is not known, or does what cannot be followed."""
        if name in _MOVE:
            outs = list(tensors_in(out))
            found = moved(marks[0], func, args[1:], kwargs, outs, name in _SPLIT) if len(marks) == 1 else None
            return found is not None and all(self._keep(m, x) for m, x in zip(found, outs, strict=True))
        if not isinstance(out, Tensor):
            return False
        if name in _KEEP:
            return self._keep(marks[0], out)
        if name in _ADD:
            return self._add(args, out, marks)
        if name in _MULTIPLY:
            numerator = "div" not in name or self._mark(args[0]) is not None
            return numerator and self._scale(tensors, out, marks)
        if name == "relu" and marks[0].kind == LINEAR:  # a positive factor passes
            return self._keep(replace(marks[0], exact=False, mixes=False), out)
        if name in ("sum", "mean"):
            return self._keep(reduced(marks[0], kwargs.get("dim", args[1] if len(args) > 1 else None), out), out)
        if name == "scaled_dot_product_attention":
            return self._attend(args[2] if len(args) > 2 else kwargs.get("value"), tensors, out)
        if name == "matmul":
            return self._attend(args[1], tensors, out)
        if name in ("cat", "concat"):  # with an empty cache
            return len(marks) == 1 and sum(x.numel() > 0 for x in tensors) == 1 and self._keep(marks[0], out)
        return name == "rms_norm" and marks[0].kind == STREAM and len(tensors) == 1 and self._keep(marks[0], out)

    def _see_parameter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
        """Whether an operator reads a parameter in a way that is known: it is looked up, turned or converted, or multiplies."""
        if name == "embedding":
            table = next((found[0] for x in (*args, *kwargs.values()) if (found := self._param(x))), "")
            if table and table == self._table:
                self.found.tables = [table]
                self._set(out, Mark.of(STREAM, "", out))
            return True
        first = self._param(args[0]) if args else None
        turns = name in _TURN and isinstance(out, Tensor) and _turns(out, args[1:])
        if first is not None and (turns or name in _KEEP):
            self._params[id(out)] = (first[0], first[1] ^ turns)
            self._held.append(out)
            return True
        at = _PRODUCTS.get(name)
        if at is None:
            return False
        weight = self._param(args[at] if len(args) > at else kwargs.get("weight"))
        bias = (
            args[0] if name == "addmm" else kwargs.get("bias", args[2] if name == "linear" and len(args) > 2 else None)
        )
        bias_name = self._param(bias)
        if weight is None or (bias is not None and bias_name is None):
            return False
        if weight[1] == (name == "linear"):
            self.found.turned.add(weight[0])
        self._multiply(args[at - 1] if len(args) >= at else kwargs.get("input"), weight[0])
        self._leaves_linear(weight[0], bias_name[0] if bias_name else "", out)
        return True

    def _multiply(self, x: Any, weight: str) -> None:
        """A product of ``x`` with a matrix."""
        mark = self._mark(x) if isinstance(x, Tensor) else None
        again = weight in self._used
        self._used.add(weight)
        if again:
            self._lost.add(weight)
        if mark is None:
            return
        if mark.kind == LINEAR:
            self._feed(mark, weight)
        elif again:
            self._refuse(f"{weight} multiplies more than once in a pass")
        elif mark.in_order:
            self.found.reads[weight] = next(iter(mark.names), "")
        else:
            self._drop([mark], weight)

    def _leaves_linear(self, weight: str, bias: str, out: Tensor) -> None:
        self._biases[weight] = bias
        self._set(out, Mark.of(LINEAR, weight, out))

    def _feed(self, mark: Mark, weight: str) -> None:
        channels = mark.row
        if len(mark.names) != 1 or channels is None:
            self._lost |= mark.names
            return
        self.found.feeds[weight] = Feed(next(iter(mark.names)), channels, mark.head, mark.mixes)

    def _keep(self, mark: Mark | None, out: Tensor) -> bool:
        """Give a tensor that mark, where it has its shape."""
        if mark is None or out.shape != mark.channels.shape:
            return False
        self._set(out, mark)
        return True

    def _add(self, args: tuple[Any, ...], out: Tensor, marks: list[Mark]) -> bool:
        """The sum of two values: the stream, outputs of linears, or one of these and its bias."""
        kinds = {m.kind for m in marks}
        bias = next((found for x in args if (found := self._param(x))), None)
        if bias is not None and len(marks) == 1 and len(marks[0].names) == 1 and kinds == {LINEAR} and marks[0].exact:
            (weight,) = marks[0].names
            known, self._biases[weight] = self._biases[weight], bias[0]
            return not known and self._keep(marks[0], out)
        if len(args) != 2 or len(marks) != 2 or NORMED in kinds or any(m.channels.shape != out.shape for m in marks):
            return False
        if not all(m.exact and m.agrees(marks[0]) for m in marks):
            return False
        if STREAM in kinds:
            for mark in marks:
                if mark.kind == LINEAR:
                    self.found.writes.update((n, self._biases.get(n, "")) for n in mark.names)
            self._set(out, next(m for m in marks if m.kind == STREAM))
        else:
            self._set(out, replace(marks[0], names=marks[0].names | marks[1].names, mixes=False))
        return True

    def _scale(self, tensors: list[Tensor], out: Tensor, marks: list[Mark]) -> bool:
        mark = marks[-1]  # of act(gate) * up, the second
        if len(marks) > 1:
            self._lost |= {n for m in marks[:-1] if m.kind == LINEAR for n in m.names}
            if any(m.kind != LINEAR for m in marks):
                return False
        return self._keep(scaled(mark, [x for x in tensors if self._mark(x) is not mark], out), out)

    def _attend(self, values: Any, tensors: list[Tensor], out: Tensor) -> bool:
        """Sums over tokens: of values, weighted by attention. Queries and keys are not followed."""
        self._drop([m for x in tensors if x is not values and (m := self._mark(x)) is not None], "attention")
        mark = self._mark(values) if isinstance(values, Tensor) else None
        return mark is None or self._keep(attended(mark, out), out)

    # ---- marks -------------------------------------------------------------------------------------------------

    def _is_stream(self, x: Any) -> bool:
        mark = self._mark(x) if isinstance(x, Tensor) else None
        return mark is not None and mark.kind == STREAM

    def _mark(self, x: Tensor) -> Mark | None:
        found = self._marks.get(id(x))
        if found is None or (self.found.against and found[1].kind != LINEAR):
            return None
        return found[1]

    def _param(self, x: Any) -> tuple[str, bool] | None:
        return self._params.get(id(x)) if isinstance(x, Tensor) else None

    def _set(self, x: Tensor, mark: Mark) -> None:
        self._marks[id(x)] = (x, mark)  # the tensor lives on, so that its id is its own

    def _drop(self, marks: list[Mark], what: str) -> None:
        """What is not followed any more."""
        for mark in marks:
            if mark.kind == LINEAR:
                self._lost |= mark.names
            else:
                behind = next(iter(mark.names), "")
                self._refuse(f"{what} reads {f'what leaves {behind}' if behind else 'the residual stream'}")

    def _refuse(self, why: str) -> None:
        self.found.against = self.found.against or why

    def finish(self, blocks: tuple[str, ...], whole: bool) -> Stream:
        """What the run showed. whole: it came to its end"""
        found = self.found
        found.feeds = {
            w: f for w, f in found.feeds.items() if f.source not in self._lost and f.source not in found.writes
        }
        sources = {f.source for f in found.feeds.values()}
        lost = next((n for n in found.writes if n in self._lost or n in sources), None)
        if not whole:
            found.feeds = {}
            self._refuse("a run on a text does not get to the end of the model")
        elif not found.tables:
            self._refuse("its blocks do not begin with the embeddings of a text")
        elif lost is not None:
            self._refuse(f"what leaves {lost} is added to the residual stream and read elsewhere, too")
        elif not found.outer_reads(blocks):
            self._refuse("no layer behind the blocks reads the residual stream")
        elif not found.writes:
            self._refuse("no layer writes to the residual stream")
        self._marks.clear()
        return found


def _turns(out: Tensor, dims: tuple[Any, ...]) -> bool:
    """Whether a view of a parameter has its last two dimensions exchanged. dims: those that the operator got"""
    numbers = [d % out.dim() for d in dims if isinstance(d, int)]
    return out.dim() > 1 and (not numbers or set(numbers) == {out.dim() - 2, out.dim() - 1})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments, such as those of torch.cat."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)
