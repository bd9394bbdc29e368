"""Makes tiny-vlm, the vision-language reference model: a LLaVA of 5 million parameters, trained on drawn scenes.

    python calib_data/make_tiny_vlm.py --language DIR --out OUT [--steps 2000]

First its SigLIP tower learns to tell what is drawn where, with a linear head on every piece that is thrown away; then it
stays as it is (training it along with the rest loses shapes and letters), and the projector, from nothing, and the
language model, from the first layers of tiny-llama (--language), learn to answer. A caption and several questions about
a picture share one row: each sees the picture and itself, at the positions that it would have alone. Loss on answers
only; AdamW, cosine schedule with warm-up, float32. Writes OUT in bfloat16 with its processor, and prints exact-match
accuracy on pictures that training did not see. A stopped run goes on from OUT.part.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from qkit_data.scenes import COLORS, PLACES, SHAPES, SIZE, TRAINING, scene
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

PATCH, LAYERS, ROW = 8, 4, 144
CAPTION = "Describe the picture."
PICTURES = 4_000_000  # seeds of what the tower learns from
IMAGE_TOKENS = (SIZE // PATCH) ** 2
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{% for c in m.content %}{% if c.type == 'image' %}<image>"
    "{% else %}{{ '\nQ: ' + c.text + '\nA:' }}{% endif %}{% endfor %}{% else %}{% for c in m.content %}"
    "{{ ' ' + c.text + '<|endoftext|>' }}{% endfor %}{% endif %}{% endfor %}"
)


def processor(language: str) -> LlavaProcessor:
    """The tokenizer of the language model with one token more, and plain pictures of 48 x 48."""
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.eos_token
    images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )  # fmt: skip


def new_model(language: str, seed: int) -> LlavaForConditionalGeneration:
    """Float32; a language model of the first LAYERS layers, with room for <image>."""
    torch.manual_seed(seed)
    source = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    text = source.config
    vocabulary = 64 * -(-(text.vocab_size + 1) // 64)
    settings = {**text.to_dict(), "num_hidden_layers": LAYERS, "vocab_size": vocabulary, "tie_word_embeddings": True}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4, image_size=SIZE,
            patch_size=PATCH, vision_use_head=False,
        ),
        text_config=settings, image_token_index=text.vocab_size, vision_feature_select_strategy="full",
        vision_feature_layer=-1, image_seq_length=IMAGE_TOKENS, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    own = model.model.language_model
    own.embed_tokens.weight.data[: text.vocab_size] = source.model.embed_tokens.weight.data
    own.layers.load_state_dict(source.model.layers[:LAYERS].state_dict())
    own.norm.load_state_dict(source.model.norm.state_dict())
    model.tie_weights()
    return model


def pixels(images: list[Any]) -> Tensor:
    """float32 [n, 3, 48, 48], as the processor gives them: from -1 to 1."""
    return torch.stack([torch.from_numpy(i).permute(2, 0, 1) for i in images]).float() / 127.5 - 1


def drawn_in(seed: int) -> dict[str, str]:
    """All that can be asked about the picture, by question."""
    return {t.question: t.answer for t in scene(seed, turns=100).turns}


def caption_of(answers: dict[str, str]) -> str:
    """All that is drawn, in words: more to learn from than single answers."""
    word = answers.get("What word is written?")
    if word is not None:
        return f"{answers['What color is the word?']} {word}"
    bars = [f"{c} {answers[q]}" for c in COLORS if (q := f"How tall is the {c} bar?") in answers]
    shapes = {p: answers.get(f"What shape is at the {p}?") for p in PLACES}
    things = [f"{p} {answers[f'What color is the object at the {p}?']} {x}" for p, x in shapes.items() if x]
    return ", ".join(bars or things)


SIDE = SIZE // PATCH
LABELS = (1 + len(SHAPES), 1 + len(COLORS), IMAGE_TOKENS, *[8] * len(COLORS), *[27] * 3)
WEIGHTS = (1.0, 1.0, 0.5, *[1.0] * len(COLORS), *[4.0] * 3)  # one picture in five has letters


def labels_of(answers: dict[str, str]) -> list[list[int]]:
    """What every piece of a picture should say, as classes of LABELS (0: nothing): shape and colour of what is drawn around it,
    which piece it is, and of the whole picture the height of every colour's bar and the letters of the word."""

    def of(question: str, names: Sequence[str]) -> int:
        answer = answers.get(question)
        return 0 if answer is None else 1 + names.index(answer)

    colors, heights, word = list(COLORS), [str(h) for h in range(1, 8)], answers.get("What word is written?", "")
    shape = [of(f"What shape is at the {p}?", SHAPES) for p in PLACES]
    color = [of(f"What color is the object at the {p}?", colors) for p in PLACES]
    whole = [of(f"How tall is the {c} bar?", heights) for c in colors] + [ord(x) - 96 for x in word or "```"]
    cells = [3 * (i // SIDE // 2) + i % SIDE // 2 for i in range(IMAGE_TOKENS)]
    return [[shape[cell], color[cell], i, *whole] for i, cell in enumerate(cells)]


def teach_to_see(tower: Any, steps: int, seed: int, batch: int = 48) -> None:
    """Trains the tower, and a linear head on every piece, to tell the labels."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(tower.config.hidden_size, sum(LABELS))
    params = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        first = PICTURES + step * batch
        seeds = range(first, first + batch)
        wanted = torch.tensor([labels_of(drawn_in(s)) for s in seeds]).flatten(0, 1)
        features = tower(pixels([scene(s).image for s in seeds])).last_hidden_state.flatten(0, 1)
        each = head(features).split(LABELS, dim=1)
        terms = [
            w * functional.cross_entropy(x, wanted[:, i]) for i, (x, w) in enumerate(zip(each, WEIGHTS, strict=True))
        ]
        loss = torch.stack(terms).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            told = torch.stack([x.argmax(1) for x in each], 1)
            there = wanted > 0  # what is drawn, and not what is missing
            right = ((told == wanted) & there).sum(0) / there.sum(0).clamp_min(1)
            said = " ".join(f"{x:.3f}" for x in (*right[:3], right[3:9].mean(), right[9:].mean()))
            print(f"tower {step + 1}: {loss:.4f}, right {said}", flush=True)


def batch_of(seeds: range, tokenizer: Any, image_token: int) -> dict[str, Tensor]:
    """input_ids, positions [n, ROW]; mask bool [n, 1, ROW, ROW]; places [m, 2] (row, token) before an answer's token, and
    targets [m]."""
    ids = torch.zeros(len(seeds), ROW, dtype=torch.int64)
    ids[:, :IMAGE_TOKENS] = image_token
    positions = torch.zeros(len(seeds), ROW, dtype=torch.int64)
    positions[:, :IMAGE_TOKENS] = torch.arange(IMAGE_TOKENS)
    turn = torch.full((len(seeds), ROW), -1)
    turn[:, :IMAGE_TOKENS] = 0
    images, places, targets = [], [], []
    for row, seed in enumerate(seeds):
        drawn, at = scene(seed), IMAGE_TOKENS
        images.append(drawn.image)
        pairs = [(CAPTION, caption_of(drawn_in(seed))), *((t.question, t.answer) for t in drawn.turns)]
        for number, (question, said) in enumerate(pairs, 1):
            asked = tokenizer(f"\nQ: {question}\nA:").input_ids
            answer = [*tokenizer(f" {said}").input_ids, tokenizer.eos_token_id]
            end = at + len(asked) + len(answer)
            if end > ROW:
                break
            ids[row, at:end] = torch.tensor(asked + answer)
            positions[row, at:end] = torch.arange(IMAGE_TOKENS, IMAGE_TOKENS + end - at)
            turn[row, at:end] = number
            places += [[row, at + len(asked) + i - 1] for i in range(len(answer))]
            targets += answer
            at = end
    order = torch.arange(ROW)
    same = (turn[:, :, None] == turn[:, None]) | ((turn[:, None] == 0) & (turn[:, :, None] > 0))
    mask = (same & (order[:, None] >= order[None]))[:, None]
    return {
        "input_ids": ids, "pixel_values": pixels(images), "position_ids": positions, "attention_mask": mask,
        "places": torch.tensor(places), "targets": torch.tensor(targets),
    }  # fmt: skip


def accuracy(model: Any, tokenizer: Any, image_token: int, count: int) -> dict[str, float]:
    """Share of answers, by kind and in all, whose every token is the most likely one, the end included; single questions."""
    right: dict[str, list[bool]] = {}
    with torch.inference_mode():
        for start in range(0, count, 50):
            for seed in range(start, min(start + 50, count)):
                drawn = scene(seed)
                for t in drawn.turns:
                    asked = tokenizer(f"\nQ: {t.question}\nA:").input_ids
                    answer = [*tokenizer(f" {t.answer}").input_ids, tokenizer.eos_token_id]
                    ids = torch.tensor([[image_token] * IMAGE_TOKENS + asked + answer])
                    logits = model(input_ids=ids, pixel_values=pixels([drawn.image])).logits[0]
                    found = logits[-len(answer) - 1 : -1].argmax(-1).tolist()
                    right.setdefault(t.kind, []).append(found == answer)
    every = [x for xs in right.values() for x in xs]
    return {"all": sum(every) / len(every), **{k: sum(v) / len(v) for k, v in sorted(right.items())}}


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tower-steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made, model = processor(args.language), new_model(args.language, args.seed)
    tokenizer, image_token = made.tokenizer, model.config.image_token_index
    model.model.vision_tower.requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.05)
    part, start = args.out.with_name(args.out.name + ".part"), 0
    if part.is_file():
        saved = torch.load(part, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    else:
        model.model.vision_tower.requires_grad_(True)
        teach_to_see(model.model.vision_tower, args.tower_steps, args.seed)
        model.model.vision_tower.requires_grad_(False)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 0}, part)
    began, average = time.monotonic(), 0.0
    for step in range(start, args.steps):
        warm, left = (step + 1) / 100, step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, warm) * (0.5 * (1 + math.cos(math.pi * left)) + 0.01)
        first = TRAINING + step * args.batch
        batch = batch_of(range(first, first + args.batch), tokenizer, image_token)
        places, targets = batch.pop("places"), batch.pop("targets")
        hidden = model.model(**batch, use_cache=False)[0]
        loss = functional.cross_entropy(model.lm_head(hidden[places[:, 0], places[:, 1]]), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average += (float(loss.detach()) - average) * max(0.02, 1 / (step - start + 1))
        if step % 25 == 0:
            print(step, f"{average:.4f}", f"{time.monotonic() - began:.0f} s", flush=True)
        if step % 100 == 99:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, part)
        if step % 500 == 499:
            print("accuracy", accuracy(model, tokenizer, image_token, 100), flush=True)
    model.eval().to(torch.bfloat16).save_pretrained(args.out)
    made.save_pretrained(args.out)
    print("accuracy", accuracy(model.float(), tokenizer, image_token, 600), flush=True)
    part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
