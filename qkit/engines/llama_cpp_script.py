"""Runs a GGUF file in llama.cpp, in an interpreter of its own that has no qkit.

python -I llama_cpp_script.py JOB.json ANSWER.json, as ``process.run_engine`` calls it: the job says what to run, the answer
holds log-probabilities of tokens of every prompt, greedy tokens, and the type of each tensor. A job without prompts asks only
whether the library is here.

llama.cpp's server gives no log-probabilities of a prompt, so its C interface (llama.h) is called, in the library that the
package xllamacpp or llama-cpp-python brings. Settings are passed as they are made by the library itself, in a buffer larger
than they are; the one field that is changed is the length, which is the first, and its default is looked at before.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

numpy: Any = importlib.import_module("numpy") if importlib.util.find_spec("numpy") else None

LIBRARIES = {"xllamacpp": "xllamacpp*.so", "llama_cpp": "lib/libllama.so"}  # package: where its library lies
CONTEXT_DEFAULTS = (512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max
PIECE = 512  # tokens that are computed at once: the logits of a long text would fill the memory
ERROR = 4  # the level of messages that are errors


Logger = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Settings(ctypes.Structure):
    """llama_model_params or llama_context_params, which are shorter."""

    _fields_ = (("fields", ctypes.c_uint32 * 256),)


class HeaderSettings(ctypes.Structure):
    """gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def library() -> tuple[Any, str]:
    """The functions of llama.h, and the name of the package that has them. Raises FileNotFoundError."""
    for name, pattern in LIBRARIES.items():
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            for file in sorted(Path(place).glob(pattern)):
                return declared(ctypes.CDLL(str(file))), name
    raise FileNotFoundError


def declared(lib: Any) -> Any:
    """The library, with the types of what is called."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    types: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (Settings, []),
        "llama_context_default_params": (Settings, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, Settings]),
        "llama_init_from_model": (pointer, [pointer, Settings]),
        "llama_batch_init": (Batch, [integer, integer, integer]),
        "llama_decode": (integer, [pointer, Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, integer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (integer, [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_backend_init": (None, []),
        "llama_set_n_threads": (None, [pointer, integer, integer]),
        "llama_supports_gpu_offload": (ctypes.c_bool, []),
        "llama_log_set": (None, [Logger, pointer]),
        "gguf_init_from_file": (pointer, [ctypes.c_char_p, HeaderSettings]),
        "gguf_get_n_tensors": (ctypes.c_int64, [pointer]),
        "gguf_get_tensor_name": (ctypes.c_char_p, [pointer, ctypes.c_int64]),
        "gguf_get_tensor_type": (integer, [pointer, ctypes.c_int64]),
        "gguf_free": (None, [pointer]),
        "ggml_type_name": (ctypes.c_char_p, [integer]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Model:
    """A loaded file with a context for one text."""

    def __init__(self, lib: Any, file: str, length: int) -> None:
        self.said: list[str] = []
        self.logger = Logger(self.note)  # kept, because the library calls it
        lib.llama_log_set(self.logger, None)
        lib.llama_backend_init()
        self.lib = lib
        self.model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
        if not self.model:
            raise ValueError(": ".join(self.said) or "llama.cpp did not load the file")
        settings = lib.llama_context_default_params()
        if tuple(settings.fields[:4]) != CONTEXT_DEFAULTS:
            raise ValueError(f"another llama.h: context settings begin with {settings.fields[:4]}")
        settings.fields[0] = max(settings.fields[0], length)
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError("llama.cpp made no context for the model")
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        lib.llama_set_n_threads(self.context, threads, threads)
        self.size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(PIECE, 0, 1)

    def note(self, level: int, text: bytes, _: Any) -> None:
        """Keeps what goes wrong; the log gets it, and not the hundreds of lines about a file."""
        if level == ERROR:
            self.said.append(text.decode(errors="replace").strip())
            print(self.said[-1], file=sys.stderr)

    def rows(self, ids: list[int], start: int, last: int) -> Iterator[Any]:
        """Logits of the ``last`` tokens of ``ids``, which follow ``start`` others."""
        for begin in range(0, len(ids), PIECE):
            piece = ids[begin : begin + PIECE]
            asked = [begin + i >= len(ids) - last for i in range(len(piece))]
            self.decode(piece, start + begin, asked)
            for i in (i for i, is_asked in enumerate(asked) if is_asked):
                row = self.lib.llama_get_logits_ith(self.context, i)
                yield numpy.ctypeslib.as_array(row, (self.size,)).astype(numpy.float64)

    def decode(self, ids: list[int], start: int, asked: list[bool]) -> None:
        """Computes so many tokens; logits of those that are asked for can be read."""
        b = self.batch
        b.n_tokens = len(ids)
        for i, token in enumerate(ids):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, start + i, 1, asked[i]
            b.seq_id[i][0] = 0
        code = self.lib.llama_decode(self.context, b)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")

    def clear(self) -> None:
        """Forget the text."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)


