"""Asks vLLM's own code which scheme and kernel it selects for every layer, in an interpreter of its own that has no qkit.

python -I vllm_selector_script.py JOB.json ANSWER.json, as ``selector.ask`` calls it. The job names a GPU ("sm90") or "cpu",
tensor-parallel ranks, and models (folders with a config.json) or single layers. Nothing is loaded and nothing is run: each
model is made without values by vLLM's own classes, with the platform that was asked for, and each layer says what it chose.

No GPU is needed. A build of vLLM for CPUs has all rules as Python, but not the packages and compiled functions that the build
for CUDA brings: in their place are stand-ins, which hold no rule but those of ``COMPILED``.
"""

import contextlib
import enum
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# What the build for CUDA brings (its requirements/cuda.txt, and compiled modules of its own).
BROUGHT = (
    "humming", "flashinfer", "vllm.vllm_flash_attn", "vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch",
    "vllm.third_party.deep_gemm",
)  # fmt: skip
# Compiled functions that say from which capability on there are kernels, of a build with CUDA 12.8 or newer.
COMPILED = {
    "cutlass_scaled_mm_supports_fp8": 89,
    "cutlass_scaled_mm_supports_block_fp8": 90,
    "cutlass_group_gemm_supported": 90,
    "cutlass_scaled_mm_supports_fp4": 100,
}
KERNELS = ("kernel", "linear_kernel", "fp8_linear")  # where schemes of vLLM keep the kernel that they chose
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


