"""Every scheme and every family, from a checkpoint to logits of the packed model read back from disk.

The reference is the original model with weights as compressed-tensors decompresses them and activations rounded as the
formats define it (``decompressed.py``). Two readers are held against it: ``qkit.load``, and stock transformers with
compressed-tensors in a process that never imports qkit.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from decompressed import reference_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import FAMILIES, logits, relative, tokens

import qkit
from qkit.errors import QkitError
from qkit.tensor.formats import SCHEMES, scheme
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, quantize

X = tokens(2, 24)
# FP8_BLOCK rounds activations in groups of 128 channels, and 128 rows have one scale: the model must be that wide.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
METHODS = [
    ("w4a16", "gptq", 32),
    ("w8a8", "smoothquant+gptq", None),
    ("nvfp4", "gptq", None),
    ("w3a16_asym", "awq", 32),
    ("fp8_dynamic", "rtn", None),
    ("mxfp4", "rtn", None),
]


@dataclass(frozen=True)
class Case:
    family: str
    scheme: str
    method: str
    group: int | None = None
    wide: bool = False
    signed: bool = False

    def __str__(self) -> str:
        return f"{self.family}-{self.scheme}-{self.method}" + "-signed" * self.signed


CASES = [Case("llama", name, "rtn", None, True) for name in SCHEMES if name != "6BIT"]
CASES += [Case(family, *method) for family in FAMILIES for method in METHODS]
SIGNED = [Case("llama", name, "gptq", None, True, True) for name in ("W2A16", "W3A16", "W4A16", "W4A8")]
CASES += SIGNED


MOE = ("mixtral", "qwen3_moe")


def distance(case: Case, found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative difference of logits. Of experts the median over tokens: a token between two routes may take the other."""
    if case.family not in MOE:
        return relative(found, wanted)
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


class Packed:
    """The checkpoints of all cases, made when they are asked for, with the logits of their references."""

    def __init__(self, root: Path, tiny, calib: Path, quiet) -> None:
        self.root, self.tiny, self.calib, self.quiet = root, tiny, calib, quiet
        self.made: dict[Case, Path] = {}
        self.known: dict[tuple[Case, torch.dtype], torch.Tensor] = {}

    def original(self, case: Case) -> Path:
        return self.tiny(case.family, **(WIDE if case.wide else {}))

    def folder(self, case: Case) -> Path:
        if case not in self.made:
            out = self.root / str(case)
            calib = {"calib": self.calib, "samples": 8, "seqlen": 32}
            if case.signed:
                calib["options"] = {"signed": True}
            request = Request(
                model=str(self.original(case)),
                scheme=case.scheme,
                method=case.method,
                group_size=case.group,
                threads=1,
                **calib,
            )
            report = quantize(request, out, self.quiet)
            assert report.ok
            self.made[case] = out
        return self.made[case]

    def reference(self, case: Case, dtype: torch.dtype) -> torch.Tensor:
        if (case, dtype) not in self.known:
            model = reference_model(self.folder(case), self.original(case)).to(dtype)
            self.known[case, dtype] = logits(model, X)
        return self.known[case, dtype]

    def tolerance(self, case: Case) -> float:
        """Twice the error that arithmetic in bf16 makes in the reference model."""
        error = distance(case, self.reference(case, torch.bfloat16), self.reference(case, torch.float32))
        assert 1e-4 < error < 0.5
        return 2 * error


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny, calib, quiet):
    return Packed(tmp_path_factory.mktemp("packed"), tiny, calib, quiet)


def exact(case: Case) -> bool:
    """Whether float32 takes no other path than the reference: no integer sums, no experts summed in another order."""
    return case.scheme.upper() != "W8A8" and case.family not in MOE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_model_computes_what_its_file_says(case, packed):
    report = verify(packed.folder(case))
    assert report.problems == [] and report.linears > 0
    wanted = packed.reference(case, torch.float32)
    model = qkit.load(packed.folder(case), dtype=torch.float32)
    assert distance(case, logits(model, X), wanted) < (1e-5 if exact(case) else packed.tolerance(case))
    model = qkit.load(packed.folder(case))
    assert model.dtype == torch.bfloat16
    assert distance(case, logits(model, X), wanted) < packed.tolerance(case)


