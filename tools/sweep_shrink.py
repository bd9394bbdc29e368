"""Small configs: the default config of a class with its sizes made small by the names of its fields.

Lists with one entry for each layer keep one layer of every kind. What that does not get right is in ``sweep_changes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCABULARY = 4096  # of the embedded tokenizer
TOKENS = 4000  # random inputs have smaller ones: those from here on stand for pictures and sound

_SIZES = {
    128: (
        "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size word_embed_proj_dim model_dim n_embed "
        "decoder_hidden_size moe_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size expert_intermediate_size "
        "attention_hidden_size lru_width dim_model hidden_dim moe_latent_size mm_hidden_size projection_dim "
        "text_hidden_size "
        "input_embedding_size output_embedding_size pronunciation_embed_dim shape_embed_dim embedding_dim "
        "hidden_size_per_layer_input hidden_size_global router_hidden_size ple_embed_dim out_hidden_size d_latents "
        "pooler_hidden_size "
        "output_dim proj_dim vision_output_dim adapter_out_dim adapter_in_dim adapter_input_size audio_hidden_size "
        "cross_hidden_size "
        "encoder_hidden_size speech_encoder_hidden_size llm_hidden_size qk_channels v_channels entity_emb_size"
    ),
    256: (
        "intermediate_size ffn_hidden_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff "
        "feed_forward_size "
        "shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp block_ff_dim inner_hidden_size "
        "d_inner "
        "dim_feedforward moe_shared_expert_intermediate_size prefix_dense_intermediate_size mlp_dim "
        "shared_experts_intermediate_size speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim "
        "projector_hidden_size "
        "downsample_hidden_size"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads n_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads num_hidden_layers n_layer n_layers num_layers "
        "encoder_layers "
        "decoder_layers num_decoder_layers num_encoder_layers num_blocks num_experts num_local_experts n_routed_experts "
        "moe_num_experts num_routed_experts depth num_attention_heads_per_layer swa_num_attention_heads index_n_heads "
        "zero_expert_num linear_num_heads speech_encoder_attention_heads t2u_encoder_attention_heads "
        "t2u_decoder_attention_heads "
        "cross_num_attention_heads num_self_attention_heads num_cross_attention_heads attention_heads"
    ),
    2: (
        "num_key_value_heads n_kv_heads num_kv_heads swa_num_key_value_heads num_global_key_value_heads "
        "num_experts_per_tok "
        "top_k moe_topk moe_k num_experts_per_token n_activated_experts router_topk top_k_experts swa_num_kv_heads "
        "linear_num_key_heads o_groups cross_num_key_value_heads speech_encoder_layers t2u_encoder_layers "
        "t2u_decoder_layers "
        "num_self_attends_per_block num_global_layers num_timestamp_prediction_layers"
    ),
    1: (
        "n_group topk_group num_expert_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers "
        "moe_layer_start_index"
    ),
    32: (
        "head_dim global_head_dim kv_channels swa_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
        "mamba_head_dim "
        "d_head attention_head_size linear_head_dim index_head_dim rotary_dim "
        "sliding_window attention_window_size sliding_window_size attention_chunk_size d_kv num_latents conv_dim "
        "dim_head "
        "subsampling_conv_channels cross_head_dim attention_window"
    ),
    16: "ssm_state_size mamba_d_state state_size mamba_state_dim index_topk chunk_size mamba_chunk_size "
    "laurel_rank coordinate_size",
    64: (
        "num_position_embeddings num_patches position_embedding_size q_lora_rank kv_lora_rank o_lora_rank hc_lowrank "
        "entity_vocab_size max_source_positions upsample_initial_channel"
    ),
    512: "num_hash_buckets",
}
_POSITIONS = "max_position_embeddings n_positions max_target_positions n_ctx max_sequence_length max_seq_len seq_length"
_POSITIONS += " max_encoder_position_embeddings"
_VOCABULARIES = "vocab_size decoder_vocab_size "
_VOCABULARIES += " text_vocab_size unpadded_vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size"
_BY_NAME = {name: size for size, names in _SIZES.items() for name in names.split()}
_BY_NAME |= dict.fromkeys(_POSITIONS.split(), 256) | dict.fromkeys(_VOCABULARIES.split(), VOCABULARY)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
_OF_LAYERS = (
    "hybrid_layer_ids",
    "moe_layers",
    "full_attn_idxs",
    "attn_layer_indices",
    "mlp_only_layers",
)  # lists of numbers of layers
_LATENT = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "head_dim": 16, "qk_head_dim": 32}
_MOST_LAYERS = 5
_PATCHES = 8


def tiny_fields(fields: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of a config, small. changes: fields to set, with dots for those of a part."""
    small = _small({name: value for name, value in fields.items() if name != "transformers_version"})
    for path, value in (changes or {}).items():
        *parts, name = path.split(".")
        node = small
        for part in parts:
            node = node[part]
        node[name] = value
    return small


