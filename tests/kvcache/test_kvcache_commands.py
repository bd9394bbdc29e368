"""KV caches as users ask for them: quantize --kv, qkit.load, generate, eval --kv; and the measure that budgets follow."""

import json

import pytest
import qkit_data
import torch
from transformers import DynamicCache

import qkit
from qkit.calibration.batches import batches
from qkit.errors import UsageError
from qkit.evaluation.decoding import decode_windows
from qkit.evaluation.text import tokenize
from qkit.kvcache.cache import PackedCache, with_budgets
from qkit.kvcache.policy import parse
from qkit.kvcache.sensitivity import errors_of, rounded, sensitivities, with_gradients
from qkit.runtime.loading import load_tokenizer

PROMPT = torch.arange(40, 72)[None]


@pytest.fixture(scope="module")
def model():
    return qkit.load("tiny-llama", dtype=torch.float32)


def generated(model, **options):
    found = model.generate(
        PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **options
    )
    return found.past_key_values


@torch.inference_mode()
def one_pass(path, window: int, prompt: int) -> float:
    """Perplexity of the evaluation text's first window, of what follows the prompt (0: of all but the first token)."""
    ids = tokenize(load_tokenizer(path), qkit_data.text_path("evaluation").read_text(encoding="utf-8"))[None, :window]
    first = max(prompt, 1)
    logits = qkit.load(path, dtype=torch.float32, kv="none")(ids, use_cache=False).logits[:, first - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits[0].double(), ids[0, first:]).exp())


