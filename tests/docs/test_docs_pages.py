"""The generated pages are what the code gives now, and mkdocs.yml knows every page."""

import runpy
from pathlib import Path

import click
import yaml

from qkit.commands import VERBS, cli

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "docs_pages.py"))


def test_pages_are_up_to_date() -> None:
    assert TOOL["stale"]() == [], "run: python tools/docs_pages.py --write"


def test_stale_pages_are_noticed(tmp_path: Path) -> None:
    for name in TOOL["PAGES"]:
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("UsageError", "UseError"), encoding="utf-8")
    assert TOOL["stale"](tmp_path) == list(TOOL["PAGES"])
    (tmp_path / "command-line.md").unlink()
    assert "command-line.md" in TOOL["stale"](tmp_path)


def test_every_option_is_on_the_page() -> None:
    page = TOOL["command_line"]()
    for name in VERBS:
        command = cli.get_command(click.Context(cli), name)
        section = page.partition(f"\n## qkit {name}\n")[2].partition("\n## ")[0]
        options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
        assert options
        for option in options:
            assert section.count(f"- `{option.opts[-1]}") + section.count(f", {option.opts[-1]}") >= 1, option.opts


def test_groups_of_options_have_headings_of_their_own() -> None:
    """A command that lists its options in sections, and forgets one."""

    class Grouped(click.Command):
        def format_options(self, ctx, formatter) -> None:
            with formatter.section("Budgets"):
                formatter.write_dl([("--size TEXT", "Bytes of the weight files.")])

    options = [click.Option(["--size"], help="s"), click.Option(["-q", "--quiet"], is_flag=True, help="No progress.")]
    options.append(click.Option(["--old"], hidden=True))
    command = Grouped("x", params=options, help="Does it.\n\n\b\nExample:\n  qkit x --size 1GB")
    page = TOOL["command_section"]("x", command, click.Context(cli, info_name="qkit"))
    assert "### qkit x: budgets\n\n- `--size TEXT`\n\n    Bytes of the weight files.\n" in page
    more = page.partition("### qkit x: more options\n\n")[2]
    assert "--help" not in page  # the same on every command, and said once
    assert more.startswith("- `-q, --quiet`\n\n    No progress.") and "--size" not in more and "--old" not in page
    assert "Example:\n\n```\nqkit x --size 1GB\n```" in page


def test_help_is_markdown() -> None:
    said = "See 'qkit list methods'; without --max-length: int3+0.5% or int3+r16, *.weight, a ``b``."
    wanted = "See `qkit list methods`; without `--max-length`: `int3+0.5%` or `int3+r16`, \\*.weight, a `b`."
    assert TOOL["help_line"](said) == wanted


def test_the_page_of_python_follows_the_package() -> None:
    import qkit

    page = TOOL["python_api"]()
    functions = [name for name in qkit.__all__ if callable(getattr(qkit, name))]
    assert "load" in functions
    assert [line for line in page.splitlines() if line.startswith("      heading: qkit.")] == [
        f"      heading: qkit.{name}" for name in functions
    ]


def pages(node) -> list[str]:
    """All pages of a part of the navigation."""
    if isinstance(node, str):
        return [node]
    children = node if isinstance(node, list) else node.values()
    return [page for child in children for page in pages(child)]


def test_every_page_is_in_the_navigation() -> None:
    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(named) == len(set(named))
    docs = ROOT / "docs"
    assert {p.relative_to(docs).as_posix() for p in docs.rglob("*.md")} <= set(named)
