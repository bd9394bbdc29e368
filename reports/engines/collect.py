"""Collects reports of ``qkit verify --engine`` into proofs.json.

python collect.py NAME=REPORT.json ...: NAME says what the file is; reports of one name are of several engines.
"""

import json
import re
import sys
from pathlib import Path

TARGET = Path(__file__).with_name("proofs.json")


def main(arguments: list[str]) -> None:
    proofs = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    for argument in arguments:
        name, _, file = argument.partition("=")
        proof = json.loads(Path(file).read_text())["engine_proof"]
        words = re.sub(r"(refused) \S+", r"\1 the file", proof["refused"]).partition("; its output is in")[0]
        proof = {key: value for key, value in proof.items() if key != "verdict"} | {"refused": words}
        proofs.setdefault(name, {})[proof["engine"]] = proof
    TARGET.write_text(json.dumps(proofs, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
