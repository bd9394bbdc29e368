"""Declarations of the model families that qkit knows.

A ``Family`` declares where the blocks are, which linears of a block share their input (one Hessian, one
factorization, in fused engines one scheme and one global scale), which layer produces that input (so that a scale can
be folded into it), and how checkpoint names differ from module names. An architecture without a declaration
is discovered from its module tree (``discover.py``), or refused with a message that names its modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qkit.families.blocks import Group, Streams


@dataclass(frozen=True)
class Experts:
    """Routed experts whose weights transformers keeps as 3-D parameters and checkpoints store one by one.

    module:     the experts module inside the block, with parameters gate_up_proj [E, 2 I, H] and
                down_proj [E, H, I], called as forward(hidden, top_k_index, top_k_weights)
    stored:     checkpoint name of a linear inside the block, with {e} and {linear}
    gate, up, down: the names that {linear} takes
    """

    module: str
    stored: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class Rotation:
    """Names of layers for an offline Hadamard rotation of the residual stream (RMSNorm models without biases on it).

    reads:  linears that read the residual stream, by the norm whose weight is folded into them first
    writes: linears that write to it
    value, output: the linear that produces the heads' values and the one that reads them
    """

    reads: tuple[tuple[str, tuple[str, ...]], ...]
    writes: tuple[str, ...]
    value: str
    output: str


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
    experts: Experts | None = None
    rotation: Rotation | None = None
    stream: Rotation | None = None  # the same for a residual stream that cannot be rotated, since images enter it
    keys: Keys | None = None
    rename: tuple[tuple[str, str], ...] = ()  # (part of a checkpoint name, part of the module name)
    towers: tuple[Tower, ...] = ()  # in the order in which they run
    text_types: tuple[str, ...] = ()  # vision-language: model types of text_config; transformers names its checkpoints
    streams: Streams | None = None  # diffusion transformers
    encodes: bool = False  # text encoders: they generate no tokens
    skips: tuple[tuple[str, str], ...] = ()  # (glob of layers that are skipped unless a rule names them, reason)
    note: str = field(default="", compare=False)

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a module or parameter."""
        for stored, module in self.rename:
            if name == module.rstrip(".") or module in name + ".":
                return (name + ".").replace(module, stored, 1).removesuffix(".")
        return name
