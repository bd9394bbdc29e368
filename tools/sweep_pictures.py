"""Pictures for the tiny image-text models: what a processor would give, found by asking the model.

Classes differ in the shapes that they take, so those that are in use are tried in turn, and the first that the model takes
stays. How many tokens stand for the picture is what the model itself makes of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from sweep_shrink import TOKENS
from torch import Tensor

_SIDE = 8  # patches


def with_picture(model: Any, chance: torch.Generator) -> dict[str, Any] | None:
    """One row with text, a picture and text; None where no shape that is known fits."""
    accepts = inspect.signature(model.forward).parameters
    before, after = (torch.randint(5, TOKENS - 200, (1, n), generator=chance) for n in (7, 17))
    model.config.get_text_config().use_cache = False
    for picture in _pictures(model.config, accepts, chance):
        counts = list(_counts(model, picture))
        for count in counts:
            image = torch.full((1, count), _image_token(model.config))
            ids = torch.cat([before, image, after], dim=1)
            inputs = {"input_ids": ids, **picture}
            if "mm_token_type_ids" in accepts:
                inputs["mm_token_type_ids"] = (ids == _image_token(model.config)).long()
            if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepts:
                inputs["decoder_input_ids"] = after.clone()
            _beside(inputs, model.config, accepts, count)
            refusal = _refusal(model, inputs)
            if refusal is None:
                return inputs
            told = re.search(r"features:? (\d+)", refusal)
            if told and int(told[1]) not in counts:
                counts.append(int(told[1]))
    return None


def _beside(inputs: dict[str, Any], config: Any, accepts: Any, count: int) -> None:
    """What some classes want to be told beside text and picture."""
    ids = inputs["input_ids"]
    if "qformer_input_ids" in accepts:
        inputs["qformer_input_ids"] = ids[:, :7].clone()
    if "image_embeds_position_mask" in accepts:
        inputs["image_embeds_position_mask"] = (ids == _image_token(config)).long()
    if "image_attention_mask" in accepts:
        inputs["image_attention_mask"] = torch.ones(1, ids.shape[1], 1, dtype=torch.long)
    if "state" in accepts:  # of a robot
        inputs["state"] = torch.ones(1, config.max_state_dim)
    if "bbox" in accepts:
        inputs["bbox"] = torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat(1, ids.shape[1], 1)


def _refusal(model: Any, inputs: dict[str, Any]) -> str | None:
    """What the model says to inputs that it does not take."""
    try:
        with torch.inference_mode():
            logits = model(**inputs).logits
    except Exception as error:  # whatever a class raises
        return str(error)
    return None if logits.isfinite().all() else "not finite"


def _image_token(config: Any) -> int:
    for name in ("image_token_id", "image_token_index", "media_placeholder_token_id", "image_patch_id"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    vocabulary = getattr(config, "vocabulary_map", None)
    return vocabulary["<image>"] if isinstance(vocabulary, dict) else TOKENS


def _counts(model: Any, picture: dict[str, Tensor]) -> Iterator[int]:
    """How many tokens may stand for the picture."""
    ask = getattr(model, "get_image_features", None)
    if ask is not None:
        asked = {k: v for k, v in picture.items() if k in inspect.signature(ask).parameters}
        try:
            with torch.inference_mode():
                found = ask(**asked)
            parts = getattr(found, "pooler_output", found)
            parts = parts if isinstance(parts, (list, tuple)) else [parts]
            yield sum(part.numel() // part.shape[-1] for part in parts if isinstance(part, Tensor))
        except Exception:  # another shape, or another way in
            pass
    known = ("num_query_tokens", "latent_query_num", "mm_tokens_per_image", "vision_soft_tokens_per_image")
    yield from (n for name in known if isinstance(n := getattr(model.config, name, None), int))
    yield from (0, 64, 16, 65, 4, 1)


def _pictures(config: Any, accepts: Any, chance: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Pixels in the shapes that processors make, most usual ones first."""
    vision = next(
        (c for n in ("vision_config", "encoder", "vq_config") if (c := getattr(config, n, None)) is not None), config
    )
    patch = _whole(getattr(vision, "patch_size", None)) or 16
    size = _whole(getattr(vision, "image_size", None)) or _SIDE * patch
    noise = lambda *shape: torch.randn(*shape, generator=chance)  # noqa: E731
    grid_name = next((n for n in ("image_grid_thw", "image_grid_hw") if n in accepts), None)
    if grid_name is not None:
        grid = torch.tensor([[1, _SIDE, _SIDE][-len(grid_name.rpartition("_")[2]) :]])
        extra = {"image_merge_sizes": torch.tensor([2])} if "image_merge_sizes" in accepts else {}
        for depth in (
            getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1,
            1,
            2,
        ):
            yield {"pixel_values": noise(_SIDE**2, 3 * depth * patch * patch), grid_name: grid, **extra}
        yield {"pixel_values": noise(_SIDE**2, 3, patch, patch), grid_name: grid, **extra}
        yield {"pixel_values": noise(1, _SIDE**2, 3, patch, patch), grid_name: grid, **extra}
    if "flattened_patches" in accepts:
        rows = torch.cat(
            [torch.arange(16)[None, :, None].repeat(1, 1, 2).float(), noise(1, 16, 3 * patch * patch)], dim=-1
        )
        yield {"flattened_patches": rows}
    sizes = {"image_sizes": torch.tensor([[size, size]])} if "image_sizes" in accepts else {}
    if "pixel_values" in accepts:
        if "aspect_ratio_ids" in accepts:
            yield {
                "pixel_values": noise(1, 1, 1, 3, size, size), "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
                "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
            }  # fmt: skip
        positions = torch.stack(torch.meshgrid(torch.arange(_SIDE), torch.arange(_SIDE), indexing="ij"), -1).reshape(
            1, -1, 2
        )
        if "image_position_ids" in accepts:
            for flat in (3 * patch * patch, 3 * (patch * 3) ** 2):
                yield {"pixel_values": noise(1, _SIDE**2, flat), "image_position_ids": positions}
        whole = {"pixel_values": noise(1, 3, size, size), **sizes}
        if "high_res_pixel_values" in accepts:
            high = config.high_res_vision_config.image_size
            yield {**whole, "high_res_pixel_values": noise(1, 3, high, high)}
        yield whole
        yield {"pixel_values": noise(1, 3, size, size)}
        yield {"pixel_values": noise(1, 1, 3, size, size), **sizes}
        yield {"pixel_values": noise(1, 2, 3, size, size), **sizes}
        yield {"pixel_values": noise(1, 4, 3, size, size)}
        if "pixel_attention_mask" in accepts:
            shapes = {"spatial_shapes": torch.tensor([[_SIDE, _SIDE]])} if "spatial_shapes" in accepts else {}
            mask = torch.ones(1, _SIDE**2, dtype=torch.long)
            yield {"pixel_values": noise(1, _SIDE**2, 3 * patch * patch), "pixel_attention_mask": mask, **shapes}


def _whole(value: Any) -> int | None:
    found = value[0] if isinstance(value, (list, tuple)) else value
    return found if isinstance(found, int) else None
