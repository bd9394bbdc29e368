"""The checks of file content: every value read from a file is compared here with the type and range that it must have.

A file of JSON or YAML can hold any value at any place. ``validate`` compares it with a model of pydantic and complains in
one sentence that names the field; fields that qkit does not use are not looked at. What only another library can judge is in
``foreign.py``, and needs no pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qkit.errors import BadCheckpoint, QkitError
from qkit.files.foreign import AGAIN
from qkit.files.safefile import shown


def validate(
    model: type[BaseModel], data: Any, where: str, advice: str = AGAIN, error: type[QkitError] = BadCheckpoint
) -> Any:
    """``data`` as it is, if it fits the model. where: the file, for the message. Raises ``error`` naming the field."""
    try:
        model.model_validate(data, strict=True)
    except ValidationError as e:
        raise error(f"{where}: {complaint(e, data)}: {advice}") from None
    except RecursionError:
        raise error(f"{where}: nested too deep: {advice}") from None
    return data


def complaint(failure: ValidationError, data: Any) -> str:
    """'field is VALUE, expected a valid string or null': the first field that is wrong, and all that it might have been."""
    errors = failure.errors(include_url=False)
    places = [field_path(e["loc"], data) for e in errors]
    first_errors = [e for e, place in zip(errors, places, strict=True) if place == places[0]]
    field = ".".join(shown(str(p), 60)[1:-1] for p in places[0]) or "the content"
    if any(e["type"] == "missing" for e in first_errors):
        missing = next(str(e["loc"][-1]) for e in first_errors if e["type"] == "missing")
        return f"{missing} is missing" if not places[0] else f"{field}.{missing} is missing"
    expectations = dict.fromkeys(
        "one that is not empty" if e["type"] == "too_short" else _expectation(e["msg"]) for e in first_errors
    )
    return f"{field} is {shown(first_errors[0]['input'])}, expected {' or '.join(expectations)}"


def _expectation(message: str) -> str:
    for start in ("Input should be ", "Value error, expected ", "Input should have "):
        message = message.removeprefix(start)
    return message.replace("a valid ", "a ").replace("a integer", "a whole number").replace("a dictionary", "an object")


def field_path(location: tuple[int | str, ...], data: Any) -> tuple[int | str, ...]:
    """The part of pydantic's location of an error that is in the data: the location also names the members of unions."""
    path: list[int | str] = []
    for key in location:
        if isinstance(data, Mapping) and key in data:
            data = data[key]
        elif isinstance(data, (list, tuple)) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            continue
        path.append(key)
    return tuple(path)


# ---- what a model folder says ------------------------------------------------------------------------------------

MAX_ID = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=2**40)]
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Token = Annotated[int, Field(ge=-1, le=MAX_ID)]  # -1: none, in some configs
Tokens = Token | Annotated[list[Token], Field(min_length=1)] | None
Dtype = Annotated[
    str, Field(pattern=r"^(torch\.)?(auto|half|float|double|bfloat16|float(16|32|64)|float8_e4m3fn|float8_e5m2)$")
]
Object = dict[str, Any]


