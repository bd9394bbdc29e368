"""The plan of a run, from recipe and checkpoint: one decision per linear, with its reason, before any weight is read.

The plan is pure: the same recipe, checkpoint and calibration give the same plan and the same ``identity``, which is what
a job resumes by. It also says what the run will cost (``forecast``) and refuses what cannot fit.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch

from qkit.calibration.dataset import Calibration
from qkit.diffusion.policy import BY_STEP, PolicyConfig
from qkit.errors import Unsupported, UsageError
from qkit.families.blocks import BlockSequence, BlockStructure
from qkit.families.discover import kind_of
from qkit.families.sharing import guessed_groups
from qkit.families.structure import ModelStructure
from qkit.kvcache.policy import STATIC, CachePolicy
from qkit.kvcache.scales import stored_bytes
from qkit.planning import gguf
from qkit.planning.deciding import decide, kept_whole, with_units
from qkit.planning.ends import end_plans, skipped_head
from qkit.planning.engine_rules import TITLES, check_engine, check_kind
from qkit.planning.export_method import export_method, own_method_reason
from qkit.planning.fused_layers import ANY, check_shapes, engine_lines_of, fused_linears, split_apart
from qkit.planning.kept import PLAIN_REASON, kept_fields
from qkit.planning.layout import check_layout
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.methods import check_doubled, check_learned_scales, check_method
from qkit.planning.recipe import Recipe, RecipeTrial, check_rules, parse_method, rule_for
from qkit.planning.sizes import check_rank, packed_bytes
from qkit.planning.towers import tower_rules
from qkit.planning.unloaded import skipped_unloaded, unloaded_plans
from qkit.solvers.table import SOLVERS
from qkit.system.machine import run_dtype
from qkit.tensor.formats import Scheme
from qkit.transforms.table import INPUTS, RATIOS, TRANSFORMS

_VERSIONS = ("qkit", "torch", "transformers", "compressed-tensors")  # what decides the bytes of a result
UNMEASURED_REASON = (
    "the model reads its weight by itself, and the range of its inputs, which the scheme needs, is not seen"
)
OUTSIDE_REASON = "it is in no block of the model"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The decisions for a whole run. linears, skipped, and kept (as the source stores them): by checkpoint name (without
    '.weight'), in file order.

    run_dtype: what blocks are run in where there are calibration rows (``machine.run_dtype``); dtype: the checkpoint's
    device: that blocks are run and solved on, as torch names it
    significant: how many weights of the whole model go to sparse parts after it is quantized
    calibration: the rows that solvers, transforms or the scales of the KV cache are measured on; None where none are
    needs_rows: whether the blocks are solved with these rows
    kv: the KV cache policy (``qkit.kvcache.policy``) that the model is to be run with
    pipeline: of a diffusion pipeline, {name: digest} of what is around its transformer; side_files: of what lies beside the
    weights and goes with them (``files.side_files``)
    policy: precision by step that is asked for (``qkit.diffusion.policy.PolicyConfig``)
    key_exponents: of the scales of keys (``qkit.transforms.keys``), by block, head and rotary pair
    ends: what is quantized outside the blocks: embeddings and output head (``planning.ends``), and matrices that the class
    does not load (``planning.unloaded``); linears are those of blocks
    own_method: why ``export`` is qkit's own method; None where it is not, or was asked for
    fused: linears that engines load as one and that therefore share a scheme and, for NVFP4, a global scale
    """

    linears: dict[str, LinearPlan]
    ends: dict[str, LinearPlan]
    skipped: dict[str, str]
    kept: dict[str, LinearPlan]
    fused: tuple[tuple[str, ...], ...]
    significant: int
    transforms: tuple[str, ...]
    family: str
    model_type: str
    dtype: str
    run_dtype: str
    seed: int
    device: str
    source_fingerprint: str
    source_bytes: int
    packed_bytes: int
    calibration: Calibration | None
    needs_rows: bool
    untied: bool
    export: str
    recipe: dict[str, Any]
    kv: dict[str, Any] | None = None
    policy: dict[str, Any] | None = None
    own_method: str | None = None
    pipeline: dict[str, str] | None = None
    side_files: dict[str, str] = field(default_factory=dict)
    key_exponents: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    tries: dict[str, RecipeTrial] = field(default_factory=dict)

    @property
    def packed(self) -> dict[str, LinearPlan]:
        """All that has a format: the linears of the blocks, those that are kept as the source has them, then the ends."""
        return {**self.linears, **self.kept, **self.ends}

    @property
    def inputs(self) -> str:
        """The inputs that scale searches look at, of INPUTS."""
        return str(self.recipe["options"].get("inputs", INPUTS[0]))

    @property
    def learns(self) -> bool:
        """Whether codes are learned after all linears of a block are solved."""
        return any(TRANSFORMS[t].stage == "block" for t in self.transforms)

    def learning(self, option: str) -> int:
        """The largest value of 'loss_weighted' or 'e2e_steps' of any linear; 0 where no method has the option."""
        return max((int(p.options.get(option, 0)) for p in self.linears.values()), default=0)

    @cached_property
    def needs(self) -> frozenset[str]:
        """The needs of solvers and transforms beside the inputs of quantized blocks, by the names in their tables."""
        solvers = [(p.solver, p.options) for p in self.linears.values()]
        solvers += [pair for tried in self.tries.values() for pair in tried.solvers.values()]
        needs = {need for name, options in solvers for need in SOLVERS[name].needs_with(options)}
        needs |= {need for t in self.transforms for _, options in solvers for need in TRANSFORMS[t].needs_with(options)}
        return frozenset(needs | ({"original_outputs"} if self.tries else set()))

    @property
    def compensates(self) -> bool:
        """Whether solvers look at the inputs of the original model."""
        return "original_inputs" in self.needs

    @property
    def ratios(self) -> str:
        """The scope of one weight of images against answers, of RATIOS."""
        return str(self.recipe["options"].get("ratios", RATIOS[0]))

    @property
    def static_cache(self) -> bool:
        """Whether the checkpoint gets scales for a KV cache of engines."""
        return is_static(self.kv)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The weight and activation formats of what is quantized, {linear: scheme}."""
        return {name: p.pair for name, p in self.linears.items()}

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON-able dictionary."""
        data = asdict(self)
        data["calibration"] = None if self.calibration is None else self.calibration.to_json()
        return data

    @property
    def torch_device(self) -> torch.device:
        """The device that blocks are run and solved on."""
        return torch.device(self.device)

    @property
    def identity(self) -> dict[str, Any]:
        """The properties by which a job knows its plan again. Devices of one kind give the same bytes."""
        return {
            "plan": {**self.to_json(), "device": self.torch_device.type},
            "versions": {p: version(p) for p in (*_VERSIONS, *(["diffusers"] if self.pipeline else []))},
        }

    @property
    def hash(self) -> str:
        """The sha256 of the identity, in hex."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


def is_static(kv: dict[str, Any] | None) -> bool:
    """Whether that KV cache policy has scales that are measured beforehand."""
    return kv is not None and kv["kind"] in STATIC


def make_plan(
    recipe: Recipe,
    structure: ModelStructure,
    calibration: Calibration | None,
    seed: int,
    kv: dict[str, Any] | None = None,
) -> Plan:
    """The plan: one decision for every linear of the model.

    Raises BadRecipe for rules that match nothing or tear fused linears apart, Unsupported for what a format or a
    transform cannot do with this model, UsageError when calibration data is needed and missing.
    """
    transforms, _ = parse_method(recipe.method)
    check_method(recipe, transforms, structure, calibration)
    gguf.check_gguf(recipe, structure, transforms, kv)
    linears, kept = dict[str, LinearPlan](), dict[str, LinearPlan]()
    skipped, matched = dict[str, str](), set[int]()
    targets = tower_rules(recipe, structure)
    for sequence in structure.sequences:
        for linear, unit in with_units(sequence):
            index, rule = rule_for(linear.name, recipe.rules)
            if sequence.name in targets and (rule is None or not (rule.scheme or rule.skip or rule.keep)):
                rule = targets[sequence.name]
            elif rule is not None:
                matched.add(index)
            if rule is not None and rule.skip is not None:
                skipped[linear.name] = rule.skip
                continue
            if rule is not None and rule.keep:
                stored = kept_fields(linear.name, structure.checkpoint)
                if stored is None:
                    skipped[linear.name] = PLAIN_REASON
                else:
                    kept[linear.name] = LinearPlan(name=linear.name, shape=linear.shape, **stored)
                continue
            reason = gguf.float_reason(structure, linear.name, linear.shape[1]) if gguf.asks_for_gguf(recipe) else None
            if reason is None and rule is None:
                reason = structure.default_skip(linear.name)
            if reason is not None:
                skipped[linear.name] = reason
                continue
            reason = kept_whole(unit, recipe, rule)
            if reason is not None:
                skipped[linear.name] = reason
                continue
            planned = decide(linear, unit, recipe, rule)
            if rule is None and has_static(planned) and linear.name in structure.unread:
                skipped[linear.name] = UNMEASURED_REASON
                continue
            linears[linear.name] = planned
            check_rank(linears[linear.name], structure.dtype)
    if not linears:
        raise UsageError("nothing is left to quantize: every layer is skipped by a rule or by default")
    check_learned_scales(linears.values())
    check_doubled(recipe.method, transforms, sum(p.residual for p in linears.values()))
    significant = round(recipe.significant / 100 * sum(p.shape[0] * p.shape[1] for p in linears.values()))
    rows = rows_reason(linears, transforms, significant)
    untied = "rotate" in transforms and bool(structure.tied)
    ends = end_plans(gguf.with_types_of_ends(recipe, structure), structure, untied, rows is not None) | unloaded_plans(
        recipe, structure
    )
    skipped.update(skipped_head(structure, ends) | skipped_unloaded(structure, ends))
    skipped.update(structure.tables)
    skipped = structure.as_copied(skipped)
    skipped.update({name: OUTSIDE_REASON for name in structure.outside if name not in {*skipped, *ends}})
    check_rules(recipe, matched, [*linears, *kept, *skipped])
    named = {*linears, *kept, *skipped}  # the others are copied in one tensor
    in_gguf = gguf.asks_for_gguf(recipe)  # where every tensor has a type of its own
    engine = ANY if in_gguf else recipe.engine
    fused = tuple(g for g in fused_linears(structure, linears | kept, engine) if named.issuperset(g))
    fused += tuple(g.linears for g in guessed_groups([n for n, p in ends.items() if not p.uses]) if len(g.linears) > 1)
    fused += tuple(gguf.in_one_tensor(structure, linears)) if in_gguf else ()
    if rows and structure.family.encodes:
        raise Unsupported(
            f"{rows}, and a text encoder is quantized without calibration: use rtn with w8a16, w8a8 or w4a16"
        )
    if calibration is None and rows:
        raise UsageError(f"{rows}: add --calib FILE (or leave --calib out for the embedded text)")
    check_kind(recipe, in_gguf)
    own_method = None if in_gguf else own_method_reason(recipe, structure, linears, significant)
    export = gguf.GGUF if in_gguf else export_method(recipe, own_method)
    measured = rows is not None or is_static(kv) or recipe.prune_experts > 0
    if export == "compressed-tensors" and structure.family.streams is None:
        check_shapes(structure, linears, recipe.engine)
    check_layout(export, {**linears, **kept, **ends}, kept, structure, is_static(kv))
    size = gguf.gguf_bytes(structure, linears | ends) if in_gguf else 0
    size = size or packed_bytes(structure, linears, ends, significant, untied, kept, export)
    if kv is not None and is_static(kv):
        if export != "compressed-tensors" and (export, kv["kind"]) != ("modelopt", "fp"):
            raise UsageError(
                f"--kv {CachePolicy.from_json(kv).name}: its scales are part of the compressed-tensors format, and this result "
                f"has quant_method {export} (sparse or low-rank parts, or --export): leave one of the two out"
            )
        size += stored_bytes(structure, kv["kind"])
    plan = Plan(
        linears=linears,
        ends=ends,
        skipped=skipped,
        kept=kept,
        fused=fused,
        significant=significant,
        transforms=transforms,
        family=structure.family.name,
        model_type=kind_of(structure.checkpoint.config),
        dtype=str(structure.dtype).removeprefix("torch."),
        run_dtype=str(run_dtype(structure.dtype) if measured else structure.dtype).removeprefix("torch."),
        seed=seed,
        device="cpu",
        source_fingerprint=structure.checkpoint.fingerprint(),
        source_bytes=structure.checkpoint.nbytes,
        packed_bytes=size,
        calibration=calibration if measured else None,
        needs_rows=rows is not None,
        untied=untied,
        export=export,
        own_method=own_method,
        recipe=recipe.model_dump(),
        kv=kv,
        policy=_policy(recipe, structure, linears),
        side_files=structure.checkpoint.side_files,
    )
    if recipe.engine in TITLES:
        check_engine(plan, structure, engine_lines_of(plan, structure))
    return plan


def on_device(plan: Plan, device: str, stored: torch.dtype) -> Plan:
    """The plan with its blocks on another device. stored: the dtype of the checkpoint"""
    if device == "cpu" or plan.calibration is None:
        return replace(plan, device=device)
    return replace(plan, device=device, run_dtype=str(run_dtype(stored, device)).removeprefix("torch."))


def sequences(plan: Plan, structure: ModelStructure) -> tuple[BlockSequence, ...]:
    """The block sequences of a run: the towers in which something is quantized, and the language model."""
    return tuple(
        replace(s, blocks=tuple(split_apart(b, plan.linears) for b in s.blocks))
        for s in structure.sequences
        if s is structure.sequences[-1] or any(x.name in plan.linears for b in s.blocks for x in b.linears)
    )


def recorded_sequences(plan: Plan, structure: ModelStructure) -> tuple[BlockSequence, ...]:
    """The sequences that are known to be calibrated on inputs that runs of the whole original model record."""
    if not plan.needs_rows or plan.calibration is None:
        return ()
    read = (s for s in sequences(plan, structure) if s.on_text or plan.calibration.beyond_text)
    return tuple(s for s in read if structure.is_recorded(s))


def parts(plan: Plan, structure: ModelStructure) -> tuple[BlockStructure, ...]:
    """The blocks of a run in order; a job knows them by their places here."""
    return tuple(b for s in sequences(plan, structure) for b in s.blocks)


def has_static(p: LinearPlan) -> bool:
    """Whether an activation scale is measured beforehand and stored: a static one, or NVFP4's global scale."""
    return p.activations is not None and (not p.activations.dynamic or p.activations.strategy == "tensor_group")


