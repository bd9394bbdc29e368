"""Models that do not continue a text, measured on rows: embeddings, classes, scores, masked tokens, pairs, sounds."""

from __future__ import annotations

import json
import math
import struct
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers import PreTrainedTokenizerFast

import qkit
from qkit.commands.eval import eval_command
from qkit.errors import BadInput, UsageError
from qkit.evaluation.measure import measure, measure_all
from qkit.evaluation.metrics import bootstrap_ci
from qkit.evaluation.model_kinds import model_kind
from qkit.evaluation.request import EvalRequest
from qkit.evaluation.row_inputs import longest_row
from qkit.evaluation.row_measure import pooling_of

WORDS = "the a cat dog tree runs sleeps over under quick and slow house garden river stone".split()
SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = len(WORDS) + len(SPECIAL)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: at for at, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZER = make_tokenizer()


def save(model: Any, folder: Path) -> Path:
    model.eval().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def two(cls: Any, config: Any, tmp_path: Path, noise: float = 0.05) -> tuple[Path, Path, Any, Any]:
    """(folder of a model with noise in its weights, folder of the model, and both)."""
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    other = cls(config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p += noise * torch.randn_like(p)
    return save(other, tmp_path / "other"), save(model, tmp_path / "model"), other, model


def words(count: int, seed: int) -> str:
    picks = torch.randint(0, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[pick] for pick in picks)


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_sound(path: Path) -> None:
    with wave.open(str(path), "wb") as f:
        f.setparams((1, 2, 16000, 0, "NONE", ""))
        f.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(i / 7))) for i in range(12000)))


def rows_of(out: Path, baseline: Path | None, file: Path, **options: Any) -> dict[str, Any]:
    request = EvalRequest(texts=[str(file)], window=options.pop("window", 24), **options)
    found: dict[str, Any] = measure(out, baseline, request)["rows"][file.stem]
    return found


BERT = transformers.BertConfig(**SIZES, max_position_embeddings=64, pad_token_id=1)


def test_embeddings_are_compared_by_cosine_and_neighbours(tmp_path: Path) -> None:
    out, baseline, other, model = two(transformers.BertModel, BERT, tmp_path)
    texts = [words(5 + i % 4, i) for i in range(12)]
    found = rows_of(out, baseline, lines(tmp_path / "texts.jsonl", *({"text": t} for t in texts)))
    vectors = [
        torch.stack([m(**TOKENIZER(t, return_tensors="pt")).last_hidden_state.mean(1)[0] for t in texts])
        .detach()
        .double()
        for m in (other, model)
    ]
    cosines = torch.nn.functional.cosine_similarity(*vectors)
    assert found["cosine"]["mean"] == pytest.approx(float(cosines.mean()), rel=1e-6)
    assert found["cosine"]["p1"] == pytest.approx(float(cosines.min()), rel=1e-6)
    assert 0.3 < found["cosine"]["mean"] < 0.9999
    pairwise = [torch.nn.functional.cosine_similarity(v[:, None], v[None], dim=-1).fill_diagonal_(-2) for v in vectors]
    same = (pairwise[0].argmax(1) == pairwise[1].argmax(1)).double().mean()
    assert found["same_nearest"]["share"] == pytest.approx(float(same))
    pairs = torch.stack([p[torch.ones(12, 12).triu(1) > 0] for p in pairwise])
    assert found["similarities"] == pytest.approx(float(torch.corrcoef(pairs)[0, 1]), rel=1e-6)
    assert (found["kind"], found["rows"], found["pooling"], found["cut"]) == ("embeddings", 12, "mean", 0)
    equal = rows_of(baseline, baseline, tmp_path / "texts.jsonl")
    assert equal["cosine"]["mean"] == pytest.approx(1.0) and equal["same_nearest"]["share"] == 1.0
    with pytest.raises(UsageError, match="add --baseline"):
        rows_of(out, None, tmp_path / "texts.jsonl")
    with pytest.raises(UsageError, match=r"--tasks: .* is a BertModel, which generates no text"):
        measure(out, baseline, EvalRequest(tasks=["qkit_cloze"]))


