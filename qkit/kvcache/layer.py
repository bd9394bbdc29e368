"""A cache layer of transformers with packed keys and values, in three segments.

  sink    the first tokens, as 16-bit codes
  body    older tokens, at the width of the policy
  recent  the newest tokens: 16-bit codes (progressive), unquantized (kivi, hierarchical), or none

Attention uses a new token unquantized, and it is packed afterwards. ``update`` returns the dequantized past, which works with
any attention of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from qkit.errors import BudgetNotMet, Unsupported, UsageError
from qkit.kvcache.attention import QUERIES, PackedPast, Segment
from qkit.kvcache.float4 import Float4
from qkit.kvcache.grouping import channel_group, check_head_dim
from qkit.kvcache.nested import Nested, nested
from qkit.kvcache.policy import CachePolicy
from qkit.kvcache.scales import Scale
from qkit.kvcache.store import HALF, Float8, Packed, Plain, narrowed, quantize, token_bytes
from qkit.transforms.rotate import orthogonal

KeyValueSegments = tuple[Segment, Segment]  # of keys and of values
Tensors = tuple[Tensor, Tensor]
CHUNK = 4096  # tokens that are packed at a time: what that takes beside the cache does not grow with a prompt
ROTATION_SEED = 0


def _joined(a: KeyValueSegments | None, b: KeyValueSegments) -> KeyValueSegments:
    """The tokens of both, which have the same type."""
    return b if a is None else (a[0].cat(b[0]), a[1].cat(b[1]))  # type: ignore[arg-type]


def _part(pair: KeyValueSegments, start: int, end: int) -> KeyValueSegments:
    return pair[0].slice(start, end), pair[1].slice(start, end)


def _cut(pair: Tensors, start: int, end: int | None = None) -> Tensors:
    return pair[0][:, :, start:end], pair[1][:, :, start:end]


def _first(pair: KeyValueSegments | None, tokens: int) -> tuple[KeyValueSegments | None, int]:
    """(the first ``tokens`` tokens at most, the number still to take from later segments)."""
    if pair is None or pair[0].tokens <= tokens:
        return pair, tokens - (0 if pair is None else pair[0].tokens)
    return (_part(pair, 0, tokens) if tokens else None), 0


def _narrowed(pair: KeyValueSegments, bits: int) -> KeyValueSegments:
    keys, values = (narrowed(s, bits) if isinstance(s, Packed) else s for s in pair)
    return keys, values


class PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values [batch, heads, tokens, head_dim] of a layer, packed.

    policy: the cache policy; budget: bytes of a sequence, for kind progressive (None: it stays at 16 bits)
    packed: ``update`` passes the past on packed, with the new keys, where there are few new tokens (for attention.py)
    scales: of keys and of values, for kinds with static scales
    Raises UsageError for a head_dim that cannot be packed, BudgetNotMet, with the cache unchanged, for tokens that do not fit
    at the smallest width.
    """

    is_compileable = False
    is_croppable = False  # tokens cannot return to a larger width
    is_sliding = False
    pending: bool  # the packed past was passed on and not read yet
    draft: bool  # hierarchical: whether the past is read at 4 bits
    by_token: bool  # whether keys share scales along tokens
    sink: KeyValueSegments | None
    body: KeyValueSegments | None
    recent: KeyValueSegments | None

    def __init__(
        self,
        policy: CachePolicy,
        budget: int | None = None,
        packed: bool = False,
        scales: tuple[Scale, Scale] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        self.policy, self.budget, self.packed, self.scales = policy, budget, packed, scales
        self.by_token = policy.kind in ("kivi", "hierarchical")
        self.turns: Tensors | None = None
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes, dtype and device from the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.heads = key_states.shape[:2]
        self.head_dims = (key_states.shape[3], value_states.shape[3])
        for n in self.head_dims:
            check_head_dim(n, self.policy)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, [batch, heads, tokens, head_dim]: the dequantized past, and the new ones unchanged.

        The new ones are then packed. With ``packed`` only the new ones are returned, and the past is keys.qkit_past.
        """
        if self.pending:
            raise Unsupported(
                "attention did not read the packed past of a KV cache (its implementation was changed, or the model changes "
                "keys on the way): make the cache after set_attn_implementation, with 'sdpa' where 'qkit' does not work"
            )
        if self.packed and self.segments and key_states.shape[2] <= QUERIES:
            rotations = self._rotations() if self.policy.kind == "rotate" else None
            self.pending = True
            packed_past = PackedPast(tuple(self.segments), rotations, self)
            self.append(key_states, value_states)
            key_states = key_states.view_as(key_states)  # a new tensor object, which carries the past of this call
            key_states.qkit_past = packed_past  # type: ignore[attr-defined]
            return key_states, value_states
        past = self.read()
        self.append(key_states, value_states)
        if past is None:
            return key_states, value_states
        return torch.cat([past[0], key_states], dim=2), torch.cat([past[1], value_states], dim=2)

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Dequantized keys and values of the past; None where there is none."""
        if not self.segments:
            return None
        keys, values = (torch.cat([s[i].dequantize(self.dtype) for s in self.segments], dim=2) for i in (0, 1))
        return self._restored((keys, values))

    @property
    def segments(self) -> list[KeyValueSegments]:
        """The existing segments in the order of their tokens; with ``draft`` only their 4-bit part."""
        present = [s for s in (self.sink, self.body, self.recent) if s is not None]
        if not self.draft:
            return present
        return [tuple(x.upper if isinstance(x, Nested) else x for x in s) for s in present]  # type: ignore[misc]

    @property
    def limit(self) -> int | None:
        """Largest number of bytes of the layer, for all sequences; None without a budget."""
        return None if self.budget is None else self.budget * self.batch_size

    def refuse_too_many(self, keys: Tensor, values: Tensor) -> None:
        """Raises BudgetNotMet for new tokens that do not fit."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._fitting(*self._places(keys.shape[2]))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Pack tokens that follow the existing ones. Raises BudgetNotMet."""
        self.refuse_too_many(keys, values)  # all of them fit, or nothing changes
        for start in range(0, keys.shape[2], CHUNK):
            self._append((keys[:, :, start : start + CHUNK], values[:, :, start : start + CHUNK]))

    def _places(self, new: int) -> tuple[int, int, int]:
        """Numbers of tokens in (sink, body, recent) after ``new`` tokens more."""
        sink, body, recent = (0 if s is None else s[0].tokens for s in (self.sink, self.body, self.recent))
        p = self.policy
        to_sink = 0 if body or recent else min(new, p.sink - sink)
        waiting = recent + new - to_sink
        moved = max(waiting - p.keep, 0) // p.window * p.window if p.window else waiting
        return sink + to_sink, body + moved, waiting - moved

    @property
    def room(self) -> int:
        """Number of tokens that can follow before any token moves to the body."""
        recent = 0 if self.recent is None else self.recent[0].tokens
        return max(self.policy.window + self.policy.keep - recent - 1, 0)

    def _append(self, pair: Tensors) -> None:
        sink, body, recent = self._places(pair[0].shape[2])
        self.width = self._fitting(sink, body, recent)
        if self.body is not None:
            self.body = _narrowed(self.body, self.width)
        pair = self._stored(pair)
        to_sink = sink - (0 if self.sink is None else self.sink[0].tokens)
        if to_sink:
            self.sink = _joined(self.sink, self._kept(_cut(pair, 0, to_sink)))
            pair = _cut(pair, to_sink)
        if not pair[0].shape[2]:
            return
        waiting = _joined(self.recent, self._kept(pair))
        moved = body - (0 if self.body is None else self.body[0].tokens)
        if moved:
            self.body = _joined(self.body, self._packed(_part(waiting, 0, moved)))
        self.recent = waiting if not moved else _part(waiting, moved, moved + recent) if recent else None

    def _kept(self, pair: Tensors) -> KeyValueSegments:
        """New tokens in the form of sink and recent tokens."""
        if self.policy.kind == "progressive":
            return quantize(pair[0], 16, self._group(0)), quantize(pair[1], 16, self._group(1))
        return Plain(pair[0].clone()), Plain(pair[1].clone())

    def _packed(self, pair: KeyValueSegments) -> KeyValueSegments:
        """Tokens in the form and width of the body."""
        if self.policy.kind == "progressive":
            return _narrowed(pair, self.width)
        keys, values = (s.dequantize(s.tensors[0].dtype) for s in pair)
        if self.policy.kind == "hierarchical":
            return nested(keys, self.policy.group, "token"), nested(values, self._group(1))
        if self.policy.kind == "nvfp":
            return Float4.of(keys, torch.as_tensor(self.scales[0])), Float4.of(values, torch.as_tensor(self.scales[1]))
        if self.policy.kind in ("fp", "fp-head"):
            return Float8.of(keys, self.scales[0]), Float8.of(values, self.scales[1])
        by_token = self.by_token
        group = self.policy.group if by_token else self._group(0)
        return quantize(keys, self.width, group, "token" if by_token else "channel"), quantize(
            values, self.width, self._group(1)
        )

    def _group(self, side: int) -> int:
        return channel_group(self.head_dims[side], self.policy.group)

    def _stored(self, pair: Tensors) -> Tensors:
        """Keys and values in the basis in which they are stored."""
        if self.policy.kind != "rotate":
            return pair
        keys, values = (x.to(torch.float32) @ q for x, q in zip(pair, self._rotations(), strict=True))
        return keys, values

    def _restored(self, pair: Tensors) -> Tensors:
        """Keys and values from the stored basis, in the model's dtype: the inverse of ``_stored``."""
        if self.policy.kind != "rotate":
            return pair
        keys, values = (
            (x.to(torch.float32) @ q.T).to(self.dtype) for x, q in zip(pair, self._rotations(), strict=True)
        )
        return keys, values

    def _rotations(self) -> Tensors:
        if self.turns is None:
            keys, values = (orthogonal(n, ROTATION_SEED).to(self.device) for n in self.head_dims)
            self.turns = keys, values
        return self.turns

    # ---- bytes ------------------------------------------------------------------------------------------------

    def _fitting(self, sink: int, body: int, recent: int) -> int:
        """The largest width of the body, by halving, with which the segments fit the budget. Raises BudgetNotMet."""
        width, limit = self.width, self.limit
        while limit is not None and self.bytes_at(width, sink, body, recent) > limit:
            if width not in HALF:
                raise BudgetNotMet(
                    f"the KV cache of a layer needs {self.bytes_at(width, sink, body, recent)} bytes for "
                    f"{sink + body + recent} tokens at {width} bits, {self.batch_size} at a time, and its budget is {limit}: "
                    "give fewer tokens, or quantize for more (--max-length, with the --kv-memory that it takes)"
                )
            width = HALF[width]
        return width

    def bytes_at(self, width: int, sink: int, body: int, recent: int) -> int:
        """Bytes of codes, minima and ranges for numbers of tokens in each segment and a width of the body."""
        total = 0
        for side, n in enumerate(self.head_dims):
            wide_bytes, narrow_bytes = (token_bytes(w, self._group(side), self.heads, n) for w in (16, width))
            total += (sink + recent) * wide_bytes + body * narrow_bytes
        return self.batch_size * total

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's tensors."""
        segments = [s for s in (self.sink, self.body, self.recent) if s is not None]
        storages = [t.untyped_storage() for pair in segments for s in pair for t in s.tensors]
        return sum({x.data_ptr(): x.nbytes() for x in storages}.values())

    # ---- interface of transformers ---------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return sum(s[0].tokens for s in self.segments)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Empty the layer, and set its initial width."""
        self.is_initialized = False
        self.draft = self.pending = False
        self.width = self.policy.start if self.policy.kind == "progressive" else self.policy.widths[0]
        self.sink = self.body = self.recent = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, given as a negative number.

        The body keeps its width. Where a group of tokens that share scales is cut, its remaining tokens become recent ones.
        """
        if tokens_to_remove > 0:
            raise UsageError(f"crop({tokens_to_remove}): expected a negative number, that of the tokens to remove")
        kept_tokens = max(self.get_seq_length() + tokens_to_remove, 0)
        self.sink, kept_tokens = _first(self.sink, kept_tokens)
        full_groups = kept_tokens // self.policy.group * self.policy.group
        if self.by_token and self.body is not None and full_groups < kept_tokens < self.body[0].tokens:
            keys, values = (s.dequantize(self.dtype, full_groups, kept_tokens) for s in self.body)
            self.recent, kept_tokens = (Plain(keys), Plain(values)), full_groups
            self.body, _ = _first(self.body, full_groups)
            return
        self.body, kept_tokens = _first(self.body, kept_tokens)
        self.recent, _ = _first(self.recent, kept_tokens)

    def offload(self) -> None:
        """Move the layer to the CPU."""
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the layer back to its device."""
        if self.is_initialized:
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select sequences, for beam search."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))
        self._resized()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences ``indices``."""
        self._map(lambda t: t[indices.to(t.device)].clone())
        self._resized()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        changed = [
            None if s is None else (s[0].map(change), s[1].map(change)) for s in (self.sink, self.body, self.recent)
        ]
        self.sink, self.body, self.recent = changed

    def _resized(self) -> None:
        if self.segments:
            self.batch_size = self.segments[0][0].tensors[0].shape[0]
