"""The table made of vLLM's answers, and what becomes of it for layers that are joined, split or run as experts."""

from dataclasses import dataclass, replace

import pytest

from qkit.tensor.formats import SCHEMES, Format, layout
from qkit.verification import vllm_table
from qkit.verification.engine_types import Selected
from qkit.verification.loaded_layers import Split, loaded_layers
from qkit.verification.model_engines import Deployment, LinearStorage, engine_lines, engine_rows
from qkit.verification.vllm_table import GPUS, Choice, choice, format_key

QKV = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
O_PROJ, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
EXPERTS = [f"model.layers.0.mlp.experts.{e}.{x}_proj" for e in (0, 1) for x in ("gate", "up", "down")]


def key(scheme: str, group: int | None = None) -> str:
    made = SCHEMES[scheme]
    weights = made.weights if group is None else made.weights.with_group(group)
    return format_key(weights, made.activations, layout(weights, made.activations))


def stored(shape: tuple[int, int], scheme: str = "W4A16", group: int | None = None) -> LinearStorage:
    made = SCHEMES[scheme]
    weights = made.weights if group is None else made.weights.with_group(group)
    return LinearStorage(weights, made.activations, layout(weights, made.activations), shape)


@dataclass(frozen=True)
class Any:
    weights: Format
    shape: tuple[int, int]


@pytest.mark.parametrize(
    ("shape", "gpu", "kernel"),
    [
        ((128, 64), "sm90", "Machete"),
        ((192, 64), "sm90", "Humming"),  # rows are no multiple of 128
        ((192, 64), "sm80", "Marlin"),  # pads
        ((256, 192), "cpu", "CPUWNA16"),
    ],
)
def test_the_first_rule_that_holds(shape, gpu, kernel):
    assert choice("column", key("W4A16", 64), gpu, *shape).kernel == f"{kernel}LinearKernel"


def test_refusals_have_vllms_words():
    assert "WNA16 MoE" in choice("experts", key("W8A16_ASYM"), "sm80", 256, 256).refused
    assert "compatible scheme" in choice("column", key("W4A8-FP8"), "sm80", 256, 256).refused
    assert choice("column", "no such format", "sm80", 256, 256) is None
    assert vllm_table.version() == "vLLM 0.32"


def test_every_row_has_every_kind_of_gpu():
    table = vllm_table._table()
    for part in ("column/bfloat16", "experts/bfloat16"):
        assert all(set(row) == {*GPUS, "cpu"} for row in table["rows"][part].values())
    assert all(rules[-1][:2] == [1, 1] for rules in table["rules"])  # there is an answer for every shape


def test_parts_become_one_layer_and_ranks_share_it():
    parts = {
        QKV[0]: stored((512, 256)),
        QKV[1]: stored((128, 256)),
        QKV[2]: stored((128, 256)),
        O_PROJ: stored((256, 512)),
    }
    split = Split(ranks=4, heads=8, kv_heads=2)
    joined, last = loaded_layers(parts, split)
    assert joined.names == tuple(QKV) and (joined.rows, joined.columns) == (
        128 + 64 + 64,
        256,
    )  # two ranks for 2 heads of keys
    assert (last.rows, last.columns, last.problem) == (256, 128, "")


@pytest.mark.parametrize(
    ("columns", "group", "ranks", "said"),
    [
        (
            576,
            64,
            4,
            "576 input columns of model.layers.0.mlp.down_proj are 144 on each of 4 ranks, and no whole groups of 64",
        ),
        (576, 64, 5, "cannot be shared out to 5 ranks"),
        (512, 128, 4, ""),
    ],
)
def test_groups_that_ranks_would_cut(columns, group, ranks, said):
    (layer,) = loaded_layers({DOWN: stored((64, columns), group=group)}, Split(ranks))
    assert said in layer.problem and bool(said) == bool(layer.problem)


def test_experts_are_one_layer():
    shapes = {"down": (64, 96), "gate": (96, 64), "up": (96, 64)}
    parts = {n: stored(shapes[n.rpartition(".")[2].removesuffix("_proj")], group=32) for n in EXPERTS}
    (layer,) = loaded_layers(parts, Split(2))
    assert (
        layer.kind == "experts" and (layer.rows, layer.columns) == (48, 64) and "no whole groups of 32" in layer.problem
    )


def lines(parts, config, on=None):
    found = engine_lines(engine_rows(parts, {}, config, "compressed-tensors", "", on or Deployment()))
    return next(line for line in found if line.engine == "vLLM")


def test_heads_that_ranks_cannot_share():
    line = lines({O_PROJ: stored((576, 576), group=64)}, {"num_attention_heads": 9}, Deployment(ranks=2))
    assert not line.loads and "9 attention heads cannot be shared out to 2 ranks" in line.notes[0]


def test_formats_that_no_one_gpu_has():
    """W4A8-FP8 is for sm90 alone, and W8A8 is asked for on sm100."""
    parts = {O_PROJ: stored((256, 256), "W4A8-FP8"), DOWN: stored((256, 256), "W4A16")}
    assert lines(parts, {}).platforms == ("sm90",)
    line = lines(parts, {}, Deployment(platforms=("sm80", "sm100")))
    assert not line.loads


def test_int8_is_not_claimed_for_blackwell():
    line = lines({DOWN: stored((256, 256), "W8A8")}, {})
    assert line.loads and not {"sm100", "sm120"} & set(line.platforms)
    assert any("no INT8 for this GPU" in note for note in line.notes)


def test_experts_without_a_backend_are_not_claimed():
    """A run on a CPU: 'Unsupported FP8 MoE backend: NONE'."""
    shapes = {"down": (64, 128), "gate": (128, 64), "up": (128, 64)}
    parts = {n: stored(shapes[n.rpartition(".")[2].removesuffix("_proj")], "FP8_DYNAMIC") for n in EXPERTS}
    assert choice("experts", key("FP8_DYNAMIC"), "cpu", 128, 64).kernel == "NONE"
    line = lines(parts, {})
    assert line.loads and "cpu" not in line.platforms and set(GPUS) & set(line.platforms)


def test_what_the_engine_itself_says_goes_over_the_table():
    parts = {QKV[0]: stored((512, 256)), QKV[1]: stored((128, 256)), QKV[2]: stored((128, 256))}
    chosen = {name: ("model.layers.0.self_attn.qkv_proj", Choice("S", "OtherLinearKernel")) for name in QKV}
    on = Deployment(platforms=("sm90",), selected=Selected("vLLM 9", {"sm90": chosen}, {}))
    row = next(row for row in engine_rows(parts, {}, {}, "compressed-tensors", "", on) if row.engine == "vLLM")
    assert row.loads_as == "S" and row.kernels == {"sm90": {"OtherLinearKernel": 1}}
    assert row.known == "selected by the engine's code"
    refused = replace(on, selected=Selected("vLLM 9", {"sm90": {}}, {"sm90": "ValueError: no such model"}))
    assert lines(parts, {}, refused).notes == ("no such model",)
