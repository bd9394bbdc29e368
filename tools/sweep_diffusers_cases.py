"""Tiny settings of the transformers of diffusers by class, and arguments for a call of each (``sweep_diffusers_arguments``).

The second half and the U-Nets are in ``sweep_diffusers_cases_more``, the newest in ``sweep_diffusers_cases_last``.
"""

from __future__ import annotations

from typing import Any

import torch
from sweep_diffusers_arguments import (
    BOTH,
    FLUX,
    FLUX_CALL,
    FOUR,
    HEADS,
    HUNYUAN,
    PICTURE,
    SIZES,
    VIDEO,
    WAN,
    Ids,
    Ones,
    noise,
    step,
    time,
)
from sweep_diffusers_cases_last import LAST
from sweep_diffusers_cases_more import MORE, UNETS

# fmt: off
FIRST: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AceStepTransformer1DModel": (
        dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32,
            in_channels=24, audio_acoustic_hidden_dim=8, sliding_window=16,
        ),
        dict(
            hidden_states=(1, 8, 8), timestep=noise, timestep_r=noise, encoder_hidden_states=(1, 7, 64), context_latents=(1,
            8, 16)
        ),
    ),
    "AllegroTransformer3DModel": (
        dict(
            HEADS, num_layers=2, cross_attention_dim=64, sample_width=8, sample_height=8, sample_frames=2, caption_channels=32
        ),
        dict(VIDEO, timestep=step),
    ),
    "AnyFlowFARTransformer3DModel": (
        WAN,
        dict(
            hidden_states=(1, 4, 4, 16, 16), timestep=(1, 4), r_timestep=(1, 4), encoder_hidden_states=(1, 7, 32),
            chunk_partition=lambda: [2, 2],
        ),
    ),
    "AnyFlowTransformer3DModel": (
        WAN,
        dict(hidden_states=(1, 2, 4, 16, 16), timestep=(1, 2), r_timestep=(1, 2), encoder_hidden_states=(1, 7, 32)),
    ),
    "AuraFlowTransformer2DModel": (
        dict(
            HEADS, sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, caption_projection_dim=64,
            joint_attention_dim=32,
            pos_embed_max_size=64,
        ),
        dict(PICTURE, timestep=noise),
    ),
    "BriaFiboTransformer2DModel": (
        dict(FLUX, text_encoder_dim=16),
        dict(FLUX_CALL, text_encoder_layers=[(1, 8, 16), (1, 8, 16)]),
    ),
    "BriaTransformer2DModel": (FLUX, FLUX_CALL),
    "ChromaTransformer2DModel": (
        dict(FLUX, approximator_num_channels=8, approximator_hidden_dim=32, approximator_layers=1), FLUX_CALL,
    ),
    "ChronoEditTransformer3DModel": (dict(WAN, in_channels=4), dict(VIDEO, timestep=step)),
    "CogVideoXTransformer3DModel": (
        dict(
            HEADS, **FOUR, time_embed_dim=32, text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=5,
            max_text_seq_length=7,
        ),
        dict(hidden_states=(1, 2, 4, 8, 8), encoder_hidden_states=(1, 7, 32), timestep=step),
    ),
    "CogView3PlusTransformer2DModel": (
        dict(
            HEADS, **FOUR, num_layers=2, text_embed_dim=32, time_embed_dim=32, condition_dim=4, pos_embed_max_size=8,
            sample_size=8
        ),
        dict(PICTURE, timestep=step, **SIZES),
    ),
    "CogView4Transformer2DModel": (
        dict(HEADS, **FOUR, num_layers=2, text_embed_dim=32, time_embed_dim=32, condition_dim=4),
        dict(PICTURE, timestep=step, **SIZES),
    ),
    "ConsisIDTransformer3DModel": (
        dict(
            FOUR, num_attention_heads=3, attention_head_dim=32, time_embed_dim=32, text_embed_dim=32, num_layers=1,
            sample_width=8,
            sample_height=8, sample_frames=8,
            max_text_seq_length=7, cross_attn_interval=1, is_train_face=True, cross_attn_dim_head=32, cross_attn_num_heads=1,
            LFE_id_dim=32, LFE_vit_dim=32, LFE_depth=5, LFE_dim_head=32, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1,
            LFE_output_dim=64, LFE_ff_mult=1, LFE_num_scale=1,
        ),
        dict(
            hidden_states=(1, 2, 4, 8, 8), encoder_hidden_states=(1, 7, 32), timestep=step, id_vit_hidden=[(1, 2, 32)],
            id_cond=(1, 32),
        ),
    ),
    "Cosmos3OmniTransformer": (
        dict(
            head_dim=32, hidden_size=64, intermediate_size=128, latent_channel=2, latent_patch_size=1, num_attention_heads=2,
            num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=2, rope_axes_dim=[6, 5, 5], vocab_size=32,
        ),
        dict(
            input_ids=Ids(32, (2,)), text_indexes=lambda: torch.arange(2), position_ids=lambda: torch.arange(3).expand(3, 3),
            und_len=2, sequence_length=3, vision_tokens=[(1, 2, 1, 1, 1)], vision_token_shapes=lambda: [(1, 1, 1)],
            vision_sequence_indexes=lambda: torch.tensor([2]), vision_mse_loss_indexes=lambda: torch.tensor([2]),
            vision_timesteps=noise, vision_noisy_frame_indexes=lambda: [torch.tensor([0])],
        ),
    ),
    "CosmosTransformer3DModel": (
        dict(
            HEADS, **FOUR, num_layers=2, mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=32, max_size=(4, 32, 32),
            concat_padding_mask=False,
        ),
        dict(VIDEO, timestep=step, fps=30),
    ),
    "DiTTransformer2DModel": (
        dict(HEADS, in_channels=4, out_channels=8, num_layers=2, num_embeds_ada_norm=8, sample_size=8),
        dict(hidden_states=(1, 4, 8, 8), timestep=step, class_labels=Ids(8, (1,))),
    ),
    "DreamLiteTransformer2DModel": (
        dict(
            HEADS, in_channels=64, out_channels=64, num_layers=2, cross_attention_dim=32, norm_num_groups=8,
            use_linear_projection=True,
        ),
        dict(hidden_states=(1, 64, 8, 8), encoder_hidden_states=(1, 7, 32)),
    ),
    "EasyAnimateTransformer3DModel": (
        dict(HEADS, **FOUR, mmdit_layers=1, num_layers=2, patch_size=2, text_embed_dim=32, time_embed_dim=32),
        dict(VIDEO, timestep=step),
    ),
    "ErnieImageTransformer2DModel": (
        dict(
            hidden_size=64, num_attention_heads=2, num_layers=2, ffn_hidden_size=128, in_channels=16, out_channels=16,
            text_in_dim=32, rope_axes_dim=(8, 12, 12),
        ),
        dict(
            hidden_states=(1, 16, 8, 8), timestep=time, text_bth=(1, 7, 32), text_lens=lambda: torch.tensor([7])
        ),
    ),
    "Flux2Transformer2DModel": (
        dict(FLUX, axes_dims_rope=(8, 8, 8, 8), timestep_guidance_channels=32),
        dict(FLUX_CALL, img_ids=lambda: torch.zeros(1, 16, 4), txt_ids=lambda: torch.zeros(1, 8, 4), guidance=noise),
    ),
    "Flux3Transformer2DModel": (
        dict(
            HEADS, in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32,
            timestep_channels=32, axes_dims_rope=(8, 8, 8, 8),
        ),
        dict(
            FLUX_CALL, img_ids=lambda: torch.zeros(16, 4), txt_ids=lambda: torch.zeros(8, 4),
            image_cond_hidden_states=(1, 16, 16), image_cond_ids=lambda: torch.ones(16, 4),
        ),
    ),
    "FluxTransformer2DModel": (
        dict(FLUX, pooled_projection_dim=32, guidance_embeds=True),
        dict(FLUX_CALL, pooled_projections=(1, 32), guidance=noise),
    ),
    "GlmImageTransformer2DModel": (
        dict(
            HEADS, **FOUR, num_layers=2, text_embed_dim=32, time_embed_dim=32, condition_dim=8,
            prior_vq_quantizer_codebook_size=64
        ),
        dict(
            PICTURE, prior_token_id=Ids(64, (1,)), prior_token_drop=lambda: torch.tensor([False]), timestep=step,
            target_size=lambda: torch.ones(1, 2), crop_coords=lambda: torch.zeros(1, 2),
        ),
    ),
    "HeliosTransformer3DModel": (
        dict({k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, rope_dim=(8, 12, 12)),
        dict(
            hidden_states=(1, 4, 2, 16, 16), timestep=step, encoder_hidden_states=(1, 7, 32),
            indices_hidden_states=lambda: torch.ones(1, 2), indices_latents_history_short=lambda: torch.ones(1, 1),
            indices_latents_history_mid=lambda: torch.ones(1, 1), indices_latents_history_long=lambda: torch.ones(1, 4),
            latents_history_short=(1, 4, 1, 16, 16), latents_history_mid=(1, 4, 1, 16, 16), latents_history_long=(1, 4, 4, 16,
            16),
        ),
    ),
    "HiDreamImageTransformer2DModel": (
        dict(
            HEADS, **FOUR, **BOTH, patch_size=2, caption_channels=[32, 32], text_emb_dim=32, num_routed_experts=2,
            num_activated_experts=2, axes_dims_rope=(8, 12, 12), max_resolution=(32, 32), llama_layers=(0, 1),
            force_inference_output=True,
        ),
        dict(
            hidden_states=(1, 4, 32, 32), encoder_hidden_states_t5=(1, 7, 32), encoder_hidden_states_llama3=(2, 1, 7, 32),
            pooled_embeds=(1, 32), timesteps=step,
        ),
    ),
    "HunyuanDiT2DModel": (
        dict(
            HEADS, sample_size=8, patch_size=2, in_channels=4, num_layers=2, cross_attention_dim=32, cross_attention_dim_t5=32,
            pooled_projection_dim=32, hidden_size=64, text_len=4, text_len_t5=4,
        ),
        dict(
            hidden_states=(1, 4, 8, 8), encoder_hidden_states=(1, 4, 32), text_embedding_mask=Ones((1, 4)),
            encoder_hidden_states_t5=(1, 4, 32), text_embedding_mask_t5=Ones((1, 4)), timestep=time, image_meta_size=(1, 6),
            style=lambda: torch.zeros(1, dtype=torch.long), image_rotary_emb=[(16, 32), (16, 32)],
        ),
    ),
    "HunyuanImageTransformer2DModel": (
        dict(HUNYUAN, **BOTH, patch_size=(2, 2), rope_axes_dim=(16, 16), rope_theta=256.0, text_embed_2_dim=None),
        dict(
            hidden_states=(1, 4, 8, 8), timestep=time, encoder_hidden_states=(1, 7, 32),
            encoder_attention_mask=Ones((1, 7), torch.bool),
        ),
    ),
    "HunyuanVideo15Transformer3DModel": (
        dict(HUNYUAN, num_layers=2, text_embed_2_dim=16, image_embed_dim=16, target_size=16, task_type="t2v", patch_size=1),
        dict(
            hidden_states=(1, 4, 1, 8, 8), timestep=time, encoder_hidden_states=(1, 7, 32), encoder_hidden_states_2=(1, 4, 16),
            encoder_attention_mask=Ones((1, 7)), encoder_attention_mask_2=Ones((1, 4)), image_embeds=(1, 3, 16),
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        dict(
            HUNYUAN, **BOTH, pooled_projection_dim=16, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True
        ),
        dict(
            hidden_states=(1, 4, 3, 4, 4), timestep=step, encoder_hidden_states=(1, 7, 32), pooled_projections=(1, 16),
            encoder_attention_mask=Ones((1, 7)), guidance=step, image_embeds=(1, 7, 16), indices_latents=Ones((3,)),
            latents_clean=(1, 4, 2, 4, 4), indices_latents_clean=Ones((2,)), latents_history_2x=(1, 4, 2, 4, 4),
            indices_latents_history_2x=Ones((2,)), latents_history_4x=(1, 4, 8, 4, 4), indices_latents_history_4x=Ones((8,)),
        ),
    ),
    "HunyuanVideoTransformer3DModel": (
        dict(HUNYUAN, **BOTH, pooled_projection_dim=16),
        dict(
            VIDEO, timestep=time, pooled_projections=(1, 16), encoder_attention_mask=Ones((1, 7), torch.bool), guidance=time
        ),
    ),
    "Ideogram4Transformer2DModel": (
        dict(
            HEADS, in_channels=16, num_layers=2, intermediate_size=128, adaln_dim=32, llm_features_dim=32, rope_theta=10000,
            mrope_section=(8, 4, 4),
        ),
        dict(
            hidden_states=(1, 8, 16), encoder_hidden_states=(1, 8, 32), timestep=noise, position_ids=Ids(4, (1, 8, 3)),
            segment_ids=Ones((1, 8), torch.long), indicator=lambda: torch.tensor([[3, 3, 3, 3, 2, 2, 2, 2]]),
        ),
    ),
    "JoyImageEditPlusTransformer3DModel": (
        dict(hidden_size=64, num_attention_heads=2, text_dim=32, num_layers=2, rope_dim_list=[8, 12, 12]),
        dict(
            hidden_states=(1, 2, 16, 1, 2, 2), encoder_hidden_states=(1, 7, 32), timestep=time,
            shape_list=lambda: [[(1, 1, 1), (1, 1, 1)]],
        ),
    ),
    "JoyImageEditTransformer3DModel": (
        dict(hidden_size=64, num_attention_heads=2, text_dim=32, num_layers=2, rope_dim_list=[8, 12, 12]),
        dict(hidden_states=(1, 16, 1, 4, 4), encoder_hidden_states=(1, 7, 32), timestep=time),
    ),
    "Kandinsky5Transformer3DModel": (
        dict(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=32, model_dim=64, ff_dim=128,
            num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12),
        ),
        dict(
            hidden_states=(1, 2, 8, 8, 4), encoder_hidden_states=(1, 7, 32), timestep=time, pooled_projections=(1, 16),
            visual_rope_pos=lambda: [torch.arange(2), torch.arange(4), torch.arange(4)], text_rope_pos=lambda: torch.arange(7),
        ),
    ),
    "Kandinsky6SRTransformer3DModel": (
        dict(
            in_visual_dim=8, out_visual_dim=8, time_dim=32, model_dim=64, ff_dim=128, num_visual_blocks=2, axes_dims=(8, 12,
            12),
        ),
        dict(hidden_states=(1, 2, 8, 8, 17), timestep=time),
    ),
    "Krea2Transformer2DModel": (
        dict(
            HEADS, in_channels=16, num_layers=2, num_key_value_heads=1, intermediate_size=128, timestep_embed_dim=32,
            text_hidden_dim=64, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1,
            text_intermediate_size=64, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(8, 12, 12),
        ),
        dict(
            hidden_states=(1, 4, 16), encoder_hidden_states=(1, 4, 3, 64), timestep=noise, position_ids=Ones((8, 3)),
            encoder_attention_mask=Ones((1, 4), torch.bool),
        ),
    ),
}
# fmt: on
CASES = {**FIRST, **MORE, **LAST}
__all__ = ["CASES", "UNETS"]
