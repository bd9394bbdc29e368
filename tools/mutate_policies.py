"""Change lines that decide what is kept, left out, reused or refused, one at a time, and see whether a test notices.

    python tools/mutate_policies.py [--only TEXT] [--json reports/reliability/policy_mutations.json]

Each line is changed in a copy of the checkout, and the tests that are named beside it run there: at least one has to fail. They
have to pass before anything is changed. Exit code 1 if a changed line survives. Needs the packages of 'qkit[test]'.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("qkit", "kernels", "calib_data", "tests", "tools")
FILES = ("pyproject.toml", "cli.py", "README.md")


@dataclass(frozen=True)
class Mutation:
    """policy: what the line decides; line, changed: its text, found once in ``qkit/file``, and what it becomes; tests: names of
    files and tests in ``tests/``, as pytest reads them, with a space between."""

    policy: str
    file: str
    line: str
    changed: str
    tests: str


# fmt: off
MUTATIONS = (
    Mutation("a solver that is worse than rounding is replaced by rounding",
             "engine/solving.py", "worse = error > baseline",
             "worse = False", "engine/test_fallbacks.py"),
    Mutation("the recorded error is that of the stored codes",
             "engine/solving.py", "error=baseline if worse else error,",
             "error=error,", "engine/test_fallbacks.py"),
    Mutation("a solver that is worse by less than 2 percent is no failure",
             "engine/solving.py", "error > 1.02 * baseline",
             "error > baseline", "engine/test_fallbacks.py"),
    Mutation("an expert with few tokens is rounded",
             "engine/solving.py", "FEW_TOKENS = 32",
             "FEW_TOKENS = 4", "engine/test_fallbacks.py"),
    Mutation("a branch of an expert with few tokens ignores its Hessian",
             "engine/solving.py", "stats.tokens >= FEW_TOKENS else None",
             "stats.tokens > 0 else None", "engine/test_fallbacks.py"),
    Mutation("one linear in twenty may fall back",
             "engine/fallbacks.py", "MAX_FALLBACKS = 0.05",
             "MAX_FALLBACKS = 0.1", "engine/test_fallbacks.py"),
    Mutation("half of all linears may see nothing but zeros",
             "engine/fallbacks.py", "MAX_SILENT = 0.5",
             "MAX_SILENT = 0.9",
             "engine/test_fallbacks.py"),
    Mutation("one calibration row in ten may be left out",
             "calibration/statistics.py", "MAX_BAD_ROWS = 0.1",
             "MAX_BAD_ROWS = 0.15", "calibration/test_rows.py"),
    Mutation("rows of image-text data that are not finite do not count",
             "calibration/statistics.py", "((self.kinds[start:stop] > 0) & good[:, None]).flatten()",
             "(self.kinds[start:stop] > 0).flatten()", "calibration/test_rows.py"),
    Mutation("a row that was left out once stays out",
             "calibration/block_runner.py", "g and bool(is_finite) for g, is_finite",
             "bool(is_finite) for g, is_finite", "calibration/test_rows.py"),
    Mutation("one row in sixteen is held out of learned rounding",
             "rounding/block.py", "max(1, rows // _HELD_OUT)",
             "max(1, rows // (2 * _HELD_OUT))", "engine/test_auto.py::test_what_is_kept_is_what_was_measured"),
    Mutation("recipes are compared on rows that none was solved with",
             "engine/auto.py", "good=[good and i < first_held for",
             "good=[good for", "engine/test_auto.py::test_what_is_kept_is_what_was_measured"),
    Mutation("a change of a block is one step old or unknown",
             "diffusion/controller.py", "return state.change if state.last == self.step - 1 else None",
             "return state.change", "diffusion/test_diffusion_steps.py::test_a_change_is_one_step_old_or_unknown"),
    Mutation("a threshold counts runs after a skipped step as INT8",
             "diffusion/fitting.py", "None if s.step - 1 in skips else s.change",
             "s.change", "diffusion/test_diffusion_steps.py::test_a_threshold_counts_what_follows_a_skip_as_int8"),
    Mutation("at most two skips in a row",
             "diffusion/controller.py", "state.skipped < p.most",
             "state.skipped <= p.most",
             "diffusion/test_diffusion_steps.py::test_never_more_than_two_skips_in_a_row_and_the_forecast_is_the_run"),
    Mutation("a kept hash is believed only for a file that was not just written",
             "files/hash_cache.py", "if settled and _state(file) == state:",
             "if _state(file) == state:", "faults/test_05_source_hash.py::test_a_file_that_has_just_changed_is_not_kept"),
    Mutation("a kept hash is that of a file whose times are the same",
             "files/hash_cache.py", '"ctime_ns": status.st_ctime_ns,',
             '"ctime_ns": 0,', "faults/test_05_source_hash.py::test_a_file_is_read_once"),
    Mutation("measurements of another identity are refused, with fields that are new too",
             "sensitivity/result_cache.py", "dict.fromkeys((*identity, *recorded))",
             "dict.fromkeys(recorded)", "sensitivity/test_result_cache.py"),
    Mutation("a job of another version of torch is another job",
             "planning/plan.py", '_VERSIONS = ("qkit", "torch", "transformers", "compressed-tensors")',
             '_VERSIONS = ("qkit", "transformers", "compressed-tensors")', "planning/test_identity.py"),
    Mutation("a job that committed nothing gives way to another",
             "engine/job.py", "if stored is not None and (parts_in(self.path) or journal.exists()):",
             "if stored is not None:", "engine/test_job.py::test_a_job_that_committed_nothing_is_replaced"),
    Mutation("a result of other weights is not the result of this command",
             "engine/export.py", 'return same and bool(record.get("plan_hash") == plan.hash)',
             'return bool(record.get("plan_hash") == plan.hash)',
             "faults/test_05_source_hash.py::test_one_bit_of_the_source_is_another_source"),
    Mutation("times of another machine are not joined",
             "allocation/latency.py", "next((k for k in description if description[k] != stored_description[k]), None)",
             "None", "allocation/test_latency.py::test_times_of_elsewhere_are_not_joined"),
    Mutation("a figure that is not finite fails its check",
             "evaluation/budget.py", "finite = value is not None and math.isfinite(value) and math.isfinite(bound)",
             "finite = value is not None", "evaluation/test_budget.py::test_what_is_not_a_number_fails"),
    Mutation("hidden files of a model are left behind",
             "files/side_files.py", 'if leaf.startswith(".") or leaf in CACHES:',
             "if leaf in CACHES:", "faults/test_04_side_files.py::test_everything_travels_but_weights_code_and_pickles"),
    Mutation("the first layers of a cache with differences have at least 4 bits",
             "kvcache/policy.py", "ANCHORS, ANCHOR_BITS = 3, 4",
             "ANCHORS, ANCHOR_BITS = 2, 4",
             "kvcache/test_kvcache_crosslayer.py::test_the_first_three_layers_have_four_bits_at_least"),
    Mutation("the sensitivity of a cache is measured on 16 rows at most",
             "workflows/kv_cache.py", "ROWS = 16",
             "ROWS = 64", "workflows/test_rows_of_measures.py"),
)
# fmt: on


def failing(copy: Path, tests: str) -> str | None:
    """The first of the tests that fails in the copy; None if all pass. Raises SystemExit where they cannot run."""
    path = os.pathsep.join(str(copy / p) for p in ("", "calib_data", "kernels"))
    options = ["-q", "-x", "-rfE", "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{t}" for t in tests.split())]
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    if done.returncode == 0:
        return None
    return re.findall(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)[0]


def mutated(copy: Path, m: Mutation) -> str | None:
    """The first test that fails with that line changed. Raises SystemExit for a line that is not there once."""
    file = copy / "qkit" / m.file
    source = file.read_text(encoding="utf-8")
    if source.count(m.line) != 1:
        raise SystemExit(f"qkit/{m.file}: found {source.count(m.line)} times, expected once: {m.line}")
    file.write_text(source.replace(m.line, m.changed), encoding="utf-8")
    try:
        return failing(copy, m.tests)
    finally:
        file.write_text(source, encoding="utf-8")


def main() -> None:
    """All mutations; prints a line for each, and writes them where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="text in the file or the policy of those to try")
    parser.add_argument("--json", type=Path, help="file for the results")
    asked = parser.parse_args()
    chosen = [m for m in MUTATIONS if asked.only in m.file or asked.only in m.policy]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        for name in FOLDERS:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in FILES:
            shutil.copyfile(ROOT / name, copy / name)
        broken = failing(copy, " ".join(dict.fromkeys(t for m in chosen for t in m.tests.split())))
        if broken is not None:
            raise SystemExit(f"{broken} fails before anything is changed")
        for m in chosen:
            killer = mutated(copy, m)
            results.append({**asdict(m), "killed_by": killer})
            print(f"{'survives' if killer is None else 'killed  '} {m.file}: {m.policy}", flush=True)
    alive = [r["policy"] for r in results if r["killed_by"] is None]
    if asked.json is not None:
        figures = {"mutations": len(results), "survivors": alive, "lines": results}
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
