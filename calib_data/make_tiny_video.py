"""Makes tiny-video, the video diffusion reference pipeline: a Wan transformer of 4.5 million parameters on drawn clips.

    python calib_data/make_tiny_video.py --out OUT [--steps 4000]

The VAE is set, not trained: the weights of a Wan VAE are put so that it is linear, and gives the principal components of
pieces of PATCH x PATCH pixels. The transformer, with a UMT5 encoder of one layer that learns along, learns the velocity from
clips to noise (flow matching, a tenth of the prompts empty for guidance). AdamW, float32, the average of the last weights is
kept. Writes OUT as a diffusers WanPipeline with sampling.json beside its index: how it is meant to be called. A stopped run
goes on from OUT.part.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from qkit_data.clips import FRAMES, SIZE, TRAINING, WORDS, clip
from torch import Tensor
from torch.nn import functional

PATCH, Z, TEXT, TOKENS = 4, 16, 128, 8
CALL = {
    # WanPipeline adds a frame to any number of them where a VAE does not shorten time.
    "num_inference_steps": 20, "guidance_scale": 3.0, "height": SIZE, "width": SIZE, "num_frames": FRAMES - 1,
    "max_sequence_length": TOKENS,
}  # fmt: skip
SHIFT = 3.0
# Of a channel that never changes, beside which all others are small: a norm over channels does nothing then.
LOUD = 1024.0


def pixels(seeds: range) -> tuple[Tensor, list[str]]:
    """(float32 [n, 3, FRAMES, SIZE, SIZE] from -1 to 1, prompts)."""
    clips = [clip(s) for s in seeds]
    return torch.stack([torch.from_numpy(c.frames).permute(3, 0, 1, 2) for c in clips]).float() / 127.5 - 1, [
        c.prompt for c in clips
    ]


def pieces(x: Tensor) -> Tensor:
    """[n, F, SIZE / PATCH, SIZE / PATCH, 3 * PATCH * PATCH] of pixels, in the order in which the VAE cuts them."""
    n, channels, frames, height, width = x.shape
    cut = x.view(n, channels, frames, height // PATCH, PATCH, width // PATCH, PATCH)
    return cut.permute(0, 2, 3, 5, 1, 6, 4).flatten(4)


def components(count: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [48], to latents [48, Z], back [Z, 48]), float32, from so many clips.

    Latents have mean square 1 over all channels; a channel's deviation is the root of what the pixels say, so that fine detail
    is neither lost nor as loud as the rest.
    """
    flat = pieces(pixels(range(2 * TRAINING, 2 * TRAINING + count))[0]).flatten(0, 3).double()
    power, axes = torch.linalg.eigh(torch.cov((flat - flat.mean(0)).T))
    power, axes = power.flip(0)[:Z], axes.flip(1)[:, :Z]
    axes = axes * axes.sum(0).sign()
    gain = power**-0.25 / power.sqrt().mean().sqrt()
    return flat.mean(0).float(), (axes * gain).float(), (axes / gain).T.float()


