"""What the tiny config of a class needs beyond small sizes: fields by model type, inside parts with "part.field".

``{"": fields}`` stands for a class that has no default config: these are all fields that it gets.
"""

from __future__ import annotations

from typing import Any

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32}
_FEW_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 16, "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64, "split_ngram_parts": 1, "heads_per_ngram": 2, "ple_layer_ids": [1], "output_gate_type": "silu",
    "eos_token_id": 2,
}  # fmt: skip
_GEMMA4 = {
    "num_hidden_layers": 4, "layer_types": _SLIDING, "num_kv_shared_layers": 2,
    "per_layer_config": {1: {"head_dim": 64}, 3: {"head_dim": 64}},
}  # fmt: skip
_GEMMA4_EYES = {
    "model_type": "gemma4_vision", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "position_embedding_size": 64, "pooling_kernel_size": 2,
}  # fmt: skip
_GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 128}
_GEMMA3N = {
    "num_hidden_layers": 4, "layer_types": _SLIDING, "num_kv_shared_layers": 2, "intermediate_size": [256] * 4,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}  # fmt: skip
_DRAFT = {
    "model_type": "gemma4_text", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0, "layer_types": _SLIDING, "num_kv_shared_layers": 4, "sliding_window": 32,
    "per_layer_config": {1: {"head_dim": 64}, 3: {"head_dim": 64}},
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"text_config.rope_parameters": {**_ROPE, "mrope_section": [6, 5, 5]}}
_PLAIN_MROPE = (
    "glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl",
)  # fmt: skip
_TWO_SHAPES = {"image_grid_pinpoints": [[112, 112], [112, 224]]}
_COMPASS = {"rope_parameters": {**_ROPES, "full_attention": None}, "layer_types": _SLIDING, "num_hidden_layers": 4}
_VISUAL_TOKENS = {"<image>": 4000, **{f"IMGIMG{i:02d}Z": 3900 + i for i in range(64)}}
_REFORMER = {
    "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 96], "attn_layers": ["local", "lsh"] * 2, "num_hidden_layers": 4,
    "lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16, "num_buckets": 4, "hash_seed": 0,
}  # fmt: skip