def test_pooling_is_that_of_the_folder(tmp_path: Path) -> None:
    out, baseline, _, _ = two(transformers.BertModel, BERT, tmp_path)
    file = lines(tmp_path / "texts.jsonl", *({"text": words(6, i)} for i in range(4)))
    means = rows_of(out, baseline, file)
    module = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    (out / "modules.json").write_text(json.dumps([module]))
    (out / "1_Pooling").mkdir()
    (out / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    first = rows_of(out, baseline, file)
    assert first["pooling"] == "cls" and first["cosine"] != means["cosine"]
    (out / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    assert pooling_of(out) == "last"
    (out / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "weighted"}))
    with pytest.raises(UsageError, match="qkit pools by one of mean, cls, last and max"):
        pooling_of(out)


def test_classes_agree_and_are_right(tmp_path: Path) -> None:
    config = transformers.BertConfig(**{**BERT.to_dict(), "num_labels": 3, "id2label": {0: "x", 1: "y", 2: "z"}})
    out, baseline, other, model = two(transformers.BertForSequenceClassification, config, tmp_path, noise=0.1)
    texts = [(words(6, i), words(3, 100 + i)) for i in range(20)]
    rows = [{"text": a, "text_pair": b, "label": "xyz"[i % 3] if i % 2 else i % 3} for i, (a, b) in enumerate(texts)]
    found = rows_of(out, baseline, lines(tmp_path / "rows.jsonl", *rows))
    scores = [
        torch.cat([m(**TOKENIZER(a, b, return_tensors="pt")).logits.detach() for a, b in texts]) for m in (other, model)
    ]
    ours, theirs = (s.argmax(1) for s in scores)
    labels = torch.tensor([i % 3 for i in range(20)])
    assert found["same_class"]["share"] == pytest.approx(float((ours == theirs).double().mean()))
    assert found["accuracy"]["percent"] == pytest.approx(100 * float((ours == labels).double().mean()))
    assert found["accuracy"]["baseline_percent"] == pytest.approx(100 * float((theirs == labels).double().mean()))
    kl = torch.nn.functional.kl_div(*(s.log_softmax(-1) for s in scores), log_target=True, reduction="none").sum(1)
    assert found["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert set(rows_of(out, None, tmp_path / "rows.jsonl")) == {"kind", "rows", "cut", "labels", "accuracy"}
    bad = lines(tmp_path / "bad.jsonl", {"text": "the cat", "label": "w"})
    with pytest.raises(
        BadInput, match=r"bad.jsonl, line 1: label 'w', expected a number from 0 to 2, or one of x, y, z"
    ):
        rows_of(out, baseline, bad)
    pair = lines(tmp_path / "pair.jsonl", {"text": "the cat"}, {"chosen": "the cat", "rejected": "a dog"})
    with pytest.raises(
        BadInput, match=r"pair.jsonl, line 2: 'chosen' and 'rejected' .*num_labels 1.* gives 3 \(x, y, z\)"
    ):
        rows_of(out, baseline, pair)
    unlabelled = lines(tmp_path / "unlabelled.jsonl", {"text": "the cat"})
    with pytest.raises(UsageError, match=r"add --baseline, to compare with the original model, or rows with 'label'$"):
        rows_of(out, None, unlabelled)


def test_a_reward_model_keeps_the_order(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, num_labels=1)  # no padding token: one row at a time
    out, baseline, _, _ = two(transformers.LlamaForSequenceClassification, config, tmp_path)
    pairs = [(f"the dog {words(3, i)}", words(3, 50 + i), words(3, 90 + i)) for i in range(8)]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    found = rows_of(out, baseline, lines(tmp_path / "rows.jsonl", *rows))
    assert (found["kind"], found["rows"]) == ("scores", 16)
    same = rows_of(baseline, baseline, tmp_path / "rows.jsonl")
    assert (same["same_order"], same["error"], same["preferred"]["change"]) == (1.0, 0.0, 0.0)
    assert same["rank_correlation"] == pytest.approx(1.0) and found["rank_correlation"] < 1
    assert found["preferred"]["rows"] == 8 and found["preferred"]["baseline_percent"] == same["preferred"]["percent"]
    assert 0.4 < found["same_order"] <= 1 and found["error"] > 0


def test_masked_tokens(tmp_path: Path) -> None:
    out, baseline, _, _ = two(transformers.BertForMaskedLM, BERT, tmp_path)
    (tmp_path / "text.txt").write_text(words(22 * 5 + 3, 0))
    found = rows_of(out, baseline, tmp_path / "text.txt", windows=None)
    assert (found["kind"], found["rows"], found["tokens"]) == ("masked", 5, 5 * round(0.15 * 22))
    assert 1 < found["perplexity"] < 1e6 and found["kl"]["mean"] > 0 and 0 <= found["same_top1"] <= 1
    same = rows_of(baseline, baseline, tmp_path / "text.txt", windows=None)
    assert (same["kl"]["mean"], same["same_top1"], same["change_percent"]) == (0.0, 1.0, 0.0)
    assert same["perplexity"] == found["baseline_perplexity"]


def test_pairs_are_scored_as_transformers_does(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=1, eos_token_id=3,
        decoder_start_token_id=1,
    )  # fmt: skip
    out, baseline, other, model = two(transformers.T5ForConditionalGeneration, config, tmp_path)
    texts = [(words(6, i), words(4, 100 + i)) for i in range(6)]
    rows = [{"prompt": a, "completion": b} if i % 2 else {"source": a, "target": b} for i, (a, b) in enumerate(texts)]
    found = rows_of(out, baseline, lines(tmp_path / "rows.jsonl", *rows))
    for key, m in (("perplexity", other), ("baseline_perplexity", model)):
        read = [tuple(torch.tensor([TOKENIZER(x)["input_ids"]]) for x in pair) for pair in texts]
        losses = [m(input_ids=a, labels=b).loss.item() for a, b in read]
        assert found[key] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (found["kind"], found["tokens"]) == ("pairs", 6 * 6) and 0 < found["same_top1"] <= 1
    alone = lines(tmp_path / "alone.jsonl", {"text": "the cat"})
    with pytest.raises(
        BadInput, match=r"alone.jsonl, line 1: a text alone, and this model reads one text and writes another"
    ):
        rows_of(out, baseline, alone)
    (tmp_path / "text.txt").write_text(words(100, 0))
    assert rows_of(out, baseline, tmp_path / "text.txt", windows=3)["rows"] == 3


def test_a_model_that_hears(tmp_path: Path) -> None:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=16, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50, max_target_positions=32,
        pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    out, baseline, _, _ = two(transformers.WhisperForConditionalGeneration, config, tmp_path)
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(out)
    write_sound(tmp_path / "sound.wav")
    found = rows_of(out, baseline, lines(tmp_path / "rows.jsonl", {"audio": "sound.wav", "text": "the cat sleeps"}))
    assert (found["kind"], found["tokens"]) == ("pairs", 4)  # the words and the end; the beginning is given
    assert found["perplexity"] != found["baseline_perplexity"] and found["kl"]["mean"] > 0
    with pytest.raises(BadInput, match=r"there is no file 'none\.wav'"):
        rows_of(out, baseline, lines(tmp_path / "none.jsonl", {"audio": "none.wav", "text": "the cat"}))
    (tmp_path / "text.txt").write_text(words(100, 0))
    with pytest.raises(UsageError, match="WhisperForConditionalGeneration reads sound, and text 'text' is a text"):
        rows_of(out, baseline, tmp_path / "text.txt")


def test_every_frame_and_every_token_counts(tmp_path: Path) -> None:
    """CTC gives scores for every frame, a tagger for every token."""
    hearing = transformers.Wav2Vec2Config(
        vocab_size=12, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16),
        conv_kernel=(10, 4), conv_stride=(8, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
    )  # fmt: skip
    out, baseline, _, _ = two(transformers.Wav2Vec2ForCTC, hearing, tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(out)
    write_sound(tmp_path / "sound.wav")
    found = rows_of(out, baseline, lines(tmp_path / "rows.jsonl", {"audio": "sound.wav"}))
    assert (found["kind"], found["tokens"]) == ("tokens", 374) and found["kl"]["mean"] > 0
    config = transformers.BertConfig(**{**BERT.to_dict(), "num_labels": 5})
    out, baseline, _, _ = two(transformers.BertForTokenClassification, config, tmp_path / "tags")
    found = rows_of(out, baseline, lines(tmp_path / "tags.jsonl", {"text": words(6, 0)}, {"text": words(4, 1)}))
    assert (found["kind"], found["tokens"]) == ("tokens", 8 + 6) and 0 < found["same_top1"] <= 1


def test_a_row_of_several_labels(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        **{**BERT.to_dict(), "num_labels": 4, "problem_type": "multi_label_classification"}
    )
    out, baseline, other, model = two(transformers.BertForSequenceClassification, config, tmp_path, noise=0.2)
    texts = [words(6, i) for i in range(10)]
    found = rows_of(out, baseline, lines(tmp_path / "rows.jsonl", *({"text": t} for t in texts)))
    given = [torch.cat([m(**TOKENIZER(t, return_tensors="pt")).logits for t in texts]) > 0 for m in (other, model)]
    assert found["kind"] == "labels"
    same = (given[0] == given[1]).double()
    assert found["same_class"]["share"] == pytest.approx(float(same.mean()))
    of_rows = bootstrap_ci(same.mean(1))  # rows are drawn, not labels
    assert found["same_class"]["ci"] == pytest.approx(of_rows.ends)


def test_models_of_one_class_are_compared(tmp_path: Path) -> None:
    out, baseline, _, _ = two(transformers.BertModel, BERT, tmp_path)
    other = save(transformers.BertForMaskedLM(BERT), tmp_path / "masked")
    (tmp_path / "text.txt").write_text(words(100, 0))
    request = EvalRequest(texts=[str(tmp_path / "text.txt")], window=24)
    with pytest.raises(UsageError, match=r"is a BertForMaskedLM and .* a BertModel"):
        measure(other, baseline, request)
    found = measure_all([out, baseline], baseline, request)
    assert [m["rows"]["text"]["cosine"]["mean"] > 0.99999 for m in found] == [False, True]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaForCausalLM", "text"), ("Qwen3Model", "embeddings"), ("XLMRobertaModel", "embeddings"),
        ("GPT2LMHeadModel", "text"), ("BertForMaskedLM", "masked"), ("Qwen2ForSequenceClassification", "classes"),
        ("Wav2Vec2ForCTC", "tokens"),
        ("BertForTokenClassification", "tokens"), ("NoSuchModel", "text"), ("Qwen2VLForConditionalGeneration", "text"),
    ],
)  # fmt: skip
def test_kinds(name: str, kind: str) -> None:
    assert model_kind({"architectures": [name]}).kind == kind


