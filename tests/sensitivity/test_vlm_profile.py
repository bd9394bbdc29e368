"""Sensitivities of vision-language models: the loss of answers, errors weighed by modality, budgets from end to end."""

import json

import pytest
import tiny_vlms
import torch
import transformers
from PIL import Image
from test_sensitivity import rough
from torch.nn import functional

from qkit.calibration.batches import batches, extent, sample
from qkit.calibration.dataset import ANSWER, KINDS, VISION, Calibration, digest_of
from qkit.calibration.image_text import rows_of
from qkit.kvcache.sensitivity import divergences, errors_of, sensitivities, with_gradients
from qkit.runtime import loading
from qkit.sensitivity.outputs import OutputSample, next_norms
from qkit.sensitivity.pqi import mean_gradients, weight_shares
from qkit.sensitivity.reference_model import ReferenceModel, Replacement
from qkit.sensitivity.units import units_of
from qkit.system.parallel import workers
from qkit.workflows.calibration_rows import requested_image_text
from qkit.workflows.quantize import Request, open_structure

DOWN, GATE = "layers.0.mlp.down_proj", "layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def llava(vlm):
    """A tiny model with a processor."""
    return vlm("llava", processor=True)


@pytest.fixture(scope="module")
def rows(llava):
    """Drawn scenes, of several lengths."""
    made = requested_image_text(Request(model=str(llava), samples=6), open_structure(str(llava)))
    assert len({x["input_ids"].shape[1] for x in made.inputs}) > 1
    return made


@pytest.fixture
def original(llava):
    with workers(2) as pool:
        yield ReferenceModel(loading.load(llava, dtype=torch.float32), open_structure(str(llava)), pool)


def named(original, end: str) -> str:
    return next(n for n in original.where if n.endswith(end))


def answer_losses(model, rows) -> list[torch.Tensor]:
    """By hand, row after row: of each token of the answer, from the model's logits at the place before it."""
    found = []
    for x, kinds in zip(rows.inputs, rows.kinds, strict=True):
        ids, logits = x["input_ids"][0], model(**x).logits[0]
        places = [i for i in range(len(ids)) if kinds[i] == ANSWER]
        found.append(torch.stack([functional.cross_entropy(logits[i - 1], ids[i]) for i in places]))
    return found


# ---- the loss -------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_answers(original, rows):
    with torch.no_grad():
        by_hand = torch.cat(answer_losses(original.model, rows))
    assert original.loss(rows) == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert extent(rows).scored == len(by_hand) < rows.tokens.numel() / 3
    reference = original.log_probs(rows)
    assert sum(x.shape[1] for x in reference) == len(by_hand)
    loss, kl = original.compare(rows, reference)
    assert loss == pytest.approx(original.loss(rows), rel=1e-6) and abs(kl) < 1e-7


def test_divergence_at_answers(original, rows):
    name = named(original, DOWN)
    reference = original.log_probs(rows)
    with original.replaced({name: Replacement(rough(original, name))}):
        loss, kl = original.compare(rows, reference)
        after = [x.double() for x in original.log_probs(rows)]
    by_hand = [(p.exp() * (p - q)).sum(-1)[0] for p, q in zip((r.double() for r in reference), after, strict=True)]
    assert kl == pytest.approx(float(torch.cat(by_hand).mean()), rel=1e-4) and kl > 1e-6
    assert loss != original.loss(rows)


def test_gradients_are_those_of_answers(original, rows):
    name = named(original, GATE)
    _, found = original.gradients(rows, [name])
    _, squares = original.gradients(rows, [name], squares=True)
    weight = original.model.get_parameter(original.path(name) + ".weight").requires_grad_(True)
    losses = answer_losses(original.model, rows)
    (wanted,) = torch.autograd.grad(torch.cat(losses).mean(), weight, retain_graph=True)
    each = [torch.autograd.grad(x.mean(), weight, retain_graph=True)[0].square() for x in losses]
    weight.requires_grad_(False)
    assert float((found[name] - wanted).norm()) < 1e-4 * float(wanted.norm())
    assert float((squares[name] - sum(each) / len(each)).norm()) < 1e-4 * float(squares[name].norm())
    terms = sum(original.with_inputs(rows, [name], lambda seen: float((seen[name][0] * seen[name][1]).double().sum())))
    assert terms == pytest.approx(float((wanted * original.weight(name)).double().sum()), rel=1e-3)


