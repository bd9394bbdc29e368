"""The pages for those who build qkit: their code runs, and a method is one new file and one line in one table."""

import json
import re
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file

from qkit.families import Family, Keys, declared, discover
from qkit.families.blocks import Group
from qkit.kvcache import policy
from qkit.solvers.table import SOLVERS, Solver
from qkit.solvers.task import Task
from qkit.system.option import Option
from qkit.tensor import formats
from qkit.tensor.formats import FORMATS, SCHEMES
from qkit.transforms.table import TRANSFORMS, Transform
from qkit.verification import kv_cache
from qkit.workflows.quantize import open_structure

ROOT = Path(__file__).parents[2]
DEVELOP = ROOT / "docs" / "develop"


def block(page: str, first: str) -> str:
    """The code block of a page whose first line is that comment, without it."""
    text = (DEVELOP / page).read_text(encoding="utf-8")
    (found,) = [
        t for t in re.findall(r"^```py(?:thon)?\n(.*?)^```$", text, re.M | re.S) if t.startswith(f"# {first}\n")
    ]
    return found.partition("\n")[2]


def new_module(monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    """The source as the module of that name, for one test: what one new file is."""
    module = types.ModuleType(name)
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)


def new_entry(page: str, first: str) -> tuple[str, Solver | Transform]:
    """(name, entry) of a table, from the line that a page shows."""
    names = {"Solver": Solver, "Transform": Transform, "Option": Option, "import_module": import_module}
    ((name, entry),) = eval(f"{{{block(page, first)}}}", names).items()
    return name, entry


@pytest.fixture
def clip(monkeypatch):
    """The solver of add-a-solver.md, registered."""
    page = "add-a-solver.md"
    new_module(monkeypatch, "qkit.solvers.clip", block(page, "qkit/solvers/clip.py"))
    monkeypatch.setitem(SOLVERS, *new_entry(page, "qkit/solvers/table.py, in SOLVERS"))


@pytest.fixture
def equalize(monkeypatch):
    """The transform of add-a-transform.md, registered."""
    page = "add-a-transform.md"
    new_module(monkeypatch, "qkit.transforms.equalize", block(page, "qkit/transforms/equalize.py"))
    monkeypatch.setitem(TRANSFORMS, *new_entry(page, "qkit/transforms/table.py, in TRANSFORMS"))


def quantized(run, out: Path, *options) -> dict:
    """qkit.json of a run on tiny-llama."""
    code, _, err = run("quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--out", out, "--threads", 1, *options)
    assert code == 0, err
    return json.loads((out / "qkit.json").read_text())


# ---- a solver ----------------------------------------------------------------------------------------------------


def test_a_new_solver_runs_through_the_command_line(clip, run, tmp_path) -> None:
    records = {
        share: quantized(run, tmp_path / share, "--method", "clip", "--option", f"share={share}")
        for share in ("1", "0.8")
    }
    for share, record in records.items():
        assert record["recipe"]["options"] == {"share": float(share)}
        assert {x["solver"] for x in record["linears"].values()} == {"clip"}
    # Nothing is clipped by a share of 1, and a share of 0.8 is seen in every layer: the option reaches the solver.
    one, less = (records[share]["linears"] for share in ("1", "0.8"))
    assert all(x["error"] == x["baseline_error"] for x in one.values())
    assert all(less[n]["error"] < x["error"] and less[n]["weight_sha256"] != x["weight_sha256"] for n, x in one.items())
    assert run("verify", tmp_path / "0.8")[0] == 0


