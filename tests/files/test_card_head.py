"""The head of a card, which the hub reads: what is set, what is added to, and what stays."""

import pytest
import yaml

from qkit.files.card_head import with_head


def read(card):
    return yaml.safe_load(card.split(b"---\n")[1])


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_fields_are_set_and_everything_else_stays(end):
    card = end.join(
        [
            b"---",
            b"license: other  # see LICENSE",
            b"tags:",
            b"- a",
            b"- gptq",
            b"library_name: old",
            b"---",
            b"# Words",
            b"",
        ]
    )
    found = with_head(
        card, {"base_model": "o/n"}, {"tags": ["qkit", "a"], "library_name": "x", "pipeline_tag": "t"}, {"gptq"}
    )
    assert found.endswith(b"# Words" + end) and b"license: other  # see LICENSE" + end in found
    assert read(found) == {
        "license": "other", "library_name": "old", "base_model": "o/n", "tags": ["a", "qkit"], "pipeline_tag": "t"
    }  # fmt: skip
    assert with_head(found, {"base_model": "o/n"}, {"tags": ["qkit", "a"], "library_name": "x"}) == found


def test_a_list_of_base_models_and_a_card_without_a_head():
    card = b"---\nbase_model:\n  - a/b\n  - c/d\nlicense: mit\n---\n"
    assert read(with_head(card, {"base_model": "o/n"}, {})) == {"license": "mit", "base_model": "o/n"}
    assert with_head(b"# Words\n", {}, {"tags": ["qkit"]}) == b"---\ntags: [qkit]\n---\n# Words\n"
    assert with_head(b"# Words\n", {}, {}) == b"# Words\n"


def test_of_a_head_that_cannot_be_read_only_what_is_decided_is_set():
    card = b"---\na: &x [1]\ntags: *x\nbase_model: a/b\n---\n# Words\n"
    assert with_head(card, {"base_model": "o/n"}, {"tags": ["qkit"]}) == (
        b"---\na: &x [1]\ntags: *x\nbase_model: o/n\n---\n# Words\n"
    )
