"""qkit doctor: the diagnosis of a quantized file of any writer."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.common import OutFile, print_wide, wide_table, write_json
from qkit.commands.verb import Verb
from qkit.diagnosis.result import Diagnosis, counts
from qkit.engines.process import ENGINES
from qkit.errors import VerifyFailure
from qkit.files.locate import find_local
from qkit.system.words import megabytes

_SHOWN, _NAMES, _WORST = 40, 6, 10


@click.command("doctor", cls=Verb)
@click.argument("path")
@click.option("--baseline", metavar="MODEL", help="Original model: each weight is compared with it.")
@click.option("--engine", type=click.Choice(list(ENGINES)), help="Engine that has to load the file.")
@click.option("--json", "json_file", type=OutFile(), help="JSON file for the printed results.")
def doctor_command(path: str, baseline: str | None, engine: str | None, json_file: Path | None) -> None:
    """Diagnose PATH: a quantized model folder or GGUF file of any tool.

    The command lists what is quantized and how, then all findings, the worst first. It knows compressed-tensors, GPTQ, AWQ,
    ModelOpt, FP8 in blocks, MXFP4 and GGUF. PATH may also be the name of a model in the local hub cache. The exit code is 4 if
    there is a fault, and 3 if there is nothing to diagnose; warnings do not change it.

    \b
    Example:
      qkit doctor out/tiny-llama-w4a16 --baseline tiny-llama --json doctor.json
    """
    from qkit.workflows.doctor import diagnose

    base = find_local(baseline) if baseline is not None else None
    diagnosis = diagnose(find_local(path), base, engine)
    write_json(json_file, diagnosis.to_json())
    show(diagnosis, Console())
    if diagnosis.faulty:
        faults = counts(diagnosis)["fault"]
        raise VerifyFailure(f"{path}: {faults} fault{'s' if faults > 1 else ''}, first: {_short(diagnosis)}")


def _short(diagnosis: Diagnosis) -> str:
    first = diagnosis.findings[0]
    more = f" and {len(first.layers) - 1} more" if len(first.layers) > 1 else ""
    return _clean(f"{first.layers[0]}{more}: {first.found}")


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _names(layers: tuple[str, ...]) -> str:
    more = f" and {len(layers) - _NAMES} more" if len(layers) > _NAMES else ""
    return ", ".join(layers[:_NAMES]) + more


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Prints what is quantized, then the findings."""

    def say(text: str) -> None:
        console.print(Text(_clean(text)), soft_wrap=True)

    say(f"{diagnosis.path}: {diagnosis.kind}, {diagnosis.method or 'not quantized'}")
    if diagnosis.made_by:
        say(f"made by: {diagnosis.made_by}")
    table = wide_table("format", "layers", "bytes")
    for words, (count, size) in sorted(diagnosis.formats.items(), key=lambda item: -item[1][1]):
        table.add_row(Text(_clean(words)), f"{count:,}", megabytes(size))
    table.add_row(Text("not quantized"), f"{diagnosis.plain[0]:,}", megabytes(diagnosis.plain[1]))
    print_wide(console, table)
    for why, names in _by_reason(diagnosis.plain_layers).items():
        say(f"not quantized, {why}: {_names(tuple(names))}")
    for line in diagnosis.drift[:_WORST]:
        say(f"from the baseline: {line['layer']}: {line['error']:.4f} (rounding explains {line['explained']:.4f})")
    for finding in diagnosis.findings[:_SHOWN]:
        say(f"{finding.level}: {finding.kind}: {_names(finding.layers)}: {finding.found}")
        if finding.expected:
            say(f"    expected: {finding.expected}")
        if finding.advice:
            say(f"    what to do: {finding.advice}")
    if len(diagnosis.findings) > _SHOWN:
        say(f"... and {len(diagnosis.findings) - _SHOWN} more findings (--json FILE contains all)")
    if diagnosis.answers and not diagnosis.sound:
        say("of the format, whatever is wrong with this file:")
    for answer in diagnosis.answers:
        say(f"engine: {answer}")
    say(diagnosis.verdict)


def _by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    """{reason: names}"""
    found: dict[str, list[str]] = {}
    for name, why in reasons.items():
        found.setdefault(why, []).append(name)
    return found
