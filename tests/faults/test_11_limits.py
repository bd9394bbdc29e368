"""Point 11: pipes and devices are refused, hostile patterns and templates stopped, texts read as far as they are needed."""

import json
import os
import shutil
import time
from functools import partial

import pytest
import qkit_data

from qkit.calibration.chat_templates import Confined, rendered, written
from qkit.calibration.dataset import token_ids
from qkit.calibration.image_text import ImageText, encode, image_text_rows, load_processor, read_image_text
from qkit.calibration.mixture import Layout, mixed_rows
from qkit.calibration.sources import CalibSource
from qkit.errors import BadCalibration, BadCheckpoint, BadInput, BadRecipe, QkitError, Unsupported
from qkit.evaluation.budget import load_budget
from qkit.evaluation.text import first_tokens, tokenize
from qkit.files.text_file import TextFile
from qkit.planning.recipe import Recipe, load_recipe, rule_for
from qkit.runtime.loading import load, load_tokenizer
from qkit.system.confined import Exceeded, Failed, confined, confined_each
from qkit.verification.verify import verify

EVIL = "re:(([a-z._0-9])+)+$"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(qkit_data.model_path("tiny-llama"))


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    return tmp_path / "pipe.jsonl"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_refused(pipe, tmp_path, tokenizer, kind):
    """Before a byte of it is read: opening a pipe waits for a writer."""
    place = pipe if kind == "pipe" else tmp_path / "zero.jsonl"
    if kind == "device":
        place.symlink_to("/dev/zero")
    start = time.monotonic()
    for error, use in (
        (BadCalibration, lambda: mixed_rows([CalibSource(str(place))], tokenizer, Layout(samples=2, seqlen=8), 4096)),
        (BadRecipe, lambda: load_recipe(place, {})),
        (BadRecipe, lambda: load_budget(place)),
        (BadInput, lambda: first_tokens(tokenizer, place, 10)),
        (BadCalibration, lambda: read_image_text(place, 1)),
    ):
        with pytest.raises(error, match="a pipe or a device"):
            use()
    line = {"image": place.name, "question": "q", "answer": "a"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    with pytest.raises(BadCalibration, match="cannot be read"):
        read_image_text(tmp_path / "p.jsonl", 1)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
def test_pipes_in_a_model_folder(tiny, tmp_path, name, run):
    folder = tmp_path / "m"
    shutil.copytree(tiny("llama"), folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    code, _, err = run(
        "plan", "--model", folder, "--scheme", "w4a16", "--method", "gptq", "--samples", 2, "--seqlen", 16
    )
    assert code == 3 and name in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["config.json", "qkit.json", "generation_config.json"])
def test_pipes_in_a_packed_folder(tiny, tmp_path, quiet, name):
    from qkit.workflows.quantize import Request, quantize

    out = tmp_path / "out"
    quantize(Request(model=str(tiny("llama")), scheme="w4a16", group_size=32, threads=1), out, quiet)
    (out / name).unlink()
    os.mkfifo(out / name)
    start = time.monotonic()
    if name != "generation_config.json":
        assert any(name in p.where for p in verify(out).problems)
        with pytest.raises(BadCheckpoint):
            load(out)
    else:
        load(out)
    assert time.monotonic() - start < 10


# ---- patterns ----------------------------------------------------------------------------------------------------


def test_a_pattern_that_takes_for_ever(tiny, tmp_path, quiet, monkeypatch):
    """The limit is 5 s; here it is 1 s."""
    monkeypatch.setattr("qkit.system.patterns.confined", partial(confined, seconds=1.0))
    from qkit.workflows.quantize import Request, quantize

    out = tmp_path / "out"
    quantize(Request(model=str(tiny("llama")), scheme="w4a16", group_size=32, threads=1), out, quiet)
    config = json.loads((out / "config.json").read_text())
    for place in ("ignore", "targets"):
        changed = json.loads(json.dumps(config))
        if place == "ignore":
            changed["quantization_config"]["ignore"].append(EVIL + "X")
        else:
            changed["quantization_config"]["config_groups"]["group_0"]["targets"] = [EVIL + "X"]
        (out / "config.json").write_text(json.dumps(changed))
        start = time.monotonic()
        report = verify(out)
        assert any("more than 1 s" in p.what for p in report.problems), report.problems
        with pytest.raises(Unsupported, match="more than 1 s"):
            load(out)
        assert time.monotonic() - start < 20


def test_patterns_that_are_in_use_match(tiny):
    from qkit.system.patterns import is_pattern, matched

    names = ["model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", "lm_head"]
    found = matched(["re:.*mlp.gate$", "re:^lm_.*", "lm_head"], names)
    assert found == {"re:.*mlp.gate$": {names[0]}, "re:^lm_.*": {"lm_head"}}
    assert not any(map(is_pattern, ("re:", "", 5, None, "re:(", "re:" + "a" * 3000)))


def test_b7_globs_of_a_recipe():
    """10,000 names, 100 rules whose globs would backtrack as regular expressions: within a second or two of a busy machine."""
    rules = [{"match": f"*a*a*a*a*a*a*a*a*{i}.x", "skip": "no"} for i in range(100)]
    recipe = Recipe.model_validate({"scheme": "w4a16", "rules": rules})
    names = [f"model.layers.{i}.{'a' * 40}.proj" for i in range(10_000)]
    start = time.process_time()
    assert {rule_for(name, recipe.rules)[0] for name in names} == {-1}
    assert time.process_time() - start < 4


# ---- chat templates ----------------------------------------------------------------------------------------------

TEMPLATES = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "string": "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "macro": "{% macro f(x) %}{% for i in range(9) %}{{ f(x) }}{% endfor %}{% endmacro %}{{ f(1) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_b5_a_hostile_chat_template(vlm, tmp_path, name):
    folder = shutil.copytree(vlm("llava", processor=True), tmp_path / "m")
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    start = time.monotonic()
    with pytest.raises(BadCalibration, match="chat template") as e:
        encode(ImageText(images=(), question="q", answer="a", where="line 1"), load_processor(folder), True)
    assert "\n" not in str(e.value) and time.monotonic() - start < 12


def test_b5_the_sandbox_holds(vlm, tmp_path):
    folder = shutil.copytree(vlm("llava", processor=True), tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__base__.__subclasses__() }}")
    with pytest.raises(BadCalibration, match="refuse"):
        encode(ImageText(images=(), question="q", answer="a", where="line 1"), load_processor(folder), True)


def test_a_confined_template_writes_what_the_own_does(vlm):
    processor = load_processor(vlm("llava", processor=True))
    said = "quote ' \" back \\ brace {{ x }} {% endraw %} line\n tab\t \u00e4 \U0001f600 end"
    messages = [{"role": "user", "content": [{"type": "text", "text": said}]}]
    own = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    constant = rendered(processor, messages, True)
    assert written(constant) == own
    assert processor.apply_chat_template(messages, chat_template=constant, tokenize=False) == own
    wrapped = Confined(processor)
    assert wrapped.apply_chat_template(messages, add_generation_prompt=True) == own
    assert wrapped.tokenizer is processor.tokenizer


def test_confined():
    assert confined(lambda: {"a": [1, "\ud800"]}) == {"a": [1, "\ud800"]}
    with pytest.raises(Failed, match="'b'") as e:
        confined(lambda: {}["b"])
    assert e.value.kind == "KeyError"
    for work in (lambda: bytearray(2 << 30) and None, lambda: "x" * (600 << 20)):
        with pytest.raises(Exceeded, match="512 MB"):
            confined(work)
    with pytest.raises(Exceeded, match=r"more than 0\.2 s"):
        confined(lambda: time.sleep(5), seconds=0.2)


def test_work_in_one_copy_is_limited_one_by_one():
    """What went before one that exceeds a limit has its result, and time is counted anew for each."""
    nap, fails = partial(time.sleep, 0.15), partial(int, "x")
    *found, last = confined_each([nap, fails, nap, partial(time.sleep, 5), nap], seconds=0.25)
    assert [found[0], found[1].kind, found[2]] == [None, "ValueError", None] and len(found) == 3
    assert isinstance(last, Exceeded) and str(last) == "more than 0.25 s"
    assert isinstance(confined_each([partial(str, "a"), partial(bytearray, 2 << 30)])[1], Exceeded)
    assert confined_each([]) == []


@pytest.mark.parametrize(("bad", "words"), [
    ("{{ raise_exception('not this one') }}", "not this one"), (TEMPLATES["string"], "needs more than 512 MB")
])  # fmt: skip
def test_the_sample_that_a_template_refuses_is_named(vlm, tmp_path, bad, words):
    folder = shutil.copytree(vlm("llava", processor=True), tmp_path / "m")
    template = (folder / "chat_template.jinja").read_text()
    asked = "{% if messages[0]['content'][0]['text'] == 'bad' %}"
    (folder / "chat_template.jinja").write_text(f"{asked}{bad}{{% endif %}}{template}")
    samples = [ImageText(images=(), question=q, answer="a", where=f"line {i}") for i, q in enumerate(("b", "bad", "c"))]
    with pytest.raises(BadCalibration, match=f"^line 1: .*{words}"):
        image_text_rows(samples, load_processor(folder), {7}, "texts")


# ---- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filler", ["", "\u00e4\U0001f600 ", "   \n\n\t  "])
def test_rows_are_those_of_the_whole_text(tmp_path, tokenizer, filler):
    """Of the embedded text some times over, with white space and characters of several bytes in it."""
    text = qkit_data.text_path("calibration").read_text(encoding="utf-8")
    file = tmp_path / "t.txt"
    file.write_text((text[:70_000] + filler) * 5, encoding="utf-8")
    whole = token_ids(tokenizer, file.read_text(encoding="utf-8"))
    for samples, seqlen in ((1, 2), (4, 32), (40, 64), (100, 128)):
        rows = mixed_rows([CalibSource(str(file))], tokenizer, Layout(samples=samples, seqlen=seqlen), 4096)
        assert rows.tokens.flatten().tolist() == whole[: samples * seqlen]
    assert first_tokens(tokenizer, file, 4000)[:4000].tolist() == tokenize(tokenizer, file.read_text())[:4000].tolist()


def test_a_long_text_is_not_read_whole(tmp_path, tokenizer):
    file = tmp_path / "long.txt"
    text = qkit_data.text_path("calibration").read_bytes()
    with file.open("wb") as f:
        for _ in range(30_000_000 // len(text) + 1):
            f.write(text)
    lengths = []

    def encode(piece):
        lengths.append(len(piece))
        return token_ids(tokenizer, piece)

    assert len(TextFile(file, "text").first_tokens(encode, 4096)) == 4096
    assert sum(lengths) < 300_000


def test_where_the_end_matters_the_whole_text_is_tokenised(tmp_path):
    """A tokenizer whose first token depends on the last character."""
    file = tmp_path / "t.txt"
    file.write_text("abcdefg " * 40_000)

    def encode(piece):
        return [len(piece), *range(len(piece) // 8)]

    assert TextFile(file, "text").first_tokens(encode, 100) == encode(file.read_text())


def test_a_text_that_is_too_short_is_counted_whole(tmp_path, tokenizer):
    file = tmp_path / "t.txt"
    file.write_text(qkit_data.text_path("calibration").read_text(encoding="utf-8")[:400_000], encoding="utf-8")
    count = len(token_ids(tokenizer, file.read_text(encoding="utf-8")))
    with pytest.raises(BadCalibration, match=f"{count} tokens are"):
        mixed_rows([CalibSource(str(file))], tokenizer, Layout(samples=10_000, seqlen=256), 4096)


def test_a_sparse_side_file_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "m")
    with (folder / "tokenizer.json").open("wb") as f:
        f.truncate(5 << 30)
    with pytest.raises(BadCheckpoint, match="expected at most"):
        load_tokenizer(folder)
    assert issubclass(BadCheckpoint, QkitError)
