"""README.md and docs/ are true: tables are those of code and reports, commands parse, files load, Python runs."""

import ast
import re
import runpy
import shlex
import shutil
from pathlib import Path

import click
import pytest
import yaml
from doc_pages import NOT_RUN, PAGES, ROOT, USER_PAGES, Block, Page, commands, page

import qkit
from qkit.commands import VERBS, cli
from qkit.diffusion.policy import PolicyConfig
from qkit.errors import QkitError
from qkit.evaluation.budget import load_budget
from qkit.planning.recipe import AUTO
from qkit.planning.request import REQUANT
from qkit.solvers.table import SOLVERS
from qkit.tensor.formats import GGUF_SCHEMES, SCHEMES
from qkit.transforms.table import TRANSFORMS
from qkit.workflows.quantize import Request, prepare, quantize

TOOL = runpy.run_path(str(ROOT / "tools" / "docs_tables.py"))
CODE = TOOL["code_tables"]
HINT = "run: python tools/docs_tables.py --write"
COMMANDS = [(p.name, line) for p in PAGES for line in p.commands]
PROGRAMS = [(p.name, block) for p in USER_PAGES for block in p.blocks if block.language == "python"]
NEW_API = ("quantize", "plan", "profile", "verify", "evaluate", "check", "load")


def parse(line: str) -> click.Context:
    """The parsed command line; nothing is run."""
    verb, *rest = shlex.split(line)[1:]
    command = cli.get_command(click.Context(cli), verb)
    if command is None:
        raise click.UsageError(f"no verb {verb}")
    return command.make_context(verb, rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_up_to_date(page: Page) -> None:
    assert TOOL["updated"](page.text) == page.text, HINT


def test_every_table_is_shown() -> None:
    shown = {name for p in PAGES for name in re.findall(r"<!-- generated:(\S+) -->", p.text)}
    assert shown == set(TOOL["TABLES"])


def test_tables_that_differ_are_noticed() -> None:
    text = page("docs/formats.md").text
    changed = text.replace("| W8A8 |", "| W8A9 |")
    assert changed != text
    assert TOOL["updated"](changed) == text
    with pytest.raises(SystemExit, match="mark"):
        TOOL["updated"](text.replace("<!-- /generated:schemes -->", ""))
    with pytest.raises(SystemExit, match="no table 'scheme'"):
        TOOL["updated"]("<!-- generated:scheme -->\n<!-- /generated:scheme -->\n")


def test_a_changed_report_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "reports", tmp_path / "reports", ignore=shutil.ignore_patterns("*.png", "*.py"))
    monkeypatch.setattr(TOOL["report_tables"], "REPORTS", tmp_path / "reports")
    assert TOOL["updated"](page("docs/results.md").text) == page("docs/results.md").text
    for file in (tmp_path / "reports").glob("*/*.json"):
        file.write_text(re.sub(r"38\.(\d)", r"37.\1", file.read_text(encoding="utf-8")), encoding="utf-8")
    for name in ("README.md", "docs/results.md", "docs/choosing-a-method.md"):
        assert TOOL["updated"](page(name).text) != page(name).text


def test_the_check_of_the_tool(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TOOL["main"](["--check"]) == 0, HINT
    monkeypatch.setitem(TOOL["FIGURES"], "video.png", "reports/comparison/tiny-llama.png")
    assert TOOL["main"](["--check"]) == 1
    assert "docs/figures/video.png is not up to date" in capsys.readouterr().err


def typed_figures(text: str) -> list[str]:
    """Rows of tables outside of generated regions with a cell that is a decimal number, or with an interval."""
    rows = re.findall(r"^\|.*$", TOOL["REGION"].sub("", text), re.MULTILINE)
    return [row for row in rows if re.search(r"\|\s*[*+-]*\d+\.\d+[^|a-z]*\||\[[+-]?\d+\.\d+, ", row)]


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.name)
def test_no_measured_figure_is_typed_into_a_table(page: Page) -> None:
    assert typed_figures(page.text) == []


def test_a_typed_figure_is_noticed() -> None:
    assert typed_figures("| `w4a16` | 38.58 |\n") and typed_figures("| a | -0.2 [-0.31, -0.14] |\n")
    assert typed_figures("<!-- generated:rank -->\n| `w4a16` | 38.58 |\n<!-- /generated:rank -->\n") == []


def test_spans() -> None:
    assert CODE.spans(["int2", "int3", "int4", "int4", "fp8", "int7", "int8"]) == "int2 to int4, fp8, int7, int8"


def test_sizes_of_known_models() -> None:
    shape = next(shape for shape in CODE.SHAPES if shape.name == "Llama 3.1 8B")
    norms = 2 * (2 * shape.layers + 1) * shape.width
    assert shape.weights(None) + norms == 16_060_522_496  # bytes of the published checkpoint
    assert shape.cache(8192) == 8192 * 2 * 32 * 8 * 128 * 2


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[f"{where}: {line}" for where, line in COMMANDS])
def test_command(where: str, line: str) -> None:
    parse(line)


def unknown_names(line: str) -> list[str]:
    """Schemes, methods, options of methods and policies of a command line that no table of qkit has."""
    given = parse(line).params
    found = [] if given.get("scheme") in (None, *map(str.lower, SCHEMES | GGUF_SCHEMES)) else [given["scheme"]]
    parts = (given.get("method") or "").split("+")
    tables = {**SOLVERS, **TRANSFORMS}
    found += [part for part in parts if part and part not in (*tables, AUTO, REQUANT)]
    known = {name for part in parts if part in tables for name in tables[part].options}
    found += [option for option in given.get("options") or () if option.partition("=")[0] not in known]
    return found + [p for p in given.get("policy") or () if p.partition("=")[0] not in PolicyConfig.model_fields]


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.name)
def test_names_in_commands_exist(page: Page) -> None:
    assert [name for line in page.commands for name in unknown_names(line)] == []