def new_vae(mean: Tensor, there: Tensor, back: Tensor) -> Any:
    """float32, whose latents are (piece - mean) @ there, and pieces latents @ back + mean.

    All residual branches are zero. What is left of either half is two convolutions with a norm over channels and a SiLU in
    between: a loud channel makes the norm a constant, and silu(x) - silu(-x) = x.
    """
    from diffusers import AutoencoderKLWan

    made = AutoencoderKLWan(
        base_dim=2 * Z + 8, z_dim=Z, dim_mult=[1], num_res_blocks=1, temperal_downsample=[], in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2, patch_size=PATCH, latents_mean=[0.0] * Z, latents_std=[1.0] * Z,
        scale_factor_temporal=1, scale_factor_spatial=PATCH,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        last, loud = (2, 1, 1), 2 * Z  # of a causal kernel the tap that sees the frame itself
        for half, first in ((made.encoder, there), (made.decoder, torch.eye(Z))):
            half.conv_in.weight[(slice(Z), slice(None), *last)] = first.T
            half.conv_in.weight[(slice(Z, 2 * Z), slice(None), *last)] = -first.T
            half.conv_in.bias[loud] = LOUD
            half.norm_out.gamma.fill_(LOUD / len(half.norm_out.gamma) ** 0.5)
        made.encoder.conv_in.bias[:Z], made.encoder.conv_in.bias[Z : 2 * Z] = -mean @ there, mean @ there
        for half, second in ((made.encoder, torch.eye(Z)), (made.decoder, back)):
            rows = second.shape[1]
            half.conv_out.weight[(slice(rows), slice(Z), *last)] = second.T
            half.conv_out.weight[(slice(rows), slice(Z, 2 * Z), *last)] = -second.T
        made.encoder.conv_out.bias[Z:] = -30.0  # logarithm of the variance
        made.decoder.conv_out.bias.copy_(mean)
        for mixed in (made.quant_conv, made.post_quant_conv):
            mixed.weight[:, :, 0, 0, 0] = torch.eye(len(mixed.weight))
    return made


def new_denoiser() -> Any:
    """float32, random."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(3, 2, 2), num_attention_heads=8, attention_head_dim=32, in_channels=Z, out_channels=Z, text_dim=TEXT,
        freq_dim=128, ffn_dim=512, num_layers=5, rope_max_seq_len=64,
    )  # fmt: skip


def new_text() -> tuple[Any, Any]:
    """(tokenizer of WORDS, UMT5 encoder)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = UMT5Config(
        vocab_size=len(words), d_model=TEXT, d_kv=32, d_ff=256, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    return tokenizer, UMT5EncoderModel(config)


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, then a cosine to a hundredth."""
    return peak * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def learn(optimizer: Any, loss: Tensor, params: list[Tensor], at: float) -> None:
    """One step of AdamW."""
    for group in optimizer.param_groups:
        group["lr"] = at
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def embedded(tokenizer: Any, encoder: Any, prompts: list[str]) -> Tensor:
    """float32 [n, TOKENS, TEXT], zeros behind every prompt, as the pipeline makes them."""
    given = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    mask = given["attention_mask"]
    return encoder(given["input_ids"], mask).last_hidden_state * mask[..., None]


def train_denoiser(
    model: Any, encoder: Any, tokenizer: Any, mean: Tensor, there: Tensor, args: Any, part: Path
) -> None:
    """Flow matching: the velocity from a clip to noise at a random time, shifted as the sampler's are."""
    params = [*model.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(params, lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in params]
    generator, start, began, usual = torch.Generator().manual_seed(args.seed), 0, time.monotonic(), 0.0
    if part.is_file():
        saved = torch.load(part, weights_only=True)
        model.load_state_dict(saved["model"])
        encoder.load_state_dict(saved["encoder"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        average, start = saved["average"], saved["step"]
    forward = torch.compile(model) if args.compile else model
    for step in range(start, args.steps):
        clips, prompts = pixels(range(TRAINING + step * args.batch, TRAINING + (step + 1) * args.batch))
        x0 = ((pieces(clips) - mean) @ there).permute(0, 4, 1, 2, 3)
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.rand(args.batch, generator=generator)
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        empty = torch.rand(args.batch, generator=generator) < 0.1
        said = ["" if e else p for p, e in zip(prompts, empty.tolist(), strict=True)]
        text = embedded(tokenizer, encoder, said)
        at = sigma.view(-1, 1, 1, 1, 1)
        given = (1 - at) * x0 + at * noise
        found = forward(hidden_states=given, timestep=1000 * sigma, encoder_hidden_states=text, return_dict=False)[0]
        loss = functional.mse_loss(found, noise - x0)
        learn(optimizer, loss, params, rate(step, args.steps, args.rate))
        keep = min(0.999, step / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - keep)
        usual += (float(loss.detach()) - usual) * max(0.02, 1 / (step - start + 1))
        if step % 25 == 0:
            print(step, f"{usual:.4f}", f"{time.monotonic() - began:.0f} s", flush=True)
        if step % 100 == 99:
            state = {
                "model": model.state_dict(), "encoder": encoder.state_dict(), "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(), "average": average, "step": step + 1,
            }  # fmt: skip
            torch.save(state, part)
    for p, kept in zip(params, average, strict=True):
        p.data.copy_(kept)


def main() -> None:
    """Train both and save the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    mean, there, back = components()
    vae, model = new_vae(mean, there, back), new_denoiser()
    tokenizer, encoder = new_text()
    train_denoiser(model, encoder, tokenizer, mean, there, args, args.out.with_name(f"{args.out.name}.part"))

    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    made = WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder.eval().to(torch.bfloat16), vae=vae.to(torch.bfloat16),
        transformer=model.eval().to(torch.bfloat16), scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )  # fmt: skip
    made.save_pretrained(args.out)
    prompts = [clip(i).prompt for i in range(64)]
    (args.out / "sampling.json").write_text(json.dumps({"call": CALL, "prompts": prompts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
