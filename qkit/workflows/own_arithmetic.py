"""What qkit computes of the texts of an engine's proof, and what another rounding alone changes in it."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.engines.process import EngineAnswer
from qkit.errors import BadInput, Unsupported
from qkit.evaluation.text import tokenize
from qkit.families.structure import predicts_next
from qkit.files.checkpoint import Checkpoint
from qkit.files.embedded import embedded_text
from qkit.files.folder import RECORD, is_pipeline
from qkit.files.foreign import foreign_errors
from qkit.files.gguf import TYPES, read_gguf
from qkit.kvcache.argument import with_cache
from qkit.kvcache.policy import stored
from qkit.kvcache.read_back import fp8_cache
from qkit.nn.layers import QuantLinear
from qkit.runtime.loading import load, load_tokenizer

TEXTS, LENGTH = 6, 96  # texts, and tokens of each
GGUF = ".gguf"
Q8 = "q8_0"  # llama.cpp's arithmetic: inputs of products in 8 bits
_BLOCK, _SUPER_BLOCK = 32, 256  # inputs that share a scale there: with most types, and with those of super-blocks
_JITTER = 2.0**-23  # the last bit of float32
NewCache = Callable[[Any], Any]  # makes an empty cache for a model


def engine_dtype(out: Path, engine: str) -> str:
    """The arithmetic that an engine is asked for: transformers computes in float32, where a difference shows most, vLLM in 16
    bits as it is used, llama.cpp as it does. Raises Unsupported for a folder that holds no language model."""
    if (engine == "llama.cpp") != (out.suffix == GGUF):
        raise Unsupported(f"{out}: llama.cpp runs GGUF files, and other engines run folders: use the engine that fits")
    if engine == "llama.cpp":
        return Q8
    if is_pipeline(out):
        raise Unsupported(
            f"{out}: --engine is for models that continue a text, and this is a diffusion pipeline: leave --engine out"
        )
    config = Checkpoint.open(out, quantized=True).config
    inner = config.get("text_config")
    texts = inner if isinstance(inner, Mapping) else {}
    named = str(config.get("dtype") or config.get("torch_dtype") or texts.get("dtype") or texts.get("torch_dtype"))
    return "float32" if engine == "transformers" else "float16" if "float16" in named.split(".") else "bfloat16"


def load_model(out: Path, dtype: torch.dtype) -> Any:
    """qkit's own model of the folder, or of the folder of a GGUF file that qkit wrote, with a plain cache; of another GGUF file
    the one that transformers decodes. Raises Unsupported for one that does not continue a text."""
    folder = out.parent if out.suffix == GGUF and (out.parent / RECORD).is_file() else out
    model = _decoded(out, dtype) if folder.suffix == GGUF else load(folder, dtype=dtype, kv="none")
    if not predicts_next(model):
        raise Unsupported(
            f"{out}: --engine is for models that continue a text, and a {type(model).__name__} does not: leave --engine out"
        )
    return model


def result_of(out: Path) -> Path | None:
    """The folder of a GGUF file that is a result of qkit; None for every other path."""
    return out.parent if out.suffix == GGUF and (out.parent / RECORD).is_file() else None


def load_texts_tokenizer(out: Path) -> Any:
    """The tokenizer of a folder, or of a GGUF file that lies by itself."""
    folder = out if out.suffix != GGUF else result_of(out)
    if folder is not None:
        return load_tokenizer(folder)
    from transformers import AutoTokenizer

    _require_gguf(out)
    with foreign_errors(f"{out}: no tokenizer that transformers can read", "use a complete GGUF file"):
        return AutoTokenizer.from_pretrained(out.parent, gguf_file=out.name, local_files_only=True)


def _decoded(file: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    _require_gguf(file)
    quiet = redirect_stderr(io.StringIO())  # its bars
    with foreign_errors(f"{file}: transformers cannot decode this file", "leave --engine out"), quiet:
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    return model.eval()


def _require_gguf(file: Path) -> None:
    if find_spec("gguf") is None:
        raise Unsupported(f"{file}: decoding GGUF needs gguf, which is not installed: pip install gguf")


def proof_texts(tokenizer: Any) -> Tensor:
    """The first tokens of the first long paragraphs of the embedded text, int64 [TEXTS, LENGTH], begun as the tokenizer begins
    a text. Raises BadInput for a tokenizer that makes too few tokens."""
    paragraphs = embedded_text("evaluation").read_text(encoding="utf-8").splitlines()
    rows = []
    for paragraph in paragraphs:
        ids = tokenizer(paragraph, verbose=False)["input_ids"][:LENGTH]
        if len(ids) == LENGTH and len(tokenize(tokenizer, paragraph)) >= LENGTH:
            rows.append(ids)
        if len(rows) == TEXTS:
            return torch.tensor(rows, dtype=torch.int64)
    raise BadInput(f"the tokenizer makes {len(rows)} texts of {LENGTH} tokens, expected {TEXTS}: leave --engine out")


@torch.inference_mode()
def log_probabilities(model: Any, prompts: Tensor, cache: NewCache | None = None) -> Tensor:
    """Of all tokens of each prompt but the first, float64 [texts, tokens - 1]. cache: makes the cache of a pass, through which
    all keys and values go; None for a pass without one."""
    rows = []
    for ids in prompts:
        through = {} if cache is None else with_cache(model, cache(model))
        logits = model(input_ids=ids[None].to(model.device), **through, use_cache=cache is not None).logits
        logits = logits[0, :-1].float().cpu()
        rows.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].double())
    return torch.stack(rows)


def rounding_layers(model: Any) -> list[str]:
    """The packed layers whose inputs are quantized."""
    return [path for path, m in model.named_modules() if isinstance(m, QuantLinear) and m.activations is not None]


def keep_inputs(model: Any, layers: Iterable[str]) -> None:
    """The inputs of these of its ``rounding_layers`` are quantized no more."""
    for path in layers:
        model.get_submodule(path).keep_inputs()


def other_rounding(
    out: Path, plain: Any, prompts: Tensor, cache: NewCache | None, dtype: str, kept: Iterable[str] = ()
) -> Tensor:
    """The log-probabilities of the same file with other roundings. plain: its model in float32; kept: layers whose inputs are
    not quantized, in that model too"""
    if dtype in ("float32", Q8):
        with _jitter(plain) if dtype == "float32" else rounded_inputs(plain, input_blocks(out, plain)):
            return log_probabilities(plain, prompts, cache)
    model = load_model(out, getattr(torch, dtype))
    keep_inputs(model, kept)
    found = log_probabilities(model, prompts, cache)
    del model
    gc.collect()
    return found


@contextmanager
def _jitter(model: Any) -> Iterator[None]:
    """The last bit of each number in the embeddings of tokens goes up or down."""
    draw = torch.Generator().manual_seed(0)

    def change(module: Any, args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=draw) * 2 - 1
        return output * (1 + _JITTER * signs).to(output)

    hook = model.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


def input_blocks(file: Path, model: Any) -> dict[str, int]:
    """For each linear layer of the model of a GGUF file, how many of its inputs share a scale in llama.cpp: the type of the
    weight says which of two types its inputs get. Layers with whole numbers of neither are left out."""
    import gguf

    header = read_gguf(file)
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = architectures[header.values["general.architecture"]]
    names = gguf.get_tensor_name_map(arch, int(header.values[f"{header.values['general.architecture']}.block_count"]))
    columns = {TYPES[code][0]: TYPES[code][1] for code in TYPES}
    types = {tensor.name: tensor.dtype for tensor in header.tensors}
    blocks: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            stored = types.get(
                f"{names.get_name(path)}.weight", types.get("token_embd.weight", "")
            )  # tied: no own head
            block = _SUPER_BLOCK if columns.get(stored) == _SUPER_BLOCK else _BLOCK
            blocks |= {path: block} if module.in_features % block == 0 else {}
    return blocks


@contextmanager
def rounded_inputs(model: Any, blocks: Mapping[str, int]) -> Iterator[None]:
    """The inputs of linear layers are rounded to 8 bits, as llama.cpp does before its products. blocks: of a layer, how many
    share a scale. Codes come from the scale as it is; of blocks that are not super-blocks it is then stored in float16."""

    def change(block: int, module: Any, args: tuple[Any, ...]) -> Any:
        x = args[0].unflatten(-1, (-1, block))
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(x.dtype).tiny)
        stored = scale if block == _SUPER_BLOCK else scale.half().to(x)
        return ((x / scale).round() * stored).flatten(-2), *args[1:]

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(change, block)) for path, block in blocks.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def engine_cache(out: Path, engine: str, answer: EngineAnswer) -> NewCache | None:
    """The FP8 cache of the file as this engine fills it; None where its cache is a plain one."""
    policy = None if out.suffix == GGUF else stored(out)
    used = any("fp8" in str(cache["dtype"]) for cache in answer.caches.values())
    if policy is None or policy.kind not in ("fp", "fp-head") or not used:
        return None
    on_cpu = engine == "vllm" and answer.device == "cpu"  # vLLM's cache there has one scale for all heads, the largest
    return partial(fp8_cache, kind=policy.kind, by_head=not on_cpu, cut=cuts_toward_zero(engine, answer))


def cuts_toward_zero(engine: str, answer: EngineAnswer) -> bool:
    """Whether the engine's cache takes the next FP8 number toward zero. vLLM 0.32 on CPUs does: with that its log-probabilities
    are those of qkit but for 0.021 on average, and with rounding to nearest they are 0.071 away (tiny-llama in W4A16)."""
    return engine == "vllm" and answer.device == "cpu"