def test_the_integral_is_the_loss_change(original, rows):
    targets = {n: rough(original, n) for n in original.where}
    start = {n: original.weight(n).clone() for n in targets}
    before = original.loss(rows)
    with original.replaced({n: Replacement(w) for n, w in targets.items()}):
        true = original.loss(rows) - before
    gbar = mean_gradients(original, targets, rows, 8)
    predicted = sum(float(weight_shares(start[n], targets[n], gbar[n]).double().sum()) for n in targets)
    assert predicted == pytest.approx(true, rel=0.05) and abs(true) > 1e-3


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_every_family(vlm, family):
    """The loss by hand, and of every linear of the language model g_x . x = g_w . w: both are g_y . (y - b)."""
    path = vlm(family)
    model = loading.load(path, dtype=torch.float32)
    each = [tiny_vlms.inputs(family, model, seed, n) for seed, n in enumerate([(5, 9), (2, 4)])]
    rows = rows_of(each, [len(x["input_ids"][0]) - 3 for x in each], {tiny_vlms.IMAGE}, "two")
    with workers(1) as pool:
        original = ReferenceModel(model, open_structure(str(path)), pool)
        with torch.no_grad():
            assert original.loss(rows) == pytest.approx(float(torch.cat(answer_losses(model, rows)).mean()), rel=1e-4)
        names = [x.name for b in original.structure.blocks for x in b.linears]
        products = original.with_inputs(rows, names, lambda seen: {n: (x * g).double() for n, (x, g) in seen.items()})
        found = list(products)
        _, g = original.gradients(rows, names)
        sampled = original.sample_inputs(rows, [original.path(names[0])], 20)[original.path(names[0])]
    writers = {"o_proj": "post_attention_layernorm", "down_proj": "norm"}
    for name, norm in next_norms(original.structure).items():
        assert norm.endswith(writers[name.rpartition(".")[2]]) and model.get_submodule(norm).weight.shape == (64,)
    assert len(next_norms(original.structure)) == 4
    assert len(found) == 2 and len(sampled) == len(sample(rows, 20).places) and len(names) == 14
    for n in names:
        size = sum(float(x[n].abs().sum()) for x in found)
        terms = float((g[n] * original.weight(n)).double().sum())
        assert sum(float(x[n].sum()) for x in found) == pytest.approx(terms, abs=1e-5 * size) and size > 0


def test_results_do_not_depend_on_workers(llava, rows):
    found = []
    for count in (1, 2):
        with workers(count) as pool:
            original = ReferenceModel(loading.load(llava, dtype=torch.float32), open_structure(str(llava)), pool)
            name = named(original, DOWN)
            found.append((original.loss(rows), original.gradients(rows, [name])[1][name]))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


# ---- outputs --------------------------------------------------------------------------------------------------


