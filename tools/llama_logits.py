"""Scores of tokens in llama.cpp: run by the interpreter of an environment with xllamacpp, whose library has llama.cpp's C
functions.

    VENV/bin/python tools/llama_logits.py MODEL.gguf TOKENS.json

TOKENS.json: a list of windows, each a list of token ids. Prints {"nll": [[..]], "seconds": ..}: for every window the negative
log-probability of each token but the first.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_ROOM = 1024  # bytes for structures whose layout differs between versions; functions touch what they know of them


class _Opaque(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint32 * (_ROOM // 4))]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def library() -> Any:
    """llama.cpp within xllamacpp."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        sys.exit("no xllamacpp in this environment")
    lib = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(lib, name).restype = _Opaque
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.llama_batch_init.restype = _Batch
    lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    lib.quiet = silent(lambda level, text, data: sys.stderr.buffer.write(text) if level >= 4 else None)  # errors
    lib.llama_log_set(lib.quiet, None)
    lib.llama_backend_init()
    return lib


def scores(lib: Any, model_file: str, windows: list[list[int]]) -> list[list[float]]:
    """Negative log-probabilities of the tokens of each window behind the first."""
    model = lib.llama_model_load_from_file(model_file.encode(), lib.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp does not load {model_file}")
    model = ctypes.c_void_p(model)
    vocabulary = lib.llama_vocab_n_tokens(ctypes.c_void_p(lib.llama_model_get_vocab(model)))
    longest = max(map(len, windows))
    params = lib.llama_context_default_params()
    params.start[0] = params.start[1] = params.start[2] = longest  # n_ctx, n_batch, n_ubatch
    context = ctypes.c_void_p(lib.llama_init_from_model(model, params))
    lib.llama_set_n_threads(context, 1, 1)
    batch = lib.llama_batch_init(longest, 0, 1)
    result = []
    for window in windows:
        lib.llama_memory_clear(ctypes.c_void_p(lib.llama_get_memory(context)), True)
        batch.n_tokens = len(window)
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if lib.llama_decode(context, batch):
            sys.exit("llama.cpp does not decode the tokens")
        logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(window), vocabulary)).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        result.append((-logits[np.arange(len(window) - 1), window[1:]]).tolist())
    return result


def main() -> None:
    """See the top of the file."""
    lib = library()
    windows = json.loads(Path(sys.argv[2]).read_text())
    began = time.monotonic()
    nll = scores(lib, sys.argv[1], windows)
    print(json.dumps({"nll": nll, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
