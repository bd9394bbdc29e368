"""Hadamard rotation of the residual stream and the value heads, folded into the weights.

With an orthogonal Q, h' = Q^T h for the residual stream h: embeddings become E Q, linears that read it W diag(g) Q (g: the
weight of the norm before them, which becomes 1), linears that write it Q^T W, and the head W diag(g) Q. Inside a
head of size d the value rows are multiplied by a Hadamard matrix and the columns of the output projection by its inverse.
RMSNorm commutes with Q, so the function is unchanged and run time has no extra cost. Outlier channels are spread over all
channels. What reads and writes the stream, and where the heads' values go, is seen in a run of the skeleton
(``families.stream``); ``engine.proof`` checks the result on blocks. QuaRot (Ashkboos et al., arXiv 2404.00456, section 4,
stages 1a-1c without the online parts).

Q is a Hadamard matrix with random column signs where the width is a power of two; otherwise the Kronecker product
of the largest Hadamard factor with an orthonormal cosine transform (our choice: any orthogonal matrix is valid).
The norm in front of the head can no longer share its weight with the embeddings: tied models become untied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkit.errors import Unsupported
from qkit.families.structure import ModelStructure
from qkit.system.extras import needs, require
from qkit.tensor.formats import Scheme
from qkit.transforms.state import BlockState


def orthogonal(n: int, seed: int) -> Tensor:
    """An orthogonal matrix, float32 [n, n]; it depends on n and seed alone."""
    with needs("method rotate", "rotation"):
        from scipy.fft import dct
        from scipy.linalg import hadamard

    power = n & -n
    q = torch.from_numpy(hadamard(power, dtype=float)) / power**0.5
    if power != n:
        odd = torch.from_numpy(dct(torch.eye(n // power, dtype=torch.float64).numpy(), norm="ortho", axis=0))
        q = torch.kron(q, odd)
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    signed: Tensor = (q * signs).to(torch.float32)
    return signed


def check_rotatable(structure: ModelStructure) -> None:
    """Raises Unsupported for a model whose function the rotation would change, and without scipy."""
    require("method rotate", "rotation", "scipy")
    against = _against(structure)
    if against:
        raise Unsupported(
            f"method rotate needs blocks that read and write one residual stream through RMSNorm; in {structure.kind_name}, "
            f"{against}: use smoothquant or awq"
        )
    left = next((n for n in structure.unloaded if len(structure.checkpoint.tensors[n].shape) == 2), None)
    if left is not None:
        raise Unsupported(
            f"method rotate rotates what every layer reads, and the model's class does not load {left} (and others, perhaps), "
            "which would be fed rotated values: use smoothquant or awq"
        )


def _against(structure: ModelStructure) -> str:
    """What keeps the rotation from leaving the function as it is; '' for nothing."""
    family, stream = structure.family, structure.stream
    if family.streams is not None or family.encodes or not structure.is_language_model:
        return "no token is predicted from those before it"
    if structure.towers:
        return f"values of the {structure.towers[0].name} enter the stream"
    if stream.against:
        return stream.against
    unseen = next((b.path for b in structure.blocks if b.path not in stream.places), None)
    if unseen is not None:
        return f"{unseen} does not run on a text"
    paths = tuple(f"{b.path}." for b in structure.blocks)
    for param, norm in stream.reads.items():
        block = next((p for p in paths if param.startswith(p)), "")
        if block and norm and not norm.startswith(block):
            return f"{norm} is outside the block of {param}, which reads what leaves it"
    touched = [n for n in (*stream.reads, *stream.writes) if n.startswith(paths)]
    shared = next((n for n in touched if structure.names.is_shared(n)), None)
    if shared is not None:
        return f"several layers share {shared}"
    head = f"{family.head}.weight"
    others = [n for n in stream.outer_reads(structure.paths) if n not in (head, stream.table)]
    others += [n for n in structure.tied if n != structure.stored_name(head)]
    return f"{others[0]} reads the stream beside the output head, or is one with another weight" if others else ""


def rotate(state: BlockState, schemes: dict[str, Scheme], seed: int) -> None:
    """Rewrite the weights of a block (float32) and the norms of its stream, whose factors become 1."""
    stream = state.structure.stream.of(state.block.path)
    q = orthogonal(_width(state.structure), seed).to(state.device)
    for param, norm in stream.reads.items():
        gain = _gain(state.module.get_submodule(norm), stream.offsets[norm]) if norm else None
        _rewrite(state, param, param in stream.transposed, lambda w, g=gain: (w if g is None else w * g) @ q)  # type: ignore[misc]
    for norm, offset in stream.offsets.items():
        weight: Any = state.module.get_submodule(norm).weight
        weight.data.fill_(1.0 - offset)
    for param, bias in stream.writes.items():
        _rewrite(state, param, param in stream.transposed, lambda w: q.T @ w)
        if bias:
            values = state.module.get_parameter(bias)
            state.assign(values, values.data.float() @ q)
    if stream.values is not None:
        _rotate_heads(state, *stream.values, seed + 1)
    state.write_back()


def _gain(norm: Any, offset: float) -> Tensor:
    """What a norm multiplies each channel by, float32 [width]."""
    weight: Tensor = norm.weight.data.float()
    return weight + offset if offset else weight


def _rewrite(state: BlockState, param: str, transposed: bool, product: Callable[[Tensor], Tensor]) -> None:
    """Replace the matrices of a parameter, [.., out, in]: each of its linears, or the parameter itself (a router).

    transposed: it holds them as [.., in, out], as its module sees it
    """
    linears = [x for x in state.block.linears if x.param == param]
    for linear in linears:
        state.changed[linear.name] = product(state.weight(linear))
    if not linears:
        whole = state.module.get_parameter(param)
        matrix = whole.data.mT if transposed else whole.data
        changed = product(matrix.float())
        state.assign(whole, (changed.mT if transposed else changed).contiguous())


def _rotate_heads(state: BlockState, value: str, output: str, head: int, seed: int) -> None:
    """Multiply the values of each head by one orthogonal matrix, and what reads them by its inverse."""
    linears = {x.param: x for x in state.block.linears if x.expert is None and x.rows is None}
    if value not in linears or output not in linears:
        return
    h = orthogonal(head, seed).to(state.device)
    of_value, of_output = linears[value], linears[output]
    w = state.weight(of_value)
    state.changed[of_value.name] = torch.einsum("ij,hik->hjk", h, w.view(-1, head, w.shape[1])).reshape(w.shape)
    bias: Any = getattr(state.module.get_submodule(of_value.owner), "bias", None)
    if bias is not None:
        state.assign(bias, (bias.data.float().view(-1, head) @ h).reshape(-1))
    w = state.weight(of_output)
    state.changed[of_output.name] = (w.view(len(w), -1, head) @ h).reshape(w.shape)


def _width(structure: ModelStructure) -> int:
    """The width of the residual stream."""
    return int(structure.model.get_parameter(structure.stream.table).shape[1])


def rotated_parameters(structure: ModelStructure, seed: int) -> dict[str, Tensor]:
    """{parameter: rotated tensor} of embeddings, final norm and head, in the checkpoint's dtypes.

    For a tied model the head is a tensor of its own in the result.
    """
    stream, read = structure.stream, structure.checkpoint.read_finite
    q = orthogonal(_width(structure), seed)
    table = stream.table
    values = read(structure.stored_name(table))
    result = {table: (values.float() @ q).to(values.dtype)}
    for param, norm in stream.outer_reads(structure.paths).items():
        projection = values if param == table else read(structure.stored_name(param))
        matrix = projection.float()
        if norm:
            gain, offset = read(structure.stored_name(f"{norm}.weight")), stream.offsets[norm]
            result[f"{norm}.weight"] = torch.full_like(gain, 1.0 - offset)
            matrix = matrix * (gain.float() + offset if offset else gain.float())
        head = f"{structure.family.head}.weight" if param == table else param
        result[head] = (matrix @ q).to(projection.dtype)
    return result


def rotate_outer(structure: ModelStructure, seed: int) -> dict[str, Tensor]:
    """``rotated_parameters`` by the names in the checkpoint."""
    return {structure.stored_name(name): tensor for name, tensor in rotated_parameters(structure, seed).items()}