@pytest.mark.parametrize(
    ("end", "name"),
    [
        ("--scheme w4a17", "w4a17"),
        ("--method gptq+awk", "awk"),
        ("--method gptq --option sweep=4", "sweep=4"),
        ("--method awq --option sweeps=4", "sweeps=4"),
        ("--policy widths=6", "widths=6"),
    ],
)
def test_names_that_do_not_exist_are_noticed(end: str, name: str) -> None:
    assert unknown_names(f"qkit quantize --model M --out OUT {end}") == [name]


def test_the_main_verbs_are_shown() -> None:
    assert {line.split()[1] for _, line in COMMANDS} >= VERBS.keys()
    assert len({where for where, _ in COMMANDS}) >= 12  # pages


@pytest.mark.parametrize(
    "bad", ["qkit quantise --model M", "qkit eval OUT --text", "qkit verify", "qkit check OUT --bud b"]
)
def test_commands_that_do_not_exist_are_noticed(bad: str) -> None:
    assert commands(f"$ {bad}") == [bad]
    with pytest.raises(click.UsageError):
        parse(bad)


def test_commands_are_found_in_every_kind_of_block() -> None:
    text = "```bash\nqkit verify \\\n  OUT\n```\n```\n$ qkit list schemes   # all\n```\n```yaml\n- run: qkit inspect X\n```\n"
    assert Page("x.md", text).commands == ["qkit verify OUT", "qkit list schemes", "qkit inspect X"]


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.name)
def test_flags_in_sentences_exist(page: Page) -> None:
    known = {"--help", "--debug"}
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        known.update(name for parameter in command.params for name in parameter.opts)
    assert set(re.findall(r"`(--[a-z-]+)", page.prose)) <= known


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page) -> None:
    here = (ROOT / page.name).parent
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.prose):
        file = here / target if target else ROOT / page.name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{target}#{anchor}"


def named_yaml(name: str) -> str:
    texts = [block.text for p in PAGES for block in p.blocks if block.language == "yaml"]
    (found,) = [text for text in texts if text.startswith(f"# {name}\n")]
    return found


def test_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(named_yaml("recipe.yaml"), encoding="utf-8")
    plan = prepare(Request(model="tiny-llama", recipe=path)).plan
    assert {p.scheme for p in plan.linears.values()} == {"W4A16", "W8A16"}
    for layer in ("self_attn.q_proj", "mlp.down_proj"):  # the first rule that matches
        assert plan.skipped[f"model.layers.0.{layer}"] == "too sensitive"


@pytest.mark.parametrize(("name", "said"), [("down_proj", "matches no layer"), ("w8a16", "unknown scheme 'x'")])
def test_recipe_with_a_wrong_name(name: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(named_yaml("recipe.yaml").replace(name, "x"), encoding="utf-8")
    with pytest.raises(QkitError, match=said):
        prepare(Request(model="tiny-llama", recipe=path))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("budget.yaml", ["perplexity", "kl.mean", "same_top1", "size"]),
        ("pictures.yaml", ["accuracy", "accuracy.count", "answer_perplexity", "answer_kl.mean"]),
    ],
)
def test_budget(name: str, lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(named_yaml(name), encoding="utf-8")
    assert [line.name for line in load_budget(path).lines] == lines


def test_workflow() -> None:
    workflow = yaml.safe_load(named_yaml(".github/workflows/quantized-model.yml"))
    steps = workflow["jobs"]["check"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)


def test_exit_codes() -> None:
    kinds = [QkitError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    documented = set(map(int, re.findall(r"^\| (\d+) \| ", page("docs/ci.md").text, re.MULTILINE)))
    assert documented == {kind.exit_code for kind in kinds[1:]} | {0}


def called(program: str) -> set[str]:
    """The names of qkit that a program uses."""
    nodes = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "qkit"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, quiet) -> Path:
    out = tmp_path_factory.mktemp("docs") / "out"
    quantize(Request(model="tiny-llama", scheme="w4a16", method="rtn"), out, quiet)
    return out


@pytest.mark.parametrize(("where", "block"), PROGRAMS, ids=[where for where, _ in PROGRAMS])
def test_python_runs(
    where: str,
    block: Block,
    quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    compile(block.text, where, "exec")
    names = called(block.text)
    assert names <= set(NEW_API)
    if block.note.startswith(NOT_RUN):
        return
    if not all(hasattr(qkit, name) for name in names):
        pytest.skip(f"this version has no qkit.{', qkit.'.join(sorted(names))}")
    monkeypatch.chdir(tmp_path)
    if "quantize" not in names:
        shutil.copytree(quantized, "out")
    exec(compile(block.text, where, "exec"), {})
    if "print(" in block.text:
        assert "The sea was" in capsys.readouterr().out


def test_programs_are_found() -> None:
    run = [where for where, block in PROGRAMS if not block.note.startswith(NOT_RUN)]
    assert {"README.md", "docs/getting-started.md", "docs/serving.md"} <= set(run)
    assert len(PROGRAMS) - len(run) == 1  # a pipeline takes a minute to quantize