def test_a_sample_has_pictures_and_answers(rows):
    counts = dict(zip(KINDS, rows.kinds.flatten().bincount(minlength=4).tolist(), strict=True))
    flat = torch.cat([x["input_ids"][0] for x in rows.inputs])
    kinds = torch.cat([k[: x["input_ids"].shape[1]] for k, x in zip(rows.kinds, rows.inputs, strict=True)])
    for count in (10, 40, 10_000):
        found = sample(rows, count)
        assert torch.equal(found.kinds, kinds[found.places]) and (found.places.diff() > 0).all()
        for name, kind in (("vision", VISION), ("answer", ANSWER)):
            mine = found.kinds == kind
            assert int(mine.sum()) == min(counts[name], count // 2)
            assert float(found.sample_weight[mine].sum()) == pytest.approx(counts[name], rel=1e-5)
        assert set(found.kinds.tolist()) == {VISION, ANSWER}
        assert (flat[found.places[found.kinds == VISION]] == tiny_vlms.IMAGE).all()


def test_answers_alone_are_a_text(original):
    """With r = 1, and where every token is an answer, errors are those of a text."""
    ids = torch.randint(5, tiny_vlms.IMAGE, (8, 32), generator=torch.Generator().manual_seed(3))
    kinds = torch.full(ids.shape, ANSWER, dtype=torch.uint8)
    each = tuple({"input_ids": row[None]} for row in ids)
    rows = Calibration(
        source="answers", samples=8, seqlen=32, digest=digest_of(ids, each), tokens=ids, inputs=each, kinds=kinds
    )
    units = units_of(original.structure)
    moved = [{x.name: Replacement(rough(original, x.name)) for x in u.linears} for u in units]
    ones = [{"attention": 1.0, "mlp": 1.0}] * 2
    for count in (100, 10_000):
        text = OutputSample(original, units, ids, count)
        answers = OutputSample(original, units, rows, count, ones)
        for unit, found in zip(units, moved, strict=True):
            for alone in (False, True):
                error = answers.error(unit, found, alone)
                assert error == pytest.approx(text.error(unit, found, alone), rel=1e-5) and error > 0


@pytest.mark.parametrize("end", ["layers.1.self_attn.o_proj", GATE])
def test_output_errors_by_hand(original, rows, end):
    """In float64, token after token: an answer's squares once, a picture's times r^2, no others."""
    unit = next(u for u in units_of(original.structure) if any(x.name.endswith(end) for x in u.linears))
    r, name = {"attention": 0.3, "mlp": 0.05}, named(original, end)
    part = "mlp" if "mlp" in end else "attention"
    norm = next_norms(original.structure).get(name)
    assert (norm is not None) == (part == "attention")  # o_proj writes to the residual stream
    seen = {}
    keep = [original.path(name), *([norm] if norm else [])]
    modules = [(n, original.model.get_submodule(n)) for n in keep]
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0][0].double()})) for n, m in modules
    ]
    found = {x.name: Replacement(rough(original, x.name)) for x in unit.linears}
    moved = {n: (f.weight - original.weight(n)).double() for n, f in found.items()}
    gain = torch.ones(()) if norm is None else original.model.get_submodule(norm).weight.double()
    top, bottom = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0)
    for x, kinds in zip(rows.inputs, rows.kinds, strict=True):
        with torch.inference_mode():
            original.model(**x)
        for i in range(x["input_ids"].shape[1]):
            weight = {ANSWER: 1.0, VISION: r[part] ** 2}.get(int(kinds[i]), 0.0)
            inputs = seen[keep[0]][i]
            for n in found:
                whole = original.weight(n).double() @ inputs if norm is None else seen[norm][i]
                top[n] += weight * float((moved[n] @ inputs * gain).square().sum())
                bottom[n] += weight * float((whole * gain).square().sum())
    for handle in handles:
        handle.remove()
    wanted = sum(top[n] / bottom[n] for n in found) / len(found)
    measured = OutputSample(original, [unit], rows, 10_000, [{"attention": 9.0, "mlp": 9.0}, r])
    assert measured.error(unit, found) == pytest.approx(wanted, rel=1e-3)


# ---- the KV cache ---------------------------------------------------------------------------------------------


