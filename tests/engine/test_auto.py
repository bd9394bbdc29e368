"""Method auto: what it tries, what it keeps, and that it says so."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quiet, Stops

from qkit.errors import UsageError
from qkit.planning.recipe import make_recipe, trial_recipes
from qkit.runtime.loading import load, load_tokenizer
from qkit.workflows.quantize import Request, prepare, quantize


@pytest.fixture
def asked(tiny: Any, tmp_path: Path) -> Request:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97} and" for i in range(4000)))
    return Request(
        model=str(tiny("llama", num_hidden_layers=3)),
        scheme="w3a16",
        method="auto",
        group_size=32,
        calib=text,
        samples=32,
        seqlen=32,
        threads=1,
    )


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in Path(f"{out}.job", "journal.jsonl").read_text().splitlines()]


def sums(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}


@pytest.mark.parametrize("scheme, method, beyond, expected", [
    ("w4a16", "auto", False, ["gptq", "gptq, compensate 0.5", "awq+gptq", "smoothquant+gptq", "rtn"]),
    ("w4a8", "auto", False, ["gptq", "gptq, compensate 0.5", "awq+gptq", "smoothquant+gptq", "rtn"]),
    ("w8a8", "rotate+auto", False, ["gptq", "gptq, compensate 0.5", "awq+gptq", "smoothquant+gptq", "rtn"]),
    ("nvfp4", "residual+auto+signround", False, ["gptq", "gptq, compensate 0.5", "awq+gptq", "smoothquant+gptq", "rtn"]),
    ("w4a8", "awq+auto", False, ["gptq", "gptq, compensate 0.5", "rtn"]),
    ("w4a8", "auto", True, ["gptq", "rtn"]),
    ("w4a8", "gptq", False, []),
])  # fmt: skip
def test_what_is_tried(scheme: str, method: str, beyond: bool, expected: list[str]) -> None:
    found = trial_recipes(make_recipe({"scheme": scheme, "method": method}, "test"), beyond)
    assert list(found) == expected
    others = [p for p in method.split("+") if p != "auto"]
    for name, recipe in found.items():
        assert set(recipe.method.split("+")) == {*others, *name.partition(",")[0].split("+")}
        assert recipe.options.get("signed", False) == scheme.startswith("w4")


def test_options_go_to_those_that_have_them() -> None:
    given = {"damp": 0.02, "signed": False, "steps": 3}
    found = trial_recipes(make_recipe({"scheme": "w4a16", "method": "auto+signround", "options": given}, "test"), False)
    assert found["gptq, compensate 0.5"].options == {**given, "sweeps": 4, "compensate": 0.5}
    assert found["rtn"].options == {"signed": False, "steps": 3}
    with pytest.raises(UsageError, match="unknown option 'dump'"):
        make_recipe({"scheme": "w4a16", "method": "auto", "options": {"dump": 0.02}}, "command line")
    with pytest.raises(UsageError, match="at most one solver"):
        make_recipe({"scheme": "w4a16", "method": "auto+gptq"}, "command line")


def test_the_best_is_kept_and_nothing_depends_on_the_workers(asked: Request, tmp_path: Path) -> None:
    out, other, stopped = tmp_path / "out", tmp_path / "other", tmp_path / "stopped"
    assert quantize(asked, out, Quiet()).ok
    for entry in journal(out):
        errors = entry["held_out_errors"]
        assert len(errors) == 5 and errors[entry["recipe"]] == min(errors.values()) < max(errors.values())
    quantize(replace(asked, threads=3), other, Quiet())
    for phases in (9, 25):
        with pytest.raises(KeyboardInterrupt):
            quantize(asked, stopped, Stops(phases))
    quantize(asked, stopped, Quiet())
    assert sums(out) == sums(other) == sums(stopped)


def test_what_is_kept_is_what_was_measured(asked: Request, tmp_path: Path) -> None:
    """The packed model gives, behind its only block, the error that the journal says, on the rows that were held out."""
    one = replace(asked, samples=64)
    out = tmp_path / "out"
    quantize(one, out, Quiet())
    ids = load_tokenizer(one.model)(one.calib.read_text(), add_special_tokens=False)["input_ids"][: 64 * 32]
    held = torch.tensor(ids).view(64, 32)[60:]

    def behind_the_first(folder: Any) -> torch.Tensor:
        model, found = load(folder, dtype=torch.float32), []
        model.model.layers[0].register_forward_hook(lambda module, args, made: found.append(made))
        model(held)
        return found[0][0] if isinstance(found[0], tuple) else found[0]

    error = float((behind_the_first(out) - behind_the_first(one.model)).square().mean())
    entry = journal(out)[0]
    assert entry["held_out_errors"][entry["recipe"]] == pytest.approx(error, rel=0.03)  # it runs in bf16 there
    assert {r["tokens"] for r in entry["linears"].values()} == {
        60 * 32
    }  # no recipe is solved with the rows that judge it


@pytest.mark.parametrize("changes", [
    {"scheme": "nvfp4", "group_size": None, "method": "residual+auto"},
    {"scheme": "w4a8", "method": "auto+signround", "options": {"steps": 4, "loss_weighted": True}},
    {"scheme": "w8a8", "group_size": None, "method": "rotate+auto"},
], ids=str)  # fmt: skip
def test_with_other_parts_of_a_method(asked: Request, tmp_path: Path, changes: dict[str, Any]) -> None:
    """What is kept block by block is, at the end, no worse than the first of the list everywhere (but for chance)."""
    request, out, first = replace(asked, **changes), tmp_path / "out", tmp_path / "first"
    assert quantize(request, out, Quiet()).ok
    quantize(replace(request, method=request.method.replace("auto", "gptq")), first, Quiet())
    ids = load_tokenizer(request.model)(asked.calib.read_text()[3000:9000], return_tensors="pt")["input_ids"][:, :512]
    ours, theirs, true = (load(p, dtype=torch.float32)(ids.view(-1, 32)).logits for p in (out, first, request.model))
    assert float((ours - true).square().mean()) < 1.05 * float((theirs - true).square().mean())
    assert all(entry["recipe"] in entry["held_out_errors"] for entry in journal(out))


def test_experts_and_towers(tiny: Any, vlm: Any, asked: Request, tmp_path: Path) -> None:
    assert quantize(replace(asked, model=str(tiny("mixtral"))), tmp_path / "moe", Quiet()).ok
    request = Request(
        model=str(vlm("llava", processor=True)),
        scheme="w4a16",
        method="auto",
        samples=6,
        threads=1,
        targets={"vision": "w4a16"},
    )
    assert quantize(request, tmp_path / "vlm", Quiet()).ok
    said = ["recipe" in entry for entry in journal(tmp_path / "vlm")]
    assert said == sorted(said) and said[-1] and not said[0]


def test_a_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")
    from tiny_dits import make_pipeline

    source = make_pipeline(tmp_path / "wan", steps=3)
    assert quantize(
        Request(model=str(source), scheme="w4a8", method="auto", group_size=32, samples=4, threads=2),
        tmp_path / "out",
        Quiet(),
    ).ok
    assert all(set(entry["held_out_errors"]) == {"gptq", "rtn"} for entry in journal(tmp_path / "out"))


def test_all_of_it_is_forecast(asked: Request) -> None:
    auto, gptq, rtn = (prepare(replace(asked, method=m)).forecast for m in ("auto", "gptq", "rtn"))
    assert sum(auto.operations.values()) > 3 * sum(gptq.operations.values())
    assert auto.peak_memory >= gptq.peak_memory and auto.packed_bytes == gptq.packed_bytes == rtn.packed_bytes


def test_the_command_says_what_it_chose(run: Any, small: list[Any], tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, _ = run(
        "quantize",
        "--model",
        tiny("llama"),
        "--scheme",
        "w4a16",
        "--group-size",
        32,
        "--method",
        "auto",
        "--out",
        out,
        *small,
    )
    chosen = [entry["recipe"] for entry in journal(out)]
    assert code == 0 and all(f"{name} for {7 * chosen.count(name)} linears" in said for name in chosen)
    record = json.loads((out / "qkit.json").read_text())
    assert {x["recipe"] for x in record["linears"].values()} == set(chosen)
    assert all(x["solver"] == ("rtn" if x["recipe"] == "rtn" else "gptq") for x in record["linears"].values())
