"""Fills the generated tables of README.md and docs/**/*.md, and copies the figures that docs/ shows.

python tools/docs_tables.py            print all tables
python tools/docs_tables.py --write    put them between their marks, and copy the figures
python tools/docs_tables.py --check    exit with 1 and name the files that are not up to date

A table stands between <!-- generated:NAME --> and <!-- /generated:NAME -->.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("tools", ".", "calib_data", "kernels")]

import code_tables
import report_tables
import report_tables_more

TABLES = {**code_tables.TABLES, **report_tables.TABLES, **report_tables_more.TABLES}
REGION = re.compile(r"^(<!-- generated:(\S+) -->\n).*?^(<!-- /generated:\2 -->)$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"^<!-- /?generated:", re.MULTILINE)  # a sentence may speak of a mark
# docs/ is built by itself and cannot show a file outside: these are copies, by name in docs/figures.
FIGURES = {
    "comparison.png": "reports/comparison/tiny-llama.png",
    "outliers.png": "reports/comparison/outliers.png",
    "kv-cache.png": "reports/kvcache/tiny-llama-long.png",
    "kv-length.png": "reports/kvcache/length.png",
    "video.png": "reports/video/tiny-video.png",
}


def pages() -> list[Path]:
    """README.md and all pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def updated(text: str) -> str:
    """The page with its tables as code and reports have them now. Raises SystemExit for an unknown or open region."""

    def filled(region: re.Match[str]) -> str:
        name = region[2]
        if name not in TABLES:
            raise SystemExit(f"no table {name!r}: there are {', '.join(TABLES)}")
        return f"{region[1]}{TABLES[name]()}\n{region[3]}"

    result, count = REGION.subn(filled, text)
    if len(MARK.findall(text)) != 2 * count:
        raise SystemExit("a mark '<!-- generated:NAME -->' has no '<!-- /generated:NAME -->', or the reverse")
    return result


def main(arguments: list[str]) -> int:
    """The exit code."""
    if arguments not in (["--write"], ["--check"]):
        sys.stdout.write("\n\n".join(f"{name}\n\n{table()}" for name, table in TABLES.items()) + "\n")
        return 0
    files = {page: updated(page.read_text(encoding="utf-8")).encode() for page in pages()}
    files |= {ROOT / "docs" / "figures" / name: (ROOT / source).read_bytes() for name, source in FIGURES.items()}
    stale = [file for file, content in files.items() if not file.is_file() or file.read_bytes() != content]
    for file in stale:
        if arguments == ["--write"]:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(files[file])
        else:
            sys.stderr.write(f"{file.relative_to(ROOT)} is not up to date: run python tools/docs_tables.py --write\n")
    return int(bool(stale) and arguments == ["--check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
