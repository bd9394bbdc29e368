"""Vision towers and projectors: found in every family, quantized by recipe, loaded by both libraries, calibrated."""

import json
import shutil

import pytest
import tiny_vlms
import torch
import transformers
from safetensors.torch import load_file, save_file

from qkit.calibration.block_calls import enter
from qkit.engine.export import job_identity
from qkit.engine.job import Job
from qkit.families.structure import ModelStructure
from qkit.files.checkpoint import Checkpoint
from qkit.runtime.loading import load
from qkit.workflows.quantize import Request, prepare, quantize

TARGETS = ("--target", "vision=w4a16", "--target", "projector=w8a16")


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_packed_and_loaded(run, vlm, tmp_path, family):
    """Every linear of tower and projector is packed; logits are those of stock transformers, which cannot load a SigLIP."""
    path, out = vlm(family), tmp_path / "out"
    towers = {
        s.name: [x.name for b in s.blocks for x in b.linears] for s in ModelStructure(Checkpoint.open(path)).towers
    }
    assert list(towers) == ["vision", "projector"] and len(towers["vision"]) >= 8 and len(towers["projector"]) >= 1
    code, _, err = run("quantize", "--model", path, "--scheme", "w4a16", "--method", "rtn", *TARGETS, "--out", out)
    assert code == 0 and run("verify", out)[0] == 0, err
    made = json.loads((out / "qkit.json").read_text())["linears"]
    assert {made[n]["scheme"] for n in towers["vision"]} == {"W4A16"}
    assert {made[n]["scheme"] for n in towers["projector"]} == {"W8A16"}
    own = tiny_vlms.logits(family, load(out, dtype=torch.float32))
    before = tiny_vlms.logits(family, load(path, dtype=torch.float32))
    assert 0.01 < (own - before).norm() / before.norm() < 0.5
    siglip = "siglip" in str(json.loads((path / "config.json").read_text())["vision_config"].get("model_type"))
    if siglip:  # its initializer asks every linear for its weight
        said = run("verify", out)[1]
        assert "SigLIP" in said
        return
    other = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert (own - tiny_vlms.logits(family, other)).norm() < 1e-5 * own.norm()


def test_rules_and_refusals(run, vlm, tmp_path):
    """A rule with a scheme reaches into a tower; a target that is not there, and a text for what sees pictures, are refused."""
    path = vlm("llava", processor=True)
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "scheme: w4a16\ntargets: {projector: w8a16}\nrules:\n  - match: '*vision_tower*fc1'\n    scheme: w8a16\n"
        "  - match: '*projector.linear_2'\n    skip: small\n"
    )
    plan = prepare(Request(model=str(path), recipe=rules)).plan
    inside = {n.rpartition("vision_tower")[2]: p.scheme for n, p in plan.linears.items() if "language_model" not in n}
    wide = [".encoder.layers.0.mlp.fc1", ".encoder.layers.1.mlp.fc1", "multi_modal_projector.linear_1"]
    assert inside == dict.fromkeys(wide, "W8A16")
    assert plan.skipped["multi_modal_projector.linear_2"] == "small"
    assert "--target vision=SCHEME" in plan.skipped["vision_tower.encoder.layers.0.mlp.fc2"]
    out, text = ("--out", tmp_path / "out"), tmp_path / "text.txt"
    text.write_text("Some words. " * 2000)
    for args, code, words in (
        (("--target", "visoin=w4a16"), 2, "did you mean vision?"),
        (("--target", "vision"), 2, "expected PART=SCHEME"),
        (
            ("--target", "vision=w4a16", "--method", "gptq", "--calib", text, "--seqlen", 64, "--samples", 8),
            2,
            "a text without images",
        ),
    ):
        got, _, err = run("quantize", "--model", path, "--scheme", "w4a16", *args, *out)
        assert got == code and words in err and len(err.strip().splitlines()) == 1, err


def request(path, method="awq+gptq", **options):
    targets = {"vision": "w4a8", "projector": "w4a8"}
    return Request(model=str(path), scheme="w4a8", method=method, targets=targets, samples=8, options=options)


def test_rows_reach_towers(vlm, tmp_path, quiet):
    """The solver of every linear of a tower saw all pieces of all pictures, through what was quantized before it."""
    path = vlm("llava", processor=True)
    quantize(request(path), tmp_path / "out", quiet, keep_job=True)
    made = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"]
    seen = {n: r["tokens"] for n, r in made.items() if "language_model" not in n}
    assert len(seen) == 14 and set(seen.values()) == {8 * 16}
    assert sum(r["error"] for n, r in made.items() if n in seen) < sum(made[n]["baseline_error"] for n in seen)
    found = prepare(request(path))
    hashed = {"sha256": found.structure.checkpoint.sha256()}
    with Job.open(tmp_path / "out.job", job_identity(found.plan, hashed)):
        pass
    # What enters the language model now is not what entered it in the original.
    samples = list(found.plan.calibration.calls(tmp_path))[:1]
    paths = found.structure.sequences[-1].paths
    before, after = (next(enter(load(p, dtype=torch.float32), paths, samples))[0][0] for p in (path, tmp_path / "out"))
    pictures = found.plan.calibration.kinds[0] == 2
    change = (before - after).norm(dim=1) / before.norm(dim=1)
    assert bool((change[pictures] > 1e-3).all()) and bool((change[~pictures] == 0).all())


def test_measured(run, vlm, tmp_path):
    """What is left to measuring: the KL figures are those of models rounded by hand, and the cheaper byte decides."""
    path, rows = vlm("llava", processor=True), ("--method", "gptq", "--samples", 8)
    loud, quiet_ = tmp_path / "loud", tmp_path / "quiet"
    for folder, factor in ((loud, 1.0), (quiet_, 1e-3)):  # what is projected reaches the language model, or hardly does
        shutil.copytree(path, folder)
        tensors = load_file(path / "model.safetensors")
        name = "multi_modal_projector.linear_2.weight"
        save_file({**tensors, name: tensors[name] * factor}, folder / "model.safetensors", {"format": "pt"})
    for folder, verdict in ((loud, "left as it is"), (quiet_, "quantized too")):
        command = ("--model", folder, "--scheme", "w2a16", *rows)
        code, said, err = run("plan", *command)
        assert code == 0 and "measured when quantize runs: whether projector" in said and "nats for" not in said, err
        code, said, err = run("quantize", *command, "--out", tmp_path / f"{folder.name}-out")
        assert code == 0, err
        line = next(x for x in said.splitlines() if x.startswith("projector: "))
        assert verdict in line and "nats for" in line, said
        assert "vision: left as it is: transformers cannot load a packed SigLIP" in said.replace("\n", " ")


class StopAfter:
    """Raises at a step of a block, as a kill would."""

    def __init__(self, block: str) -> None:
        self.block, self.now = block, ""

    def start(self, what: str, total: int) -> None:
        self.now = what

    def step(self, amount: int = 1) -> None:
        if self.now.startswith(self.block):
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("block", "asked"),
    [
        ("vision block 2/2, layers 3", {}),
        ("projector block 1/1", {}),
        ("block 1/2, layers 2", {}),
        ("block 2/2, layers 2", {"method": "mbq", "inputs": "distort"}),
    ],
)
def test_resumed(vlm, tmp_path, quiet, block, asked):
    """A run that was stopped in a tower, or behind it, gives the bytes of one that was not."""
    path = vlm("llava", processor=True)
    quantize(request(path, **asked), tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        quantize(request(path, **asked), tmp_path / "out", StopAfter(block))
    quantize(request(path, **asked), tmp_path / "out", quiet)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
