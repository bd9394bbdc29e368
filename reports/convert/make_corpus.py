"""Files that other tools make of a model, for matrix.py and reports/doctor/corpus.py: OUT/WRITER/NAME.

    python reports/convert/make_corpus.py ENGINES MODEL TEXT OUT [WRITER[/NAME] ..]
ENGINES has an environment for each writer, by its name: autoround, llmcompressor, gptqmodel, modelopt. writers/with_WRITER.py
says how to make it. MODEL: the folder of tiny-llama; TEXT: a file of some 100 kB. What is there already stays. On two cores
all of it takes about 20 minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WRITERS = ("autoround", "llmcompressor", "gptqmodel", "modelopt")


def main() -> int:
    """Run each writer in its environment; 1 where one of them failed."""
    engines, model, text, out = (Path(a).absolute() for a in sys.argv[1:5])
    asked = [a.partition("/") for a in sys.argv[5:]] or [(w, "", "") for w in WRITERS]
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment = {**plain, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    failed = []
    for writer in dict.fromkeys(w for w, _, _ in asked):
        names = [name for w, _, name in asked if w == writer and name]
        script = Path(__file__).parent / "writers" / f"with_{writer}.py"
        command = [engines / writer / "bin" / "python", script, model, text, out / writer, *names]
        if subprocess.run(command, env=environment).returncode:
            failed.append(writer)
    missing = f"; some of {', '.join(failed)} are missing" if failed else ""
    print(f"{len(list(out.glob('*/*/config.json')))} files{missing}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
