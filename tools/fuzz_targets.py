"""The nine kinds of inputs that ``fuzz`` mutates: their sound files, the code that reads them, and what a success has to be."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mutations
import qkit_data
import torch
from fuzz_models import SIZES, make_model, plan_again, planned, tokens
from mutations import mutated_json_file, mutated_yaml

from qkit.allocation.limits import Budget, BudgetRequest
from qkit.calibration.image_text import read_image_text
from qkit.calibration.mixture import Layout, mixed_rows
from qkit.calibration.sources import CalibSource
from qkit.evaluation.budget import check_budget, junit_xml, load_budget
from qkit.files.checkpoint import Checkpoint
from qkit.files.locate import recorded_source
from qkit.planning.request import Request
from qkit.runtime.loading import PackedStructure, load, load_tokenizer
from qkit.sensitivity.profile import Profile
from qkit.verification.verify import verify
from qkit.workflows.budget import allocate_budget
from qkit.workflows.profile import ProfileRequest, profile
from qkit.workflows.quantize import prepare, quantize

KINDS = ("config", "headers", "index", "recipe", "budget", "calibration", "pairs", "profile", "output")
Mutant = tuple[Path, bytes, Callable[[], str | None]]  # the file, what it becomes, and what is run then


class Quiet:
    """A progress listener that says nothing."""

    def start(self, what: str, total: int) -> None: ...

    def step(self, amount: int = 1) -> None: ...


@dataclass
class Target:
    """folder: with the sound files; mutant: makes one input of random numbers."""

    kind: str
    folder: Path
    mutant: Callable[[random.Random], Mutant]
    kept: dict[Path, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept = {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}

    def restore(self) -> None:
        """All files as they were, behind a child that died."""
        self.clean()
        for path, data in self.kept.items():
            path.write_bytes(data)

    def clean(self) -> None:
        """Without what a run left."""
        for name in ("out", "out.job", "out.partial"):
            shutil.rmtree(self.folder.parent / name, ignore_errors=True)


def make(folder: Path, kinds: list[str]) -> list[Target]:
    """The targets of these kinds, each with files of its own below ``folder``."""
    makers: dict[str, Callable[[Path], Target]] = {
        "config": _config,
        "headers": _headers,
        "index": _index,
        "recipe": _recipe,
        "budget": _budget,
        "calibration": _calibration,
        "pairs": _pairs,
        "profile": _profile,
        "output": _output,
    }
    return [makers[kind](folder / kind) for kind in kinds]


def _config(folder: Path) -> Target:
    folder.mkdir(parents=True)
    families = ("llama", "qwen3_moe", "gemma3_text", "mamba2", "opt")
    more = {
        "qwen3_moe": dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        "gemma3_text": dict(head_dim=16, sliding_window=32),
        "mamba2": dict(num_heads=8, head_dim=16, expand=2, n_groups=1, state_size=16),
        "opt": dict(ffn_dim=96, word_embed_proj_dim=64),
    }
    expected = {}
    for family in families:
        make_model(folder / family, family, **more.get(family, {}))
        if family != "mamba2":
            expected[family] = planned(folder / family)
    (folder / "text.txt").write_bytes(qkit_data.text_path("calibration").read_bytes()[:3000])

    def mutant(rng: random.Random) -> Mutant:
        family = rng.choice((*families, "llama", "llama", "llama"))
        place = folder / family
        if rng.random() < 0.12:
            file = place / rng.choice(("tokenizer.json", "tokenizer_config.json", "tokenizer_config.json"))
            top = ("model",) if rng.random() < 0.3 else ("added_tokens",)
            return (
                file,
                mutated_json_file(file, rng, top if file.name == "tokenizer.json" else ()),
                partial(tokens, place),
            )
        data = mutated_json_file(place / "config.json", rng)
        if family in expected:
            return place / "config.json", data, partial(plan_again, place, expected[family])
        return place / "config.json", data, partial(_ignored, partial(planned, place))

    return Target("config", folder, mutant)


def _ignored(run: Callable[[], object]) -> str | None:
    run()
    return None


def _headers(folder: Path) -> Target:
    place = make_model(folder / "model")
    file, expected = place / "model.safetensors", planned(place)
    shutil.copy(file, folder / "sound")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def mutant(rng: random.Random) -> Mutant:
        action = rng.random()
        if action < 0.6:
            text = mutations.mutated_json(header, rng)
            size = (
                len(text)
                if rng.random() < 0.9
                else rng.choice((0, 1, 2**31, 2**63, len(text) + 1, 10**8 + 1, len(raw)))
            )
            data = size.to_bytes(8, "little") + text + body
        elif action < 0.9:
            data = mutations.mutated_bytes(raw[: 8 + length], rng) + body
        else:
            cut = rng.choice((0, 7, 8, 9, 8 + length, rng.randrange(len(raw))))
            data = raw[:cut] if rng.random() < 0.5 else raw + b"\0" * rng.choice((1, 8))
        return file, data, partial(plan_again, place, expected)

    return Target("headers", folder, mutant)


def _index(folder: Path) -> Target:
    place = make_model(folder / "model", shard="150KB")
    file, expected = place / "model.safetensors.index.json", planned(place)
    return Target(
        "index",
        folder,
        lambda rng: (
            file,
            mutated_json_file(file, rng, ("weight_map",)),
            partial(plan_again, place, expected),
        ),
    )


# ---- files that people write -------------------------------------------------------------------------------------

RECIPE = {
    "scheme": "w4a16",
    "method": "smoothquant+gptq",
    "group_size": 32,
    "options": {"damp": 0.02},
    "outliers": {"*.down_proj": 0.5},
    "rank": 0,
    "significant": 0.0,
    "rules": [
        {"match": "*.down_proj", "scheme": "w8a16", "group_size": 32},
        {"match": ["model.layers.0.*", "*.o_proj"], "skip": "the first block reacts strongly"},
        {"match": "*.v_proj", "solver": "gptq", "options": {"damp": 0.05}},
    ],
}
BUDGET = {
    "perplexity.a": "+2%", "kl.mean": 0.02, "kl.p99": 0.3, "same_top1": ">=0.95", "task.qkit_cloze.acc": ">=-1%",
    "size": "0.3x", "accuracy": ">=-1%", "answer_perplexity": "+2%", "psnr": 25, "texts": {"a": "a.txt"}, "pairs": "drawn",
    "window": 512, "windows": 200, "limit": 100,
}  # fmt: skip
MEASURED = {
    "texts": {
        "a": {"perplexity": 12.0, "baseline_perplexity": 11.5, "kl": {"mean": 0.01, "p99": 0.1}, "same_top1": 0.97}
    },
    "size": {"bytes": 10, "baseline_bytes": 40},
}


def _recipe(folder: Path) -> Target:
    place = make_model(folder / "model")
    file = folder / "recipe.yaml"
    calib = folder / "calib.txt"
    calib.write_bytes(qkit_data.text_path("calibration").read_bytes()[:3000])
    text = json.dumps(RECIPE, indent=1).replace("{\n", "{ ").encode()
    file.write_bytes(text)
    every = planned(place)[0]

    def run() -> str | None:
        plan = prepare(Request(model=str(place), recipe=file, calib=calib, samples=2, seqlen=16, threads=1)).plan
        found = len(plan.linears) + len(plan.skipped)
        return None if found == every else f"planned {found} layers of {every}"

    return Target("recipe", folder, lambda rng: (file, mutated_yaml(RECIPE, text, rng), run))


def _budget(folder: Path) -> Target:
    folder.mkdir(parents=True)
    file = folder / "budget.yaml"
    text = "".join(f"{k}: {json.dumps(v)}\n" for k, v in BUDGET.items()).encode()
    file.write_bytes(text)

    def run() -> str | None:
        budget = load_budget(file)
        checks = check_budget(budget, MEASURED)
        junit_xml(checks, "fuzz")
        return None if len(checks) >= len(budget.lines) else "lines without a check"

    return Target("budget", folder, lambda rng: (file, mutated_yaml(BUDGET, text, rng), run))


def _calibration(folder: Path) -> Target:
    folder.mkdir(parents=True)
    text = qkit_data.text_path("calibration").read_bytes()[:2500]
    said = text[:400].decode(errors="ignore")
    chat = [{"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": said}]}] * 3
    sound: dict[str, bytes] = {
        "text.txt": text,
        "chat.json": json.dumps(chat).encode(),
        "chat.txt": "\n".join(map(json.dumps, chat)).encode(),
        "table.csv": b"question,answer\n"
        + b"".join(b"what is %d,it is %d and no other number\n" % (i, i) for i in range(90)),
        "table.txt": b"PAR1" + bytes(range(256)) * 9 + b"PAR1",
    }
    for name, data in sound.items():
        (folder / name).write_bytes(data)
    tokenizer = load_tokenizer(qkit_data.model_path("tiny-llama"))
    marks = {"table.csv": b"question,answer\n", "table.txt": b"PAR1"}

    def mutant(rng: random.Random) -> Mutant:
        file = folder / rng.choice(("text.txt", "text.txt", *sound))
        data = mutations.mutated_bytes(sound[file.name], rng)
        if rng.random() < 0.1:
            data = data * rng.choice((2, 50, 1000))

        def run() -> str | None:
            rows = mixed_rows([CalibSource(str(file))], tokenizer, Layout(samples=4, seqlen=32), SIZES["vocab_size"])
            if tuple(rows.tokens.shape) != (4, 32) or int(rows.tokens.max()) >= SIZES["vocab_size"]:
                return f"rows of {tuple(rows.tokens.shape)}"
            mark, form = marks.get(file.name), rows.understood[0]["form"]
            return f"{file.name} was read as a text" if mark and data.startswith(mark) and form == "text" else None

        return file, data, run

    return Target("calibration", folder, mutant)


def _pairs(folder: Path) -> Target:
    from PIL import Image

    folder.mkdir(parents=True)
    frames = folder / "clip"
    frames.mkdir()
    for name in ("a.png", "clip/0.png", "clip/1.png"):
        Image.new("RGB", (8, 8), (3, 200, 9)).save(folder / name)
    lines: list[Any] = [
        {"image": "a.png", "question": "What is it?", "answer": "green", "kind": "colour"},
        {"image": ["a.png", "a.png"], "question": "How many?", "answer": "two"},
        {"video": "clip", "question": "What moves?", "answer": "nothing"},
    ]
    file = folder / "pairs.jsonl"
    file.write_bytes("\n".join(map(json.dumps, lines)).encode())

    def mutant(rng: random.Random) -> Mutant:
        if rng.random() < 0.2:
            picture = folder / rng.choice(("a.png", "clip/0.png"))
            return picture, mutations.mutated_bytes(picture.read_bytes(), rng), run
        if rng.random() < 0.25:
            return file, mutations.mutated_bytes(file.read_bytes(), rng), run
        number = rng.randrange(len(lines))
        changed = [json.dumps(line).encode() for line in lines]
        changed[number] = mutations.mutated_json(lines[number], rng)
        return file, b"\n".join(changed), run

    def run() -> str | None:
        pairs = read_image_text(file, 3)
        sound = all(p.answer and p.question and (p.images or p.frames) for p in pairs)
        return None if sound and len(pairs) == 3 else "a pair without a part"

    return Target("pairs", folder, mutant)


# ---- what qkit writes --------------------------------------------------------------------------------------------


def _profile(folder: Path) -> Target:
    place = make_model(folder / "model", num_hidden_layers=1)
    calib = folder / "calib.txt"
    calib.write_bytes(qkit_data.text_path("calibration").read_bytes()[:3000])
    base = Request(model=str(place), calib=calib, samples=2, seqlen=16, threads=1)
    profile(ProfileRequest(base, "int4,int8,bf16", ("weight", "kl")), folder / "profile", Quiet())
    for extra in ("probes",):
        shutil.rmtree(folder / "profile" / extra, ignore_errors=True)
    file, table = folder / "profile" / "profile.json", folder / "table.json"
    made = Profile.load(folder / "profile")
    structure_shapes = {"q": (64, 64), "k": (32, 64), "g": (96, 64), "d": (64, 96)}
    entries = [
        {"format": name, "group": group, "out": out, "in": columns, "seconds": 1e-5}
        for name, group in (*((n, 32) for n in made.candidates), *((n, 128) for n in made.candidates), ("keep", None))
        for out, columns in structure_shapes.values()
    ]
    about = {"machine": "m", "device": "cpu", "dtype": "float32", "m": 1, "threads": 1}
    table.write_text(json.dumps({"version": 1, **about, "entries": entries}))

    def run(latency: bool) -> str | None:
        budget = Budget(bits=6.0, latency=(10**9, table) if latency else None)
        found = allocate_budget(base, BudgetRequest(budget=budget, profile=folder / "profile", named=True), Quiet())
        prepare(found.request)
        unknown = [u for u in found.allocation.picks if u not in {u.key for u in found.profile.units}]
        return f"units {unknown}" if unknown else None

    def mutant(rng: random.Random) -> Mutant:
        if rng.random() < 0.2:
            return table, mutated_json_file(table, rng), partial(run, True)
        return (
            file,
            mutated_json_file(file, rng, rng.choice((("units",), ("request",), ()))),
            partial(run, False),
        )

    return Target("profile", folder, mutant)


def _output(folder: Path) -> Target:
    source = make_model(folder / "model", num_hidden_layers=1)
    calib = folder / "calib.txt"
    calib.write_bytes(qkit_data.text_path("calibration").read_bytes()[:3000])
    out = folder / "packed"
    quantize(Request(model=str(source), scheme="w8a8", method="rtn", threads=1), out, Quiet())
    shutil.rmtree(folder / "packed.job", ignore_errors=True)
    ids = torch.arange(24)[None] * 31
    with torch.inference_mode():
        expected = load(out).generate(ids, do_sample=False, max_new_tokens=4), load(out)(input_ids=ids).logits
    names = ("config.json", "config.json", "qkit.json", "qkit.json", "model.safetensors", "generation_config.json")

    def run(file: Path) -> str | None:
        sound = verify(out).ok
        recorded_source(out)
        if not sound and file.name == "model.safetensors":
            PackedStructure(Checkpoint.open(out, quantized=True))
            return None
        if not sound:
            load(out)
            return None
        with torch.inference_mode():
            model = load(out)
            found = model.generate(ids, do_sample=False, max_new_tokens=4), model(input_ids=ids).logits
        same = torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        return None if same else f"verified, and {file.name} changed what the model says"

    def mutant(rng: random.Random) -> Mutant:
        file = out / rng.choice(names)
        if file.name == "model.safetensors":
            return file, mutations.mutated_bytes(file.read_bytes(), rng), partial(run, file)
        top = ("quantization_config",) if file.name == "config.json" else rng.choice((("linears",), ("plain",), ()))
        return file, mutated_json_file(file, rng, top, 0.1), partial(run, file)

    return Target("output", folder, mutant)