def _inside(part: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{name}": value for name, value in changes.items()}


CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "blt": {
        "encoder_hash_byte_group_vocab": 500, "global_config.intermediate_size": 256, "decoder_config.num_hidden_layers": 2,
        "global_config.num_hidden_layers": 2, "patcher_config.num_hidden_layers": 2,
    },
    "cohere_compass_text": _COMPASS,
    "dbrx": {
        "attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 2, "ffn_config.hidden_size": 128, "ffn_config.moe_top_k": 2,
        "attn_config.clip_qkv": 8.0,
    },
    "deepseek_v2": _FEW_EXPERTS,
    "dory": {
        "num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "dots1": {**_FEW_EXPERTS, "num_hidden_layers": 4, "layer_types": _SLIDING},
    "dots3_note": {
        "text_config.head_dim": 32, "vision_config.adapter_in_dim": 128, "audio_config.adapter_input_size": 128,
        "vision_config.adapter_out_dim": 128, "audio_config.adapter_out_dim": 128,
    },
    "dots3_note_text": {"head_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 256, **_MAMBA, "num_hidden_layers": 3},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {**_inside("text_config", {**_GEMMA4, **_GEMMA4_MOE}), "vision_config": _GEMMA4_EYES},
    "gemma4_text": {**_GEMMA4, **_GEMMA4_MOE},
    "gemma4_unified": _inside("text_config", _GEMMA4),
    "gemma4_unified_text": _GEMMA4,
    "gemma4_assistant": {"": {"text_config": _DRAFT, "backbone_hidden_size": 128}},
    "gemma4_unified_assistant": {
        "": {"text_config": {**_DRAFT, "model_type": "gemma4_unified_text"}, "backbone_hidden_size": 128}
    },
    "got_ocr2": {
        "vision_config.num_hidden_layers": 2, "vision_config.image_size": 64, "vision_config.global_attn_indexes": [1],
    },
    "granitemoehybrid": {**_MAMBA, "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]},
    "granitemoeshared": {"num_hidden_layers": 3},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32, "num_experts": 4, "moe_topk": 2},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3, "num_hidden_layers": 4,
        "loop_gate_rank": 32, "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2, "mamba_dt_rank": 16},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 2},
    "longcat_flash": {"num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 32, "n_groups": 2},
    "mobilebert": {"embedding_size": 64, "num_hidden_layers": 2},  # nothing normalizes in its blocks: more of them lose digits
    "ministral": {"head_dim": 32, "layer_types": _SLIDING, "num_hidden_layers": 4},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config.num_hidden_layers": 2, "vision_config.image_size": 56, "vision_config.crop_size": 56,
        "audio_config.num_blocks": 2, "audio_config.nemo_conv_channels": 64, "audio_config.ext_pw_out_channel": 128,
        "audio_config.depthwise_separable_out_channel": 128,
    },
    "qwen4_exp": _inside("text_config", _INDEXER),
    "qwen4_exp_text": _INDEXER,
    "reformer": {**_REFORMER, "is_decoder": True},
    "roc_bert": {"shape_vocab_size": 500},
    "xmod": {"default_language": "en_XX"},
    "reformer:masked": _REFORMER,
    "reformer:sequence": _REFORMER,
    "esm": {"vocab_size": 4096, "pad_token_id": 1, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4},
    "lilt": {"hidden_size": 192},
    "layoutlmv3": {"shape_size": 32},
    "granite_speech5_ctc": {"encoder_config.num_key_value_heads": 4},
    "t5": {"decoder_start_token_id": 0},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 32},
    "mistral4": {"head_dim": 32},
    "wav2vec2-bert": {"vocab_size": 4096},
    "wav2vec2-conformer": {"vocab_size": 4096},
    "perceiver": {"num_self_attention_heads": 4},
    "vibevoice": {
        "audio_config.num_filters": 2, "semantic_model_config.num_filters": 2, "audio_config.hidden_size": 64,
        "audio_config.depths": [1] * 7, "semantic_model_config.depths": [1] * 7,
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config.num_filters": 2, "semantic_tokenizer_encoder_config.num_filters": 2,
        "acoustic_tokenizer_encoder_config.depths": [1] * 7, "semantic_tokenizer_encoder_config.depths": [1] * 7,
    },
    "apertus1p5": {
        "audio_config.codebook_dim": 128, "audio_config.decoder_num_layers": 2, "audio_config.codebook_size": 64,
        "vision_config.base_channels": 32, "vision_config.codebook_size": 64, "image_token_offset": 3500,
        "audio_token_offset": 3564,
    },
    "chameleon": {"vocabulary_map": _VISUAL_TOKENS, "vq_config.base_channels": 32, "vq_config.num_embeddings": 64},
    "cohere2_vision": {"vision_config.hidden_size": 128, "alignment_intermediate_size": 256},
    "cohere_compass": _inside("text_config", _COMPASS),
    "deepseek_ocr2": _inside("text_config", {**_FEW_EXPERTS, "mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2}),
    "diffusion_gemma": _inside("text_config", {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 128}),
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [128, 64], "text_config.moe_num_experts": 4, "text_config.moe_k": 2,
        "text_config.rope_parameters": {**_ROPE, "mrope_section": [5, 5, 6]},
    },
    "glm5_next": _inside("text_config", {"qk_rope_head_dim": 0, "head_dim": 0, "qk_nope_head_dim": 32, "qk_head_dim": 32}),
    "granite4_vision": {
        "downsample_rate": "4/8", "deepstack_layer_map": [[-2, 0], [-1, 1]], "spatial_target_layers": [0, 1, 2, 3],
    },
    "hunyuan_vl": {
        "text_config.head_dim": 32, "vision_config.max_image_size": 128, "vision_config.min_image_size": 32,
        "text_config.rope_parameters": {**_ROPE, "mrope_section": [4, 4, 4, 4]},
    },
    "kyutai_speech_to_text": {
        "codec_config.upsample_groups": 128, "num_codebooks": 4, "codebook_vocab_size": 256,
    },
    "llama4": {
        "vision_config.vision_output_dim": 256, "vision_config.projector_input_dim": 256,
        "vision_config.projector_output_dim": 256, "vision_config.intermediate_size": 512,
    },
    "mllama": {
        "vision_config.max_num_tiles": 1, "vision_config.supported_aspect_ratios": [[1, 1]],
        "vision_config.intermediate_layers_indices": [1, 2], "vision_config.vision_output_dim": 384,
        "text_config.cross_attention_layers": [1, 3],
    },
    "molmo2": {
        "adapter_config.vision_feature_layer": [3, 1],
        "text_config.rope_scaling_layers": [0, 1],
    },
    "muse_spark": {"audio_config.hidden_sizes": [32, 32, 64, 128], "audio_config.depths": [1, 1, 1, 1]},
    **dict.fromkeys(_PLAIN_MROPE, _MROPE),
    "glm4v_moe": {"text_config.rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2]}},
    "emu3": {"vocabulary_map": {"<image>": 4000, "<|extra_200|>": 4001}, "vq_config.base_channels": 32},
    "gemma3": {"mm_tokens_per_image": 16},
    "shieldgemma2": {"mm_tokens_per_image": 16},
    "kosmos-2.5": {"latent_query_num": 16, "vision_config.max_num_patches": 64},
    "step3p7": {"text_config.sliding_window": 32},
    "janus": {"vq_config.base_channels": 32, "vq_config.num_embeddings": 64},
    "llava_next": _TWO_SHAPES,
    "llava_next_video": _TWO_SHAPES,
    "llava_onevision": _TWO_SHAPES,
    "vipllava": {"vision_feature_layers": [-1, -2, -3]},
    "instructblip": {"image_token_index": 4000},
    "instructblipvideo": {"video_token_index": 4000, "image_token_index": 4000},
    "kimi_k25": {"vision_config.projection_hidden_size": 128, "projection_hidden_size": 128},
    "aria": {"projector_patch_to_query_dict": {"64": 16}},
    "blip-2": {"image_token_index": 4000},
    "zamba": {
        "num_hidden_layers": 5, "attention_head_dim": 64, "mamba_dt_rank": 16, "attention_hidden_size": 256,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
    },
    "zamba2": {
        "num_hidden_layers": 5, "hybrid_layer_ids": [1, 3], "mamba_headdim": 32, "attention_hidden_size": 256,
        "attention_head_dim": 64, "adapter_rank": 16,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
