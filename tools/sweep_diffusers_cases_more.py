"""The second half of the cases of ``sweep_diffusers_cases``, and the U-Nets."""

from __future__ import annotations

from typing import Any

import torch
from sweep_diffusers_arguments import (
    BOTH,
    FLUX,
    FLUX_CALL,
    FOUR,
    HEADS,
    LUMINA,
    PICTURE,
    QWEN,
    QWEN_CALL,
    SANA,
    VIDEO,
    WAN,
    Ids,
    Ones,
    noise,
    step,
    time,
)

# fmt: off
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LTX2VideoTransformer3DModel": (
        dict(
            HEADS, **FOUR, cross_attention_dim=64, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
            audio_attention_head_dim=16, audio_cross_attention_dim=32, num_layers=2, caption_channels=32,
            rope_double_precision=False,
        ),
        dict(
            hidden_states=(1, 32, 4), audio_hidden_states=(1, 9, 4), encoder_hidden_states=(1, 7, 32),
            audio_encoder_hidden_states=(1, 7, 32), timestep=time, encoder_attention_mask=Ones((1, 7), torch.bool),
            num_frames=2,
            height=4, width=4, audio_num_frames=9, fps=25.0,
        ),
    ),
    "LTXVideoTransformer3DModel": (
        dict(HEADS, **FOUR, cross_attention_dim=64, num_layers=2, caption_channels=32),
        dict(
            hidden_states=(1, 32, 4), encoder_hidden_states=(1, 7, 32), timestep=step,
            encoder_attention_mask=Ones((1, 7), torch.bool), num_frames=2, height=4, width=4,
        ),
    ),
    "LatteTransformer3DModel": (
        dict(
            HEADS, sample_size=8, patch_size=2, caption_channels=32, in_channels=4, cross_attention_dim=64, out_channels=8,
            attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, num_layers=1, video_length=2,
        ),
        dict(VIDEO, timestep=step, enable_temporal_attentions=True),
    ),
    "LongCatAudioDiTTransformer": (
        dict(dit_dim=64, dit_depth=2, dit_heads=2, dit_text_dim=32, latent_dim=8, text_conv=False),
        dict(
            hidden_states=(1, 16, 8), encoder_hidden_states=(1, 7, 32), encoder_attention_mask=Ones((1, 7), torch.bool),
            attention_mask=Ones((1, 16), torch.bool), timestep=noise,
        ),
    ),
    "LongCatImageTransformer2DModel": (dict(FLUX, pooled_projection_dim=32), dict(FLUX_CALL, guidance=noise)),
    "Lumina2Transformer2DModel": (
        dict(LUMINA, in_channels=4, num_refiner_layers=1, axes_dim_rope=(8, 12, 12), axes_lens=(32, 32, 32), cap_feat_dim=32),
        dict(PICTURE, timestep=noise, encoder_attention_mask=Ones((1, 7), torch.bool)),
    ),
    "LuminaNextDiT2DModel": (
        dict(LUMINA, cross_attention_dim=32, learn_sigma=False),
        dict(
            hidden_states=(1, 4, 16, 16), encoder_hidden_states=(1, 7, 32), timestep=noise, encoder_mask=Ones((1, 7)),
            image_rotary_emb=lambda: torch.polar(torch.ones(384, 384, 16), torch.ones(384, 384, 16)),
            cross_attention_kwargs=lambda: {},
        ),
    ),
    "MiniMaxH3Transformer3DModel": (
        dict(
            HEADS, hidden_size=64, num_layers=2, ffn_dim=128, in_channels=4, audio_in_channels=6, text_dim=32, freq_dim=32,
            time_embed_hidden_dim=32, time_embed_dim=32, rope_freq_dim=4,
        ),
        dict(
            hidden_states=(1, 8, 16), audio_hidden_states=(1, 6, 6), encoder_hidden_states=(1, 4, 32), timestep=(2,),
            timestep_indices=Ids(2, (18,)), token_tags=Ids(3, (18,)), position_ids=(18, 3),
            video_indices=lambda: torch.arange(8),
            audio_indices=lambda: torch.arange(8, 14), text_indices=lambda: torch.arange(14, 18),
        ),
    ),
    "MiniMaxMusic3RVQDepthDecoder": (
        dict(
            hidden_size=64, num_layers=2, num_attention_heads=2, intermediate_size=128, audio_vocab_size=16, num_codebooks=4,
            max_position_embeddings=8,
        ),
        dict(inputs_embeds=(1, 4, 64)),
    ),
    "MiniMaxMusic3Transformer1DModel": (
        dict(
            HEADS, in_channels=8, condition_dim=32, num_layers=2, ff_inner_dim=128, rotary_dim=16, fourier_embedding_dim=32
        ),
        dict(hidden_states=(1, 8, 24), encoder_hidden_states=(1, 24, 32), timestep=noise),
    ),
    "MochiTransformer3DModel": (
        dict(
            HEADS, num_layers=2, pooled_projection_dim=32, in_channels=4, text_embed_dim=32, time_embed_dim=32,
            max_sequence_length=7,
        ),
        dict(VIDEO, timestep=step, encoder_attention_mask=Ones((1, 7), torch.bool)),
    ),
    "MotifVideoTransformer3DModel": (
        dict(HEADS, **BOTH, patch_size=1, text_embed_dim=32, image_embed_dim=4, rope_axes_dim=(8, 12, 12)),
        dict(hidden_states=(1, 33, 2, 8, 8), encoder_hidden_states=(1, 7, 32), timestep=step),
    ),
    "NucleusMoEImageTransformer2DModel": (
        dict(QWEN, num_layers=4, moe_enabled=True, num_experts=4, capacity_factors=[2.0] * 4,
        dense_moe_strategy="leave_first_three_blocks_dense"),
        QWEN_CALL,
    ),
    "OmniGenTransformer2DModel": (
        dict(
            hidden_size=64, num_attention_heads=2, num_key_value_heads=2, intermediate_size=128, num_layers=2, pad_token_id=0,
            vocab_size=100, time_step_dim=32, rope_scaling={"long_factor": [1] * 16, "short_factor": [1] * 16},
        ),
        dict(
            hidden_states=(1, 4, 8, 8), timestep=noise, input_ids=Ids(100, (1, 8)), input_img_latents=lambda: [],
            input_image_sizes=lambda: {}, attention_mask=Ones((1, 25, 25)),
            position_ids=lambda: torch.arange(25)[None],
        ),
    ),
    "OvisImageTransformer2DModel": (FLUX, FLUX_CALL),
    "PRXTransformer2DModel": (
        dict(
            in_channels=4, context_in_dim=32, hidden_size=64, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[16, 16]
        ),
        dict(PICTURE, timestep=noise),
    ),
    "PixArtTransformer2DModel": (
        dict(
            HEADS, sample_size=8, num_layers=2, cross_attention_dim=64, in_channels=4, out_channels=8, caption_channels=32,
            use_additional_conditions=False,
        ),
        dict(PICTURE, timestep=step, added_cond_kwargs=lambda: {"aspect_ratio": None, "resolution": None}),
    ),
    "PriorTransformer": (
        dict(HEADS, num_layers=2, embedding_dim=32, num_embeddings=7, additional_embeddings=4),
        dict(
            hidden_states=(1, 32), timestep=step, proj_embedding=(1, 32), encoder_hidden_states=(1, 7, 32)
        ),
    ),
    "QwenImageTransformer2DModel": (QWEN, QWEN_CALL),
    "QwenImage21Transformer2DModel": (
        dict(HEADS, in_channels=16, out_channels=16, num_layers=2, context_in_dim=32, axes_dims_rope=(8, 12, 12)),
        dict(QWEN_CALL, img_shapes=lambda: [[(1, 4, 4)]], img_mask=lambda: torch.tensor([[False] * 8 + [True] * 4])),
    ),
    "SD3Transformer2DModel": (
        dict(
            HEADS, **FOUR, sample_size=8, num_layers=2, caption_projection_dim=64, joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16, dual_attention_layers=(0,),
        ),
        dict(PICTURE, pooled_projections=(1, 32), timestep=step),
    ),
    "SanaTransformer2DModel": (dict(SANA, sample_size=8), dict(PICTURE, timestep=step)),
    "SanaVideoTransformer3DModel": (
        dict(SANA, sample_size=8, rope_max_seq_len=32), dict(VIDEO, timestep=step),
    ),
    "SkyReelsV2Transformer3DModel": (WAN, dict(VIDEO, timestep=step)),
    "StableAudio3DiTModel": (
        dict(
            io_channels=8, embed_dim=64, depth=2, num_heads=2, cond_token_dim=32, global_cond_dim=32, local_add_cond_dim=5,
            timestep_features_dim=32, ff_mult=2, num_memory_tokens=3, use_differential_attention=False,
        ),
        dict(hidden_states=(1, 8, 16), timestep=noise, encoder_hidden_states=(1, 4, 32), global_hidden_states=(1, 32)),
    ),
    "StableAudioDiTModel": (
        dict(
            sample_size=16, in_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2,
            num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=32, time_proj_dim=32,
            global_states_input_dim=32,
            cross_attention_input_dim=32,
        ),
        dict(
            hidden_states=(1, 4, 16), timestep=noise, encoder_hidden_states=(1, 7, 32), global_hidden_states=(1, 1, 32),
            rotary_embedding=[(17, 16), (17, 16)],
        ),
    ),
    "T5FilmDecoder": (
        dict(input_dims=16, targets_length=8, d_model=64, num_layers=2, num_heads=2, d_kv=32, d_ff=128),
        dict(
            encodings_and_masks=lambda: [(torch.ones(1, 7, 64), torch.ones(1, 7))], decoder_input_tokens=(1, 8, 16),
            decoder_noise_time=noise,
        ),
    ),
    "Transformer2DModel": (
        dict(HEADS, in_channels=64, num_layers=2, cross_attention_dim=32, norm_num_groups=8),
        dict(hidden_states=(1, 64, 8, 8), encoder_hidden_states=(1, 7, 32)),
    ),
    "TransformerTemporalModel": (
        dict(HEADS, in_channels=4, norm_num_groups=1), dict(hidden_states=(2, 4, 8, 8), timestep=step),
    ),
    "WanAnimateTransformer3DModel": (
        dict(
            WAN, in_channels=12, latent_channels=4, image_dim=32, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16, motion_style_dim=32, motion_dim=4, motion_encoder_dim=32, face_encoder_hidden_dim=32,
            face_encoder_num_heads=2, inject_face_latents_blocks=2,
        ),
        dict(
            hidden_states=(1, 12, 21, 16, 16), timestep=step, encoder_hidden_states=(1, 7, 32),
            encoder_hidden_states_image=(1, 7, 32), pose_hidden_states=(1, 4, 20, 16, 16), face_pixel_values=(1, 3, 77, 16, 16),
        ),
    ),
    "WanTransformer3DModel": (WAN, dict(VIDEO, timestep=step)),
    "WanVACETransformer3DModel": (
        dict(WAN, in_channels=16, out_channels=16, num_layers=3, vace_layers=[0, 2], vace_in_channels=48),
        dict(
            hidden_states=(1, 16, 2, 8, 8), encoder_hidden_states=(1, 7, 32), control_hidden_states=(1, 48, 2, 8, 8),
            timestep=step
        ),
    ),
    "ZImageTransformer2DModel": (
        dict(
            dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[8, 12, 12],
            axes_lens=[256, 32, 32],
        ),
        dict(x=[(16, 1, 16, 16)], cap_feats=[(8, 32)], t=noise),
    ),
}

UNETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "UNet2DConditionModel": (
        dict(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
            attention_head_dim=(1, 2), transformer_layers_per_block=(1, 2), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        dict(
            sample=(1, 4, 8, 8), timestep=step, encoder_hidden_states=(1, 7, 32),
            added_cond_kwargs={"text_embeds": (1, 32), "time_ids": (1, 6)},
        ),
    ),
    "UNet2DModel": (
        dict(
            sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=32,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        dict(sample=(1, 3, 8, 8), timestep=step),
    ),
    "UNet3DConditionModel": (
        dict(
            sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32, attention_head_dim=32,
            layers_per_block=1, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
        dict(sample=(1, 4, 4, 8, 8), timestep=step, encoder_hidden_states=(1, 7, 32)),
    ),
    "UNetMotionModel": (
        dict(
            sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32, num_attention_heads=2,
            layers_per_block=1, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_num_attention_heads=2,
        ),
        dict(sample=(1, 4, 4, 8, 8), timestep=step, encoder_hidden_states=(4, 7, 32)),
    ),
}
