"""Whether a model continues a text, told by its attention where its config says that it is no decoder."""

import pytest
import transformers

from qkit.families.structure import predicts_next

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        ("GPTNeoXConfig", "GPTNeoXForCausalLM", True),  # its is_decoder is False, and its attention causal
        ("LlamaConfig", "LlamaForCausalLM", True),
        ("BertConfig", "BertForMaskedLM", False),
        ("BertConfig", "BertLMHeadModel", False),
    ],
)
def test_models_that_continue_a_text(config, kind, expected):
    model = getattr(transformers, kind)(getattr(transformers, config)(**SMALL))
    assert predicts_next(model) is expected
