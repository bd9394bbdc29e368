"""Declarations of the language-model families."""

from __future__ import annotations

from qkit.families import Family, Keys, ResidualStream
from qkit.families.blocks import Group

_ATTENTION = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), source="input_layernorm"),
    Group(("self_attn.o_proj",), source="self_attn.v_proj"),
)
_MLP_DOWN = Group(("mlp.down_proj",), source="mlp.up_proj")
_GATED_MLP = (Group(("mlp.gate_proj", "mlp.up_proj"), source="post_attention_layernorm"), _MLP_DOWN)
_LLAMA_STREAM = ResidualStream(
    reads=(
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    writes=("self_attn.o_proj", "mlp.down_proj"),
)

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks=("model.layers",),
    groups=(*_ATTENTION, *_GATED_MLP),
    stream=_LLAMA_STREAM,
    keys=Keys(),
    note="Llama, Mistral, Qwen2, Qwen3",
)
GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    blocks=("model.layers",),
    groups=(*_ATTENTION, Group(("mlp.gate_proj", "mlp.up_proj"), source="pre_feedforward_layernorm"), _MLP_DOWN),
    norm_offset=1.0,
    note="Gemma 3 (text)",
)
PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    blocks=("model.layers",),
    groups=(
        Group(("self_attn.qkv_proj",), source="input_layernorm"),
        Group(("self_attn.o_proj",)),
        Group(("mlp.gate_up_proj",), source="post_attention_layernorm"),
        Group(("mlp.down_proj",)),
    ),
    note="Phi-3 (fused qkv and gate/up)",
)
_PRE_NORM = ("do_layer_norm_before", True)  # OPT-350m alone norms after the residual sum
OPT = Family(
    name="opt",
    model_types=("opt",),
    blocks=("model.decoder.layers",),
    groups=(
        Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn_layer_norm", _PRE_NORM),
        Group(("self_attn.out_proj",), source="self_attn.v_proj"),
        Group(("fc1",), "final_layer_norm", _PRE_NORM),
        Group(("fc2",), "fc1", source_if=("activation_function", "relu")),  # a positive scale passes ReLU, not GELU
    ),
    embeddings="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    note="OPT (biases, LayerNorm)",
)
GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    blocks=("gpt_neox.layers",),
    groups=(
        Group(("attention.query_key_value",), source="input_layernorm"),
        Group(("attention.dense",)),
        Group(("mlp.dense_h_to_4h",), source="post_attention_layernorm"),
        Group(("mlp.dense_4h_to_h",)),
    ),
    embeddings="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    note="GPT-NeoX, Pythia (biases, LayerNorm)",
)
MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    blocks=("model.layers",),
    groups=_ATTENTION,
    keys=Keys(),
    note="Mixtral (fused 3-D experts)",
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    blocks=("model.layers",),
    groups=(*_ATTENTION, *_GATED_MLP),
    keys=Keys(),
    note="Qwen3-MoE (fused 3-D experts, dense layers among them)",
)

FAMILIES = (LLAMA, GEMMA3, PHI3, OPT, GPT_NEOX, MIXTRAL, QWEN3_MOE)
