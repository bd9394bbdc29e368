"""Vision-language models: named right, packed, loaded by both libraries; rows with pictures run as the model runs them."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import tiny_vlms
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer

from qkit.calibration.block_calls import PerRow, enter, merged
from qkit.calibration.dataset import KINDS
from qkit.calibration.image_text import read_image_text, rows_of
from qkit.errors import BadCalibration
from qkit.families.structure import ModelStructure
from qkit.files.checkpoint import Checkpoint
from qkit.nn.layers import QuantLinear
from qkit.runtime.loading import load


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_packed_and_loaded(run, vlm, tmp_path, family):
    """The loaded original is transformers' own; of the packed one qkit's logits are those of stock transformers."""
    path = vlm(family)
    stock = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    before = tiny_vlms.logits(family, stock)
    assert torch.equal(tiny_vlms.logits(family, load(path, dtype=torch.float32)), before)
    for scheme in ("w4a16", "w4a8"):
        out = tmp_path / scheme
        code, said, err = run("quantize", "--model", path, "--scheme", scheme, "--method", "rtn", "--out", out)
        assert code == 0 and "14 linears quantized" in said, err
        assert run("verify", out)[0] == 0
        own = tiny_vlms.logits(family, load(out, dtype=torch.float32))
        found = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
        other = tiny_vlms.logits(family, found)
        effect = (own - before).norm() / before.norm()
        assert 0.01 < effect < 0.5
        if scheme == "w4a16":
            assert (own - other).norm() < 1e-5 * own.norm()
        else:  # sums in another order differ in the last bit, and an input halfway between two codes then falls either way
            assert (own - other).norm() / own.norm() < 0.1 * effect
            assert_same_linears(family, load(out, dtype=torch.float32), found)


def assert_same_linears(family, model, stock):
    """Each packed linear gives, of the inputs that stock transformers gives its own, the same outputs."""
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    seen = {}
    for name in packed:
        stock.get_submodule(name).register_forward_hook(lambda m, args, y, n=name: seen.update({n: (args[0], y)}))
    tiny_vlms.logits(family, stock)
    assert len(seen) == len(packed) == 14
    for name, (x, y) in seen.items():
        assert (packed[name](x) - y).norm() < 1e-5 * y.norm(), name


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_rows_of_several_lengths(vlm, family):
    """A batch of rows, filled up, run block by block: every token as in the model itself; masks lie where the pictures are."""
    path = vlm(family)
    model = load(path, dtype=torch.float32)
    each = [tiny_vlms.inputs(family, model, seed, n) for seed, n in enumerate([(5, 9), (2, 4), (7, 3)])]
    if family in tiny_vlms.VIDEO:
        each[1] = tiny_vlms.film(family, model, 1, (3, 5))
    for x in each:
        del x["attention_mask"]
    rows = rows_of(each, [len(x["input_ids"][0]) - 3 for x in each], {tiny_vlms.IMAGE, tiny_vlms.IMAGE + 1}, "three")
    structure = ModelStructure(Checkpoint.open(path))
    (blocks,) = structure.family.blocks
    samples = ({**x, "use_cache": False} for x in rows.calls(path))
    entered = list(enter(model, structure.sequences[-1].paths, samples))
    lengths = [x["input_ids"].shape[1] for x in each]
    calls = merged([c for _, c in entered], lengths)
    differ = any(isinstance(v, PerRow) for c in calls.values() for v in c.kwargs.get("position_embeddings", ()))
    assert differ == family.startswith("qwen")  # positions of a picture's pieces depend on what is before them
    hidden = torch.cat([torch.nn.functional.pad(h, (0, 0, 0, rows.seqlen - h.shape[1])) for h, _ in entered])
    seen = {}
    with torch.inference_mode():
        for i, x in enumerate(each):
            found = model(**x, output_hidden_states=True)
            seen[i] = found.hidden_states
        for start, stop in ((0, 3), (1, 2)):
            part = hidden[start:stop]
            for i, block in enumerate(model.get_submodule(blocks)):
                part = calls[i](block, part, slice(start, stop))
                if i + 1 < len(structure.blocks):  # transformers gives the last one behind the norm
                    for row in range(start, stop):
                        wanted = seen[row][i + 1][0]
                        assert torch.allclose(part[row - start, : lengths[row]], wanted, atol=1e-4)
    for i, x in enumerate(each):
        seen_at = (x["input_ids"][0] == tiny_vlms.IMAGE) | (x["input_ids"][0] == tiny_vlms.IMAGE + 1)
        at = torch.nn.functional.pad(seen_at, (0, rows.seqlen - lengths[i]))
        counts = dict(zip(KINDS, rows.kinds[i].bincount(minlength=4).tolist(), strict=True))
        assert torch.equal(rows.kinds[i] == KINDS.index("vision"), at) and counts["answer"] == 3
        assert counts["padding"] == rows.seqlen - lengths[i] and bool((rows.kinds[i, lengths[i] :] == 0).all())


def test_pairs_of_a_data_set(tmp_path):
    """Columns by their names, captions without a question, and what is missing in one sentence."""
    pictures = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(3)]
    columns = {"image": pictures, "question": ["a?", "b?", "c?"], "answer": ["1", "2", ""], "kind": ["x", "y", "z"]}
    for name, data in (
        ("asked", columns),
        ("told", {"images": [[p, p] for p in pictures], "caption": ["red", "dark", "black"]}),
        ("bare", {"image": pictures}),
    ):
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(data).to_parquet(tmp_path / name / "train.parquet")
    first, second = read_image_text(Path(f"dataset:{tmp_path}/asked"), 2)
    assert (first.question, first.answer, first.kind) == ("a?", "1", "x") and second.images[0].getpixel((0, 0)) == (
        40,
        0,
        0,
    )
    told = read_image_text(Path(f"dataset:{tmp_path}/told::train"), 3)
    assert [(p.question, p.answer, len(p.images)) for p in told][2] == ("Describe the picture.", "black", 2)
    for name, words in (("asked", "row 2: a sample without an answer"), ("bare", "expected the columns image")):
        with pytest.raises(BadCalibration, match=words):
            read_image_text(Path(f"dataset:{tmp_path}/{name}"), 3)
    with pytest.raises(BadCalibration, match="cannot be loaded"):
        read_image_text(Path(f"dataset:{tmp_path}/none"), 3)


def test_what_cannot_be_calibrated(run, vlm, tiny, tmp_path):
    """One sentence for each."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "b.png").write_bytes(b"not a picture")
    for name, lines, words in (
        ("answer", [{"image": "a.png", "question": "What?"}], "line 1: a sample without an answer"),
        ("broken", [{"image": "b.png", "question": "What?", "answer": "A"}], "cannot be read"),
        ("few", [], "0 image-text samples, 4 are needed"),
        ("frames", [{"video": "none", "question": "What?", "answer": "A"}], "none cannot be read"),
        ("still", [{"video": "empty", "question": "What?", "answer": "A"}], "has no frames"),
        ("shape", [["a"]], "expected an object with image (or video), question and answer"),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        common = ("quantize", "--scheme", "w4a16", "--method", "gptq", "--samples", 4, "--calib", file)
        code, _, err = run(*common, "--model", vlm("llava"), "--out", tmp_path / "out")
        assert code == 3 and words in err and len(err.strip().splitlines()) == 1
        code, _, err = run(*common, "--model", tiny("llama"), "--out", tmp_path / "out")
        assert code in (2, 3) and len(err.strip().splitlines()) == 1
    picture = {"image": "a.png", "question": "What?", "answer": "A"}
    (tmp_path / "good.jsonl").write_text(f"{json.dumps(picture)}\n" * 4)
    image = AutoTokenizer.from_pretrained(vlm("llava")).convert_ids_to_tokens(tiny_vlms.IMAGE)
    for part, other, words in (
        ("'image'", "'none'", "has no attribute 'text'"),
        (image, "", "no place for an image"),
        ("' ' + c.text + eos_token + '\\n'", "''", "leaves the answer out"),
    ):
        path = shutil.copytree(vlm("llava", processor=True), tmp_path / words)
        template = (path / "chat_template.jinja").read_text()
        assert template.count(part) == 1
        (path / "chat_template.jinja").write_text(template.replace(part, other))
        code, _, err = run(*common[:-1], tmp_path / "good.jsonl", "--model", path, "--out", tmp_path / "out")
        assert code == 3 and words in err and len(err.strip().splitlines()) == 1, err
    code, _, err = run(
        "quantize", "--scheme", "w4a16", "--method", "gptq", "--model", vlm("llava"), "--out", tmp_path / "out"
    )
    assert code == 3 and "no processor" in err