def test_a_checkpoint_with_its_cache(run, tmp_path):
    out = tmp_path / "out"
    code, said, _ = run(
        "quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--kv", "pm-kvq:4-2", "--kv-memory", "1.45MB",
        "--method", "rtn", "--max-length", "1000", "--samples", "4", "--seqlen", "64", "--out", out,
    )  # fmt: skip
    assert code == 0 and "KV cache: pm-kvq:4-2, 1.4" in said and "final bits by layer" in said
    record = json.loads((out / "qkit.json").read_text())["kv"]
    assert set(record["finals"]) == {4, 2} and sum(record["budgets"]) <= 1.45e6
    cache = generated(qkit.load(out))
    assert isinstance(cache, PackedCache) and [layer.budget for layer in cache.layers] == record["budgets"]
    assert cache.nbytes == sum(layer.nbytes for layer in cache.layers)
    assert type(generated(qkit.load(out, kv="none"))) is DynamicCache
    code, said, _ = run(
        "eval",
        out,
        "--windows",
        "1",
        "--window",
        "300",
        "--kv-step",
        "50",
        "--kv",
        "stored,none,int8",
        "--json",
        tmp_path / "e",
    )
    figures = json.loads((tmp_path / "e").read_text())
    assert list(figures["caches"]["evaluation"]) == ["none", "pm-kvq:4-2", "int8"]
    measured = figures["caches"]["evaluation"]["pm-kvq:4-2"]  # of its budgets, which 300 tokens do not fill
    assert min(measured["widths"]) > 2 and measured["bytes"] <= sum(record["budgets"])
    decoded, whole = (one_pass(out, 300, first) for first in (300 // 2, 0))
    assert code == 0 and figures["texts"]["evaluation"]["perplexity"] == pytest.approx(whole, rel=1e-4)
    # The plain cache is a plain one: pieces of 50 tokens differ from one pass by the order of additions in float32 alone.
    assert figures["caches"]["evaluation"]["none"]["perplexity"] == pytest.approx(decoded, rel=1e-4)
    assert generated(qkit.load(out, kv="kivi2")).widths == [2] * 8
    with pytest.raises(UsageError, match="kv policy '3' is not known: expected one kind with its bits"):
        qkit.load(out, kv=3)
    own = DynamicCache()
    assert generated(qkit.load(out), past_key_values=own) is own  # a caller's cache is the caller's
    assert run("verify", out)[0] == 0
    edited = json.loads((out / "qkit.json").read_text())
    edited["kv"]["finals"] = "4"
    (out / "qkit.json").write_text(json.dumps(edited))
    code, said, err = run("verify", out)
    assert code == 4 and "kv.finals" in said + err


def test_a_checkpoint_with_differences_between_layers(run, tiny, small, tmp_path):
    """What the plan says is what four layers of four bits, and one of two, take in the end; eval compares it."""
    source, out = tiny("qwen2", num_hidden_layers=5, num_key_value_heads=1), tmp_path / "out"
    code, said, _ = run(
        "quantize", "--model", source, "--scheme", "w4a16", "--group-size", "16", "--kv", "xquant-cl2", "--max-length", "384",
        "--out", out, *small,
    )  # fmt: skip
    whole, four, two = (
        2 * (16 * b // 8 + 4 * (b < 16)) for b in (16, 4, 2)
    )  # bytes of a token: 16 numbers and a group, twice
    most = 5 * 127 * whole + 256 * (3 * four + 2 * two)
    assert code == 0 and f"KV cache: xquant-cl2, {most / 1e6:.2f}" in said
    assert json.loads((out / "qkit.json").read_text())["kv"]["kind"] == "xquant-cl" and run("verify", out)[0] == 0
    cache = generated(qkit.load(out))
    assert isinstance(cache, PackedCache) and cache.widths == [4, 4, 4, 2, 2]
    code, _, _ = run(
        "eval",
        out,
        "--windows",
        "1",
        "--window",
        "120",
        "--kv-step",
        "20",
        "--kv",
        "xquant-cl8",
        "--json",
        tmp_path / "e",
    )
    found = json.loads((tmp_path / "e").read_text())["caches"]["evaluation"]["xquant-cl8"]
    assert code == 0 and found["widths"] == [8] * 5 and found["share"] == 1  # newest tokens, all of them


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv", "pm-kvq:4-2"], "add --kv-memory (or --memory for all), or use one width"),
        (["--kv", "pm-kvq:2", "--kv-memory", "10KB", "--max-length", "1000"], "takes 1.15MB"),
        (["--kv", "pm-kvq:2", "--max-length", "100"], "nothing is left to pack"),
        (["--kv", "kivi"], "kv policy 'kivi'"),
        (["--kv", "int8", "--kv-memory", "1MB"], "--kv-memory 1.00MB"),
        (["--kv", "int8", "--kv-memory", "many"], "--kv-memory many"),
        (["--max-length", "100"], "needs --kv"),
    ],
)
def test_what_cannot_be_asked_for(options, words, run, tmp_path):
    code, _, err = run("quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--out", tmp_path / "out", *options)
    too_little = "takes 1.15MB", "--kv-memory 1.00MB"
    assert code == (3 if words in too_little else 2) and words in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_eval_compares_caches(run, tmp_path):
    code, said, _ = run(
        "eval", "tiny-llama", "--windows", "2", "--window", "500", "--prompt", "60", "--kv-step", "20",
        "--kv", "pm-kvq:2,int2", "--kv", "int8", "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert code == 0 and "pm-kvq:2" in said and "decoding" in said
    found = next(iter(json.loads((tmp_path / "e.json").read_text())["caches"].values()))
    assert list(found) == ["none", "pm-kvq:2", "int2", "int8"]
    assert found["none"]["share"] == 1 and found["int2"]["share"] == pytest.approx(0.1875)
    assert abs(found["int8"]["change_percent"]) < 0.5 < found["int2"]["change_percent"]
    assert found["none"]["same_greedy"] == 32 >= found["int8"]["same_greedy"] > found["int2"]["same_greedy"]
    assert found["pm-kvq:2"]["widths"] == [2] * 8
    widths = [w for _, layer, w in found["pm-kvq:2"]["halvings"] if layer == 0]
    assert widths == sorted(widths, reverse=True) and widths[-1] == 2
    for options, words in (
        (("--prompt", "9"), "--prompt needs --kv"),
        (("--kv-step", "9"), "--kv-step needs --kv"),
        (("--kv", "stored"), "was quantized without --kv"),
        (("--kv", "pm-kvq:4-2"), "the widths of the layers are chosen by 'qkit quantize --kv pm-kvq:4-2"),
        (("--kv", "int8", "--json", tmp_path / "no" / "e"), "there is no folder"),
        (("--kv", "int8", "--json", tmp_path), "that is a folder"),
    ):
        code, _, err = run("eval", "tiny-llama", *options)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1
    code, _, err = run("eval", "tiny-llama", "--kv", "int8", "--window", "100", "--prompt", "100")
    assert code == 2 and "a prompt of 100 tokens in windows of 100" in err


@torch.inference_mode()
def test_decoding_reads_the_cache_at_every_step(model):
    """With a plain cache it is the likelihood of one pass; in steps of any size the same tokens are scored."""
    windows = torch.randint(1, 4000, (3, 40), generator=torch.Generator().manual_seed(0))
    logits = model(windows, use_cache=False).logits[:, 9:-1].log_softmax(-1)
    expected = -logits.gather(2, windows[:, 10:, None])[..., 0]
    for step in (1, 7):
        made = decode_windows(model, windows, 10, None, step)
        torch.testing.assert_close(made.nll.float(), expected, rtol=1e-4, atol=1e-4)
    rough = decode_windows(model, windows, 10, parse("int2"))
    assert (rough.nll - expected).abs().max() > 0.01
    assert decode_windows(model, windows, 39, None).nll.shape == (3, 1)
    with pytest.raises(UsageError, match="a prompt of 40"):
        decode_windows(model, windows, 40, None)


@pytest.mark.parametrize("bits", (4, 2))
def test_the_integral_is_the_change_of_the_loss(model, bits):
    """Of adding the errors of all layers at once, and its layers' parts add up to it; the error falls as the square."""
    rows = text_rows(2)
    changes = []
    for row in batches(rows, 1):
        start = with_gradients(model, row)
        changes.append(with_gradients(model, row, errors=errors_of(start.seen, bits, 128)).loss - start.loss)
    true = sum(changes) / len(changes)
    found = [float(sensitivities(model, rows, [bits], points=n).sum()) for n in (2, 8)]
    assert found[1] == pytest.approx(true, rel=0.02)
    assert abs(found[1] - true) < abs(found[0] - true) / 4 + 1e-5


def text_rows(count: int) -> torch.Tensor:
    text = qkit_data.text_path("evaluation").read_text()[:20000]
    return torch.tensor(load_tokenizer("tiny-llama")(text)["input_ids"])[: count * 128].view(count, 128)


def test_sensitivity_grows_as_bits_go(model):
    rows = torch.randint(1, 4000, (3, 48), generator=torch.Generator().manual_seed(1))
    found = sensitivities(model, rows, [8, 4, 2], stretch=2)
    assert found.shape == (8, 3) and bool((found.diff(dim=1) > 0).all())
    assert torch.equal(found, sensitivities(model, rows, [8, 4, 2], stretch=2))
    assert not torch.equal(found, sensitivities(model, rows, [8, 4, 2]))


def test_stretched_rows_show_the_keys_of_long_positions():
    """Constant keys before rotary embedding: the largest of each pair over 512 tokens at stride 4 is that over 2048 at stride 1
    (PM-KVQ's positional interpolation)."""
    angles = 10000.0 ** -(torch.arange(16) / 16)

    def largest(positions: torch.Tensor) -> torch.Tensor:
        turned = positions[:, None] * angles
        return torch.maximum((turned.cos() - turned.sin()).abs().amax(0), (turned.sin() + turned.cos()).abs().amax(0))

    whole, stretched, short = (largest(torch.arange(0.0, n, s)) for n, s in ((2048, 1), (2048, 4), (512, 1)))
    assert float((whole - stretched).abs().max()) < 0.02
    assert float((whole - short).abs().max()) > 0.02


def test_rounded_is_what_a_cache_gives_back(model):
    x = torch.randn(1, 4, 20, 32)
    policy = with_budgets(parse("pm-kvq:4"), model, 1000)
    assert policy.finals == (4,) * 8
    from qkit.kvcache.store import narrowed, quantize

    assert torch.equal(rounded(x, 4, 128), narrowed(quantize(x, 16, 32), 4).dequantize(torch.float32))