def log_probability(logits: Any, token: int) -> float:
    """Of one token."""
    shifted = logits - logits.max()
    return float(shifted[token] - numpy.log(numpy.exp(shifted).sum()))


def tensor_types(lib: Any, file: str) -> dict[str, dict[str, str]]:
    """The type of each tensor of a file, by its name."""
    header = lib.gguf_init_from_file(file.encode(), HeaderSettings(True, None))
    if not header:
        return {}
    types = {}
    for i in range(lib.gguf_get_n_tensors(header)):
        kind = lib.ggml_type_name(lib.gguf_get_tensor_type(header, i)).decode()
        types[lib.gguf_get_tensor_name(header, i).decode()] = {"class": kind.upper()}
    lib.gguf_free(header)
    return types


def answer_of(model: Model, ids: list[int], scored: int, count: int, stops: set[int]) -> Any:
    """Log-probabilities of the last ``scored`` tokens of a prompt, whether each is the most likely one, and so many greedy
    tokens after it, or fewer where one of ``stops`` is the last."""
    model.clear()
    logprobs, best = [], []
    expected: list[int | None] = [*ids[len(ids) - scored :], None]
    for row, token in zip(model.rows(ids, 0, scored + 1), expected, strict=True):
        if token is not None:
            logprobs.append(log_probability(row, token))
            best.append(int(row.argmax()) == token)
    made: list[int] = []
    while len(made) < count and not (made and made[-1] in stops):
        if made:
            (row,) = model.rows(made[-1:], len(ids) + len(made) - 1, 1)
        made.append(int(row.argmax()))
    return logprobs, best, made


def run(job: dict[str, Any], lib: Any, package: str) -> dict[str, Any]:
    """The answer to a job."""
    start = time.perf_counter()
    model = Model(lib, job["model"], job["max_length"])
    loaded = time.perf_counter()
    entries = zip(job["prompts"], job["scored"], job["new_tokens"], map(set, job["stops"]), strict=True)
    answers = [answer_of(model, *entry) for entry in entries]
    return {
        "version": f"({package} {version(package.replace('_', '-'))})",
        "device": "GPU as llama.cpp chooses" if lib.llama_supports_gpu_offload() else "cpu",
        "dtype": "inputs of products in 8 bits",
        "logprobs": [logprobs for logprobs, _, _ in answers],
        "best": [best for _, best, _ in answers],
        "tokens": [made for _, _, made in answers],
        "seconds": {"load": loaded - start, "run": time.perf_counter() - loaded},
        "layers": tensor_types(lib, job["model"]),
    }


def main(job_file: str, answer_file: str) -> None:
    """Writes the answer, or why there is none."""
    job = json.loads(Path(job_file).read_text())
    try:
        lib, package = library()
    except FileNotFoundError:
        lib, package = None, "llama.cpp"
    if lib is None or numpy is None:
        Path(answer_file).write_text(json.dumps({"missing": package if lib is None else "numpy"}))
        return
    if not job["prompts"]:
        Path(answer_file).write_text(json.dumps({"found": True}))
        return
    try:
        answer = run(job, lib, package)
    except (ValueError, RuntimeError, OSError) as e:
        Path(answer_file).write_text(json.dumps({"refused": f"{type(e).__name__}: {e}"}))
        raise
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