def _small(fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = _kept_layers(fields)
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "per_layer_config" and kept and isinstance(value, Mapping):
            result[name] = {new: _small(_own(value, old)) for new, old in enumerate(kept[1]) if _own(value, old)}
        elif isinstance(value, Mapping):
            result[name] = _small(value) if "model_type" in value or name.endswith("_config") else {**value}
        elif kept and name in _OF_LAYERS and isinstance(value, list):
            result[name] = [new for new, old in enumerate(kept[1]) if old in value]
        elif kept and isinstance(value, list) and len(value) == kept[0]:
            result[name] = [_sized(name, value[i]) for i in kept[1]]
        elif kept and name in _LAYERS:
            result[name] = len(kept[1])
        elif name.endswith(("_token_id", "_token_index", "_token")) and type(value) is int and value >= VOCABULARY:
            result[name] = _token(name)
        elif name == "eos_token_id" and isinstance(value, list):
            result[name] = [2]
        else:
            result[name] = _sized(name, value)
    if "kv_lora_rank" in fields:  # latent attention has keys for every head
        result |= {name: size for name, size in _LATENT.items() if fields.get(name)}
        result["num_key_value_heads"] = 4
    _small_pictures(result)
    _three_positions(result)
    return result


def _small_pictures(fields: dict[str, Any]) -> None:
    """Pictures of eight by eight patches."""
    patch, size = fields.get("patch_size"), fields.get("image_size")
    if type(patch) is int and type(size) is int:
        fields["image_size"] = _PATCHES * patch
    elif size and isinstance(size, (list, tuple)):
        patches = patch if isinstance(patch, (list, tuple)) else [patch or 14] * len(size)
        fields["image_size"] = [_PATCHES * p for p in patches]


def _three_positions(fields: dict[str, Any]) -> None:
    """Rotary positions of time, height and width share half the width of a head."""
    ropes = fields.get("rope_parameters")
    for rope in (ropes, *(ropes.values() if isinstance(ropes, dict) else ())):
        if isinstance(rope, dict) and rope.get("mrope_section"):
            width = fields.get("qk_rope_head_dim") or fields.get("head_dim") or 32
            half = int(width * (rope.get("partial_rotary_factor") or 1)) // 2
            rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _sized(name: str, value: Any) -> Any:
    if name in _BY_NAME and isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
        return [_BY_NAME[name]] * len(value)
    return _BY_NAME[name] if name in _BY_NAME and type(value) is int else value


def _token(name: str) -> int:
    "A token of the small vocabulary for what a config calls a token beyond it: one of its own for each part of a"
    "picture."
    if name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        return 3
    return TOKENS + sum(map(ord, name)) % 90


def _own(by_layer: Mapping[Any, Any], layer: int) -> Mapping[str, Any]:
    """What a layer has of its own; keys are numbers, or text of one or two digits."""
    return next((own for key, own in by_layer.items() if int(key) == layer), {})


def _kept_layers(fields: Mapping[str, Any]) -> tuple[int, list[int]] | None:
    """(the number of layers, those that show every kind of layer), where the config tells the kinds layer by layer."""
    count = next((fields[n] for n in _LAYERS if isinstance(fields.get(n), int)), None)
    if count is None and isinstance(fields.get("layers_block_type"), list):
        count = len(fields["layers_block_type"])
    lists = [v for v in fields.values() if isinstance(v, list) and len(v) == count and count]
    own = fields.get("per_layer_config")
    if isinstance(own, Mapping) and count:
        lists.append([_own(own, i) for i in range(count)])
    lists += [[i in fields[n] for i in range(count)] for n in _OF_LAYERS if count and isinstance(fields.get(n), list)]
    if not lists or not count:
        return None
    kinds: dict[Any, int] = {}
    for i in range(count):
        kinds.setdefault(str([v[i] for v in lists if v is not fields.get("moe_layers")]), i)
    kept = sorted(kinds.values())[:_MOST_LAYERS]
    kept += [i for i in range(count) if i not in kept][: max(0, 3 - len(kept))]
    return count, sorted(kept)
