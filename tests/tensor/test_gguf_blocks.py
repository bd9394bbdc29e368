"""Blocks of GGUF: bytes that the reference decoder of the gguf package reads as the weights that qkit computes."""

import pytest
import torch

from qkit.tensor import block_params
from qkit.tensor.formats import GGUF_FORMATS, Format, fit_gguf
from qkit.tensor.gguf_blocks import block_bytes, pack, scale_of_tensor
from qkit.tensor.qtensor import dequantize, find_params, quantize


def _weight(rows: int = 7, columns: int = 512, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.02
    w[1] *= 50
    w[2, 16:48] = 0
    w[3] = 0
    w[4] = w[4].abs() + 0.1  # no zero within its range
    w[5] *= 1e-4
    return w


@pytest.mark.parametrize("fmt", GGUF_FORMATS.values(), ids=GGUF_FORMATS)
@pytest.mark.parametrize("search", [True, False], ids=["search", "range"])
def test_the_reference_decoder_reads_the_weight_bit_for_bit(fmt: Format, search: bool) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    w = _weight()
    q = quantize(w, find_params(w, fmt, torch.float32, search=search), fmt)
    data = pack(q)
    assert data.numel() == block_bytes(fmt, q.shape)
    read = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[fmt.ggml])
    if fmt.scale == "e4m3":
        read = read * scale_of_tensor(q).numpy()
    assert torch.equal(torch.from_numpy(read), dequantize(q))


@pytest.mark.parametrize("fmt", GGUF_FORMATS.values(), ids=GGUF_FORMATS)
def test_errors_are_those_of_the_width_and_a_search_lowers_them(fmt: Format) -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    errors = []
    for search in (False, True):
        q = quantize(w, find_params(w, fmt, torch.float32, search=search), fmt)
        errors.append(float((dequantize(q) - w).square().mean()))
    assert errors[1] <= errors[0]
    steps = 3.3 if fmt.scale == "e8m0" else 2.2 if fmt.bits < 8 else 3  # scales that are powers of two fit less
    assert errors[1] < 4.0**-fmt.bits * steps


def test_a_width_that_256_does_not_divide_gets_what_llama_cpp_takes() -> None:
    fits = {name: f.name if (f := fit_gguf(fmt, 576)) else None for name, fmt in GGUF_FORMATS.items()}
    assert fits == {
        "q8_0": "q8_0", "q5_0": "q5_0", "q4_0": "q4_0", "q5_1": "q5_1", "q4_1": "q4_1", "iq4_nl": "iq4_nl",
        "gguf_mxfp4": "gguf_mxfp4", "gguf_nvfp4": "gguf_nvfp4",
        "q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "q3_k": "iq4_nl", "q2_k": "iq4_nl", "iq4_xs": "iq4_nl",
    }  # fmt: skip
    assert fit_gguf(GGUF_FORMATS["q4_k"], 80) is None


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"])
def test_moving_the_integers_of_groups_lowers_the_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, w, errors = GGUF_FORMATS[name], torch.randn(64, 512, generator=torch.Generator().manual_seed(1)), []
    for moves in (0, 2):
        monkeypatch.setattr(block_params, "_MOVES", moves)
        q = quantize(w, find_params(w, fmt, torch.float32, search=True), fmt)
        errors.append(float((dequantize(q) - w).square().mean()))
    assert errors[1] < errors[0]
