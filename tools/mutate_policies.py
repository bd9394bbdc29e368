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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("qkit", "kernels", "calib_data", "tests", "tools")
FILES = ("pyproject.toml", "cli.py", "README.md")


@dataclass(frozen=True)
class Mutation:
    """policy: what the line decides; line, changed: its text, found once in ``qkit/file``, and what it becomes; tests: names of
    files and tests in ``tests/``, as pytest reads them."""

    policy: str
    file: str
    line: str
    changed: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "a solver that is worse than rounding is replaced by rounding",
        "engine/solving.py",
        "worse = error > baseline",
        "worse = False",
        ("engine/test_fallbacks.py",),
    ),
    Mutation(
        "the recorded error is that of the stored codes",
        "engine/solving.py",
        "error=baseline if worse else error,",
        "error=error,",
        ("engine/test_fallbacks.py",),
    ),
    Mutation(
        "a solver that is worse by less than 2 percent is no failure",
        "engine/solving.py",
        "error > 1.02 * baseline",
        "error > baseline",
        ("engine/test_fallbacks.py",),
    ),
    Mutation(
        "an expert with few tokens is rounded",
        "engine/solving.py",
        "FEW_TOKENS = 32",
        "FEW_TOKENS = 4",
        ("engine/test_fallbacks.py", "faults/test_16_calibration.py::test_experts_that_few_tokens_reach"),
    ),
    Mutation(
        "a branch of an expert with few tokens ignores its Hessian",
        "engine/solving.py",
        "stats.tokens >= FEW_TOKENS else None",
        "stats.tokens > 0 else None",
        ("engine/test_fallbacks.py", "tensor/test_lowrank.py"),
    ),
    Mutation(
        "one linear in twenty may fall back",
        "engine/fallbacks.py",
        "MAX_FALLBACKS = 0.05",
        "MAX_FALLBACKS = 0.1",
        ("engine/test_fallbacks.py", "faults/test_08_numbers.py::test_too_many_fallbacks_end_the_run"),
    ),
    Mutation(
        "half of all linears may see nothing but zeros",
        "engine/fallbacks.py",
        "MAX_SILENT = 0.5",
        "MAX_SILENT = 0.9",
        ("engine/test_fallbacks.py", "faults/test_08_numbers.py::test_inputs_that_are_all_zero_are_no_failure"),
    ),
    Mutation(
        "one calibration row in ten may be left out",
        "calibration/statistics.py",
        "MAX_BAD_ROWS = 0.1",
        "MAX_BAD_ROWS = 0.15",
        ("calibration/test_rows.py",),
    ),
    Mutation(
        "rows of image-text data that are not finite do not count",
        "calibration/statistics.py",
        "((self.kinds[start:stop] > 0) & good[:, None]).flatten()",
        "(self.kinds[start:stop] > 0).flatten()",
        ("calibration/test_rows.py",),
    ),
    Mutation(
        "a row that was left out once stays out",
        "calibration/block_runner.py",
        "good += [g and bool(now)",
        "good += [bool(now)",
        ("calibration/test_rows.py",),
    ),
    Mutation(
        "one row in sixteen is held out of learned rounding",
        "rounding/block.py",
        "max(1, rows // _HELD_OUT)",
        "max(1, rows // (2 * _HELD_OUT))",
        ("engine/test_auto.py::test_what_is_kept_is_what_was_measured",),
    ),
    Mutation(
        "recipes are compared on rows that none was solved with",
        "engine/auto.py",
        "good=[good and i < first_held for",
        "good=[good for",
        ("engine/test_auto.py",),
    ),
    Mutation(
        "a change of a block is one step old or unknown",
        "diffusion/controller.py",
        "return state.change if state.last == self.step - 1 else None",
        "return state.change",
        ("diffusion/test_diffusion_steps.py::test_a_change_is_one_step_old_or_unknown",),
    ),
    Mutation(
        "a threshold counts runs after a skipped step as INT8",
        "diffusion/fitting.py",
        "None if s.step - 1 in skips else s.change",
        "s.change",
        ("diffusion/test_diffusion_steps.py",),
    ),
    Mutation(
        "at most two skips in a row",
        "diffusion/controller.py",
        "state.skipped < p.most",
        "state.skipped <= p.most",
        ("diffusion/test_diffusion_steps.py::test_never_more_than_two_skips_in_a_row_and_the_forecast_is_the_run",),
    ),
    Mutation(
        "a kept hash is believed only for a file that was not just written",
        "files/hash_cache.py",
        "if settled and _state(file) == state:",
        "if _state(file) == state:",
        ("faults/test_05_source_hash.py",),
    ),
    Mutation(
        "a kept hash is that of a file whose times are the same",
        "files/hash_cache.py",
        '"ctime_ns": found.st_ctime_ns,',
        '"ctime_ns": 0,',
        ("faults/test_05_source_hash.py",),
    ),
    Mutation(
        "measurements of another identity are refused, with fields that are new too",
        "sensitivity/result_cache.py",
        "dict.fromkeys((*identity, *found))",
        "dict.fromkeys(found)",
        ("sensitivity/test_result_cache.py",),
    ),
    Mutation(
        "a job of another version of torch is another job",
        "planning/plan.py",
        '_VERSIONS = ("qkit", "torch", "transformers", "compressed-tensors")',
        '_VERSIONS = ("qkit", "transformers", "compressed-tensors")',
        ("engine/test_job.py",),
    ),
    Mutation(
        "a job that committed nothing gives way to another",
        "engine/job.py",
        "if stored is not None and (parts_in(self.path) or journal.exists()):",
        "if stored is not None:",
        ("engine/test_job.py", "faults/test_01_job_folder.py"),
    ),
    Mutation(
        "a result of other weights is not the result of this command",
        "engine/export.py",
        'return same and bool(found.get("plan_hash") == plan.hash)',
        'return bool(found.get("plan_hash") == plan.hash)',
        ("faults/test_05_source_hash.py::test_one_bit_of_the_source_is_another_source",),
    ),
    Mutation(
        "times of another machine are not joined",
        "allocation/latency.py",
        "next((k for k in mine if mine[k] != other[k]), None)",
        "None",
        ("allocation/test_latency.py",),
    ),
    Mutation(
        "a figure that is not finite fails its check",
        "evaluation/budget.py",
        "finite = value is not None and math.isfinite(value) and math.isfinite(bound)",
        "finite = value is not None",
        ("evaluation/test_budget.py",),
    ),
    Mutation(
        "hidden files of a model are left behind",
        "files/side_files.py",
        'if leaf.startswith(".") or leaf in CACHES:',
        "if leaf in CACHES:",
        ("faults/test_04_side_files.py",),
    ),
    Mutation(
        "the first layers of a cache with differences have at least 4 bits",
        "kvcache/policy.py",
        "ANCHORS, ANCHOR_BITS = 3, 4",
        "ANCHORS, ANCHOR_BITS = 2, 4",
        ("kvcache/test_kvcache_crosslayer.py",),
    ),
    Mutation(
        "the sensitivity of a cache is measured on 16 rows at most",
        "workflows/kv_cache.py",
        "ROWS = 16",
        "ROWS = 64",
        ("workflows/test_rows_of_measures.py",),
    ),
)


def failed(copy: Path, tests: Sequence[str]) -> str | None:
    """The first of the tests that fails in the copy; None if all pass. Raises SystemExit where they cannot run."""
    path = os.pathsep.join(str(copy / p) for p in ("", "calib_data", "kernels"))
    options = ["-q", "-x", "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{t}" for t in tests)]
    found = subprocess.run(
        command, cwd=copy, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if found.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}\n{found.stdout[-3000:]}{found.stderr[-3000:]}")
    return (
        None if found.returncode == 0 else re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", found.stdout, re.MULTILINE)[0]
    )
