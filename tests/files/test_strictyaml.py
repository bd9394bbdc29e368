"""Hand-written YAML: what it means, and everything that is refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.errors import BadRecipe, IOFailure
from qkit.files.strictyaml import MAX_BYTES, MAX_DEPTH, LineDict, check_keys, load_yaml, parse_yaml


def parse(text: str | bytes):
    return parse_yaml(text.encode() if isinstance(text, str) else text, "recipe", "r.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-3", -3),
        ("+2%", "+2%"),
        ("1e-3", 1e-3),
        ("0.5", 0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("'12'", "12"),
        ('"true"', "true"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("010", 10),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("nan", "nan"),
        ("9223372036854775807", 2**63 - 1),
        ("[1, a, [true]]", [1, "a", [True]]),
        ("|\n  12\n", "12\n"),
        ("'*.down_proj'", "*.down_proj"),
    ],
)
def test_values(text, value):
    found = parse(f"key: {text}\n")["key"]
    assert found == value
    assert type(found) is type(value)


def test_mappings_are_dicts_that_know_their_lines():
    content = parse("a: 1\n\nb:\n  - c: 2\n    no: 3\n")
    assert content == {"a": 1, "b": [{"c": 2, "no": 3}]}
    assert isinstance(content, LineDict)
    assert content.lines == {"a": 1, "b": 3}
    assert content["b"][0].lines == {"c": 4, "no": 5}


def test_an_empty_file_is_none():
    assert parse("") is None
    assert parse("# nothing\n") is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' is given twice, first on line 1"),
        ("a: {b: 1, b: 2}", "line 1: key 'b' is given twice"),
        ("a: 1\n'a': 2\n", "line 2: key 'a' is given twice"),
        ("a: &x 1\nb: 2\n", "line 1: anchor '&x'"),
        ("a: 1\nb: *x\n", "line 2: alias '*x'"),
        ("&k a: 1\n", "anchor '&k'"),
        ("a: !function os.system\n", "tag '!function'"),
        ("!!python/object/apply:os.system ['true']", "python/object/apply"),
        ("a: !!str 1\n", "tag "),
        ("a: .nan\n", "line 1: .nan is not a number"),
        ("\na: -.inf\n", "line 2: -.inf is not a number"),
        ("a: 1e999\n", "too large"),
        ("a: 9223372036854775808\n", "64 bits"),
        ("a: " + "9" * 5000 + "\n", "64 bits"),
        ("--- 1\n--- 2\n", "second document"),
        ("? [1]\n: 2\n", "a key must be plain text"),
        ("'': 1\n", "empty"),
        ('"a\\eb": 1\n', "cannot be printed"),
        ("a: [1\n", "not valid YAML"),
        ("a:\n\t- b\n", "line 2: not valid YAML"),
        ("a: >=0.95\n", "needs quotes"),
        ('a: "\\UFFFFFFFF"\n', "not valid YAML"),
        ("a: \x07\n", "not valid YAML"),
        (b"a: \xff\n", "byte 3 is not UTF-8"),
    ],
)
def test_refused(text, problem):
    with pytest.raises(BadRecipe, match=re.escape(problem)) as error:
        parse(text)
    assert str(error.value).startswith("recipe r.yaml")


def test_depth_is_limited_and_cheap():
    deepest = parse("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert deepest is not None
    start = time.monotonic()
    for opening in ("[" * 400_000, "{a: " * 200_000, "- " * 400_000):
        with pytest.raises(BadRecipe, match="deeper than 20 levels"):
            parse(opening)
    assert time.monotonic() - start < 10


def test_a_bomb_of_aliases_is_refused_before_it_grows():
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 64)]
    with pytest.raises(BadRecipe, match="anchor"):
        parse("\n".join(lines))


def test_the_size_is_limited(tmp_path):
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(BadRecipe, match=f"larger than {MAX_BYTES} bytes"):
        load_yaml(path, "recipe")


def test_files(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfscheme: w4a16\n")
    assert load_yaml(path, "recipe") == {"scheme": "w4a16"}
    with pytest.raises(BadRecipe, match="no such file"):
        load_yaml(tmp_path / "none.yaml", "recipe")
    with pytest.raises(BadRecipe, match="no such file"):
        load_yaml(tmp_path, "recipe")
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    with pytest.raises(IOFailure, match="cannot be read"):
        load_yaml(loop, "recipe")


def test_unknown_keys_are_named_with_line_and_suggestion():
    content = parse("scheme: w4a16\nmetod: gptq\n")
    with pytest.raises(BadRecipe, match=r"recipe r.yaml, line 2: unknown key 'metod'; did you mean 'method'\?"):
        check_keys(content, ["scheme", "method"], "recipe r.yaml")
    check_keys(content, ["scheme", "metod"], "recipe r.yaml")
    with pytest.raises(BadRecipe, match="known keys: other, thing"):
        check_keys(content, ["other", "thing"], "recipe r.yaml")


_LETTERS = "abz09 \n\t:-?[]{},&*!|>%'\"\\#.~+_=<eExuU\x00\x85\ufeff\U0001f600"
_PIECES = st.sampled_from([*_LETTERS, "\n  ", ": ", "- "])


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.lists(_PIECES, max_size=40).map("".join).map(lambda s: s.encode()), st.binary(max_size=60)))
def test_nothing_but_badrecipe_leaves(data):
    try:
        value = parse(data)
    except BadRecipe as error:
        assert "\n" not in str(error)
        return
    assert _plain(value)


def _plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))