class AnyKind(type):
    """The type of stand-ins for classes: they have every attribute, and calling them gives themselves."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return (
            cls.__name__ if name == "value" else AnyKind(name, (), {})
        )  # members of an enumeration have their own names

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls


class StandIn(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = AnyKind(name, (), {})
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for what is missing, and nothing else."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """A stand-in's, or None."""
        if any(name == n or name.startswith(f"{n}.") for n in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        """The stand-in."""
        return StandIn(spec.name)

    def exec_module(self, module: Any) -> None:
        """It has nothing to run."""


def missing(name: str) -> bool:
    """Whether a module of the build for CUDA is not here, without importing anything. One whose folder is there may lack its
    compiled part."""
    package, *inner = name.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not inner:
        return spec is None
    places = [Path(place).joinpath(*inner) for place in spec.submodule_search_locations or ()]
    return not any([*place.parent.glob(f"{place.name}.*so"), *place.rglob("*.so")] for place in places)


def pretend(gpu: str) -> list[str]:
    """Makes vLLM in this process believe in a GPU; gives the names of all stand-ins."""
    import_names = [name for name in BROUGHT if missing(name)]
    sys.meta_path.insert(0, Finder(import_names))
    import torch
    from vllm import _custom_ops, platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    number = int(gpu.removeprefix("sm"))
    kept = ("get_attn_backend_cls", "get_vit_attn_backend", "get_supported_vit_attn_backends",
            "get_default_ir_op_priority", "is_pin_memory_available", "get_punica_wrapper")  # fmt: skip
    # Rules of kernels are those of CUDA; what is about running a model is that of CPUs.
    functions = {name: CpuPlatform.__dict__[name] for name in kept if name in CpuPlatform.__dict__}
    functions |= {
        "get_device_capability": classmethod(lambda cls, device_id=0: DeviceCapability(number // 10, number % 10)),
        "get_device_name": classmethod(lambda cls, device_id=0: gpu),
        "get_device_total_memory": classmethod(lambda cls, device_id=0: 80 << 30),
        "num_compute_units": classmethod(lambda cls, device_id=0: 132),
        "is_fully_connected": classmethod(lambda cls, device_ids: True),
        "device_count": classmethod(lambda cls: 8),
        "import_kernels": classmethod(lambda cls: None),
    }
    platforms.current_platform = type("AskedPlatform", (CudaPlatformBase,), functions)()
    if torch.version.cuda is None:
        for name, least in COMPILED.items():
            if hasattr(_custom_ops, name):
                setattr(_custom_ops, name, functools.partial(lambda least, number: number >= least, least))
                import_names.append(f"vllm._custom_ops.{name}")
    return import_names


def prepare_groups(tp: int) -> None:
    """One process that holds itself for the first of ``tp`` ranks, for the current config."""
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state

    if not parallel_state.model_parallel_is_initialized():
        where = Path(tempfile.mkdtemp(prefix="qkit-selector-")) / "store"
        init_distributed_environment(1, 0, f"file://{where}", 0, "gloo")
    parallel_state.destroy_model_parallel()  # which groups there are depends on the model
    config = get_config().parallel_config
    config.tensor_parallel_size = 1
    initialize_model_parallel(1, 1)
    config.tensor_parallel_size = tp
    parallel_state.get_tp_group().world_size = tp


def get_config() -> Any:
    """vLLM's current config."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()


def kernel_of(owner: Any) -> str:
    """The name of what runs a layer: the kernel of a scheme, or the backend of experts."""
    kernel = next((k for x in KERNELS if (k := getattr(owner, x, None)) is not None), None)
    if kernel is not None:
        return type(kernel).__name__
    backend = next((v for n, v in vars(owner).items() if n.endswith("backend") and isinstance(v, enum.Enum)), None)
    return "" if backend is None else str(backend.name)


class Recorder:
    """What every layer chose, or why none could be chosen, by its name in vLLM."""

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, str]] = {}

    def note(self, name: str, layer: Any, error: Exception | None = None) -> None:
        """One layer."""
        found = self.layers.setdefault(name, {"class": type(layer).__name__})
        if error is not None:
            found["refused"] = f"{type(error).__name__}: {error}"
            return
        method, scheme = layer.quant_method, getattr(layer, "scheme", None)
        found["scheme"] = type(method if scheme is None else scheme).__name__
        kernel = kernel_of(scheme if scheme is not None else method)
        if kernel:
            found["kernel"] = kernel

    def watch(self, config: Any) -> None:
        """Has a quantization config tell this recorder of every layer that asks it."""
        kind, recorder = type(config), self

        def get_quant_method(config: Any, layer: Any, prefix: str) -> Any:
            try:
                method = kind.get_quant_method(config, layer, prefix)
            except Exception as e:  # whatever vLLM raises is its answer
                recorder.note(prefix, layer, e)
                return plain(layer)
            if (
                method is None
                or type(method).__name__.startswith("Unquantized")
                or not hasattr(method, "create_weights")
            ):
                return method
            return recorder.watched(method, layer, prefix)

        config.__class__ = type(kind.__name__, (kind,), {"get_quant_method": get_quant_method})

    def watched(self, method: Any, layer: Any, name: str) -> Any:
        """A method of vLLM whose making of weights is noted: kernels are chosen there."""
        create = method.create_weights

        def create_weights(layer: Any, *args: Any, **options: Any) -> None:
            layer.quant_method = method
            try:
                create(layer, *args, **options)
            except Exception as e:  # whatever vLLM raises is its answer
                self.note(name, layer, e)
            else:
                self.note(name, layer)

        if type(layer).__name__ not in ("Attention", "MLAAttention"):
            method.create_weights = create_weights
        return method


def plain(layer: Any) -> Any:
    """What makes a layer whose quantization was refused, so that the layers behind it are asked, too."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    if isinstance(layer, LinearBase):
        return UnquantizedLinearMethod()
    if isinstance(layer, RoutedExperts):
        from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

        return UnquantizedFusedMoEMethod(layer.moe_config)
    return None


@contextlib.contextmanager
def configured(folder: str, tp: int) -> Iterator[Any]:
    """vLLM's config of a model on so many ranks, as the current one."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=folder, enforce_eager=True, skip_tokenizer_init=True, load_format="dummy",
        optimization_level=0, tensor_parallel_size=tp, distributed_executor_backend="mp",
    )  # fmt: skip
    config = args.create_engine_config()
    with set_current_vllm_config(config):
        prepare_groups(tp)
        yield config


def ask_model(folder: str, tp: int) -> dict[str, Any]:
    """What the layers of a model chose."""
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    recorder, refused, joined = Recorder(), "", {}
    try:
        with configured(folder, tp) as config:
            if config.quant_config is not None:
                recorder.watch(config.quant_config)
            with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
                model = initialize_model(vllm_config=config)
            joined = dict(getattr(model, "packed_modules_mapping", None) or {})
    except Exception as e:  # whatever vLLM raises is its answer
        refused = f"{type(e).__name__}: {e}"
    return {"layers": recorder.layers, "joined": joined, "refused": refused}


def ask_layers(items: list[dict[str, Any]], config: Any) -> list[dict[str, str]]:
    """What single layers chose. Each item: {"quantization", "kind": "column", "row" or "experts", "in", "out": parts}."""
    import torch
    from vllm.utils.torch_utils import set_default_torch_dtype

    answers = []
    for item in items:
        recorder = Recorder()
        config.compilation_config.static_forward_context.clear()
        try:
            quantization = quantization_of(item["quantization"])
            quantization.packed_modules_mapping = {"layer": ["layer"]}
            recorder.watch(quantization)
            with set_default_torch_dtype(getattr(torch, item["dtype"])), torch.device("meta"):
                make_layer(item, quantization)
        except Exception as e:  # whatever vLLM raises is its answer
            answers.append({"refused": f"{type(e).__name__}: {e}"})
            continue
        answers.append(next(iter(recorder.layers.values()), {"refused": "no layer asked"}))
    return answers


def quantization_of(data: dict[str, Any]) -> Any:
    """vLLM's object for a quantization_config: of ModelOpt there are several classes, each of which knows its own. Raises
    ValueError for a GPU that is older than its class asks for."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from vllm.platforms import current_platform

    name = data["quant_method"]
    kinds = [get_quantization_config(kind) for kind in QUANTIZATION_METHODS if kind.startswith(name)]
    kind = next((k for k in kinds if k.override_quantization_method(data, None)), get_quantization_config(name))
    capability = current_platform.get_device_capability()
    if capability is not None and capability.to_int() < kind.get_min_capability():
        raise ValueError(f"its class {kind.__name__} needs sm{kind.get_min_capability()} or newer")
    return kind.from_config(data)


def make_layer(item: dict[str, Any], quantization: Any) -> Any:
    """One layer of vLLM."""
    import torch
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    dtype = getattr(torch, item["dtype"])
    if item["kind"] == "experts":
        return FusedMoEFactory(
            num_experts=4, top_k=2, hidden_size=item["in"], intermediate_size=item["out"][0], params_dtype=dtype,
            quant_config=quantization, prefix="layer.experts",
        )  # fmt: skip
    if item["kind"] == "row":
        kind: Any = linear.RowParallelLinear
        return kind(
            item["in"], item["out"][0], bias=False, params_dtype=dtype, quant_config=quantization, prefix="layer"
        )
    return linear.MergedColumnParallelLinear(
        item["in"], item["out"], bias=False, params_dtype=dtype, quant_config=quantization, prefix="layer"
    )


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job."""
    os.environ.update(ENVIRONMENT)
    stand_ins = [] if job["gpu"] == "cpu" else pretend(job["gpu"])
    if not job["amx"]:
        import torch

        torch.cpu._is_amx_tile_supported = lambda: False
    import vllm

    answer: dict[str, Any] = {"models": {key: ask_model(folder, job["tp"]) for key, folder in job["models"].items()}}
    answer["layers"] = []
    if job["layers"]:
        with configured(job["base"], job["tp"]) as config:
            answer["layers"] = ask_layers(job["layers"], config)
    from vllm.model_executor.models import ModelRegistry

    answer["architectures"] = sorted(ModelRegistry.get_supported_archs())
    made = str(getattr(vllm, "__version__", None) or version("vllm"))
    return {"version": made, "gpu": job["gpu"], "tp": job["tp"], "stand_ins": stand_ins, **answer}


def main(job_file: str, answer_file: str) -> None:
    """Writes the answer, or why there is none."""
    job = json.loads(Path(job_file).read_text())
    if importlib.util.find_spec("vllm") is None:
        answer: dict[str, Any] = {"missing": "vllm"}
    else:
        try:
            answer = run(job)
        except Exception as e:  # whatever vLLM raises is its answer
            Path(answer_file).write_text(json.dumps({"refused": f"{type(e).__name__}: {e}"}))
            raise
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
