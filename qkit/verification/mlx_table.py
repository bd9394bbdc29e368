"""What mlx_lm 0.32 loads of files in MLX's layout: read from its source, and run on a CPU for the models that tests name."""

from __future__ import annotations

from qkit.verification.engine_types import TABLE, EngineFit, ModelFacts
from qkit.verification.vllm_table import NumberFormat

MLX_LM = "mlx-lm"
_KNOWN = TABLE.format("mlx-lm 0.32")
MODEL_TYPES = frozenset(
    """
    afm7 afmoe apertus baichuan_m1 bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v3 bitnet cohere cohere2 dbrx
    deepseek deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v41 deepseek_v41_text dots1 ernie4_5 ernie4_5_moe exaone exaone4
    exaone_moe falcon_h1 falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma4 gemma4_text gemma4_unified glm glm4
    glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium
    hunyuan hunyuan_v1_dense internlm2 internlm3 iquestcoder iquestloopcoder jamba joyai_llm_flash kimi_k2 kimi_k25 kimi_k3
    kimi_linear kimi_vl laguna lfm2 lfm2-vl lfm2_moe llama llama4 llama4_text llava longcat_flash longcat_flash_ngram mamba
    mamba2 mellum mimo mimo_v2_flash minicpm minicpm3 minimax minimax_m2 minimax_m3_vl ministral3 mistral mistral3 mistral4
    mixtral nanochat nemotron nemotron-nas nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openelm phi phi-msft phi3 phi3small
    phimoe phixtral pixtral plamo plamo2 plamo3 qwen qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_moe
    qwen3_next qwen3_vl qwen3_vl_moe recurrent_gemma rwkv7 seed_oss smollm3 solar_open stablelm starcoder2 step3p5 telechat3
    xverse youtu_llm
    """.split()
)
# Models whose experts it stacks from packed ones; of others it stacks plain weights, and finds scales that it does not know.
STACKED = ("dots1", "glm4_moe", "mixtral", "olmoe", "phimoe", "qwen2_moe")


def mlx_fit(weights: NumberFormat, facts: ModelFacts) -> EngineFit:
    """The answer of mlx_lm for linears of these formats."""
    refused = _refuses(facts)
    if refused is not None:
        return EngineFit(MLX_LM, None, (refused,), _KNOWN)
    name = (
        "QuantizedSwitchLinear"
        if facts.experts
        else "QuantizedEmbedding"
        if "embeddings" in facts.uses
        else "QuantizedLinear"
    )
    limits = (
        [] if weights.symmetric else ["layers with float32 biases, which zero points need, are computed in float32"]
    )
    return EngineFit(MLX_LM, name, tuple(limits), _KNOWN)


def _refuses(facts: ModelFacts) -> str | None:
    if facts.model_type and facts.model_type not in MODEL_TYPES:
        return f"it has no class for {facts.model_type} models"
    if facts.experts:
        return experts_refusal(facts.model_type, facts.torn_experts)
    return None


def experts_refusal(model_type: str, torn: str) -> str | None:
    """Why mlx_lm does not load experts that are quantized, or None. torn: a layer whose experts have several formats"""
    if model_type not in STACKED:
        return f"it stacks packed experts of {', '.join(STACKED)} alone, and not those of {model_type}"
    return f"it runs the experts of a layer as one product, and those of {torn} have several formats" if torn else None
