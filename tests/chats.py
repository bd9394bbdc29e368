"""Chats for tests: a chat template for the tiny models, and files in every form that people have."""

import json
import shutil
from pathlib import Path

from qkit.calibration.mixture import Layout, mixed_rows
from qkit.calibration.sources import parse_sources

# It writes BOS at the beginning, as templates do, and <|endoftext|> behind every answer, which the model has to write too.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':\\n' + m['content'] | trim }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
WORDS = "river stone light window garden letter morning bridge paper winter song table".split()


def said(number: int, length: int = 12) -> str:
    """Some words, others for every number."""
    return " ".join(WORDS[(number * 7 + i * (1 + number % 5)) % len(WORDS)] for i in range(length)) + f" {number}"


def turns(number: int) -> list[dict[str, str]]:
    """A question and its answer."""
    return [
        {"role": "user", "content": f"What about {said(number, 5)}?"},
        {"role": "assistant", "content": said(number + 1, 20)},
    ]


def with_template(model: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """A copy of a model with a chat template."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def write_lines(file: Path, records: list) -> Path:
    """A file of JSON lines."""
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return file


def rows_of(given, tokenizer, samples: int, seqlen: int, **layout):
    """Calibration rows of what ``--calib`` names."""
    return mixed_rows(parse_sources(given), tokenizer, Layout(samples=samples, seqlen=seqlen, **layout), 4096)
