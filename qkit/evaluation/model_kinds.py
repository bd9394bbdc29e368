"""What a model reads and gives, by its class: which figures ``qkit eval`` measures of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkit.families.discover import parsed_config
from qkit.files.foreign import foreign_errors

TEXT, EMBEDDINGS, CLASSES, TOKENS, MASKED, PAIRS = "text", "embeddings", "classes", "tokens", "masked", "pairs"
_TABLES = {  # names of transformers' tables of classes, in the order in which a class is looked up in them
    TEXT: ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
    PAIRS: ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    MASKED: ("MASKED_LM",),
    CLASSES: ("SEQUENCE_CLASSIFICATION", "AUDIO_CLASSIFICATION"),
    TOKENS: ("TOKEN_CLASSIFICATION", "CTC"),
}


@dataclass(frozen=True)
class ModelKind:
    """kind: of the figures, one of the constants here. TEXT: it continues a text, PAIRS: it reads something and writes a text,
    MASKED: it fills in tokens that are masked, CLASSES: it gives one row of scores for its input, TOKENS: one for each token,
    EMBEDDINGS: hidden states

    class_name: of transformers; main_input: the name of what it reads
    """

    kind: str
    class_name: str
    main_input: str

    @property
    def hears(self) -> bool:
        """Whether it reads sound."""
        return self.main_input in ("input_features", "input_values")


def model_kind(config: Mapping[str, Any], where: str = "the model") -> ModelKind:
    """The kind of a model by its config.json; TEXT where that names no class of transformers. Raises BadCheckpoint."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    cls: Any = getattr(transformers, name, None)
    if "_class_name" in config or not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        return ModelKind(TEXT, name, "input_ids")
    main_input = str(getattr(cls, "main_input_name", "input_ids"))
    for kind, tables in _TABLES.items():
        known = [v for t in tables for v in getattr(modeling_auto, f"MODEL_FOR_{t}_MAPPING_NAMES").values()]
        if any(name == v or (isinstance(v, (tuple, list)) and name in v) for v in known):
            return ModelKind(kind if kind != PAIRS or _has_encoder(config, where) else TEXT, name, main_input)
    writes = name.endswith(("ForCausalLM", "LMHeadModel"))
    return ModelKind(TEXT if writes else EMBEDDINGS, name, main_input)


def _has_encoder(config: Mapping[str, Any], where: str) -> bool:
    with foreign_errors(f"{where}: config.json does not describe a model", "get the config of this model"):
        return bool(getattr(parsed_config(config), "is_encoder_decoder", False))
