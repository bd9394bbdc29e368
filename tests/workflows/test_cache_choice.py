"""The choice of vLLM's KV cache by what each costs, and where it is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from qkit.errors import UsageError
from qkit.kvcache.engine_caches import ENGINE_CACHES
from qkit.system.progress import Silent
from qkit.verification.verify import verify
from qkit.workflows.cache_choice import CacheCost, measure_caches
from qkit.workflows.card import forget_measurement, store_measurement
from qkit.workflows.own_arithmetic import load_model, load_texts_tokenizer
from qkit.workflows.serving import serve_command

CONTEXT, WINDOWS = 48, 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """tiny-llama with scales of an FP8 cache; not to be written to."""
    from qkit.commands import main

    out = tmp_path_factory.mktemp("choice") / "out"
    options = ["--model", "tiny-llama", "--scheme", "w8a8", "--kv", "fp8", "--samples", "8", "--seqlen", "48"]
    main(["quantize", *options, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    from qkit.files.embedded import embedded_text

    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(embedded_text("evaluation").read_text(encoding="utf-8")[:4000])
    return file


@pytest.fixture(scope="module")
def measure(packed, text):
    """``measure(limit, asked)``, computed once for each."""
    made = {}

    def get(limit: float, asked: tuple[str, ...] | None = None):
        key = (limit, asked)
        if key not in made:
            made[key] = measure_caches(packed, text, CONTEXT, Silent(), WINDOWS, limit, asked)
        return made[key]

    return get


def by_name(found) -> dict[str, CacheCost]:
    return {c.dtype: c for c in found.caches}


def test_figures_are_those_of_two_passes(measure, packed, text):
    """With the rounding of FP8 written out."""
    found = by_name(measure(1.0))
    model = load_model(packed, torch.float32)
    ids = torch.tensor(load_texts_tokenizer(packed)(text.read_text(), add_special_tokens=False)["input_ids"][:CONTEXT])
    kinds = {n: c.kl for n, c in found.items() if c.kl is not None}
    assert kinds["auto"] == 0 and all(kl > 0 for n, kl in kinds.items() if n != "auto")
    assert kinds["int8_per_token_head"] < kinds["fp8_per_token_head"] < kinds["int4_per_token_head"]
    assert kinds["fp8"] < kinds["nvfp4"]
    layers = model.config.num_hidden_layers
    numbers = 2 * layers * model.config.num_key_value_heads * CONTEXT
    assert found["auto"].bytes == numbers * 32 * 2 and found["fp8"].bytes == numbers * 32
    assert found["int8_per_token_head"].bytes == numbers * 36
    with torch.no_grad():
        p = model(input_ids=ids[None]).logits[0, CONTEXT // 2 :].double().log_softmax(-1)

        class Rounding(DynamicCache):
            def update(self, keys, values, layer, *args, **kwargs):
                scales = model.model.layers[layer].self_attn
                pairs = ((keys, scales.k_scale), (values, scales.v_scale))
                return tuple((x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s for x, s in pairs)

        q = model(input_ids=ids[None], past_key_values=Rounding(), use_cache=True).logits
        q = q[0, CONTEXT // 2 :].double().log_softmax(-1)
    first = float((p.exp() * (p - q)).sum(-1).mean())
    one = measure_caches(packed, text, CONTEXT, Silent(), 1, 1.0)
    assert by_name(one)["fp8"].kl == pytest.approx(first, rel=1e-3)
    assert by_name(one)["fp8"].low is None


def test_the_smallest_within_the_limit(measure):
    loose, strict = measure(1.0), measure(1e-9)
    assert loose.chosen.dtype == "int4_per_token_head" and not loose.chosen.skip
    assert strict.chosen == by_name(strict)["auto"]
    assert "nvfp4" not in loose.candidates  # not on all GPUs: chosen where it is asked for
    assert measure(1.0, ("nvfp4", "fp8")).chosen.dtype == "nvfp4"
    assert measure(1.0, ("fp8", "fp8_e5m2")).chosen.dtype == "fp8"
    for name, cost in by_name(loose).items():
        assert (name == "fp8_e5m2" or name not in ENGINE_CACHES) == bool(cost.refused)
    with pytest.raises(UsageError, match="'fp9' is none of auto, fp8"):
        measure(1.0, ("fp9",))


def test_the_worst_layers_stay_in_16_bits(measure):
    whole = by_name(measure(1.0))["int4_per_token_head"]
    limit = whole.kl / 3
    found = measure(limit, ("int4_per_token_head",)).chosen
    assert found.dtype == "int4_per_token_head" and 0 < len(found.skip) < 8
    assert found.kl <= limit < whole.kl and whole.bytes < found.bytes < by_name(measure(1.0))["auto"].bytes
    order = sorted(range(8), key=lambda i: -found.layer_kl[i])
    assert set(found.skip) == set(order[: len(found.skip)])


def test_what_is_written_and_what_serves(measure, packed, text, run, tmp_path):
    out = shutil.copytree(packed, tmp_path / "out")
    card, record = (out / "README.md").read_text(), json.loads((out / "qkit.json").read_text())
    limit = by_name(measure(1.0))["int4_per_token_head"].kl / 3
    options = ["--context", CONTEXT, "--windows", WINDOWS, "--limit", limit, "--text", text]
    options += ["--kv-dtypes", "int4_per_token_head", "--json", tmp_path / "found.json"]
    code, said, err = run("serve-command", out, "--measure", *options)
    assert code == 0 and "int4_per_token_head (chosen)" in err
    skip = " ".join(map(str, measure(limit, ("int4_per_token_head",)).chosen.skip))
    words = f"--kv-cache-dtype int4_per_token_head --kv-cache-dtype-skip-layers {skip}"
    assert said == f"vllm serve {out} --max-model-len {CONTEXT} {words}\n"
    assert verify(out).ok
    later = serve_command(out)
    assert words in later.command and any(
        "measured at 48 tokens, and the context here is 1024" in n for n in later.notes
    )
    now = json.loads((out / "qkit.json").read_text())
    assert now["serving"]["chosen"]["dtype"] == json.loads((tmp_path / "found.json").read_text())["chosen"]["dtype"]
    assert {k: v for k, v in now.items() if k not in ("serving", "sum", "files")} == {
        k: v for k, v in record.items() if k not in ("sum", "files")
    }
    written = (out / "README.md").read_text()
    assert written.startswith(card) and "| `int4_per_token_head` |" in written and written.count("## KV cache") == 1
    # Once more, after a kill between card and record, and with a card that somebody changed.
    store_measurement(out, measure(1e-9).to_json(), "another")
    assert (out / "README.md").read_text() == f"{card}\n<!-- qkit: KV cache -->\nanother\n<!-- /qkit: KV cache -->\n"
    assert verify(out).ok and "--kv-cache-dtype bfloat16" in serve_command(out).command  # auto would be FP8 here
    (out / "README.md").write_text(f"{card}\n<!-- qkit: KV cache -->\nhalf done\n<!-- /qkit: KV cache -->\n")
    store_measurement(out, measure(1.0).to_json(), "whole")
    assert verify(out).ok and "whole" in (out / "README.md").read_text()
    (out / "README.md").write_text("my own words")
    store_measurement(out, measure(1.0).to_json(), "more")
    section = "\n<!-- qkit: KV cache -->\nmore\n<!-- /qkit: KV cache -->\n"
    assert (out / "README.md").read_text() == f"my own words\n{section}" and verify(out).ok


def test_a_choice_is_forgotten(packed, measure, run, tmp_path):
    out = shutil.copytree(packed, tmp_path / "out")
    plain, before = run("serve-command", out)[1], {p.name: p.read_bytes() for p in out.iterdir()}
    store_measurement(out, measure(1.0).to_json(), "figures")
    assert run("serve-command", out)[1] != plain
    code, said, err = run("serve-command", out, "--forget")
    assert code == 0 and said == plain and "note: what was measured is taken out of qkit.json" in err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and verify(out).ok
    code, said, err = run("serve-command", out, "--forget")
    assert code == 0 and said == plain and "note: nothing was measured for this folder" in err
    # After a kill between card and record, and with a card that somebody changed.
    store_measurement(out, measure(1.0).to_json(), "figures")
    (out / "README.md").write_bytes(before["README.md"])
    assert forget_measurement(out) and (out / "README.md").read_bytes() == before["README.md"] and verify(out).ok
    store_measurement(out, measure(1.0).to_json(), "figures")
    (out / "README.md").write_text("my own words")
    assert run("serve-command", out, "--forget")[0] == 0 and (out / "README.md").read_text() == "my own words"


def test_a_result_without_a_card_gets_one(packed, measure, tmp_path):
    from qkit.files.record import packed_record, write_record

    out = shutil.copytree(packed, tmp_path / "out")
    record = packed_record(out)
    del record["files"]["README.md"]
    (out / "README.md").unlink()
    write_record(out, record)
    store_measurement(out, measure(1.0).to_json(), "figures")
    assert verify(out).ok and "figures" in (out / "README.md").read_text()
    assert forget_measurement(out) and verify(out).ok and not (out / "README.md").exists()


def test_a_gguf_file_has_no_cache_of_vllm(tmp_path, run):
    # A sound header without keys and tensors.
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    for option in ("--measure", "--forget"):
        for place in (tmp_path, tmp_path / "model.gguf"):
            code, said, err = run("serve-command", place, option)
            assert code == 2 and not said and len(err.splitlines()) == 1
            assert f"{option}: {tmp_path / 'model.gguf'} is a GGUF file" in err and "--cache-type-k" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "fp3"}, 'found "fp3", which vLLM does not know'),
        ({"skip": [8]}, "expected layers of the model"),
        ({"skip": "0"}, "expected layers of the model"),
    ],
)
def test_an_entry_that_cannot_be(change, words, packed, measure, tmp_path):
    out = shutil.copytree(packed, tmp_path / "out")
    data = json.loads(json.dumps(measure(1.0).to_json()))
    data["chosen"].update(change)
    store_measurement(out, data, "figures")
    assert any(words in str(p) for p in verify(out).problems)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--limit", "0.1"], 2, "--limit needs --measure"),
        (["--kv-dtypes", "fp8"], 2, "--kv-dtypes needs --measure"),
        (["--measure", "--kv-dtypes", "fp9"], 2, "'fp9' is none of"),
        (["--measure", "--context", "5000"], 2, "has 1024 positions"),
        (["--measure", "--forget"], 2, "--measure and --forget exclude each other"),
        (["--measure", "--text", "no-such-file.txt"], 3, "no-such-file.txt"),
    ],
)
def test_what_cannot_be_measured(options, code, words, packed, run):
    before = {p: p.read_bytes() for p in Path(packed).iterdir()}
    found, said, err = run("serve-command", packed, *options)
    assert found == code and words in err and not said
    assert {p: p.read_bytes() for p in Path(packed).iterdir()} == before
