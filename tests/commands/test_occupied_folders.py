"""An output folder that may not be used is told before torch is imported, and so before a model is read."""

import json
import subprocess
import sys

import pytest

from qkit.planning.request import Request, recipe_of

_RUN = """
import sys
from qkit.commands import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
QUANTIZE = ("quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--method", "rtn")


def told(*arguments) -> tuple[int, str, str]:
    """The exit code of a command in a process of its own, what it says, and whether it imported torch."""
    done = subprocess.run([sys.executable, "-c", _RUN, *map(str, arguments)], capture_output=True, text=True)
    said, imported = done.stderr.strip().rsplit("\n", 1)
    return done.returncode, said, imported


@pytest.fixture
def result(tmp_path):
    """A folder with the record of a result: all that is looked at."""
    folder = tmp_path / "result"
    folder.mkdir()
    recipe = recipe_of(Request(model="tiny-llama", scheme="w4a16", method="rtn")).model_dump()
    (folder / "qkit.json").write_text(json.dumps({"format_version": 2, "recipe": recipe, "seed": 0, "files": {}}))
    return folder


@pytest.mark.parametrize(
    "command", [QUANTIZE, ("convert", "tiny-llama", "--export", "gptq")], ids=["quantize", "convert"]
)
def test_a_folder_of_others_is_told_without_torch(command, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, said, imported = told(*command, "--out", tmp_path)
    assert code == 2 and "the output folder is not empty: choose another, or add --overwrite" in said
    assert imported == "False"


@pytest.mark.parametrize(
    ("options", "other"),
    [(("--scheme", "w8a16"), "scheme"), (("--scheme", "w4a16", "--group-size", 64, "--seed", 1), "group_size, seed")],
    ids=["scheme", "group and seed"],
)
def test_a_result_of_other_settings_is_told_without_torch(options, other, result):
    code, said, imported = told("quantize", "--model", "tiny-llama", "--method", "rtn", *options, "--out", result)
    assert code == 2 and imported == "False"
    assert f"it holds a result of other settings ({other}): choose another, or add --overwrite" in said


def test_a_result_of_the_same_settings_is_looked_at(result):
    _, said, imported = told(*QUANTIZE, "--out", result)
    assert "other settings" not in said and imported == "True"


def test_profile_tells_of_a_folder_of_others_without_torch(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, said, imported = told("profile", "--model", "tiny-llama", "--candidates", "int4", "--out", tmp_path)
    assert code == 2 and "so it is not a profile: use another folder" in said and imported == "False"