def test_its_default_is_taken(clip, run, tmp_path) -> None:
    default, given = tmp_path / "default", tmp_path / "given"
    quantized(run, default, "--method", "clip")
    quantized(run, given, "--method", "clip", "--option", "share=0.9")
    first, second = (load_file(folder / "model.safetensors") for folder in (default, given))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("share=2", "option 'share': expected more than 0.5, to 1, found 2.0"),
        ("share=0.5", "option 'share': expected more than 0.5, to 1, found 0.5"),
        ("share=wide", "option 'share': expected float, found 'wide'"),
        ("shar=0.8", "unknown option 'shar' for clip; did you mean share?"),
    ],
)
def test_options_out_of_range_are_refused(clip, run, tmp_path, option: str, said: str) -> None:
    code, _, err = run(
        "quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--method", "clip", "--option", option,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2 and said in err
    assert not (tmp_path / "out").exists()


def test_it_is_listed(clip, run) -> None:
    code, out, _ = run("list", "methods")
    (line,) = [line for line in out.splitlines() if line.split()[:2] == ["clip", "solver"]]
    assert code == 0 and "share=0.9" in line


def test_without_its_line_it_is_unknown(run, tmp_path) -> None:
    code, _, err = run("quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--method", "clip", "--out", tmp_path)
    assert code == 2 and "unknown method 'clip'" in err


def test_the_test_of_the_page(clip) -> None:
    names: dict = {}
    exec(block("add-a-solver.md", "tests/solvers/test_clip.py"), names)
    names["test_clipping_helps_rows_with_a_long_tail"]()


def test_the_message_of_the_page(clip) -> None:
    assert "option 'share': expected more than 0.5, to 1, found 2.0" in (DEVELOP / "add-a-solver.md").read_text()


@pytest.mark.parametrize("name", FORMATS)
def test_the_solver_of_the_page_works_on_every_format(clip, name: str) -> None:
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    amax = weight.abs().amax().reshape(1)
    task = Task(weights=[weight], fmt=FORMATS[name], dtype=torch.bfloat16, amax=amax, options={"share": 0.9})
    assert SOLVERS["clip"].solve(task).qtensors[0].shape == (128, 256)


# ---- a transform -------------------------------------------------------------------------------------------------


def test_a_new_transform_runs_through_the_command_line(equalize, run, tmp_path, calib) -> None:
    rows = ["--calib", calib, "--samples", 8, "--seqlen", 32]
    record = quantized(run, tmp_path / "out", "--method", "equalize+rtn", *rows)
    assert record["transforms"] == ["equalize"] and record["calibration"]["samples"] == 8
    plain = quantized(run, tmp_path / "plain", "--method", "rtn")
    changed = [n for n, p in record["plain"].items() if p != plain["plain"][n]]
    assert any(n.endswith("input_layernorm.weight") for n in changed)  # a scale was folded into a norm
    assert run("verify", tmp_path / "out")[0] == 0
    code, out, _ = run("list", "methods")
    assert code == 0 and re.search(r"^\s*equalize\s+transform ", out, re.M)


# ---- formats, families, caches, exports --------------------------------------------------------------------------


def test_a_new_scheme_is_one_line(monkeypatch, run, tmp_path) -> None:
    line = block("add-a-format.md", "qkit/tensor/formats.py, in SCHEMES")
    (made,) = eval(line, {"_scheme": formats._scheme})
    monkeypatch.setitem(SCHEMES, made.name, made)
    code, _, err = run(
        "quantize", "--model", "tiny-llama", "--scheme", "w6a8", "--method", "rtn", "--out", tmp_path / "out"
    )
    assert code == 0, err
    linears = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"].values()
    assert {(x["format"]["bits"], x["activations"]["name"]) for x in linears} == {(6, "int8_token")}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"


def test_a_new_family_says_what_the_run_shows_and_adds_its_keys(monkeypatch, run, small, tmp_path) -> None:
    page = "add-a-family.md"
    found: dict = {"Family": Family, "Group": Group, "Keys": Keys}
    exec(block(page, "qkit/families/llm.py"), found)
    line = block(page, "tests/tiny_models.py, in FAMILIES")
    given = {"transformers": transformers, "_SIZES": tiny_models._SIZES}
    ((name, config),) = eval(f"{{{line}}}", given).items()
    monkeypatch.setitem(tiny_models.FAMILIES, name, config)
    model = tiny_models.make(name, tmp_path / "model")
    results = []
    for declare in (False, True):
        if declare:
            for module in (declared, discover):
                monkeypatch.setattr(module, "DECLARED", (*module.DECLARED, found["GRANITE"]))
        out = tmp_path / f"out-{declare}"
        code, _, err = run(
            "quantize", "--model", model, "--scheme", "w4a16", "--group-size", 32, "--method", "awq", "--out", out, *small
        )  # fmt: skip
        assert code == 0, err
        family = open_structure(str(model)).family
        results.append((family.name, family.keys is not None, (out / "model.safetensors").read_bytes()))
    before, after = (load_file(folder / "model.safetensors") for folder in (model, out))
    norms = [n for n in before if "layers" in n and n.endswith("layernorm.weight")]
    assert any(not torch.equal(before[n], after[n]) for n in norms)
    assert [r[:2] for r in results] == [("discovered:granite", False), ("granite", True)]
    assert results[0][2] == results[1][2]


def test_a_new_cache_policy_is_data(monkeypatch) -> None:
    page = "add-a-cache-policy.md"
    kinds = eval(f"{{{block(page, 'qkit/kvcache/policy.py, in KINDS')}}}")
    monkeypatch.setitem(policy.KINDS, *kinds.popitem())
    ((kind, defaults),) = eval(f"{{{block(page, 'qkit/kvcache/policy.py, in parse')}}}").items()
    assert policy.parse(f"{kind}4").kind == kind and defaults == {"window": 64}
    ((field, (accepts, said)),) = eval(f"{{{block(page, 'qkit/verification/kv_cache.py, in _CACHE')}}}").items()
    before, said_before = kv_cache._CACHE[field]
    assert said == said_before and accepts(kind) and not before(kind)
    assert all(accepts(known) == before(known) for known in policy.KINDS if known != kind)
    names: dict = {}
    exec(block(page, "tests/kvcache/test_kvcache_recent.py"), names)
    names["test_the_newest_tokens_are_as_they_came"]()


def test_a_new_layout_round_trips(monkeypatch) -> None:
    page = "add-an-export.md"
    new_module(monkeypatch, "qkit.tensor.byte_codes", block(page, "qkit/tensor/byte_codes.py"))
    names: dict = {}
    exec(block(page, "tests/tensor/test_byte_codes.py"), names)
    for name, fmt in FORMATS.items():
        if fmt.kind == "int":
            names["test_round_trip"](name)


# ---- pages that describe the code --------------------------------------------------------------------------------

# What changes something of another library, or of the process.
CHANGES = re.compile(
    r"__class__ = |sys\.meta_path|\.set_submodule\(|Interface\.register\(|@register_quantiz|_MAPPING\.|\bsetattr\(module"
    r"|register_buffer\(name|simplefilter\(|set_num_threads\(|signal\.signal\(|set_verbosity|TorchFunctionMode\)|mallopt\("
)


def test_every_change_of_another_library_is_on_the_page() -> None:
    page = (DEVELOP / "hooks.md").read_text(encoding="utf-8")
    files = [p for p in (ROOT / "qkit").rglob("*.py") if CHANGES.search(p.read_text(encoding="utf-8"))]
    assert len(files) > 10
    assert [name for p in files if (name := p.relative_to(ROOT).as_posix()) not in page] == []
    assert all((ROOT / name).is_file() for name in re.findall(r"`(qkit/[\w/]+\.py)`", page))


def test_names_on_the_page_of_hooks_exist() -> None:
    page = (DEVELOP / "hooks.md").read_text(encoding="utf-8")
    named = re.findall(r"\| `(qkit/[\w/]+\.py)`, `(?:\w+\.)?(\w+)`", page)
    named += re.findall(r"\*\*File\*\*: `(qkit/[\w/]+\.py)`, (?:function|functions|classes) `(\w+)`", page)
    assert len(named) > 12
    for file, name in named:
        assert re.search(rf"^\s*(?:def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.M), (file, name)


def test_every_field_of_a_record_is_on_the_page(run, small, tiny, tmp_path) -> None:
    page = (DEVELOP / "qkit-json.md").read_text(encoding="utf-8")
    model = tiny("llama")
    code, _, err = run(
        "quantize", "--model", model, "--scheme", "w4a16", "--group-size", 32, "--method", "gptq", "--outliers", 0.5,
        "--rank", 4, "--kv", "kivi2", "--out", tmp_path / "out", *small,
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())
    linear, plain = (next(iter(record[key].values())) for key in ("linears", "plain"))
    assert {"sparse", "rank"} <= linear.keys()
    fields = [*record, *linear, *linear["format"], *plain]
    fields += [field for key in ("source", "calibration", "kv") for field in record[key]]
    assert [f for f in fields if f"`{f}`" not in page] == []


def test_links_and_files_on_the_pages_exist() -> None:
    for page in DEVELOP.glob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        named = re.findall(r"`((?:qkit|tests|tools|kernels)/[\w/.-]+\.(?:py|json|md))`", text)
        new = {"qkit/solvers/NAME.py", "qkit/transforms/NAME.py", "qkit/tensor/NAME.py"}
        assert [n for n in named if n not in new and not (ROOT / n).is_file()] == [], page.name
        for folder in re.findall(r"`((?:qkit|tests|kernels|reports)/[\w/]+)/?`", text):
            assert (ROOT / folder).is_dir(), (page.name, folder)


def test_sentences_are_short() -> None:
    for page in DEVELOP.glob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        text = re.sub(r"`[^`]*`", "NAME", text)
        for line in (line for line in text.splitlines() if not line.startswith("|")):
            for sentence in re.split(r"[.:;?!](?:\s|$)", line):
                assert len(sentence.split()) <= 35, (page.name, sentence)


def test_architecture_names_every_folder() -> None:
    page = (DEVELOP / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ", page.partition("## Flow")[0], re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    folders = {p.name for p in (ROOT / "qkit").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert set(named) == folders and len(named) == len(folders)