def test_the_cache_of_pictures(original, rows):
    """Layer by layer by hand: the loss of answers, its gradient at keys and values times their error."""
    model, few = original.model, rows.first(2)
    bits, wanted = 2, torch.zeros(2, dtype=torch.float64)
    for x, batch in zip(few.inputs, batches(few), strict=True):
        start = with_gradients(model, batch)
        ids = x["input_ids"][0]
        with torch.no_grad():
            logits = model(**x).logits[0, -len(batch.targets[0]) - 1 : -1]
            assert start.loss == pytest.approx(float(functional.cross_entropy(logits, ids[batch.at + 1])), rel=1e-5)
        for layer, (pair, errors) in enumerate(zip(start.seen, errors_of(start.seen, bits, 128), strict=True)):
            assert pair[0].shape[2] == len(ids)
            wanted[layer] += sum((t.grad.double() * e).abs().mean() for t, e in zip(pair, errors, strict=True)) / 2
    assert sensitivities(model, few, [bits])[:, 0].tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    kl = divergences(model, few, [8, 2])
    assert (kl[:, 1] > kl[:, 0]).all() and (kl[:, 1] > 1e-6).all()


# ---- rows -----------------------------------------------------------------------------------------------------


def test_the_first_rows(llava, rows, calib):
    """Are those of a request for so few, whatever their kind."""
    few = requested_image_text(Request(model=str(llava), samples=3), open_structure(str(llava)))
    assert rows.first(3).digest == few.digest != rows.digest and rows.first(6) == rows
    assert len(batches(rows.first(3))) == 3
    ids = torch.arange(200).view(10, 20)
    text = Calibration(source="text", samples=10, seqlen=20, digest=digest_of(ids), tokens=ids)
    assert torch.equal(text.first(4).tokens, ids[:4]) and text.first(4).digest == digest_of(ids[:4])
    assert [b.ids.shape for b in batches(text, 100)] == [b.ids.shape for b in batches(ids, 100)] == [(5, 20)] * 2


# ---- commands -------------------------------------------------------------------------------------------------

SMALL = ("--samples", 4, "--threads", 1, "--group-size", 32)
PROFILE = (*SMALL, "--candidates", "int2,int4,w8a8", "--method", "rtn", "--rows", 3, "--points", 2)


def test_a_budget_from_end_to_end(run, llava, tmp_path):
    """Profile with drawn scenes and audit it; plan, refine, pack and prove what it says."""
    out, data = tmp_path / "out", tmp_path / "p.json"
    measures = ("--measures", "weight,output,output_norm,first,first_x,fisher,pqi,loss,kl")
    profile = ("profile", "--model", llava, *PROFILE, "--out", tmp_path / "p")
    code, said, err = run(*profile, *measures, "--audit", "--json", data)
    assert code == 0, err
    found = json.loads(data.read_text())
    assert found["audit"]["text"] == "drawn scenes" and found["audit"]["rows"] == 3 and "audit" in said
    made = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert made["base_loss"] == found["base_loss"] > 0
    for unit in made["units"]:
        costs = {name: choice["costs"] for name, choice in unit["choices"].items()}
        for measure in ("weight", "output", "output_norm"):
            assert costs["W2A16"][measure] > costs["W4A16"][measure] > 0
        assert costs["W8A8"]["first_x"] > 0 == costs["W2A16"]["first_x"]
    assert made["whole"]["W2A16"]["kl"] > made["whole"]["W4A16"]["kl"] > 0
    code, _, err = run(*profile, *measures, "--audit", "--audit-text", tmp_path)
    assert code == 3 and "--audit: " in err and "no file pairs.jsonl and no images" in err
    code, said, err = run(
        "quantize", "--model", llava, "--bits", 4.5, "--profile", tmp_path / "p", "--refine", 2, *SMALL[:4], "--method", "rtn",
        "--target", "vision=w4a16", "--out", out,
    )  # fmt: skip
    assert code == 0 and "refined: " in said, err
    assert run("verify", out)[0] == 0
    model = loading.load(out, dtype=torch.float32)
    assert torch.isfinite(tiny_vlms.logits("llava", model)).all()
    again = run(*profile, *measures)  # goes on from what is there
    assert again[0] == 0 and json.loads((tmp_path / "p" / "profile.json").read_text()) == made


