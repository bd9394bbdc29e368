"""Small packed checkpoints made by the compressed-tensors package, with the weights that it reads back from them."""

import hashlib
import json
from dataclasses import dataclass

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Case:
    """A format: the fields of qkit.json, the arguments of compressed-tensors, and how it is packed."""

    packing: str
    kind: str
    bits: int
    strategy: str
    group: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    scale: str = "model"
    acts: dict | None = None  # of qkit.json

    def record(self) -> dict:
        stem = {"e4m3": "nvfp4", "e8m0": f"mx{self.kind}"}.get(self.scale) or {"int": f"int{self.bits}"}.get(self.kind)
        keys = ("kind", "bits", "strategy", "group", "block", "symmetric", "scale")
        return {"name": stem or "fp8", **{k: getattr(self, k) for k in keys}, "dynamic": False}

    def scheme(self, targets: list[str]) -> QuantizationScheme:
        def args(f: dict) -> QuantizationArgs:
            local = f["strategy"] == "tensor_group" and f["dynamic"]
            return QuantizationArgs(
                num_bits=f["bits"],
                type="int" if f["kind"] == "int" else "float",
                strategy=f["strategy"],
                group_size=f["group"],
                block_structure=f["block"],
                symmetric=f["symmetric"],
                dynamic="local" if local else f["dynamic"],
                scale_dtype={"e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}.get(f["scale"]),
            )

        acts = args(self.acts) if self.acts else None
        return QuantizationScheme(
            targets=targets, weights=args(self.record()), input_activations=acts, format=self.packing
        )


def activation(name, kind, bits, strategy, group=None, scale="model", dynamic=True):
    return {
        "name": name, "kind": kind, "bits": bits, "strategy": strategy, "group": group, "block": None,
        "symmetric": True, "scale": scale, "dynamic": dynamic,
    }  # fmt: skip


INT8_TOKEN = activation("int8_token", "int", 8, "token")
FP8_TOKEN = activation("fp8_token", "fp8", 8, "token")
FP8_STATIC = activation("fp8_static", "fp8", 8, "tensor", dynamic=False)
FP8_GROUP = activation("fp8_group", "fp8", 8, "group", 128)
NVFP4 = activation("nvfp4_dynamic", "fp4", 4, "tensor_group", 16, "e4m3")

CASES = {
    "int4": Case("pack-quantized", "int", 4, "group", 32),
    "int3-asym": Case("pack-quantized", "int", 3, "group", 32, symmetric=False),
    "int8-w8a8": Case("int-quantized", "int", 8, "channel", acts=INT8_TOKEN),
    "fp8-channel": Case("float-quantized", "fp8", 8, "channel", acts=FP8_TOKEN),
    "fp8-static": Case("float-quantized", "fp8", 8, "tensor", acts=FP8_STATIC),
    "fp8-block": Case("float-quantized", "fp8", 8, "block", block=(24, 40), acts=FP8_GROUP),
    "nvfp4": Case("nvfp4-pack-quantized", "fp4", 4, "tensor_group", 16, scale="e4m3", acts=NVFP4),
    "mxfp4": Case("mxfp4-pack-quantized", "fp4", 4, "group", 32, scale="e8m0"),
    "mxfp8": Case("mxfp8-quantized", "fp8", 8, "group", 32, scale="e8m0"),
}
SAMPLES = [*CASES, "mixed", "sharded", "sparse"]
CASES["w4a8-bytes"] = Case("int-quantized", "int", 4, "group", 32, acts=INT8_TOKEN)  # packed in a way to be refused
GLOBAL = torch.tensor([2688 / 4.0])


def pack(case: Case, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that compressed-tensors stores for a bf16 weight, and the float32 weight that they stand for."""
    rows, columns = weight.shape
    tall, wide = case.block or (rows if case.strategy == "tensor" else 1, case.group or columns)
    blocks = torch.nn.functional.pad(weight.float(), (0, -columns % wide, 0, -rows % tall))
    blocks = blocks.unfold(0, tall, tall).unfold(1, wide, wide).flatten(2)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    amax, state = torch.maximum(-low, high).clamp(min=1e-4), {"weight": weight}
    if case.strategy == "tensor":  # one scale for all parts of what engines fuse
        amax = torch.full_like(amax, 4.0)
    top, half = {"fp4": 6.0, "fp8": 448.0}.get(case.kind, (2**case.bits - 1) / 2), 2 ** (case.bits - 1)
    scale = (amax / top).to(torch.bfloat16)
    if case.scale == "e8m0":
        scale = torch.exp2(torch.ceil(torch.log2(amax / top)))
    if not case.symmetric:
        scale = ((high - low) / (2**case.bits - 1)).to(torch.bfloat16)
        state["weight_zero_point"] = (-half - low / scale.float()).round().clamp(-half, half - 1).to(torch.int8)
    if case.scale == "e4m3":
        scale = (GLOBAL * amax / 6).to(torch.float8_e4m3fn).float().to(torch.bfloat16)
        state |= {"weight_global_scale": GLOBAL.clone(), "input_global_scale": torch.tensor([99.0])}
    if case.acts and not case.acts["dynamic"]:
        state["input_scale"] = torch.tensor([0.02], dtype=torch.bfloat16)
    scheme, packer = case.scheme(["Linear"]), BaseCompressor.get_value_from_registry(case.packing)
    state["weight_scale"] = scale.reshape(1) if case.strategy == "tensor" else scale
    stored = {key: value.contiguous() for key, value in packer.compress(state, scheme).items()}
    if case.scale == "e4m3":
        values = unpack_fp4_from_uint8(stored["weight_packed"], rows, columns).float()
        args = {"args": scheme.weights, "dtype": torch.float32, "global_scale": GLOBAL}
        return stored, dequantize(values, stored["weight_scale"].float(), **args)
    wide_scale = stored["weight_scale"] if case.scale == "e8m0" else stored["weight_scale"].float()
    return stored, packer.decompress({**stored, "weight_scale": wide_scale}, scheme)["weight"].float()


@dataclass
class Sample:
    shards: dict[str, dict[str, torch.Tensor]]
    config: dict
    record: dict

    def write(self, out, stale_hashes=False):
        out.mkdir(exist_ok=True)
        for path in out.iterdir():
            path.unlink()
        for name, tensors in self.shards.items():
            save_file(tensors, out / name, metadata={"format": "pt"})
        if not stale_hashes:
            self.record["shards"] = {name: sha((out / name).read_bytes()) for name in self.shards}
        if len(self.shards) > 1:
            total = sum(t.numel() * t.element_size() for s in self.shards.values() for t in s.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {t: name for name, s in self.shards.items() for t in s},
            }
            (out / "model.safetensors.index.json").write_text(json.dumps(index))
        self.write_json(out)

    def write_json(self, out):
        (out / "config.json").write_text(json.dumps(self.config))
        (out / "qkit.json").write_text(json.dumps(self.record))


SHAPES = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
SPARSE = ("self_attn.k_proj", "mlp.up_proj")
SHAPES |= {"mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64)}


def sparse_part(reference: torch.Tensor) -> dict[str, torch.Tensor]:
    """CSR tensors of a few values, added to the weight in place; the second row has none."""
    places = torch.zeros(reference.shape, dtype=torch.bool)
    places[::3, 5::17] = True
    values = (places.nonzero().sum(1) / 8 - 3.52).to(torch.bfloat16)
    reference[places] += values.float()
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), places.sum(1).cumsum(0)))
    columns = places.nonzero()[:, 1].to(torch.uint8)
    return {"sparse_rows": starts.to(torch.uint16), "sparse_columns": columns, "sparse_values": values}


def make(name: str, layers: int = 2) -> Sample:
    """One or two layers and a tied head. 'mixed' has two formats, 'sharded' two files, 'sparse' linears with a sparse part; the
    rest one of each."""
    generator = torch.Generator().manual_seed(len(name))
    attention = CASES["int4" if name in ("mixed", "sharded", "sparse") else name]
    mlp = CASES["fp8-channel"] if name == "mixed" else attention
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    linears, plain, skipped, fused = {}, {}, {"lm_head": "the head stays"}, []
    for layer in range(layers):
        base = f"model.layers.{layer}"
        for suffix, shape in SHAPES.items():
            case = mlp if suffix.startswith("mlp") else attention
            weight = (torch.randn(*shape, generator=generator) * 0.4).clamp(-3.9, 3.9).to(torch.bfloat16)
            stored, reference = pack(case, weight)
            kept = sparse_part(reference) if name == "sparse" and suffix in SPARSE else {}
            stored |= kept
            shards[layer] |= {f"{base}.{suffix}.{key}": value for key, value in stored.items()}
            linears[f"{base}.{suffix}"] = {
                "format": case.record(), "activations": case.acts, "shape": list(shape), "solver": "rtn",
                "error": 0.01, "baseline_error": 0.02, "fallback": None, "weight_sha256": sha(raw(reference)),
                **({"sparse": len(kept["sparse_values"])} if kept else {}),
            }  # fmt: skip
        plain[f"{base}.self_attn.o_proj.weight"] = torch.randn(64, 64, generator=generator).to(torch.bfloat16)
        plain[f"{base}.input_layernorm.weight"] = torch.ones(64, dtype=torch.float32)
        plain[f"{base}.self_attn.q_proj.bias"] = torch.randn(64, generator=generator).to(torch.float16)
        shards[layer] |= {key: value for key, value in plain.items() if key.startswith(base)}
        skipped[f"{base}.self_attn.o_proj"] = "sensitive"
        fused += [[f"{base}.self_attn.{p}_proj" for p in "qkv"], [f"{base}.mlp.{p}_proj" for p in ("gate", "up")]]
    plain["model.embed_tokens.weight"] = torch.randn(40, 64, generator=generator).to(torch.bfloat16)
    shards[0]["model.embed_tokens.weight"] = plain["model.embed_tokens.weight"]
    named = {f"model-0000{i + 1}-of-00002.safetensors": tensors for i, tensors in enumerate(shards)}
    groups = {"group_0": attention.scheme(["Linear"])}
    if name == "mixed":
        exact = [key for key in linears if "mlp" in key]
        groups = {"group_0": attention.scheme([r"re:.*self_attn\.[qkv]_proj$"]), "group_1": mlp.scheme(exact)}
    top = "mixed-precision" if name == "mixed" else attention.packing
    quantization = QuantizationConfig(
        config_groups=groups, format=top, quantization_status="compressed", ignore=list(skipped)
    )
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": True,
        "quantization_config": {
            **json.loads(json.dumps(quantization.model_dump(), default=str)),
            "version": "0.20.0", "sparsity_config": {}, "transform_config": {},
        },
    }  # fmt: skip
    if name == "sparse":
        config["quantization_config"] |= {
            "quant_method": "qkit",
            "sparse": sorted(k for k in linears if k.endswith(SPARSE)),
        }
    dtypes = {
        torch.bfloat16: "BF16",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.uint8: "U8",
        torch.uint16: "U16",
    }
    listed = plain | {
        key: value for tensors in shards for key, value in tensors.items() if ".input_" in key or ".sparse_" in key
    }
    record = {
        "format_version": 1, "qkit_version": "0.1.0", "compressed_tensors": "0.20.0",
        "source": {"fingerprint": "a" * 64, "model_type": "llama", "bytes": 1000}, "plan_hash": "b" * 64,
        "recipe": {}, "calibration": None, "linears": linears, "skipped": skipped, "fused": fused,
        "tied": [["lm_head.weight", "model.embed_tokens.weight"]],
        "plain": {
            key: {"dtype": dtypes[value.dtype], "shape": list(value.shape), "sha256": sha(raw(value))}
            for key, value in listed.items()
        },
        "shards": {},
    }  # fmt: skip
    return Sample(named if name == "sharded" else {"model.safetensors": shards[0] | shards[1]}, config, record)
