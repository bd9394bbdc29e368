"""The newest transformers of diffusers (``sweep_diffusers_cases``)."""

from __future__ import annotations

from typing import Any

import torch
from sweep_diffusers_arguments import FOUR, HEADS, Ids, Ones, noise, time
from torch import Tensor


def cameras() -> Tensor:
    """Two cameras [1, 2, 20]: a pose of four by four, and where its picture lies."""
    pose = torch.eye(4).flatten().repeat(2, 1)
    pose[1, 3] = 0.1  # the second one has moved
    return torch.cat([pose, torch.tensor([[4.0, 4.0, 2.0, 2.0]] * 2)], 1)[None]


def reference_cache() -> Any:
    """What a pass over a reference picture fills, for two blocks."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return WanAnimate2KVCache(2)


# fmt: off
LAST: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "BriaFibo2Transformer2DModel": (
        dict(
            in_channels=4, dim=64, n_layers=3, n_refiner_layers=1, n_heads=2, cap_feat_dim=32, injection_layer_ids=(1,),
            perceiver_num_layers=1, min_num_gist_tokens=8, max_num_gist_tokens=16, gist_step=4, gist_min_text_len=4,
            gist_max_text_len=32, axes_dims=(8, 12, 12), axes_lens=(64, 64, 64),
        ),
        dict(hidden_states=(1, 4, 8, 8), timestep=noise, encoder_hidden_states=(1, 2, 8, 32)),
    ),
    "Kandinsky6Transformer3DModel": (
        dict(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=32, time_dim=32, model_dim=64, ff_dim=128,
            num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12), visual_cond=False, in_audio_dim=8, out_audio_dim=8,
        ),
        dict(
            hidden_states=(1, 2, 8, 8, 4), encoder_hidden_states=(1, 7, 32), pooled_projections=(1, 32), timestep=time,
            audio_hidden_states=(1, 5, 8),
        ),
    ),
    "RFD4ProteinaTransformer": (
        dict(
            nlayers=3, token_dim=64, nheads=2, dim_cond=32, pair_repr_dim=32, latent_dim=8, token_type_emb_dim=8,
            cath_emb_dim=8, t_emb_dim=16, seq_sep_dim=8, xt_pair_dist_dim=8, tri_mult_c=32,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"), feats_pair_repr=("xt_bb_ca_pair_dists",),
            feats_pair_cond=("time_emb_bb_ca",),
        ),
        dict(
            bb_ca=(1, 6, 3), local_latents=(1, 6, 8), bb_ca_time=noise, local_latents_time=noise,
            padding_mask=Ones((1, 6), torch.bool), token_type=Ids(7, (1, 6)),
            conditioning={
                "is_in_context_conditioning": lambda: torch.zeros(1, 6, dtype=torch.bool),
                "supports_local_latent": Ones((1, 6), torch.bool),
            },
        ),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        dict(
            HEADS, **FOUR, cross_attention_dim=64, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
            audio_attention_head_dim=16, audio_cross_attention_dim=32, num_layers=2, caption_channels=32,
        ),
        dict(
            hidden_states=(1, 8, 4), encoder_hidden_states=(1, 7, 32), timestep=(1, 8),
            video_rotary_emb=[(1, 8, 64), (1, 8, 64)],
        ),
    ),
    "SanaWMTransformer3DModel": (
        dict(
            in_channels=4, num_layers=2, hidden_size=64, num_attention_heads=2, softmax_every_n=2, linear_head_dim=32,
            chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=2, caption_channels=32, mlp_ratio=2.0,
        ),
        dict(
            hidden_states=(1, 4, 2, 4, 4), timestep=Ids(1000, (1, 1, 2)), encoder_hidden_states=(1, 1, 7, 32),
            mask=Ones((1, 7), torch.long), camera_conditions=cameras, chunk_plucker=(1, 6, 2, 4, 4),
        ),
    ),
    "WanAnimate2Transformer3DModel": (
        dict(
            dim=64, ffn_dim=128, freq_dim=32, text_dim=32, out_dim=4, in_dim=8, num_heads=2, num_layers=2, text_len=16,
        ),
        dict(
            hidden_states=[(4, 1, 8, 8)], timestep=time, encoder_hidden_states=[(7, 32)], condition_latents=[(4, 1, 8, 8)],
            kv_cache=reference_cache, kv_cache_mode="extract", seq_len=16, encoder_hidden_states_image=(1, 4, 1280),
            offset_grid_sizes=lambda: torch.tensor([[1, 4, 4]]),
        ),
    ),
}
