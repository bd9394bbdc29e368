"""Declarations of the model families that qkit knows.

A ``Family`` declares where the blocks are, which linears of a block share their input (one Hessian, one
factorization, in fused engines one scheme and one global scale), which layer produces that input (so that a scale can
be folded into it). An architecture without a declaration is discovered from its module tree (``discover.py``). Names in a
checkpoint are matched with modules by transformers' own tables (``conversion.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qkit.families.blocks import Group, Streams

if TYPE_CHECKING:
    from qkit.families.sharing import Reads


@dataclass(frozen=True)
class ResidualStream:
    """Layers of a block at its residual stream, in running order.

    reads:  linears that read it, by the norm before them
    writes: linears that write to it
    """

    reads: tuple[tuple[str, tuple[str, ...]], ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Keys:
    """Attention whose queries and keys are linears of their own, turned by rotary embedding in pairs (i, i + head_dim / 2).

    attention: its module inside the block; query, key: its linears; query_norm, key_norm: of every head, where the model
    has them
    """

    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"


@dataclass(frozen=True)
class Tower:
    """A part of a model before its language model: a vision encoder, or a projector into the language model's space.

    name:   its name in recipes and reports
    blocks: possible module paths: a list of blocks, or one module that is a block; a model has one of them
    """

    name: str
    blocks: tuple[str, ...]
    groups: tuple[Group, ...] = ()
    on_text: bool = False  # it runs where the model reads a text alone, as an encoder before its decoder


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of model. Names are module names of transformers, or diffusers, unless said otherwise.

    model_types: what config.json calls it: its model_type, or the class of a diffusion transformer or of a text encoder
    """

    name: str
    model_types: tuple[str, ...]
    blocks: tuple[str, ...]  # lists of blocks, one behind the other
    groups: tuple[Group, ...]
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    norm_offset: float = 0.0  # Gemma multiplies by (1 + weight)
    stream: ResidualStream | None = None
    keys: Keys | None = None
    towers: tuple[Tower, ...] = ()  # in the order in which they run
    text_types: tuple[str, ...] = ()  # vision-language: model types of text_config; transformers names its checkpoints
    streams: Streams | None = None  # diffusion transformers
    encodes: bool = False  # text encoders: they generate no tokens
    skips: tuple[tuple[str, str], ...] = ()  # (glob of layers that are skipped unless a rule names them, reason)
    note: str = field(default="", compare=False)
    reads: Reads | None = field(default=None, compare=False)  # of a discovered family: what a run of it showed
