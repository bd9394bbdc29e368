"""Make qkit_data/evaluation.jsonl and qkit_data/cloze.jsonl from qkit_data/text/evaluation.txt.

Run `python calib_data/make_cloze.py` after the text has changed; the same text gives the same bytes.
A question is a passage of two to four sentences cut before its last few words. The wrong choices are endings of the
same number of words from other documents, alike in length and preferably in their first word.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "qkit_data"
QUESTIONS, CHOICES = 120, 4
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bDr)(?<!\bMrs)(?<!\bJas)(?<!\bNov)[.!?][\"\u201d]?(?=\s|$)")
NOT_PROSE = re.compile(r"[{}|$\\<>_@`]| [.,]|\(.*\) *\d|^\s|^[=\-#\[]|^[A-Z]{2,}[:.]|^[A-Z][a-z]+: ")


@dataclass(frozen=True)
class Ending:
    """The last words of a sentence, and the passage that leads up to them."""

    document: int
    context: str
    phrase: str


def rank(*parts: object) -> str:
    """A fixed order with no pattern in it: the sha256 of the parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def sentences(document: str) -> list[tuple[int, int]]:
    """(start, stop) of each sentence on the lines of `document` that are English prose."""
    spans, offset = [], 0
    for line in document.splitlines(keepends=True):
        text = line.rstrip("\n")
        start = 0
        prose = len(text) > 40 and not NOT_PROSE.search(text)
        for end in SENTENCE_END.finditer(text) if prose else ():
            spans.append((offset + start, offset + end.end()))
            start = end.end() + 1
        offset += len(line)
    return spans


def endings(documents: list[str]) -> list[Ending]:
    """One Ending for each sentence that is long enough and has at least one sentence right before it."""
    found = []
    for number, document in enumerate(documents):
        if len(re.findall(r"\b(?:the|of|and|was|is)\b", document)) < len(document.split()) / 20:
            continue  # not English
        spans = sentences(document)
        for i, (start, stop) in enumerate(spans):
            words = list(re.finditer(r"\S+", document[start:stop]))
            size = 3 + int(rank("size", number, i), 16) % 4
            first = max(0, i - 1 - int(rank("first", number, i), 16) % 3)
            while first < i and any(b[0] - a[1] > 1 for a, b in zip(spans[first:i], spans[first + 1 :], strict=False)):
                first += 1  # only sentences that follow one another in the text
            if first == i or len(words) < size + 5:
                continue
            cut = start + words[-size].start()
            found.append(Ending(number, document[spans[first][0] : cut].rstrip(), document[cut:stop]))
    return found


def question(right: Ending, pool: list[Ending], answer: int) -> dict[str, object]:
    def unlike(other: Ending) -> tuple[bool, bool, int, str]:
        mine, theirs = right.phrase, other.phrase
        return (
            mine[-1] != theirs[-1],
            mine.split()[0].lower() != theirs.split()[0].lower(),
            abs(len(mine) - len(theirs)) // 4,
            rank(mine, theirs),
        )

    others = [e for e in pool if e.document != right.document and e.phrase.count(" ") == right.phrase.count(" ")]
    choices = [e.phrase for e in sorted(others, key=unlike)[: CHOICES - 1]]
    choices.insert(answer, right.phrase)
    return {"context": right.context, "choices": choices, "answer": answer}


def write(name: str, rows: list[dict[str, object]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (PACKAGE / name).write_text(lines, encoding="utf-8", newline="\n")


def main() -> None:
    text = (PACKAGE / "text" / "evaluation.txt").read_text(encoding="utf-8")
    documents = [document for document in text.split("\n\n") if document.strip()]
    write("evaluation.jsonl", [{"page": document.strip("\n")} for document in documents])
    pool = endings(documents)
    chosen = sorted(sorted(pool, key=lambda e: rank("choose", e.context, e.phrase))[:QUESTIONS], key=pool.index)
    if len(chosen) < QUESTIONS:
        raise SystemExit(f"evaluation.txt gives {len(chosen)} questions, {QUESTIONS} wanted: add English prose to it")
    places = [place % CHOICES for place in sorted(range(QUESTIONS), key=lambda place: rank("place", place))]
    write("cloze.jsonl", [question(right, pool, place) for right, place in zip(chosen, places, strict=True)])


if __name__ == "__main__":
    main()
