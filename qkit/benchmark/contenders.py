"""The contenders of a benchmark: qkit's own product, dense ones, and other libraries where they are installed.

A contender is a name, a function that prepares a weight and one that multiplies with what was prepared. Another one is one
more function in ``_MAKERS``; each gets its preferred layout and activations in its preferred dtype, and neither laying out
nor that conversion is timed. What a product needs each time (quantizing activations, sparse and low-rank parts) is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from qkit_kernels import cpu
from torch import Tensor
from torch.nn import functional

from qkit.errors import Unsupported
from qkit.nn import ops
from qkit.planning.sizes import linear_bytes
from qkit.sensitivity.candidates import Candidate
from qkit.tensor import sparse
from qkit.tensor.activations import quantize_activations, static_scale
from qkit.tensor.formats import Format, fit_group
from qkit.tensor.lowrank import LowRank
from qkit.tensor.qtensor import Params, QTensor, dequantize, param_shape
from qkit.tensor.sparse import outlier_count

OWN, BF16, FLOAT32 = "qkit", "dense bf16", "dense float32"


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product to time. dtype: of activations; q: None for a weight that is kept; exact: float32, what the weight stands
    for; static: float32 [1], the scale of static activation formats; size: bytes of the weight as a checkpoint stores it."""

    candidate: Candidate
    shape: tuple[int, int]
    dtype: torch.dtype
    q: QTensor | None
    exact: Tensor
    static: Tensor
    size: int

    @property
    def activations(self) -> Format | None:
        """The format of the activations."""
        return None if self.candidate.scheme is None else self.candidate.scheme.activations

    def rounded(self, x: Tensor) -> Tensor:
        """Activations as the scheme multiplies with them."""
        return x if self.activations is None else quantize_activations(x, self.activations, self.static)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One implementation of a product. size: bytes of the weight as it is read; dtype: of the activations it gets; rounds:
    whether it rounds activations to 8 bits on its own, which is then part of its error."""

    name: str
    size: int
    dtype: torch.dtype
    prepare: Callable[[], Any]
    run: Callable[[Any, Tensor], Tensor]
    rounds: bool = False


def random_product(candidate: Candidate, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Product:
    """A product of a random weight in a candidate's format. Raises Unsupported where the format cannot have that shape."""
    generator = torch.Generator().manual_seed(seed)
    static = torch.ones(1)
    if candidate.scheme is None:
        kept_weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        return Product(
            candidate=candidate,
            shape=shape,
            dtype=dtype,
            q=None,
            exact=kept_weight.to(torch.float32),
            static=static,
            size=kept_weight.nbytes,
        )
    weights, activations = fit_group(candidate.scheme.weights, shape[1]), candidate.scheme.activations
    sparse_count = outlier_count(candidate.outliers, shape)
    q = random_weight(weights, shape, sparse_count, generator)
    if candidate.rank:
        factors = (torch.randn(n, candidate.rank, generator=generator) * 0.02 for n in shape)
        up, down = (t.to(torch.bfloat16) for t in factors)
        q = replace(q, low_rank=LowRank(down.T.contiguous(), up))
    if activations is not None and activations.strategy in ("tensor", "tensor_group"):
        static = torch.tensor([static_scale(4.0, activations)])
    size = linear_bytes(weights, activations, shape, torch.bfloat16, sparse_count, candidate.rank)
    return Product(candidate=candidate, shape=shape, dtype=dtype, q=q, exact=dequantize(q), static=static, size=size)


def random_weight(fmt: Format, shape: tuple[int, int], sparse_count: int, generator: torch.Generator) -> QTensor:
    """A weight of random codes over the whole range, with random scales, zero points where the format has them, and
    ``sparse_count`` values beside."""
    low, high = -(1 << (fmt.bits - 1)), 1 << (fmt.bits - 1)
    per_tile = param_shape(fmt, shape)
    scale, zero, global_scale = torch.rand(per_tile, generator=generator) + 0.5, None, None
    if fmt.kind == "int":
        codes = torch.randint(low, high, shape, dtype=torch.int8, generator=generator)
        if not fmt.symmetric:
            zero = torch.randint(low // 2, high // 2, per_tile, dtype=torch.int8, generator=generator)
    elif fmt.kind == "fp4":
        codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)
    else:
        codes = (torch.randn(shape, generator=generator) * 100).to(torch.float8_e4m3fn)
    if fmt.scale == "e8m0":
        scale = torch.randint(117, 122, per_tile, dtype=torch.uint8, generator=generator)
    elif fmt.scale == "e4m3":
        scale, global_scale = (scale * 100).to(torch.float8_e4m3fn), torch.tensor([5000.0])
    else:
        scale = (scale * 0.02).to(torch.bfloat16)
    part = None
    if sparse_count:
        places = torch.randperm(shape[0] * shape[1], generator=generator)[:sparse_count].sort().values
        part = sparse.make(places, torch.randn(sparse_count, generator=generator).to(torch.bfloat16), shape)
    return QTensor(codes, Params(scale, zero, global_scale), fmt, part)


