"""The command line: one thin file per verb."""

from __future__ import annotations

import shlex
import sys
import warnings
from typing import Any

import click

from qkit.errors import QkitError, RenamedWarning, UsageError
from qkit.system.memory import ran_out
from qkit.system.version import __version__

VERBS = {
    "recommend": "Recommend scheme, KV cache and commands for a machine.",
    "quantize": "Quantize a model into a packed checkpoint and verify it.",
    "plan": "Show what quantize would do, and its cost.",
    "profile": "Measure the cost of every format for every layer.",
    "convert": "Write a quantized model in another layout, unchanged.",
    "verify": "Verify every byte of a packed checkpoint.",
    "eval": "Measure a model: perplexity, KL divergence, tasks.",
    "report": "Write the page of finished results.",
    "check": "Compare a packed checkpoint with a budget (for CI).",
    "bench": "Measure the speed of products and models.",
    "serve-command": "Print the command line that serves a result.",
    "push": "Upload a result to the Hugging Face Hub.",
    "inspect": "Show the formats and sizes of a folder or a file.",
    "doctor": "Diagnose a quantized file of any tool.",
    "list": "List schemes, methods, formats, caches, families, models.",
    "demo": "Quantize the reference model in two ways and compare.",
}


def _command(name: str) -> click.Command:
    """Imports one verb, without torch: its options are read and checked first."""
    if name == "quantize":
        from qkit.commands.quantize import quantize_command as command
    elif name == "plan":
        from qkit.commands.plan import plan_command as command
    elif name == "profile":
        from qkit.commands.profile import profile_command as command
    elif name == "convert":
        from qkit.commands.convert import convert_command as command
    elif name == "verify":
        from qkit.commands.verify import verify_command as command
    elif name == "eval":
        from qkit.commands.eval import eval_command as command
    elif name == "report":
        from qkit.commands.report import report_command as command
    elif name == "check":
        from qkit.commands.check import check_command as command
    elif name == "bench":
        from qkit.commands.bench import bench_command as command
    elif name == "recommend":
        from qkit.commands.recommend import recommend_command as command
    elif name == "serve-command":
        from qkit.commands.serve_command import serve_command_command as command
    elif name == "push":
        from qkit.commands.push import push_command as command
    elif name == "inspect":
        from qkit.commands.inspect import inspect_command as command
    elif name == "doctor":
        from qkit.commands.doctor import doctor_command as command
    elif name == "list":
        from qkit.commands.list import list_command as command
    else:
        from qkit.commands.demo import demo_command as command
    return command


def _refuse_repeats(command: click.Command, ctx: click.Context, arguments: list[str]) -> None:
    """Raises UsageError for an option with one value that is used twice: the first value would be ignored silently."""
    parser = command.make_parser(ctx)
    once = [p for p in command.get_params(ctx) if isinstance(p, click.Option) and not p.multiple and not p.count]
    for option in once:
        how: dict[str, Any] = (
            {"action": "append_const", "const": "", "nargs": 0} if option.is_flag else {"action": "append"}
        )
        parser.add_option(option, opts=option.opts, dest=option.name, **how)
    values, _, _ = parser.parse_args(args=[*arguments])
    for option in once:
        given = values.get(str(option.name)) or ()
        if len(given) > 1:
            named = "" if option.is_flag else f", with {' and '.join(shlex.quote(str(v)) for v in given)}"
            times = "twice" if len(given) == 2 else f"{len(given)} times"
            raise UsageError(f"{max(option.opts, key=len)} is used {times}{named}: use it once")


class _Verbs(click.Group):
    """Loads a verb's file when it is asked for: --help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS]  # not list(): that name is the submodule's once the verb 'list' was imported

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        return _command(name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _refuse_repeats(self, ctx, args)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            _refuse_repeats(command, click.Context(command, info_name=name, parent=ctx), rest)
        return name, command, rest

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """The same whoever makes the context: click keeps the first option that it builds from them."""
        return ["-h", "--help"]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qkit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Post-training quantization of language, vision-language and diffusion models.

    qkit turns a full-precision checkpoint into a packed, verified checkpoint that is ready to load.
    'qkit VERB -h' shows the most used options of a verb, 'qkit VERB --help' shows all of them.
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs the command line and turns an error into one line and its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():
        if "--debug" not in arguments and not sys.warnoptions:
            _hide_warnings()
        _show_renamed()
        _run(arguments)


def _hide_warnings() -> None:
    """Hides the warnings that libraries address to programmers: users cannot act on them."""
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.simplefilter("ignore", category)


def _show_renamed() -> None:
    """Former names of options are noted on stderr, each once and in one line."""
    show, shown = warnings.showwarning, set[str]()

    def note(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, RenamedWarning):
            show(message, category, *place, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            click.echo(f"qkit: note: {message}", err=True)

    warnings.showwarning = note  # until ``catch_warnings`` ends
    warnings.simplefilter("always", RenamedWarning)


def _run(arguments: list[str]) -> None:
    try:
        cli.main(arguments, prog_name="qkit", standalone_mode=False)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("qkit: interrupted", err=True)
        sys.exit(130)
    except QkitError as e:
        if "--debug" in arguments:
            raise
        click.echo(f"qkit: {' '.join(str(e).split())}", err=True)
        sys.exit(e.exit_code)
    except OSError as e:
        if "--debug" in arguments:
            raise
        click.echo(f"qkit: {e.filename or 'input/output'}: {e.strerror or e}", err=True)
        sys.exit(5)
    except Exception as e:  # the last place: what comes here should have been an error of qkit
        if "--debug" in arguments:
            raise
        if ran_out(e):
            click.echo("qkit: out of memory: close other programs, or raise the memory limit of this process", err=True)
            sys.exit(5)
        said = (str(e).strip().splitlines() or [""])[0]
        click.echo(
            f"qkit: {type(e).__name__}: {said}: this is a fault of qkit: please report it with the output of 'qkit --debug ..'",
            err=True,
        )
        sys.exit(1)
