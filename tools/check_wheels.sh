#!/usr/bin/env bash
# Builds the two source distributions and wheels of this tree, and proves in an empty environment that they do what the
# documentation says: help and load without any extra, a sentence for what is missing, the demo with its extra, and the tests of
# the source distribution. Needs a package index (for torch and transformers), about 3 GB of disk and five minutes on an idle machine.
#
#   tools/check_wheels.sh [WORK]      WORK: where everything goes (default: a new folder, removed at the end)
#
# PYTHON, TORCH: the interpreter, and what to install as torch (default: torch==2.13.0).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
MOST=2000000 # bytes of the wheel without data

if [ $# -gt 0 ]; then
    mkdir -p "$1"
    WORK=$(cd "$1" && pwd)
else
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
fi
unset PYTHONPATH
say() { printf '\n== %s\n' "$*"; }
fail() { printf 'check_wheels: %s\n' "$*" >&2; exit 1; }

say "build from a copy of the tracked files: the checkout stays clean"
rm -rf "$WORK/tree" "$WORK/dist" "$WORK/sdist" "$WORK/out"
mkdir -p "$WORK/tree" "$WORK/sdist"
git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$WORK/tree"
[ -x "$WORK/build/bin/python" ] || "$PYTHON" -m venv "$WORK/build"
"$WORK/build/bin/python" -m pip install --quiet build
"$WORK/build/bin/python" -m build --outdir "$WORK/dist" "$WORK/tree" >"$WORK/build.log"
"$WORK/build/bin/python" -m build --outdir "$WORK/dist" "$WORK/tree/calib_data" >"$WORK/build_data.log"
for file in "$WORK"/dist/*; do printf '%10d  %s\n' "$(stat -c %s "$file")" "${file##*/}"; done
wheel=$(echo "$WORK"/dist/qkit-*.whl)
size=$(stat -c %s "$wheel")
[ "$size" -lt "$MOST" ] || fail "${wheel##*/} has $size bytes, expected less than $MOST"

say "an empty environment: torch, then the wheel"
[ -x "$WORK/empty/bin/python" ] || "$PYTHON" -m venv "$WORK/empty"
BIN=$WORK/empty/bin
"$BIN/python" -m pip uninstall --quiet --yes qkit qkit-data 2>"$WORK/uninstall.log"
"$BIN/python" -m pip install --quiet "$TORCH"
"$BIN/python" -m pip install --quiet "$wheel"
cd "$WORK" # nothing of the checkout can be imported from here
"$BIN/qkit" --help >help.txt
"$BIN/python" -m qkit --help >help_module.txt
cmp help.txt help_module.txt
"$BIN/qkit" quantize --model tree/calib_data/qkit_data/models/tiny-llama --scheme w4a16 --method rtn --out out
"$BIN/qkit" verify out
"$BIN/python" -c "import qkit; print(type(qkit.load('out')).__name__)"

say "what is missing is said in one sentence"
code=0
"$BIN/qkit" demo >said.txt 2>&1 || code=$?
cat said.txt
[ "$code" = 3 ] && grep -q "pip install 'qkit\[demo\]'" said.txt || fail "qkit demo without its extra: exit code $code"

say "the demo with its extra"
"$BIN/python" -m pip install --quiet --find-links dist "$wheel[demo]"
"$BIN/qkit" demo --work demo --overwrite

say "tests of the source distribution"
tar -xzf dist/qkit-[0-9]*.tar.gz -C sdist --strip-components 1
"$BIN/python" -m pip install --quiet pytest hypothesis psutil pillow scipy # what these tests need of the extras
cd sdist
"$BIN/python" -m pytest -p no:cacheprovider tests/test_source_rules.py tests/solvers
say "all as expected"