def _qkit(p: Product) -> Iterator[Contender]:
    q = p.q
    if q is None:
        yield _product(OWN, p, p.dtype)
        return

    def prepare() -> ops.PreparedWeight:
        return ops.prepare(replace(q, codes=q.codes.clone()), p.activations, p.dtype)

    def run(w: ops.PreparedWeight, x: Tensor) -> Tensor:
        return ops.linear(x, w, None, p.activations, p.static)

    yield Contender(name=OWN, size=p.size, dtype=p.dtype, prepare=prepare, run=run)


def _dense(p: Product) -> Iterator[Contender]:
    yield _product(BF16, p, torch.bfloat16)
    yield _product(FLOAT32, p, torch.float32)


def _product(name: str, p: Product, dtype: torch.dtype) -> Contender:
    size = p.exact.numel() * dtype.itemsize
    return Contender(
        name=name,
        size=size,
        dtype=dtype,
        prepare=lambda: p.exact.to(dtype, copy=True),
        run=lambda w, x: functional.linear(x, w),
    )


def _dequantized(p: Product) -> Iterator[Contender]:
    q = p.q
    if q is not None:
        yield Contender(
            name="dequantize, dense bf16",
            size=p.size,
            dtype=torch.bfloat16,
            prepare=lambda: replace(q, codes=q.codes.clone()),
            run=lambda w, x: functional.linear(x, dequantize(w).to(torch.bfloat16)),
        )


def _plain_int4(p: Product) -> bool:
    """Whether this is what other libraries call INT4: symmetric, in groups, nothing beside it."""
    q = p.q
    fits = q is not None and q.format.kind == "int" and q.format.bits == 4 and q.format.strategy == "group"
    return (
        fits
        and q is not None
        and q.format.symmetric
        and q.sparse is None
        and q.low_rank is None
        and p.activations is None
    )


def _torch_int4(p: Product) -> Iterator[Contender]:
    q = p.q
    if q is None or not _plain_int4(p) or q.format.group not in (32, 64, 128, 256) or p.shape[0] % 16:
        return

    def prepare() -> tuple[Tensor, Tensor]:
        scale = q.params.scale.T
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.codes.to(torch.int32) + 8, 1)
        return packed, torch.stack((scale, torch.zeros_like(scale)), dim=-1).to(torch.bfloat16).contiguous()

    def run(w: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], q.format.group, w[1])
        return y

    yield Contender(name="torch int4pack", size=p.size, dtype=torch.bfloat16, prepare=prepare, run=run)


def _onnxruntime(p: Product) -> Iterator[Contender]:
    q = p.q
    if q is None or not _plain_int4(p) or find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return
    for level, rounds in ((4, True), (0, False)):
        name = f"onnxruntime MatMulNBits, accuracy_level {level}"
        yield Contender(
            name=name,
            size=p.size,
            dtype=torch.float32,
            prepare=lambda n=level: _session(q, n),  # type: ignore[misc]
            run=_in_session,
            rounds=rounds,
        )


def _session(q: QTensor, level: int) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper

    (out, columns), group = q.shape, q.format.group
    assert group is not None
    unsigned = (q.codes + 8).to(torch.uint8)
    packed = (unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)).view(out, columns // group, group // 2).numpy()
    scale = q.params.scale.to(torch.float32).numpy()
    fields = {"K": columns, "N": out, "bits": 4, "block_size": group, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **fields)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", out])],
        [
            helper.make_tensor("w", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True),
            helper.make_tensor("s", TensorProto.FLOAT, [scale.size], scale.tobytes(), raw=True),
        ],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _in_session(session: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _auto_round(p: Product) -> Iterator[Contender]:
    q = p.q
    if q is None or not _plain_int4(p) or find_spec("auto_round_kernel") is None:
        return
    import auto_round_kernel as ark

    (out, columns), group, empty = p.shape, q.format.group, torch.empty(0)

    def prepare() -> Tensor:
        codes, scale = q.codes.T.contiguous(), q.params.scale.to(torch.float32).T.contiguous()
        blob: Tensor = ark.repack_quantized_weight(
            codes, scale, empty.to(torch.int8), group, "auto", "int4", "fp32", False
        )
        return blob

    def run(w: Tensor, x: Tensor) -> Tensor:
        y: Tensor = ark.woqgemm(x, w, empty, out, columns, group, "auto", "int4", "fp32", False)
        return y

    yield Contender(name="auto-round-lib", size=p.size, dtype=torch.float32, prepare=prepare, run=run, rounds=True)


_MAKERS = {"cpu": (_qkit, _dense, _dequantized, _torch_int4, _onnxruntime, _auto_round)}  # by device


def check_device(device: str) -> None:
    """Raises Unsupported for a device that nobody runs on."""
    if device not in _MAKERS:
        raise Unsupported(
            f"--device {device}: this bench times the CPU alone, reports/kernels_gpu/run.py a GPU: leave --device out"
        )


def contenders(p: Product, device: str) -> list[Contender]:
    """The contenders that can take part, qkit first."""
    check_device(device)
    return [contender for maker in _MAKERS[device] for contender in maker(p)]


def operator_of(prepared: Any) -> str | None:
    """The operator of ``qkit_kernels`` that was chosen, and up to how many rows it runs."""
    if not isinstance(prepared, ops.PreparedWeight):
        return None
    laid = prepared.operator_weight
    if isinstance(laid, cpu.CpuWeight) and laid.op not in ("dequantize", "int_mm"):
        return f"{laid.op}, to {laid.rows} rows"
    return laid.op
