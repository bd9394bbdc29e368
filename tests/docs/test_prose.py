"""README.md is short, and sentences for people are, too."""

import pytest
from doc_pages import README, USER_PAGES, Page, sentences

MOST_BYTES, MOST_WORDS = 10_240, 35


def test_readme_is_short() -> None:
    assert len(README.text.encode()) <= MOST_BYTES


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page: Page) -> None:
    assert page.sentences
    assert [s for s in page.sentences if len(s.split()) > MOST_WORDS] == []


def test_sentences_are_told_apart() -> None:
    prose = "# Head\n\nOne `a. b` two. Three,\nfour (arXiv 1.2)? Five.\n- six\n- seven [eight](x.md#y)\n\n| a. | B. |\n"
    assert sentences(prose) == [
        "# Head",
        "One `code` two.",
        "Three, four (arXiv 1.2)?",
        "Five.",
        "- six",
        "- seven eight",
    ]


def test_a_long_sentence_is_noticed() -> None:
    (found,) = Page("long.md", f"```\n{'code ' * 40}\n```\n\n{'word ' * 36}end.\n\nShort.").sentences[:1]
    assert len(found.split()) > MOST_WORDS
