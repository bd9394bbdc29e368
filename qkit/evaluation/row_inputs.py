"""What a model is called with for each row (``evaluation.rows``), and what is scored of its output."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.chats import Chats
from qkit.errors import BadInput, UsageError
from qkit.evaluation.model_kinds import CLASSES, MASKED, PAIRS, ModelKind
from qkit.evaluation.rows import Row, read_rows, read_sound, source_of, split_turns
from qkit.evaluation.text import first_tokens, tokenize
from qkit.families.text_arguments import decoder_start
from qkit.files.folder import check_side_files
from qkit.files.foreign import foreign_errors
from qkit.files.safefile import shown

_MASKED_SHARE = 0.15  # of the tokens of a row, as in the training of BERT
_NO_LIMIT = 1 << 30  # tokenizers without a limit state a larger number
_ADVICE = "copy the tokenizer's files of the original model here"


@dataclass(frozen=True)
class RowInput:
    """arguments: of the model, each with one row; scored: the tokens that its output is to tell, int64 [n], and places: where
    in its output, both None where nothing is scored; row: None for a window of a text; cut: whether the row was too long;
    label: the number of its class, where that is known"""

    arguments: dict[str, Tensor]
    scored: Tensor | None = None
    places: Tensor | None = None
    row: Row | None = None
    cut: bool = False
    label: int | None = None


class RowReader:
    """Makes the inputs of one model.

    folder: of the model, with its tokenizer, or the feature extractor of one that hears; length: tokens of a row at most
    """

    def __init__(self, folder: Path, model: Any, kind: ModelKind, tokenizer: Any, window: int) -> None:
        self.folder, self.model, self.kind, self.tokenizer = folder, model, kind, tokenizer
        self.length = min(window, longest_row(model, tokenizer))
        self._names = set(inspect.signature(model.forward).parameters)
        self._hearing: Any = None

    def read(self, spec: Path | str, limit: int | None) -> tuple[str, list[RowInput]]:
        """(name, rows) of what --text names. Raises BadInput for what this model cannot read."""
        name, source = source_of(spec)
        if source is not None:
            rows = read_rows(source, limit)
            return name, [self._input(row, i) for i, row in enumerate(rows)]
        if self.kind.hears:
            raise UsageError(
                f"{self.folder}: {self.kind.class_name} reads sound, and text '{name}' is a text: give JSON lines with 'audio' "
                "(a WAV file) and 'text'"
            )
        return name, list(self._windows(spec, name, limit))

    def _windows(self, spec: Path | str, name: str, limit: int | None) -> Iterator[RowInput]:
        before, after = self._around()
        size = self.length - len(before) - len(after)
        ids = first_tokens(self.tokenizer, spec, None if limit is None else limit * size)
        count = len(ids) // size if limit is None else min(limit, len(ids) // size)
        if count == 0:
            raise BadInput(
                f"text '{name}': {len(ids)} tokens, and one window needs {size}: use more text, or a smaller --window"
            )
        for i in range(count):
            piece = ids[i * size : (i + 1) * size]
            if self.kind.kind == PAIRS:
                half = size // 2
                yield self._pair([*before, *piece[:half].tolist(), *after], piece[half:].tolist(), None, False)
            else:
                yield self._tokens({"input_ids": torch.tensor([[*before, *piece.tolist(), *after]])}, i, None, False)

    def _input(self, row: Row, index: int) -> RowInput:
        if self.kind.hears:
            return self._sound(row)
        assert row.record is not None
        self._refuse_preference(row)
        if self.kind.kind == PAIRS:
            source, target = split_turns(row)
            ids, cut = self._cut(self._ids(source))
            wanted, also_cut = self._cut(self._ids(target))
            return self._pair(ids, wanted, row, cut or also_cut)
        if row.record.is_chat:
            ids, cut = self._cut(Chats(self.tokenizer).tokens([row.record], False)[0].ids)
            return self._tokens({"input_ids": torch.tensor([ids])}, index, row, cut)
        texts = [row.record.text] if row.second is None else [row.record.text, row.second]
        with foreign_errors(f"{row.where}: the tokenizer of the model cannot read the text", _ADVICE, BadInput):
            found = self.tokenizer(*texts, truncation=True, max_length=self.length, return_tensors="pt", verbose=False)
            whole = len(self.tokenizer(*texts, verbose=False)["input_ids"])
        arguments = {k: v for k, v in found.items() if k in self._names and k != "attention_mask"}
        return self._tokens(arguments, index, row, whole > self.length)

    def _tokens(self, arguments: dict[str, Tensor], index: int, row: Row | None, cut: bool) -> RowInput:
        """A row of a model that reads tokens alone; of one that fills in masks, with masks."""
        ids = arguments["input_ids"]
        if self.kind.kind != MASKED:
            return RowInput(arguments, row=row, cut=cut, label=None if row is None else self._label(row))
        mask = getattr(self.tokenizer, "mask_token_id", None)
        if mask is None:
            raise UsageError(
                f"{self.folder}: {self.kind.class_name} fills in masks, and its tokenizer has no mask token: set "
                "mask_token in the tokenizer's files of the original model, and quantize it again"
            )
        special = torch.tensor(sorted(set(self.tokenizer.all_special_ids)))
        places = (~torch.isin(ids[0], special)).nonzero()[:, 0]
        chance = torch.Generator().manual_seed(index)
        picked = (
            places[torch.randperm(len(places), generator=chance)[: max(1, round(_MASKED_SHARE * len(places)))]]
            .sort()
            .values
        )
        masked = ids.clone()
        masked[0, picked] = mask
        return RowInput({**arguments, "input_ids": masked}, ids[0, picked], picked, row, cut)

    def _pair(self, ids: Sequence[int], target: Sequence[int], row: Row | None, cut: bool) -> RowInput:
        return self._decoded({"input_ids": torch.tensor([list(ids)])}, list(target), row, cut)

    def _decoded(self, arguments: dict[str, Tensor], target: list[int], row: Row | None, cut: bool) -> RowInput:
        """A row whose decoder reads the tokens that it is to tell, one later."""
        start = decoder_start(self.model.config)
        target = target[1:] if target[:1] == [start] else target
        if not target:
            raise BadInput(f"{row.where if row else 'a window'}: there is nothing to write: give a text")
        scored = torch.tensor(target)
        begun = torch.cat([torch.tensor([start]), scored[:-1]])[None]
        return RowInput({**arguments, "decoder_input_ids": begun}, scored, torch.arange(len(scored)), row, cut)

    def _sound(self, row: Row) -> RowInput:
        if row.audio is None:
            raise BadInput(f"{row.where}: {self.kind.class_name} reads sound: give 'audio', a WAV file, and 'text'")
        if self._hearing is None:
            self._hearing = feature_extractor(self.folder)
        rate = int(self._hearing.sampling_rate)
        sound = read_sound(row.audio, rate)
        with foreign_errors(
            f"{row.audio}: the feature extractor of the model cannot read the sound", "use another", BadInput
        ):
            found = self._hearing(sound.numpy(), sampling_rate=rate, return_tensors="pt")
        arguments = {self.kind.main_input: found[self.kind.main_input]}
        if self.kind.kind != PAIRS:
            return RowInput(arguments, row=row, label=self._label(row))
        if row.record is None:
            raise BadInput(f"{row.where}: {self.kind.class_name} writes what it hears: give 'text' beside 'audio'")
        ids, cut = self._cut(self._ids(row.record.text))
        return self._decoded(arguments, ids, row, cut)

    def _refuse_preference(self, row: Row) -> None:
        """Raises BadInput for a preference pair where the model has no one score by which its rows could be put in order."""
        if row.better is None or self.kind.kind != CLASSES or self.model.config.num_labels == 1:
            return
        classes = ", ".join(map(str, list((self.model.config.id2label or {}).values())[:8]))
        raise BadInput(
            f"{row.where}: 'chosen' and 'rejected' are for reward models, which give one score (num_labels 1), and "
            f"{self.kind.class_name} gives {self.model.config.num_labels} ({classes}): give 'text', and 'label' where it is "
            "known"
        )

    def _label(self, row: Row) -> int | None:
        """The number of a row's class, which may be given by its name."""
        if self.kind.kind != CLASSES or row.label is None:
            return None
        config = self.model.config
        count, known = int(config.num_labels), {str(v): int(k) for k, v in (config.id2label or {}).items()}
        number = known.get(row.label, row.label) if isinstance(row.label, str) else row.label
        if type(number) is int and 0 <= number < max(count, 2):
            return number
        raise BadInput(
            f"{row.where}: label {shown(row.label, 40)}, expected a number from 0 to {count - 1}, or one of "
            f"{', '.join(map(str, list(known)[:8]))}"
        )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def _cut(self, ids: list[int]) -> tuple[list[int], bool]:
        return ids[: self.length], len(ids) > self.length

    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer writes before and after a text."""
        bare, full = tokenize(self.tokenizer, "a").tolist(), self._ids("a")
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []


def longest_row(model: Any, tokenizer: Any) -> int:
    """The most tokens of a row: the positions of the model, some of which may be for padding alone (RoBERTa)."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [int(positions)] if isinstance(positions, (int, float)) and positions > 0 else []
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(module, nn.Embedding) and "position" in name and padding is not None:
            limits.append(module.num_embeddings - padding - 1)
    stated = getattr(tokenizer, "model_max_length", None)
    if isinstance(stated, int) and 0 < stated < _NO_LIMIT:
        limits.append(stated)
    return min(limits, default=_NO_LIMIT)


def feature_extractor(folder: Path) -> Any:
    """The feature extractor of a model that hears. No code of the folder is run. Raises BadCheckpoint when there is none."""
    from transformers import AutoFeatureExtractor

    check_side_files(folder)
    advice = "copy preprocessor_config.json of the original model here"
    with foreign_errors(f"{folder}: no feature extractor that transformers can load", advice):
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