def rows_reason(linears: dict[str, LinearPlan], transforms: tuple[str, ...], significant: int) -> str | None:
    """The reason why calibration rows must be run, or None when the weights alone decide."""
    if significant:
        return "significant weights are found by their effect on the loss"
    for p in linears.values():
        if SOLVERS[p.solver].needs_hessian:
            return f"solver {p.solver} measures the inputs of every layer"
        if has_static(p):
            return f"scheme {p.scheme} has a static activation scale, which is measured"
    for t in transforms:
        if TRANSFORMS[t].stage in ("stats", "block"):
            return f"{t} needs the outputs of every block for calibration samples"
    return None


def _policy(recipe: Recipe, structure: ModelStructure, linears: dict[str, LinearPlan]) -> dict[str, Any] | None:
    """Precision by step, where it is asked for. Raises Unsupported for models and formats that have none."""
    config = recipe.policy or (PolicyConfig() if recipe.scheme.upper() == BY_STEP else None)
    if config is None:
        return None
    if structure.family.streams is not None and structure.family.streams.recorded:
        raise Unsupported(
            f"scheme {BY_STEP} and --policy act between blocks, and how the blocks of this "
            f"{kind_of(structure.checkpoint.config)} hand their results on is not known to qkit: use another scheme, for "
            "instance nvfp4"
        )
    if structure.family.streams is None:
        raise Unsupported(
            f"scheme {BY_STEP} and --policy act at every step of a diffusion sampler, and this is a "
            f"{kind_of(structure.checkpoint.config)}: use another scheme, for instance nvfp4"
        )
    if not any(p.weights.name == "nvfp4" and p.activations is not None for p in linears.values()):
        raise Unsupported("a policy by step needs layers with NVFP4 weights and inputs: use --scheme 6bit")
    return config.model_dump()
