"""Change output folders of several kinds in every way, one at a time, and count what verify finds.

    python tools/mutate_output.py [FIGURES.json]

Every field of config.json and qkit.json and every file is changed (``tests/output_changes.py``). Exit code 1 if any change is
called sound, or is found and not named.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from output_changes import HARMLESS, survivors
from output_kinds import KINDS, make


def main() -> None:
    """All kinds; prints a line for each, and writes the figures where a file is named."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(KINDS):
            began = time.monotonic()
            work = Path(folder) / str(number)
            tried, sound, elsewhere = survivors(make(kind, work), work / "changed")
            figures[kind] = {"changes": tried, "called sound": sound, "named elsewhere": elsewhere}
            print(
                f"{kind}: {tried} changes, {len(sound)} called sound, {len(elsewhere)} named elsewhere, "
                f"{time.monotonic() - began:.0f} s"
            )
    data = {"kinds": figures, "harmless": HARMLESS, "changes": sum(f["changes"] for f in figures.values())}
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(data, indent=1) + "\n")
    sys.exit(any(f["called sound"] or f["named elsewhere"] for f in figures.values()))


if __name__ == "__main__":
    main()
