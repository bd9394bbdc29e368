"""Diffusion transformers of every declared class with random weights, and what each is called with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_TEXT, _WIDE = 7, 32


def _gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": (
        "WanTransformer3DModel",
        dict(
            num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=_WIDE, freq_dim=32,
            ffn_dim=256, num_layers=2, rope_max_seq_len=32,
        ),
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        dict(
            num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=32,
            text_embed_dim=_WIDE, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=_TEXT,
        ),
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        dict(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=32, num_layers=1, num_single_layers=2,
            num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=_WIDE,
            pooled_projection_dim=16, rope_axes_dim=(8, 12, 12),
        ),
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        dict(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=32, cross_attention_dim=128,
            num_layers=2, caption_channels=_WIDE,
        ),
    ),
    "flux": (
        "FluxTransformer2DModel",
        dict(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
            joint_attention_dim=_WIDE, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
        ),
    ),
    "sd3": (
        "SD3Transformer2DModel",
        dict(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=4,
            joint_attention_dim=_WIDE, caption_projection_dim=128, pooled_projection_dim=16, out_channels=4,
            pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
    ),
    "sana": (
        "SanaTransformer2DModel",
        dict(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=32, num_layers=2,
            num_cross_attention_heads=4, cross_attention_head_dim=32, cross_attention_dim=128, caption_channels=_WIDE,
            sample_size=8, patch_size=1,
        ),
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        dict(
            num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2,
            cross_attention_dim=128, sample_size=8, patch_size=2, caption_channels=_WIDE, use_additional_conditions=False,
        ),
    ),
    "dit": (
        "DiTTransformer2DModel",
        dict(
            num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10,
        ),
    ),
}  # fmt: skip


def make(kind: str, path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A transformer folder. Weights that initialize to zero (gates, output projections) are random too."""
    import diffusers

    name, config = CONFIGS[kind]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    model.to(dtype).save_pretrained(path)
    return path


def call_of(kind: str, seed: int = 0, time: float = 500.0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Keyword arguments of one call of the model."""
    g = _gen(seed)
    text = torch.randn(1, _TEXT, _WIDE, generator=g).to(dtype)
    video, picture = torch.randn(1, 4, 2, 8, 8, generator=g).to(dtype), torch.randn(1, 4, 8, 8, generator=g).to(dtype)
    pooled, at = torch.randn(1, 16, generator=g).to(dtype), torch.tensor([time])
    mask = torch.ones(1, _TEXT)
    found: dict[str, dict[str, Any]] = {
        "wan": {"hidden_states": video, "timestep": at},
        "cogvideox": {"hidden_states": video.transpose(1, 2), "timestep": at},
        "hunyuan": {
            "hidden_states": video, "timestep": at, "encoder_attention_mask": mask.bool(), "pooled_projections": pooled,
            "guidance": torch.tensor([6000.0]),
        },
        "ltx": {
            "hidden_states": video.flatten(2).transpose(1, 2), "timestep": at, "encoder_attention_mask": mask,
            "num_frames": 2, "height": 8, "width": 8,
        },
        "flux": {
            "hidden_states": torch.randn(1, 16, 16, generator=g).to(dtype), "timestep": at / 1000,
            "pooled_projections": pooled, "img_ids": torch.rand(16, 3, generator=g).round(), "txt_ids": torch.zeros(_TEXT, 3),
            "guidance": torch.tensor([3.5]),
        },
        "sd3": {"hidden_states": picture, "timestep": at, "pooled_projections": pooled},
        "sana": {"hidden_states": picture, "timestep": at, "encoder_attention_mask": mask},
        "pixart": {
            "hidden_states": picture, "timestep": at, "encoder_attention_mask": mask,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        "dit": {"hidden_states": picture, "timestep": at.long(), "class_labels": torch.tensor([3])},
    }  # fmt: skip
    return found[kind] if kind == "dit" else {**found[kind], "encoder_hidden_states": text}


def make_pipeline(path: Path, steps: int = 6, dtype: torch.dtype = torch.float32) -> Path:
    """A Wan pipeline of random components that samples 2 x 8 x 8 latents in a moment."""
    import json

    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = {
        w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *"a red blue green ball square moves left right".split()])
    }
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = UMT5Config(
        vocab_size=len(words), d_model=_WIDE, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        scale_factor_temporal=1,
        scale_factor_spatial=2,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = WanTransformer3DModel.from_pretrained(make("wan", path.with_name("wan-only"), dtype), dtype=dtype)
    made = WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(config).to(dtype), vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    made.save_pretrained(path)
    call = {"num_inference_steps": steps, "height": 16, "width": 16, "num_frames": 2, "max_sequence_length": 8}
    sampling = {"prompts": ["a red ball moves left", "a blue square moves right"], "call": call}
    (path / "sampling.json").write_text(json.dumps(sampling))
    return path
