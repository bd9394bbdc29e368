"""Tiny random vision-language models of every family, and inputs with a picture in the middle of the text."""

from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers

IMAGE = 4090
_TEXT = {**tiny_models._SIZES, "vocab_size": tiny_models.VOCABULARY}
_EYES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)
_SIGLIP = dict(vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_EYES})
_QWEN = dict(
    text_config={**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
    image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_start_token_id=IMAGE + 2, vision_end_token_id=IMAGE + 3,
)  # fmt: skip
_IDEFICS = dict(
    vision_config=_EYES, text_config={"model_type": "llama", **_TEXT, "pad_token_id": 0}, image_token_id=IMAGE,
    scale_factor=2, pad_token_id=0,
)  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llava": lambda: transformers.LlavaConfig(
        **_SIGLIP, text_config={"model_type": "llama", **_TEXT}, image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "llava_clip": lambda: transformers.LlavaConfig(  # as LLaVA 1.5 has it
        vision_config={"model_type": "clip_vision_model", **_EYES}, text_config={"model_type": "llama", **_TEXT},
        image_token_id=IMAGE,
    ),
    "llava_onevision": lambda: transformers.LlavaOnevisionConfig(
        **_SIGLIP, text_config={"model_type": "qwen2", **_TEXT}, image_token_id=IMAGE, video_token_id=IMAGE + 1,
        image_grid_pinpoints=[[32, 32], [32, 64]],
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(
        **_QWEN, vision_config=dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, patch_size=4, mlp_ratio=2)
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        **_QWEN,
        vision_config=dict(
            depth=2, hidden_size=32, out_hidden_size=64, intermediate_size=48, num_heads=2, patch_size=4, window_size=16,
            fullatt_block_indexes=[1],
        ),
    ),
    "idefics3": lambda: transformers.Idefics3Config(**_IDEFICS),
    "smolvlm": lambda: transformers.SmolVLMConfig(**_IDEFICS),
    "internvl": lambda: transformers.InternVLConfig(
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=[32, 32],
            patch_size=[8, 8],
        ),
        text_config={"model_type": "qwen2", **_TEXT}, image_token_id=IMAGE, downsample_ratio=0.5,
    ),
}  # fmt: skip


def make(family: str, path: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model of the family, saved by transformers into ``path`` with a tokenizer."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(FAMILIES[family](), dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
            elif "embed" in name or "lm_head" in name:
                p.normal_(0, 0.5)
            else:
                p.normal_(0, p[0].numel() ** -0.5)
    model.tie_weights()
    model.to(dtype).save_pretrained(path)
    tiny_models.add_tokenizer(path)
    return path


def add_processor(path: Path) -> None:
    """Pictures of 32 x 32 pixels and a chat template, beside a LLaVA; IMAGE is written as the token it is."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    image = tokenizer.convert_ids_to_tokens(IMAGE)
    tokenizer.add_special_tokens({"additional_special_tokens": [image]})
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}"
        + image
        + "{% elif m.role == 'user' %}"
        "{{ '\\nQ: ' + c.text + '\\nA:' }}{% else %}{{ ' ' + c.text + eos_token + '\\n' }}{% endif %}{% endfor %}{% endfor %}"
    )
    strategy = transformers.AutoConfig.from_pretrained(path).vision_feature_select_strategy
    transformers.LlavaProcessor(
        transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, patch_size=8,
        vision_feature_select_strategy=strategy, num_additional_image_tokens=int(strategy == "default"), image_token=image,
        chat_template=template,
    ).save_pretrained(path)  # fmt: skip


VIDEO = ("qwen2_vl", "qwen2_5_vl", "llava_onevision")  # whose videos are inputs of their own


def film(family: str, model: Any, seed: int = 0, lengths: tuple[int, int] = (5, 9)) -> dict[str, torch.Tensor]:
    """What a processor would give for a video of four frames between two pieces of text of so many tokens."""
    chance = torch.Generator().manual_seed(seed)
    before, after = (torch.randint(5, IMAGE, (1, n), generator=chance) for n in lengths)
    seen: dict[str, torch.Tensor]
    if family.startswith("qwen"):
        seen, count = {"pixel_values_videos": torch.randn(32, 3 * 2 * 16, generator=chance)}, 8
        seen["video_grid_thw"] = torch.tensor([[2, 4, 4]])
    else:
        seen, count = {"pixel_values_videos": torch.randn(1, 4, 3, 32, 32, generator=chance)}, 4 * 4 + 1
    ids = torch.cat([before, torch.full((1, count), IMAGE + 1), after], dim=1)
    if family.startswith("qwen"):
        seen["mm_token_type_ids"] = 2 * (ids == IMAGE + 1).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen}


def inputs(family: str, model: Any, seed: int = 0, lengths: tuple[int, int] = (5, 9)) -> dict[str, torch.Tensor]:
    """What a processor would give for a picture between two pieces of text of so many tokens."""
    chance = torch.Generator().manual_seed(seed)
    seen: dict[str, Any]
    if family.startswith("qwen"):
        seen = {
            "pixel_values": torch.randn(16, 3 * 2 * 16, generator=chance),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
        count = 4
    else:
        shape = {"llava_onevision": (1, 3, 3, 32, 32), "idefics3": (1, 1, 3, 32, 32), "smolvlm": (1, 1, 3, 32, 32)}
        seen = {"pixel_values": torch.randn(shape.get(family, (1, 3, 32, 32)), generator=chance)}
        count = {"llava": 16, "llava_clip": 16, "llava_onevision": 0}.get(family, 4)
        if family == "llava_onevision":
            seen["image_sizes"] = torch.tensor([[32, 64]])
            with torch.inference_mode():
                found = model.model.get_image_features(**_cast(seen, model.dtype))
            count = sum(len(x) for x in found.pooler_output)
    before, after = (torch.randint(5, IMAGE, (1, n), generator=chance) for n in lengths)
    ids = torch.cat([before, torch.full((1, count), IMAGE), after], dim=1)
    if family.startswith("qwen"):
        seen["mm_token_type_ids"] = (ids == IMAGE).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen}


def logits(family: str, model: Any) -> torch.Tensor:
    """float32 [1, tokens, vocabulary]"""
    given = inputs(family, model)
    with torch.inference_mode():
        found = model(**_cast(given, model.dtype)).logits
    return found.float()


def _cast(given: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
