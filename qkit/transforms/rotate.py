"""Hadamard rotation of the residual stream and the value heads, folded into the weights.

With an orthogonal Q, h' = Q^T h for the residual stream h: embeddings become E Q, linears that read it W diag(g) Q (g: the
weight of the norm before them, which becomes 1), linears that write it Q^T W, and the head W diag(g) Q. Inside a
head of size d the value rows are multiplied by a Hadamard matrix and the columns of the output projection by its inverse.
RMSNorm commutes with Q, so the function is unchanged and run time has no extra cost. Outlier channels are spread over all
channels. QuaRot (Ashkboos et al., arXiv 2404.00456, section 4, stages 1a-1c without the online parts).

Q is a Hadamard matrix with random column signs where the width is a power of two; otherwise the Kronecker product
of the largest Hadamard factor with an orthonormal cosine transform (our choice: any orthogonal matrix is valid).
The norm in front of the head can no longer share its weight with the embeddings: tied models become untied.
"""

from __future__ import annotations

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
    if structure.family.rotation is None:
        raise Unsupported(
            f"method rotate needs a model whose blocks read and write one residual stream through RMSNorm; the family "
            f"{structure.kind_name} is not declared as such: use smoothquant or awq"
        )
    left = next((n for n in structure.unloaded if len(structure.checkpoint.tensors[n].shape) == 2), None)
    if left is not None:
        raise Unsupported(
            f"method rotate rotates what every layer reads, and the model's class does not load {left} (and others, perhaps), "
            "which would be fed rotated values: use smoothquant or awq"
        )


def rotate(state: BlockState, schemes: dict[str, Scheme], seed: int) -> None:
    """Rewrite the weights of a block (float32) and set its two norms to 1."""
    rotation = state.structure.family.rotation
    assert rotation is not None
    config: Any = state.structure.text_config
    linears = {x.param.removesuffix(".weight"): x for x in state.block.linears}
    q = orthogonal(config.hidden_size, seed)
    for norm_name, readers in rotation.reads:
        norm: Any = state.module.get_submodule(norm_name)
        gain = norm.weight.data.float()
        for name in readers:
            state.changed[linears[name].name] = (state.weight(linears[name]) * gain) @ q
        norm.weight.data.fill_(1.0)
    for name in rotation.writes:
        state.changed[linears[name].name] = q.T @ state.weight(linears[name])
        writer: Any = state.module.get_submodule(name)
        if writer.bias is not None:
            writer.bias.data = state.rounded(writer.bias.data.float() @ q)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    h = orthogonal(head, seed + 1)
    value, output = linears[rotation.value], linears[rotation.output]
    w = state.weight(value)
    state.changed[value.name] = torch.einsum("ij,hik->hjk", h, w.view(-1, head, w.shape[1])).reshape(w.shape)
    bias: Any = state.module.get_submodule(rotation.value).bias
    if bias is not None:
        bias.data = state.rounded((bias.data.float().view(-1, head) @ h).reshape(-1))
    w = state.weight(output)
    state.changed[output.name] = (w.view(len(w), -1, head) @ h).reshape(w.shape)
    state.write_back()


def rotate_outer(structure: ModelStructure, seed: int) -> dict[str, Tensor]:
    """{checkpoint name: rotated tensor} of embeddings, final norm and head, in the checkpoint's dtypes.

    For a tied model the head is a tensor of its own in the result.
    """
    family, read = structure.family, structure.checkpoint.read_finite
    embeddings, norm, head = (
        structure.stored_name(f"{n}.weight") for n in (family.embeddings, family.final_norm, family.head)
    )
    table, gain = read(embeddings), read(norm)
    projection = table if head in structure.tied else read(head)
    q = orthogonal(table.shape[1], seed)
    return {
        embeddings: (table.float() @ q).to(table.dtype),
        norm: torch.ones_like(gain),
        head: ((projection.float() * gain.float()) @ q).to(projection.dtype),
    }