class _Open(BaseModel):
    """Other keys are allowed, and not looked at."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), defer_build=True)  # built where a file is read


class ModelConfig(_Open):
    """The fields of config.json, and of each config inside it (text_config, vision_config, ..)."""

    model_type: str | None = None
    architectures: list[str] | None = None
    dtype: Dtype | Object | None = None
    torch_dtype: Dtype | Object | None = None
    tie_word_embeddings: bool | None = None
    id2label: dict[Any, Any] | None = None
    label2id: dict[Any, Any] | None = None
    num_labels: Count | None = None
    pad_token_id: Tokens = None
    bos_token_id: Tokens = None
    eos_token_id: Tokens = None
    sep_token_id: Tokens = None
    decoder_start_token_id: Tokens = None
    max_position_embeddings: Annotated[float, Field(ge=-1, le=2**40)] | None = None  # 1200.0 in some configs
    layer_types: list[str] | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    use_cache: bool | None = None
    return_dict: bool | None = None
    rope_scaling: Object | None = None
    rope_parameters: Object | None = None
    quantization_config: Object | None = None
    text_config: Object | None = None
    vision_config: Object | None = None
    audio_config: Object | None = None


def model_config(config: Object, where: str) -> None:
    """Raises BadCheckpoint for a field of config.json, at any depth, with a value that such a field cannot have."""
    advice = "get the config of this model"
    parts = [(where, config)]
    while parts:
        label, part = parts.pop()
        validate(ModelConfig, part, label, advice)
        for name, value in part.items():
            if name.endswith("_config") and name != "quantization_config" and isinstance(value, dict):
                parts.append((f"{label}: {name}", value))


class GenerationConfig(_Open):
    """The fields of generation_config.json."""

    bos_token_id: Tokens = None
    eos_token_id: Tokens = None
    pad_token_id: Tokens = None
    decoder_start_token_id: Tokens = None
    max_length: Count | None = None
    max_new_tokens: Count | None = None
    min_length: Count | None = None
    min_new_tokens: Count | None = None
    do_sample: bool | None = None
    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    return_dict_in_generate: bool | None = None
    temperature: Number | None = None
    top_k: Count | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    typical_p: Number | None = None
    repetition_penalty: Number | None = None
    num_beams: Annotated[int, Field(ge=1, le=10_000)] | None = None
    num_return_sequences: Annotated[int, Field(ge=1, le=10_000)] | None = None


# ---- quantization_config -----------------------------------------------------------------------------------------


class _Args(_Open):
    num_bits: Annotated[int, Field(ge=1, le=64)] = 8
    type: str = "int"
    strategy: str | None = None
    group_size: Annotated[int, Field(ge=-1, le=MAX_ID)] | None = None
    block_structure: (
        Annotated[list[Annotated[int, Field(ge=1, le=MAX_ID)]], Field(min_length=2, max_length=2)] | None
    ) = None
    symmetric: bool = True
    dynamic: bool | Literal["local"] = False
    scale_dtype: str | None = None


class _Group(_Open):
    targets: list[str]
    weights: _Args
    input_activations: _Args | None = None
    format: str | None = None


class Quantization(_Open):
    """A quantization_config of compressed-tensors, or of qkit."""

    quant_method: str = "compressed-tensors"
    config_groups: dict[str, _Group]
    ignore: list[str] | None = None
    kv_cache_scheme: _Args | None = None
    sparse: list[str] | None = None
    low_rank: list[str] | None = None
    scaled: list[str] | None = None
    residual: list[str] | None = None
    rotated: dict[str, Annotated[int, Field(ge=2, le=MAX_ID)]] | None = None


# ---- what qkit writes itself -------------------------------------------------------------------------------------


class _Source(_Open):
    fingerprint: str | None = None


class RecordFile(_Open):
    """The fields of qkit.json that the loader and the commands use; ``verify`` has a reading of its own."""

    source: _Source = Field(default_factory=_Source)
    plan_hash: str | None = None
    shards: dict[str, str] = {}
    kv: Object | None = None
    diffusion: Object | None = None


class KvPolicy(_Open):
    """The KV cache policy in qkit.json."""

    kind: str
    widths: Annotated[list[Annotated[int, Field(ge=1, le=16)]], Field(min_length=1)]
    group: Annotated[int, Field(ge=8, le=2**20)] = 128
    sink: Count = 0
    window: Count = 0
    keep: Count = 0
    start: Annotated[int, Field(ge=1, le=16)] = 16
    finals: list[Annotated[int, Field(ge=1, le=16)]] | None = None
    budgets: list[Count] | None = None
    length: Count | None = None


class _ChoiceEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True)
    bytes: Annotated[int, Field(gt=0, le=2**60)]
    costs: dict[str, Number]


class _UnitEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True)
    key: str
    linears: Annotated[list[str], Field(min_length=1)]
    weights: Annotated[int, Field(gt=0, le=2**60)]
    choices: Annotated[dict[str, _ChoiceEntry], Field(min_length=1)]


class _ProfileRequest(_Open):
    method: str
    group_size: Annotated[int, Field(ge=-1)] | None = None
    group_sizes: dict[str, Annotated[int, Field(ge=-1)] | None]
    outliers: dict[str, Annotated[float, Field(ge=0, le=100)]]
    ranks: dict[str, Count] = {}
    parts: list[str] = []
    samples: Count = 0
    seqlen: Count = 0
    rows: Count = 0
    points: Count = 0


class _UniformEntry(BaseModel):
    loss: Number
    kl: Number


class ProfileFile(BaseModel):
    """The fields of profile.json, but for its version."""

    model_config = ConfigDict(extra="forbid", defer_build=True)
    fingerprint: str
    request: _ProfileRequest
    candidates: Annotated[list[str], Field(min_length=1)]
    measures: Annotated[list[str], Field(min_length=1)]
    base_loss: Number
    fixed_bytes: Annotated[int, Field(ge=0, le=2**60)]
    units: Annotated[list[_UnitEntry], Field(min_length=1)]
    whole: dict[str, _UniformEntry]


class _Time(_Open):
    format: str
    group: Annotated[int, Field(ge=1)] | None
    out: Annotated[int, Field(ge=1, le=2**40)]
    columns: Annotated[int, Field(ge=1, le=2**40, alias="in")]
    seconds: Annotated[float, Field(gt=0, lt=1e6)]


class LatencyFile(_Open):
    """The fields of a table of ``qkit bench gemv --table``, but for its version."""

    machine: str
    device: str
    dtype: str
    m: Annotated[int, Field(ge=1, le=2**40)]
    threads: Annotated[int, Field(ge=1, le=2**20)]
    entries: list[_Time]


# ---- what people write -------------------------------------------------------------------------------------------


def _file_name(name: str) -> str:
    if not name or not name.isprintable() or len(name) > 1000 or any(len(p.encode()) > 255 for p in name.split("/")):
        raise ValueError("expected the name of a file")
    return name


FileName = Annotated[str, AfterValidator(_file_name)]
FileNames = FileName | list[FileName] | None


class ImageTextLine(_Open):
    """One line of a file of image-text data."""

    image: FileNames = None
    video: FileNames = None
    question: Annotated[str, Field(min_length=1)]
    answer: str | int | float | None = None
    kind: str | None = None
