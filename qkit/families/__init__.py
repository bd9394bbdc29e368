"""What qkit knows of each kind of model, by declaration.

A ``Family`` says where the blocks are, which linears of a block share their input (one Hessian, one
factorization, in fused engines one scheme and one global scale), what feeds that input (so that a scale can
be folded into it), and how checkpoint names differ from module names. An architecture that is not declared
is discovered from its module tree (``discover.py``) or refused with what was seen.
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
    """What an offline Hadamard rotation of the residual stream needs (RMSNorm models without biases on it).

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
    """A part of a model before its language model: what looks at pictures, and what projects them into its space.

    name:   what recipes and reports call it
    blocks: where it may be: a list of blocks, or one module that is a block; a model has one of them
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
    stream: Rotation | None = None  # the same of a residual stream that cannot be rotated: pictures come into it
    keys: Keys | None = None
    rename: tuple[tuple[str, str], ...] = ()  # (part of a checkpoint name, part of the module name)
    towers: tuple[Tower, ...] = ()  # in the order in which they run
    text_types: tuple[
        str, ...
    ] = ()  # vision-language: what text_config may be; its checkpoints are named by transformers
    streams: Streams | None = None  # diffusion transformers
    encodes: bool = False  # text encoders: no tokens come out of them
    skips: tuple[tuple[str, str], ...] = ()  # (glob of layers that stay as they are if no rule says otherwise, why)
    note: str = field(default="", compare=False)

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a module or parameter."""
        for stored, module in self.rename:
            if name == module.rstrip(".") or module in name + ".":
                return (name + ".").replace(module, stored, 1).removesuffix(".")
        return name
