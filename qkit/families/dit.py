"""Declarations of diffusion transformers, by the names of their classes in diffusers.

A block's norms take shift, scale and gate from the timestep (adaLN). Linears that compute these (modulation) and tables are
skipped by default: they are small, run once a step, and their outputs multiply every token. A recipe's rule can still
quantize them. Embedders of latents, timesteps and texts lie outside the blocks.

Where an attention's inputs are modulated by what all blocks share (Wan, LTX, PixArt, Sana), no scale can be folded in front of
them; of its values one can, into the linear that made them.
"""

from __future__ import annotations

from qkit.families import Family
from qkit.families.blocks import Group, Streams

MODULATION = "it makes shifts, scales and gates from the timestep: small, and an error reaches every token"
SKIPS = tuple((glob, MODULATION) for glob in ("*.norm*.linear", "*.norm*.emb.*"))

_HIDDEN = Streams(("hidden_states",), ("hidden_states",))
_VIDEO_THEN_TEXT = Streams(("hidden_states", "encoder_hidden_states"), ("hidden_states", "encoder_hidden_states"))
_TEXT_THEN_VIDEO = Streams(("hidden_states", "encoder_hidden_states"), ("encoder_hidden_states", "hidden_states"))

_FEED_FORWARD = (Group(("ff.net.0.proj",)), Group(("ff.net.2",)))
_OF_TEXT = (Group(("ff_context.net.0.proj",)), Group(("ff_context.net.2",)))
_CROSS = (Group(("attn2.to_q",)), Group(("attn2.to_k", "attn2.to_v")), Group(("attn2.to_out.0",), source="attn2.to_v"))
_SELF = (Group(("attn1.to_q", "attn1.to_k", "attn1.to_v")), Group(("attn1.to_out.0",), source="attn1.to_v"))
# Joint attention: images and texts have separate linears for queries, keys and values.
_JOINT = (
    Group(("attn.to_q", "attn.to_k", "attn.to_v")),
    Group(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Group(("attn.to_out.0",)),
    Group(("attn.to_add_out",)),
)
_SINGLE = (Group(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")), Group(("proj_out",)))

WAN = Family(
    name="wan",
    model_types=("WanTransformer3DModel",),
    blocks=("blocks",),
    groups=(
        *_SELF,
        Group(("attn2.to_q",)),
        Group(("attn2.to_k", "attn2.to_v")),
        Group(("attn2.add_k_proj", "attn2.add_v_proj")),
        Group(("attn2.to_out.0",)),
        Group(("ffn.net.0.proj",)),
        Group(("ffn.net.2",)),
    ),
    streams=_HIDDEN,
    skips=SKIPS,
    note="Wan 2.1",
)
COGVIDEOX = Family(
    name="cogvideox",
    model_types=("CogVideoXTransformer3DModel",),
    blocks=("transformer_blocks",),
    groups=(*_SELF, *_FEED_FORWARD),
    streams=_VIDEO_THEN_TEXT,
    skips=SKIPS,
    note="CogVideoX",
)
HUNYUAN = Family(
    name="hunyuan",
    model_types=("HunyuanVideoTransformer3DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    groups=(*_JOINT, *_SINGLE, *_FEED_FORWARD, *_OF_TEXT),
    streams=_VIDEO_THEN_TEXT,
    skips=SKIPS,
    note="HunyuanVideo",
)
FLUX = Family(
    name="flux",
    model_types=("FluxTransformer2DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    groups=HUNYUAN.groups,
    streams=_TEXT_THEN_VIDEO,
    skips=SKIPS,
    note="FLUX.1",
)
SD3 = Family(
    name="sd3",
    model_types=("SD3Transformer2DModel",),
    blocks=("transformer_blocks",),
    groups=(
        *_JOINT,
        Group(("attn.add_k_proj", "attn.add_v_proj")),  # of the last block, whose text goes no further
        Group(("attn2.to_q", "attn2.to_k", "attn2.to_v")),
        Group(("attn2.to_out.0",), source="attn2.to_v"),
        *_FEED_FORWARD,
        *_OF_TEXT,
    ),
    streams=_TEXT_THEN_VIDEO,
    skips=SKIPS,
    note="Stable Diffusion 3, 3.5",
)
CROSS = Family(
    name="cross",
    model_types=(
        "LTXVideoTransformer3DModel",
        "PixArtTransformer2DModel",
        "SanaTransformer2DModel",
        "DiTTransformer2DModel",
    ),
    blocks=("transformer_blocks",),
    groups=(*_SELF, *_CROSS, *_FEED_FORWARD),
    streams=_HIDDEN,
    skips=SKIPS,
    note="LTX-Video, PixArt, Sana, DiT",
)

FAMILIES = (WAN, COGVIDEOX, HUNYUAN, FLUX, SD3, CROSS)