def test_positions_for_padding_alone_do_not_count() -> None:
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=66, pad_token_id=1)
    assert longest_row(transformers.RobertaModel(config), TOKENIZER) == 64
    assert longest_row(transformers.BertModel(BERT), TOKENIZER) == 64


def test_the_command(tmp_path: Path) -> None:
    """A quantized encoder as a user measures it: the embedded text, a table, JSON, a page."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{**SIZES, "hidden_size": 64, "intermediate_size": 128}, max_position_embeddings=64
    )
    model, out = save(transformers.BertModel(config), tmp_path / "model"), tmp_path / "out"
    qkit.quantize(model, out=out, scheme="w4a16", method="rtn", threads=1)
    texts = lines(tmp_path / "texts.jsonl", *({"text": words(9, i)} for i in range(8)))
    command = [
        str(out),
        "--baseline",
        str(model),
        "--text",
        str(texts),
        "--window",
        "48",
        "--json",
        str(tmp_path / "e.json"),
    ]
    result = CliRunner().invoke(eval_command, [*command, "--report", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "texts, embeddings of 8 rows, pooled by mean" in result.output and "cosine" in result.output
    found = json.loads((tmp_path / "e.json").read_text())["rows"]["texts"]
    assert 0.9 < found["cosine"]["mean"] < 1
    assert "same nearest row" in (tmp_path / "page.html").read_text()
    limits = "cosine: 0.9\nsame_nearest: {}\nsame_class: 0.5\ntexts: {{texts: texts.jsonl}}\n"
    (tmp_path / "budget.yaml").write_text(limits.format(0.1))
    report = qkit.check(out, budget=tmp_path / "budget.yaml", baseline=model, texts=[str(texts)])
    assert [(c.name, c.ok) for c in report.checks] == [
        ("cosine.texts", True), ("same_nearest.texts", True), ("same_class.texts", False),
    ]  # fmt: skip
    assert report.checks[0].measured == pytest.approx(found["cosine"]["mean"], abs=0.02)
    assert report.checks[2].shown == "not measured"
