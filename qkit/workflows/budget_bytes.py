"""What a budget of bytes holds beside the layers that it chooses formats for."""

from __future__ import annotations

from typing import Any

from qkit.families.ends import EMBEDDINGS, HEAD
from qkit.families.structure import ModelStructure
from qkit.planning.ends import end_plans
from qkit.planning.gguf import gguf_header_bytes
from qkit.planning.recipe import AUTO, SOURCE, Recipe
from qkit.planning.request import Request
from qkit.planning.sizes import linear_bytes
from qkit.sensitivity.profile import Profile
from qkit.tensor.gguf_blocks import aligned


def saved_by_ends(request: Request, structure: ModelStructure, untied: bool) -> int:
    """The bytes that embeddings and head save in the formats that the request names; less than 0 where they take more.

    untied: the run makes a head of its own of a tied one, which the profile does not count
    """
    named = {o: text for o in (EMBEDDINGS, HEAD) if (text := getattr(request, o)) not in (None, AUTO, SOURCE)}
    plans = end_plans(Recipe(scheme="w4a16", **named), structure, untied, rows=False) if named else {}
    tensors, tied = structure.checkpoint.tensors, structure.tied
    own_head = next((tensors[shared].nbytes for shared in tied.values()), 0) if untied else 0
    stored = {name: f"{name}.weight" for name in plans}
    saved = -own_head
    for name, p in plans.items():
        before = tensors[tied.get(stored[name], stored[name])].nbytes
        after = linear_bytes(p.weights, None, p.shape, structure.dtype)
        saved += aligned(before) - aligned(after) if p.weights.gguf else before - after
    return saved


def header_bytes(known_profile: Profile, structure: ModelStructure) -> int:
    """At most so much of the weight files is not tensors: a line of JSON for each, of a name, a dtype, a shape and a place.
    Of a GGUF file its keys and the tensors that are made from them, exactly."""
    if known_profile.request.get("gguf"):
        return gguf_header_bytes(structure)
    pieces = 4 + 3 * any(known_profile.request["outliers"].values())  # tensors that a quantized weight is stored as
    pieces += 2 * any(known_profile.request.get("ranks", {}).values())
    names = [n for u in known_profile.units for n in u.linears]
    return sum(len(n) + 100 for n in structure.checkpoint.tensors) + pieces * sum(len(n) + 120 for n in names)


def running_bytes(structure: ModelStructure, context: int) -> tuple[int, int]:
    """The bytes of the KV cache and of activations at a context of ``context`` tokens of one sequence, in the checkpoint's
    dtype.

    Keys and values of all blocks; of one block the hidden states, attention inputs and MLP intermediates of a prefill (our
    count: engines add buffers of their own).
    """
    config: Any = structure.text_config
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head
    mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    live_widths = 2 * config.hidden_size + max(heads * head + 2 * kv, 2 * mlp)
    bytes_per_width = context * structure.dtype.itemsize
    return bytes_per_width * 2 * kv * len(structure.blocks), bytes_per_width * live_widths
