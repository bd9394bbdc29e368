"""Runs a GGUF file in llama.cpp, in an interpreter of its own that has no qkit.

python -I llama_cpp_script.py JOB.json ANSWER.json, as ``process.run_engine`` calls it: the job says what to run, the answer
holds log-probabilities of the tokens of every prompt, and greedy tokens.

llama.cpp's server gives no log-probabilities of a prompt, so its C interface (llama.h) is called, in the library that the
package xllamacpp or llama-cpp-python brings. Settings are passed as they are made by the library itself, in a buffer larger
than they are; the one field that is changed is the length, which is the first, and its default is looked at before.
"""

import ctypes
import importlib
import importlib.util
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

numpy: Any = importlib.import_module("numpy") if importlib.util.find_spec("numpy") else None

LIBRARIES = {"xllamacpp": "xllamacpp*.so", "llama_cpp": "lib/libllama.so"}  # package: where its library lies
CONTEXT_DEFAULTS = (512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max


class Settings(ctypes.Structure):
    """llama_model_params or llama_context_params, which are shorter."""

    _fields_ = (("fields", ctypes.c_uint32 * 256),)


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
        "llama_print_system_info": (ctypes.c_char_p, []),
        "llama_model_desc": (integer, [pointer, ctypes.c_char_p, ctypes.c_size_t]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Model:
    """A loaded file with a context for one text."""

    def __init__(self, lib: Any, file: str, length: int) -> None:
        lib.llama_backend_init()
        self.lib = lib
        self.model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
        if not self.model:
            raise ValueError("llama.cpp did not load the file")
        settings = lib.llama_context_default_params()
        if tuple(settings.fields[:4]) != CONTEXT_DEFAULTS:
            raise ValueError(f"another llama.h: context settings begin with {settings.fields[:4]}")
        settings.fields[0] = max(settings.fields[0], length)
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError("llama.cpp made no context for the model")
        self.size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(length, 0, 1)

    def logits(self, ids: list[int], start: int, last: int) -> list[Any]:
        """Logits of the ``last`` tokens of ``ids``, which follow ``start`` others."""
        b = self.batch
        b.n_tokens = len(ids)
        for i, token in enumerate(ids):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, start + i, 1, i >= len(ids) - last
            b.seq_id[i][0] = 0
        code = self.lib.llama_decode(self.context, b)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        rows = [self.lib.llama_get_logits_ith(self.context, i) for i in range(len(ids) - last, len(ids))]
        return [numpy.ctypeslib.as_array(row, (self.size,)).astype(numpy.float64) for row in rows]

    def clear(self) -> None:
        """Forget the text."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)


def log_probability(logits: Any, token: int) -> float:
    """Of one token."""
    shifted = logits - logits.max()
    return float(shifted[token] - numpy.log(numpy.exp(shifted).sum()))


def run(job: dict[str, Any], lib: Any, package: str) -> dict[str, Any]:
    """The answer to a job."""
    start = time.perf_counter()
    model = Model(lib, job["model"], job["max_length"])
    loaded = time.perf_counter()
    logprobs, tokens = [], []
    for ids in job["prompts"]:
        model.clear()
        rows = model.logits(ids, 0, len(ids))
        logprobs.append([log_probability(row, token) for row, token in zip(rows[:-1], ids[1:], strict=True)])
        made: list[int] = []
        row = rows[-1]
        for _ in range(job["new_tokens"]):
            made.append(int(row.argmax()))
            (row,) = model.logits(made[-1:], len(ids) + len(made) - 1, 1)
        tokens.append(made)
    kind = ctypes.create_string_buffer(128)
    lib.llama_model_desc(model.model, kind, 128)
    return {
        "version": f"({package} {version(package.replace('_', '-'))})",
        "device": "llama.cpp's own choice",
        "dtype": kind.value.decode(),
        "logprobs": logprobs,
        "tokens": tokens,
        "seconds": {"load": loaded - start, "run": time.perf_counter() - loaded},
        "layers": {},
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
    try:
        answer = run(job, lib, package)
    except (ValueError, RuntimeError, OSError) as e:
        Path(answer_file).write_text(json.dumps({"refused": f"{type(e).__name__}: {e}"}))
        raise
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
