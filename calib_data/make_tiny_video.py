"""Makes tiny-video, the video diffusion reference pipeline: a Wan transformer of 4.4 million parameters on drawn clips.

    python calib_data/make_tiny_video.py --out OUT [--vae-steps 1500] [--steps 3000]

First a small Wan VAE (4 times smaller in both directions, 2 times in time) learns to give clips back; then the transformer,
with a UMT5 encoder of one layer that learns along, learns the velocity from clips to noise (flow matching, a tenth of the
prompts empty for guidance). AdamW, float32, the average of the last weights is kept. Writes OUT as a diffusers WanPipeline
with sampling.json beside its index: how it is meant to be called. A stopped run goes on from OUT.part.
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

Z, TEXT, TOKENS = 8, 128, 8
CALL = {
    "num_inference_steps": 20, "guidance_scale": 3.0, "height": SIZE, "width": SIZE, "num_frames": FRAMES,
    "max_sequence_length": TOKENS,
}  # fmt: skip
SHIFT = 3.0


def new_vae() -> Any:
    """float32, random."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=16, z_dim=Z, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * Z, latents_std=[1.0] * Z, scale_factor_temporal=2, scale_factor_spatial=4,
    )  # fmt: skip


def new_denoiser() -> Any:
    """float32, random."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=8, attention_head_dim=32, in_channels=Z, out_channels=Z, text_dim=TEXT,
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


def pixels(seeds: range) -> tuple[Tensor, list[str]]:
    """(float32 [n, 3, FRAMES, SIZE, SIZE] from -1 to 1, prompts)."""
    clips = [clip(s) for s in seeds]
    return torch.stack([torch.from_numpy(c.frames).permute(3, 0, 1, 2) for c in clips]).float() / 127.5 - 1, [
        c.prompt for c in clips
    ]


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


def train_vae(vae: Any, steps: int, batch: int, part: Path) -> None:
    """Absolute error of what comes back, and a little of the divergence from a normal distribution."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    start, params, began = 0, list(vae.parameters()), time.monotonic()
    if part.is_file():
        saved = torch.load(part, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step in range(start, steps):
        x = pixels(range(TRAINING + step * batch, TRAINING + (step + 1) * batch))[0]
        found = vae.encode(x).latent_dist
        back = vae.decode(found.sample()).sample
        loss = functional.l1_loss(back, x) + 1e-4 * found.kl().mean() / found.mean[0].numel()
        learn(optimizer, loss, params, rate(step, steps, 2e-3))
        if step % 25 == 0:
            print("vae", step, f"{float(loss.detach()):.4f}", f"{time.monotonic() - began:.0f} s", flush=True)
        if step % 100 == 99:
            torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, part)


@torch.inference_mode()
def latents(vae: Any, count: int, kept: Path) -> tuple[Tensor, list[str]]:
    """(latents [n, Z, 5, 8, 8] with mean 0 and deviation 1 by channel, prompts); the VAE is told mean and deviation."""
    if kept.is_file():
        found = torch.load(kept, weights_only=True)
        means, prompts = found["means"], found["prompts"]
    else:
        pieces, prompts = [], list[str]()
        for start in range(0, count, 32):
            x, said = pixels(range(2 * TRAINING + start, 2 * TRAINING + min(start + 32, count)))
            pieces.append(vae.encode(x).latent_dist.mode().clone())
            prompts += said
        means = torch.cat(pieces)
        torch.save({"means": means, "prompts": prompts}, kept)
    mean, deviation = means.mean((0, 2, 3, 4)), means.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    return ((means - mean.view(1, -1, 1, 1, 1)) / deviation.view(1, -1, 1, 1, 1)).clone(), prompts


def embedded(tokenizer: Any, encoder: Any, prompts: list[str]) -> Tensor:
    """float32 [n, TOKENS, TEXT], zeros behind every prompt, as the pipeline makes them."""
    given = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    mask = given["attention_mask"]
    return encoder(given["input_ids"], mask).last_hidden_state * mask[..., None]


def train_denoiser(
    model: Any, encoder: Any, tokenizer: Any, data: tuple[Tensor, list[str]], args: Any, part: Path
) -> None:
    """Flow matching: the velocity from a clip to noise at a random time, shifted as the sampler's are."""
    params = [*model.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(params, lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in params]
    generator, start, began, mean = torch.Generator().manual_seed(args.seed), 0, time.monotonic(), 0.0
    if part.is_file():
        saved = torch.load(part, weights_only=True)
        model.load_state_dict(saved["model"])
        encoder.load_state_dict(saved["encoder"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        average, start = saved["average"], saved["step"]
    forward = torch.compile(model) if args.compile else model
    clean, prompts = data
    for step in range(start, args.steps):
        chosen = torch.randint(len(clean), (args.batch,), generator=generator)
        x0, noise = clean[chosen], torch.randn(args.batch, *clean.shape[1:], generator=generator)
        sigma = torch.rand(args.batch, generator=generator)
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        empty = torch.rand(args.batch, generator=generator) < 0.1
        said = ["" if e else prompts[i] for i, e in zip(chosen.tolist(), empty.tolist(), strict=True)]
        text = embedded(tokenizer, encoder, said)
        at = sigma.view(-1, 1, 1, 1, 1)
        given = (1 - at) * x0 + at * noise
        found = forward(hidden_states=given, timestep=1000 * sigma, encoder_hidden_states=text, return_dict=False)[0]
        loss = functional.mse_loss(found, noise - x0)
        learn(optimizer, loss, params, rate(step, args.steps, args.rate))
        keep = min(0.999, step / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - keep)
        mean += (float(loss.detach()) - mean) * max(0.02, 1 / (step - start + 1))
        if step % 25 == 0:
            print(step, f"{mean:.4f}", f"{time.monotonic() - began:.0f} s", flush=True)
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
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--clips", type=int, default=12000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    vae, model = new_vae(), new_denoiser()
    tokenizer, encoder = new_text()
    beside = [args.out.with_name(f"{args.out.name}.{what}") for what in ("vae.part", "latents.part", "part")]
    train_vae(vae, args.vae_steps, args.vae_batch, beside[0])
    data = latents(vae.eval(), args.clips, beside[1])
    train_denoiser(model, encoder, tokenizer, data, args, beside[2])

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
