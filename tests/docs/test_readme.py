"""What README.md says is so: its tables are the code's, its commands parse, its files load, its Python runs."""

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest
import yaml

from qkit.commands import VERBS, cli
from qkit.errors import QkitError
from qkit.evaluation.budget import load_budget
from qkit.workflows.quantize import Request, prepare, quantize

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOOL = runpy.run_path(str(ROOT / "tools" / "readme_tables.py"))


def blocks(language: str = "") -> list[str]:
    """The code blocks of a language."""
    fences = re.findall(
        r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
    )  # all, so that none is read from its end
    return [text for found, text in fences if found == language]


def commands(text: str) -> list[str]:
    """The lines that call qkit."""
    return re.findall(r"^\s*(?:\$ |- run: )?(qkit [^#\n]*)", text, re.MULTILINE)


COMMANDS = [line.strip() for block in (*blocks(), *blocks("yaml")) for line in commands(block)]


def parse(line: str) -> click.Context:
    """What click makes of a command line, without running it."""
    verb, *rest = shlex.split(line)[1:]
    command = cli.get_command(click.Context(cli), verb)
    if command is None:
        raise click.UsageError(f"no verb {verb}")
    return command.make_context(verb, rest)


def test_tables_are_those_of_the_code() -> None:
    assert TOOL["updated"](README) == README, "run: python tools/readme_tables.py --write"


def test_tables_that_differ_are_noticed() -> None:
    changed = README.replace("| W8A8 |", "| W8A9 |")
    assert changed != README
    assert TOOL["updated"](changed) == README
    with pytest.raises(SystemExit, match="marks"):
        TOOL["updated"](README.replace(TOOL["END"], ""))


def test_spans() -> None:
    assert TOOL["spans"](["int2", "int3", "int4", "int4", "fp8", "int7", "int8"]) == "int2 to int4, fp8, int7, int8"


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str) -> None:
    parse(line)


def test_the_main_verbs_are_shown() -> None:
    assert {line.split()[1] for line in COMMANDS} >= VERBS.keys() - {"demo"}


@pytest.mark.parametrize(
    "bad", ["qkit quantise --model M", "qkit eval OUT --text", "qkit verify", "qkit check OUT --bud b"]
)
def test_commands_that_do_not_exist_are_noticed(bad: str) -> None:
    assert commands(f"$ {bad}") == [bad]
    with pytest.raises(click.UsageError):
        parse(bad)


def test_flags_in_sentences_exist() -> None:
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    known = {"--help"}
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        known.update(name for parameter in command.params for name in parameter.opts)
    named = set(re.findall(r"`(--[a-z-]+)", prose))
    assert len(named) > 5
    assert named <= known


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def named_yaml(name: str) -> str:
    (found,) = [block for block in blocks("yaml") if block.startswith(f"# {name}\n")]
    return found


def test_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(named_yaml("recipe.yaml"), encoding="utf-8")
    plan = prepare(Request(model="tiny-llama", recipe=path)).plan
    assert {p.scheme for p in plan.linears.values()} == {"W4A16", "W8A16"}
    assert plan.skipped["model.layers.0.self_attn.q_proj"] == "the first block reacts strongly"


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
    documented = set(map(int, re.findall(r"^\| (\d+) \| ", README, re.MULTILINE)))
    assert documented == {kind.exit_code for kind in kinds[1:]} | {0}


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, quiet) -> None:
    monkeypatch.chdir(tmp_path)
    quantize(Request(model="tiny-llama", scheme="w4a16"), Path("out"), quiet)
    programs = blocks("python")
    assert len(programs) == 2
    for program in programs:
        exec(compile(program, "README.md", "exec"), {})
    assert "The sea was" in capsys.readouterr().out