def test_a_profile_is_of_its_rows(run, llava, calib, tmp_path):
    """The user's pairs, or a text; what was measured on others is refused."""
    lines = []
    for i, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": "Which colour", "answer": color})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    losses = []
    for i, given in enumerate((("--calib", pairs), (), ("--calib", calib, "--seqlen", 32))):
        common = ("profile", "--model", llava, *PROFILE, "--measures", "output", *given)
        code, _, err = run(*common, "--out", tmp_path / str(i), "--json", tmp_path / "p.json")
        assert code == 0, err
        losses.append(json.loads((tmp_path / "p.json").read_text())["base_loss"])
        if i:
            code, _, err = run(*common, "--out", tmp_path / "0")
            assert code != 0 and "with another" in err and len(err.strip().splitlines()) == 1
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "rtn", "--significant", 0.5),
        ("--method", "requant+rtn"),
        ("--method", "rtn", "--significant", 5, "--target", "vision=w3a16"),
    ],
)
def test_significant_weights_of_answers(run, llava, tmp_path, options):
    out = tmp_path / "out"
    code, said, err = run("quantize", "--model", llava, "--scheme", "w3a16", *SMALL, *options, "--out", out)
    assert code == 0 and "linears quantized" in said, err
    assert run("verify", out)[0] == 0
    record = json.loads((out / "qkit.json").read_text())
    assert "drawn scenes" in json.dumps(record)
    found = [name for name, x in record["linears"].items() if x.get("sparse", 0)]
    assert any("language" in name for name in found)
    assert any("vision" in name for name in found) == ("--target" in options)


def test_towers_under_a_budget(run, vlm, tmp_path):
    """With a CLIP every part is profiled and decided: costs are those of layers replaced by hand, bytes those of the file."""
    path = vlm("llava_clip", processor=True)
    profile, out = tmp_path / "profile", tmp_path / "out"
    code, _, err = run(
        "profile", "--model", path, "--candidates", "int2,int8,bf16", *SMALL, "--method", "gptq",
        "--measures", "weight,output,output_norm,first,first_x,pqi,kl", "--points", 2, "--out", profile, "--audit"
    )  # fmt: skip
    assert code == 0, err
    units = json.loads((profile / "profile.json").read_text())["units"]
    names = [n for u in units for n in u["linears"]]
    structure = open_structure(str(path))
    assert names == [x.name for b in structure.every_block for x in b.linears]
    costs = {u["linears"][0]: u["choices"]["W2A16"]["costs"] for u in units}
    seen = {n: c for n, c in costs.items() if "language_model" not in n}
    assert len(seen) == 10 and all(
        min(c["weight"], c["output"], c["kl"]) > 0 for n, c in seen.items() if ".1." not in n
    )
    # The last block of the tower is behind the features that are taken: nothing in it matters.
    assert all(c["kl"] == 0 and abs(c["pqi"]) == 0 for n, c in seen.items() if "layers.1." in n)
    whole = run("quantize", "--model", path, "--profile", profile, "--bits", 5, *SMALL, "--refine", 4, "--out", out)
    assert whole[0] == 0 and run("verify", out)[0] == 0, whole[2]
    made = json.loads((out / "qkit.json").read_text())
    given = {n: made["linears"].get(n, {"scheme": "bf16"})["scheme"] for n in names}
    assert {given[n] for n in names if "encoder.layers.1." in n} == {"W2A16"}  # what costs nothing gets the least
    assert len(set(given.values())) >= 2
    own = tiny_vlms.logits("llava_clip", loading.load(out, dtype=torch.float32))
    stock = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert (own - tiny_vlms.logits("llava_clip", stock)).norm() < 1e-5 * own.norm()
    code, _, err = run(
        "quantize", "--model", path, "--profile", profile, "--bits", 5, *SMALL, "--target", "vision=w4a16",
        "--out", tmp_path / "b",
    )  # fmt: skip
    assert code == 2 and "the budget decides" in err
