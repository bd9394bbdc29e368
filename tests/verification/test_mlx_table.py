"""The answers for mlx_lm: by the kind of the model, its experts and the zero points."""

from dataclasses import replace

from qkit.verification.engine_types import ModelFacts
from qkit.verification.mlx_table import MLX_LM, mlx_fit
from qkit.verification.spec import Spec

INT4 = Spec(kind="int", bits=4, strategy="group", group=64, block=None, symmetric=True, scale="model", dynamic=False)
LLAMA = ModelFacts(model_type="llama")


def test_classes_that_load():
    assert mlx_fit(INT4, LLAMA).loads_as == "QuantizedLinear"
    assert mlx_fit(INT4, replace(LLAMA, uses=("embeddings", "head"))).loads_as == "QuantizedEmbedding"
    assert mlx_fit(INT4, replace(LLAMA, model_type="mixtral", experts=True)).loads_as == "QuantizedSwitchLinear"
    fit = mlx_fit(replace(INT4, symmetric=False), LLAMA)
    assert fit.loads_as and "computed in float32" in fit.limits[0] and fit.engine == MLX_LM


def test_models_that_do_not():
    def why(**facts):
        fit = mlx_fit(INT4, replace(LLAMA, **facts))
        assert fit.loads_as is None
        return fit.limits[0]

    assert why(model_type="opt") == "it has no class for opt models"
    assert "and not those of qwen3_moe" in why(model_type="qwen3_moe", experts=True)
    assert "have several formats" in why(model_type="mixtral", experts=True, torn_experts="model.layers.0.mlp.experts")
