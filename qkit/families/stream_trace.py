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

from qkit.families.dispatch_watch import DispatchWatch
from qkit.families.marks import LINEAR, NORMED, STREAM, Mark, attended, moved, reduced, scaled
from qkit.families.norms import commutes_with_rotations, has_no_weight, is_norm, norm_offset
from qkit.families.operators import (
    ADD,
    KEEP,
    LIKE,
    MOVE,
    MULTIPLY,
    PRODUCTS,
    SPLIT,
    TRANSPOSE,
    target,
    tensors_in,
    transposes,
    writes,
)
from qkit.families.stream import Feed, Place, Stream

_SUM = "something is added to {of} that no linear layer writes: what leaves a norm behind a layer, or positions"


class StreamTrace(TorchFunctionMode):
    """Watches a run of a model on the meta device, with ``dispatch_watch``. ``found`` is complete after ``finish``.

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
        self._shown: set[int] = set()  # ids of the tensors that the operator gets that runs now
        self.dispatch_watch = DispatchWatch(self._not_shown)
        self._by_storage: dict[int, set[int]] = {}  # ids of marked tensors
        self._stale: set[int] = set()  # of these, whose memory another tensor wrote into
        self._elsewhere: set[str] = set()  # parameters that operators read in ways that are not followed

    # ---- what hooks of modules call ------------------------------------------------------------------------------

    def watch(self, model: nn.Module) -> list[Any]:
        """Hooks on the norms of the model, each seen as one step."""
        norms = {n: m for n, m in model.named_modules() if is_norm(m) or has_no_weight(m)}
        alike = {(type(m), repr(m)): m for m in norms.values()}
        offsets = {kind: norm_offset(m) if commutes_with_rotations(m) else None for kind, m in alike.items()}
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
            tensors = list(tensors_in((args, kwargs)))
            marked = [m for x in tensors if (m := self._mark(x)) is not None]
            first = marked[0] if marked else None
            if first is None or first.kind != STREAM:
                self._elsewhere.add(f"{name}.weight")
            if first is None:
                return
            alone = not self._inside and len(tensors) == 1 and first.kind == STREAM and first.in_order
            if not alone or not isinstance(out, Tensor):
                self._drop(marked, f"{name}, a norm,")
                return
            if offset is None:
                self._refuse(f"{name} is no RMSNorm: it does more than divide by the root mean square")
            elif getattr(module, "weight", None) is None:
                self._set(out, first)
            else:
                self.found.offsets[name] = offset
                self._set(out, replace(first, kind=NORMED, names=frozenset([name])))

        return hook

    # ---- operators -------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._shown = {id(x) for x in tensors_in((args, kwargs))}
        out = func(*args, **kwargs)
        self._shown = set()
        if not self._inside:
            name = getattr(func, "__name__", "").strip("_")
            if name == "get":  # of a property, such as .T
                name = getattr(getattr(func, "__self__", None), "__name__", name)
            with torch._C.DisableTorchFunction():  # what is done with marks is no part of the run
                self._see(name, args, kwargs, out, func)
                written = target(func, args, kwargs)
                if written is not None:
                    others = self._by_storage.get(written.untyped_storage()._cdata, set())
                    self._stale |= others - {id(written)}
        return out

    def _not_shown(self, tensors: Iterator[Tensor]) -> None:
        """See what an operator reads that compiled code calls, or another operator with tensors that it did not get."""
        if self._inside:
            return
        for x in tensors:
            if id(x) in self._shown:
                continue
            if id(x) in self._marks and (mark := self._mark(x)) is not None:
                self._drop([mark], "compiled code")
            elif id(x) in self._params:
                self._elsewhere.add(self._params[id(x)][0])

    def _see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, func: Any) -> None:
        if name in LIKE or (next(tensors_in(out), None) is None and not writes(func)):
            return
        if self._see_parameter(name, args, kwargs, out):
            return
        tensors = list(tensors_in(args[:1] if name in KEEP else (args, kwargs)))
        marks = [m for x in tensors if (m := self._mark(x)) is not None]
        if marks and self._follow(name, args, kwargs, out, func, tensors, marks):
            return
        self._elsewhere |= {found[0] for x in tensors if (found := self._param(x))}
        self._drop(marks, f"the operator {name}", _SUM if name in ADD else "{what} reads {of}")

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
        if name in MOVE:
            outs = list(tensors_in(out))
            found = moved(marks[0], func, args[1:], kwargs, outs, name in SPLIT) if len(marks) == 1 else None
            return found is not None and all(self._keep(m, x) for m, x in zip(found, outs, strict=True))
        if not isinstance(out, Tensor):
            return False
        if name in KEEP:
            return self._keep(marks[0], out)
        if name in ADD:
            return self._add(args, out, marks)
        if name in MULTIPLY:
            numerator = "div" not in name or (len(marks) == 1 and self._mark(tensors[0]) is not None)
            return numerator and self._scale(tensors, out, marks)
        if name == "relu" and marks[0].kind == LINEAR:  # a positive factor passes
            return self._keep(replace(marks[0], exact=False, mixes=False), out)
        if name in ("sum", "mean"):
            return self._keep(reduced(marks[0], kwargs.get("dim", args[1] if len(args) > 1 else None), out), out)
        if name == "scaled_dot_product_attention":
            return self._attend(args[2] if len(args) > 2 else kwargs.get("value"), tensors, out)
        if name == "matmul":
            return self._attend(tensors[-1], tensors, out)
        if name in ("cat", "concat"):  # with an empty cache
            return len(marks) == 1 and sum(x.numel() > 0 for x in tensors) == 1 and self._keep(marks[0], out)
        normed = name == "rms_norm" and len(tensors) == 1 and marks[0].kind == STREAM and marks[0].in_order
        return normed and self._keep(marks[0], out)

    def _see_parameter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
        """Whether an operator reads a parameter in a known way: it looks up, transposes, converts or multiplies."""
        if name == "embedding":
            table = next((found[0] for x in (*args, *kwargs.values()) if (found := self._param(x))), "")
            if table and table == self._table:
                self.found.table = table
                self._set(out, Mark.of(STREAM, "", out))
            return True
        first = self._param(args[0]) if args else None
        transposed = name in TRANSPOSE and isinstance(out, Tensor) and transposes(out, args[1:])
        if first is not None and (transposed or name in KEEP):
            self._params[id(out)] = (first[0], first[1] ^ transposed)
            self._held.append(out)
            return True
        at = PRODUCTS.get(name)
        if at is None:
            return False
        weight = self._param(args[at] if len(args) > at else kwargs.get("weight"))
        bias = (
            next(iter(args), None)
            if name == "addmm"
            else kwargs.get("bias", args[2] if name == "linear" and len(args) > 2 else None)
        )
        bias_name = self._param(bias)
        if weight is None or (bias is not None and bias_name is None):
            return False
        if weight[1] == (name == "linear"):
            self.found.transposed.add(weight[0])
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
            self.found.feeds.pop(weight, None)
            if weight in self.found.reads or (mark is not None and mark.kind != LINEAR):
                self._refuse(f"{weight} multiplies more than once in a pass")
            self._drop([mark] if mark is not None else [], weight)
        elif mark is None:
            return
        elif mark.kind == LINEAR:
            self._feed(mark, weight)
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
        bias = next(((x, found[0]) for x in args if (found := self._param(x))), None)
        if bias is not None and len(marks) == 1 and len(marks[0].names) == 1 and kinds == {LINEAR} and marks[0].exact:
            (weight,) = marks[0].names
            known, self._biases[weight] = self._biases[weight], bias[1]
            for_each = bias[0].shape == (marks[0].width,) and marks[0].in_order
            return not known and for_each and self._keep(marks[0], out)
        if len(args) != 2 or len(marks) != 2 or NORMED in kinds or any(m.channels.shape != out.shape for m in marks):
            return False
        if not all(m.exact and m.agrees(marks[0]) for m in marks):
            return False
        if STREAM in kinds:
            if not all(m.complete for m in marks):
                return False
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
        others = [x for x in tensors if x is not values] + [x for x in tensors if x is values][1:]  # the keys, too
        self._drop([m for x in others if (m := self._mark(x)) is not None], "attention")
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
        if id(x) in self._stale:
            self._drop([found[1]], "an operator that writes into a part of a tensor")
            return None
        return found[1]

    def _param(self, x: Any) -> tuple[str, bool] | None:
        return self._params.get(id(x)) if isinstance(x, Tensor) else None

    def _set(self, x: Tensor, mark: Mark) -> None:
        self._marks[id(x)] = (x, mark)  # the tensor lives on, so that its id is its own
        self._stale.discard(id(x))
        self._by_storage.setdefault(x.untyped_storage()._cdata, set()).add(id(x))

    def _drop(self, marks: list[Mark], what: str, why: str = "{what} reads {of}") -> None:
        """What is not followed any more. what: reads it; why: the sentence, with {what} and with {of} for what is read"""
        for mark in marks:
            if mark.kind == LINEAR:
                self._lost |= mark.names
            else:
                behind = next(iter(mark.names), "")
                self._refuse(why.format(what=what, of=f"what leaves {behind}" if behind else "the residual stream"))

    def _refuse(self, why: str) -> None:
        self.found.against = self.found.against or why

    def finish(self, blocks: tuple[str, ...], whole: bool) -> Stream:
        """What the run showed. whole: it came to its end"""
        found = self.found
        unknown = {*self._lost, *found.writes, *self._elsewhere}
        unknown |= {w for w, bias in self._biases.items() if bias in self._elsewhere}
        found.feeds = {w: f for w, f in found.feeds.items() if f.source not in unknown and w not in self._elsewhere}
        sources = {f.source for f in found.feeds.values()}
        lost = next((n for n in found.writes if n in self._lost or n in sources), None)
        changed = (
            found.table,
            *found.reads,
            *found.writes,
            *found.writes.values(),
            *(f"{n}.weight" for n in found.offsets),
        )
        elsewhere = next((n for n in changed if n in self._elsewhere), None)
        if not whole:
            found.feeds = {}
            self._refuse("a run on a text does not get to the end of the model")
        elif not found.table:
            self._refuse("its blocks do not begin with the embeddings of a text")
        elif lost is not None:
            self._refuse(f"what leaves {lost} is added to the residual stream and read elsewhere, too")
        elif elsewhere is not None:
            self._refuse(f"{elsewhere} is read elsewhere, too, where nothing is rotated")
        elif not found.outer_reads(blocks):
            self._refuse("no layer behind the blocks reads the residual stream")
        elif not found.writes:
            self._refuse("no layer writes to the residual stream")
        self._marks.clear()
        return found
