"""A plain model, and files of it by qkit, which the tests of this folder damage or ask about."""

import json
from pathlib import Path

import pytest
import tiny_models

from qkit.workflows.api import quantize


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory) -> Path:
    """Wide enough for super-blocks, with so many weights that statements about most of them are made."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    tiny_models.make("llama", folder, hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory, plain_model):
    """The folder of a result, made once for each set of options: made("q4_k", kv="nvfp4")."""
    work, results = tmp_path_factory.mktemp("made"), {}

    def make(scheme: str, **options) -> Path:
        key = scheme, *sorted(options.items())
        if key not in results:
            out = work / "-".join(map(str, [scheme, *options.values()]))
            quantize(model=str(plain_model), scheme=scheme, out=str(out), **options)
            results[key] = out
        return results[key]

    return make