@pytest.mark.parametrize("case", SIGNED, ids=str)
def test_scales_of_both_signs_are_in_the_file(case, packed):
    with safe_open(packed.folder(case) / "model.safetensors", "pt") as f:
        scales = torch.cat([f.get_tensor(k).flatten() for k in f.keys() if k.endswith("weight_scale")])
    assert 0.2 < float((scales < 0).float().mean()) < 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_quantizing_keeps_the_model(family, packed):
    """Eight bits with every method part in use stay near the original: nothing is swapped, lost or taken twice."""
    case = Case(family, "w8a8", "smoothquant+gptq")
    original = logits(qkit.load(packed.original(case), dtype=torch.float32), X)
    assert distance(case, packed.reference(case, torch.float32), original) < 0.06


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_packed_or_skipped_for_a_reason(family, packed):
    folder = packed.folder(Case(family, *METHODS[0]))
    record = json.loads((folder / "qkit.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as f:
        names = list(f.keys())
    matrices = {
        n.removesuffix(".weight") for n in names if n.endswith(".weight") and "norm" not in n and "embed_t" not in n
    }
    matrices = {n for n in matrices if "embed_in" not in n and "embed_positions" not in n}
    assert matrices <= record["skipped"].keys()
    assert all(record["skipped"].values())
    packed_names = {n.removesuffix(".weight_packed") for n in names if n.endswith(".weight_packed")}
    assert packed_names == record["linears"].keys()
    experts = {"mixtral": 24, "qwen3_moe": 24}.get(family, 0)
    assert sum(".experts." in n for n in packed_names) == experts


# ---- stock transformers ----------------------------------------------------------------------------------------

# What transformers 5.23 with compressed-tensors 0.20 makes of a case: (condition, dtypes that agree with the reference,
# dtypes that are refused or crash, why). The first condition that holds decides. 'agree' is within the tolerance.
BOTH, NONE = ("float32", "bfloat16"), ()
STOCK = [
    (
        lambda c, s: not s.weights.symmetric,
        NONE,
        BOTH,
        "the loader expects zero points in their unpacked shape; files made by compressed-tensors itself fail alike",
    ),
    (
        lambda c, s: c.family in MOE and s.weights.scale == "e4m3",
        NONE,
        BOTH,
        "global scales of experts are not read: their weights come out thousands of times too large",
    ),
    (
        lambda c, s: c.family in MOE and s.weights.kind == "int" and s.activations is not None,
        NONE,
        BOTH,
        "int-quantized experts have no loader",
    ),
    (
        lambda c, s: c.family in MOE and s.activations is not None and s.weights.scale != "model",
        NONE,
        ("float32",),
        "experts run dense: the rounding of their inputs is left out; in float32 the decompressed weight is bf16",
    ),
    (
        lambda c, s: c.family in MOE and s.activations is not None,
        NONE,
        NONE,
        "experts run dense: the rounding of their inputs is left out",
    ),
    (
        lambda c, s: c.family == "opt" and s.activations is not None and s.activations.strategy == "token",
        NONE,
        NONE,
        "OPT flattens its inputs to two dimensions, which the loader takes for one token: one scale for all",
    ),
    (
        lambda c, s: s.weights.scale != "model",
        ("bfloat16",),
        ("float32",),
        "the decompressed weight is bf16 whatever the dtype of the model",
    ),
    (lambda c, s: True, BOTH, NONE, ""),
]


def stock_verdict(case: Case) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    s = scheme(case.scheme)
    return next((agree, refused, why) for holds, agree, refused, why in STOCK if holds(case, s))


@pytest.fixture(scope="module")
def stock(packed):
    """{(case, dtype): logits, or the error} of every case, from one process without qkit."""
    jobs = {}
    for case in CASES:
        with suppress(QkitError):  # its own tests say so
            jobs[str(packed.folder(case))] = case
    path = packed.root / "jobs.json"
    loads = [[folder, dtype] for folder in jobs for dtype in BOTH]
    path.write_text(json.dumps({"tokens": X.tolist(), "loads": loads}))
    script = Path(__file__).parents[1] / "stock_load.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-I", str(script), str(path)], env=environment, cwd=packed.root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = {}
    for key, error in json.loads(Path(f"{path}.out").read_text()).items():
        folder, dtype = key.split("|")
        found[jobs[folder], dtype] = error or load_file(f"{folder}.{dtype}.safetensors")["logits"]
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stock_transformers(case, packed, stock):
    """The table above is right in both directions: what should load agrees, and what does not is known."""
    agree, refused, why = stock_verdict(case)
    for dtype in BOTH:
        result = stock[case, dtype]
        if dtype in refused:
            assert isinstance(result, str), f"{dtype} loads now: {why} no longer holds"
            continue
        assert not isinstance(result, str), result
        error = distance(case, result, packed.reference(case, torch.float32))
        if dtype not in agree:
            assert error > 1e-3, f"{dtype} agrees now: {why} no longer holds"
        elif dtype == "float32" and case.family not in MOE:
            assert error < 1e-5
        else:
            assert error < packed.tolerance(case)
