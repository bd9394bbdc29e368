"""The command line: one thin file per verb."""

from __future__ import annotations

import sys

import click

from qkit import __version__
from qkit.errors import QkitError

VERBS = {
    "quantize": "quantize a model into a packed checkpoint and prove it",
    "plan": "say what quantize would do, and what it would cost",
    "profile": "measure what every layer costs in every candidate format",
    "verify": "prove that a packed checkpoint holds what it should",
    "eval": "measure a packed checkpoint: perplexity, KL divergence, lm-eval tasks",
    "check": "hold a packed checkpoint against a budget (for CI)",
    "bench": "measure products and models against what the machine could do",
    "list": "what there is: schemes, methods, formats, families, models",
    "demo": "quantize the reference model two ways and compare",
}


def _command(name: str) -> click.Command:
    """Imports one verb: torch and transformers are loaded only by the verbs that need them."""
    if name == "quantize":
        from qkit.commands.quantize import quantize_command as command
    elif name == "plan":
        from qkit.commands.plan import plan_command as command
    elif name == "profile":
        from qkit.commands.profile import profile_command as command
    elif name == "verify":
        from qkit.commands.verify import verify_command as command
    elif name == "eval":
        from qkit.commands.eval import eval_command as command
    elif name == "check":
        from qkit.commands.check import check_command as command
    elif name == "bench":
        from qkit.commands.bench import bench_command as command
    elif name == "list":
        from qkit.commands.list import list_command as command
    else:
        from qkit.commands.demo import demo_command as command
    return command


class _Verbs(click.Group):
    """Loads a verb's file when it is asked for: --help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS]  # not list(): that name is the submodule's once the verb 'list' was imported

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        return _command(name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qkit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Post-training quantization: from a full-precision checkpoint to a packed, proven and loadable one."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs the command line and turns an error into one line and its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
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
    except MemoryError:
        if "--debug" in arguments:
            raise
        click.echo("qkit: the memory that this process may use is too small: raise its limit", err=True)
        sys.exit(5)
    except Exception as e:  # the last place: what comes here should have been an error of qkit
        if "--debug" in arguments:
            raise
        said = (str(e).strip().splitlines() or [""])[0]
        click.echo(
            f"qkit: {type(e).__name__}: {said}: this is a fault of qkit: please report it with what --debug shows",
            err=True,
        )
        sys.exit(1)
