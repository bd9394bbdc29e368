"""Rules that the source keeps: nothing that runs code from data, imports that run downward, files one can read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "qkit").rglob("*.py"), *ROOT.glob("cli.py")])
FORBIDDEN_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("os", "system"),
    ("os", "popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "full_load"),
    ("yaml", "unsafe_load"),
    ("yaml", "Loader"),
    ("yaml", "FullLoader"),
    ("yaml", "UnsafeLoader"),
}
FORBIDDEN_TRUE = {"trust_remote_code", "shell", "allow_pickle"}
# All folders of the package, top floor first: a folder imports from folders below it alone.
FOLDERS = (
    "commands",
    "workflows",
    "report",
    "benchmark",
    "allocation",
    "sensitivity",
    "engine",
    "evaluation",
    "planning",
    "diagnosis",
    "runtime",
    "kvcache",
    "transforms",
    "rounding",
    "diffusion",
    "solvers",
    "calibration",
    "nn",
    "families",
    "engines",
    "files",
    "verification",
    "tensor",
    "system",
)
TOP_FILES = {"__init__", "__main__", "errors"}
# The independent proof shares nothing with what it proves: errors, and a process of its own for patterns of the checked file.
PROOF_IMPORTS = {"qkit.errors", "qkit.system.patterns"}
MAX_LINES = 400


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def true_pairs(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """(name, value) wherever a node gives a value to a name: call, dict, assignment, default, subscript."""
    if isinstance(node, ast.Call):
        yield from ((k.arg, k.value) for k in node.keywords if k.arg)
    elif isinstance(node, ast.Dict):
        yield from (
            (str(k.value), v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)
        )
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                yield target.id, node.value
            elif isinstance(target, ast.Attribute):
                yield target.attr, node.value
            elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                yield str(target.slice.value), node.value
    elif isinstance(node, ast.arguments):
        positional = [*node.posonlyargs, *node.args]
        if node.defaults:
            yield from ((a.arg, d) for a, d in zip(positional[-len(node.defaults) :], node.defaults, strict=True))
        yield from ((a.arg, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True))


def faults(source: str) -> list[str]:
    """What the rules forbid in a source text."""
    found = [] if source.isascii() else ["not ASCII"]
    for node in ast.walk(ast.parse(source)):
        found += [f"{name}=True" for name, value in true_pairs(node) if name in FORBIDDEN_TRUE and is_true(value)]
        if isinstance(node, ast.Import):
            found += [f"import {a.name}" for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [f"import {module}"] if module.split(".")[0] in FORBIDDEN_MODULES else []
            found += [f"{module}.{a.name}" for a in node.names if (module, a.name) in FORBIDDEN_ATTRIBUTES]
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            pair = (node.value.id, node.attr)
            found += [".".join(pair)] if pair in FORBIDDEN_ATTRIBUTES else []
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append("bare except")
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            literal = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if name in ("import_module", "spec_from_file_location") and not literal:
                found.append(f"{name} of a computed name")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert faults(text) == []
    assert len(text.splitlines()) < MAX_LINES


@pytest.mark.parametrize(
    "bad",
    [
        "f(trust_remote_code=True)",
        "{'trust_remote_code': True}",
        "config.trust_remote_code = True",
        "kwargs['trust_remote_code'] = True",
        "def f(a, trust_remote_code=True): ...",
        "def f(*, trust_remote_code: bool = True): ...",
        "eval('1')",
        "run = exec",
        "builtins.eval('1')",
        "importlib.import_module(name)",
        "from importlib import import_module\nimport_module(f'qkit.{name}')",
        "importlib.util.spec_from_file_location(name, path)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "import pickle",
        "def f():\n    from pickle import loads",
        "import joblib.externals",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "numpy.load(path, allow_pickle=True)",
        "try: ...\nexcept: ...",
        "x = '\u00e9'",
    ],
)
def test_each_rule_can_fail(bad: str) -> None:
    assert faults(bad)


def test_rules_allow_the_harmless() -> None:
    assert faults("model.eval(); f(trust_remote_code=flag); importlib.import_module('torch'); yaml.safe_load(x)") == []


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module, module: str, package: bool, known: set[str]) -> set[str]:
    """Modules of qkit that a source imports at run time; imports for the type checker are none."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                names.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
    return (names & known) - {module}


def import_graph() -> dict[str, set[str]]:
    modules = {module_name(path): path for path in SOURCES if path.is_relative_to(ROOT / "qkit")}
    return {
        name: imported(ast.parse(path.read_text(encoding="utf-8")), name, path.name == "__init__.py", set(modules))
        for name, path in modules.items()
    }


def folder(module: str) -> str | None:
    """The folder of a module; None for the files at the top, which import lazily what they give a name."""
    parts = module.split(".")
    return None if len(parts) < 2 or parts[1] in TOP_FILES else parts[1]


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a folder to one above it, and files in folders that are not in FOLDERS."""
    found = []
    for start, reached in graph.items():
        own = folder(start)
        if own is None:
            continue
        if own not in FOLDERS:
            found.append(f"{start}: its folder is not listed")
            continue
        for at in reached:
            other = folder(at)
            if other in FOLDERS and FOLDERS.index(other) < FOLDERS.index(own):
                found.append(f"{start} -> {at}")
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules that import each other in a ring, or none."""
    left = dict(graph)
    while True:
        used = set[str]().union(*left.values())
        free = [name for name, uses in left.items() if name not in used or not uses & left.keys()]
        if not free:
            return sorted(left)
        for name in free:
            del left[name]


def test_imports_run_downward() -> None:
    graph = import_graph()
    assert "qkit.files.safefile" in graph["qkit.files.checkpoint"]
    assert upward(graph) == []


def test_no_import_cycles() -> None:
    assert cycle(import_graph()) == []


def test_the_top_of_the_package() -> None:
    assert {p.stem for p in (ROOT / "qkit").glob("*.py")} == TOP_FILES
    folders = {p.name for p in (ROOT / "qkit").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(FOLDERS)


def test_tests_have_the_same_tree() -> None:
    others = {"faults", "golden", "docs", "kernels", "reference_models", "__pycache__"}
    assert {p.name for p in (ROOT / "tests").iterdir() if p.is_dir()} <= {*FOLDERS, *others}


def test_fixtures_are_in_one_file() -> None:
    """``from conftest import ..`` finds whichever was imported last."""
    tests = Path(__file__).parent
    assert list(tests.rglob("conftest.py")) == [tests / "conftest.py"]


def test_the_quick_tests_exist() -> None:
    """A file that is not there is no error of pytest where several processes run."""
    named = re.search(r"^QUICK := \$\(addprefix tests/,(.*?)\)$", (ROOT / "Makefile").read_text(), re.M | re.S)
    assert named is not None
    files = [ROOT / "tests" / name for name in named[1].replace("\\", " ").split()]
    assert len(files) > 10 and all(file.is_file() for file in files)


def test_the_proof_shares_nothing_with_the_writer() -> None:
    for module, reached in import_graph().items():
        if folder(module) == "verification":
            assert {m for m in reached if folder(m) != "verification"} <= PROOF_IMPORTS, module


def test_import_rules_can_fail() -> None:
    assert upward({"qkit.solvers.rtn": {"qkit.planning.plan"}, "qkit.planning.plan": set()})
    assert upward({"qkit.cellar.wine": set()})
    assert not upward({"qkit.commands.plan": {"qkit.planning.plan"}, "qkit.planning.plan": {"qkit.errors"}})
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]
