"""Pictures with a question and an answer: what vision-language models are calibrated with, and measured on.

A file of JSON lines has on each line ``image`` (a path, or a list of them, seen from the file), or ``video`` (a folder of
frames, or a list of them), ``question`` and ``answer``, and may have ``kind``, which groups answers. A folder has such
a file, pairs.jsonl, or pictures with a text of the same name beside each (a caption, then the question is CAPTION).
``dataset:NAME[:config][:split]`` is a data set of the ``datasets`` package (a hub id or a local folder; split train
unless it is said) with a column image, or images, and question and answer, or else caption. With no data given the
project's own drawn scenes are used (``qkit_data.scenes``).

The model's own processor and chat template make the rows, so that they are what the model is used with. Every token
of a row has one of four names: vision (what pictures become), answer (what the loss of training is on, the end of the
answer included), text (the rest of the prompt) and padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.chat_templates import TemplateFailure, rendered, written
from qkit.calibration.dataset import KINDS, Calibration, digest_of, read_text
from qkit.calibration.options import DRAWN
from qkit.errors import BadCalibration, BadCheckpoint, BadInput, Unsupported, UsageError
from qkit.files.folder import check_side_files, parse_checked
from qkit.files.safefile import read_bytes, shown
from qkit.files.schema import PairLine, checked, foreign
from qkit.files.text_file import TextFile, is_chat
from qkit.system.confined import Exceeded
from qkit.system.extras import needs, require

CAPTION = "Describe the picture."
_NO_PLACE = "the chat template of the model has no place for a picture"
MOST_BYTES = 1 << 28  # of a picture's file
MOST_PIXELS = 1 << 26  # of a picture: what holds one takes three bytes for each, and models see far fewer
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """images, frames (of a video): of PIL, in RGB; where: for complaints; kind: what the question is about, '' where nobody
    says."""

    images: tuple[Any, ...]
    question: str
    answer: str
    where: str
    kind: str = ""
    frames: tuple[Any, ...] = ()


def drawn(start: int, samples: int) -> Iterator[Pair]:
    """Pairs from the project's scenes, one question of each, from that seed on."""
    return (next(_asked(seed)) for seed in range(start, start + samples))


def _asked(seed: int) -> Iterator[Pair]:
    """Every question about a scene."""
    with needs("a drawn scene", "data"):
        from qkit_data.scenes import scene
    with needs("a drawn scene", "vision"):
        from PIL import Image

    made = scene(seed)
    image = Image.fromarray(made.image)
    return (
        Pair(images=(image,), question=t.question, answer=t.answer, where=f"scene {seed}", kind=t.kind)
        for t in made.turns
    )


def held_out(spec: str | Path, most: int) -> Iterator[Pair]:
    """At most so many pairs to measure with: DRAWN, all questions about the scenes from seed 0 on, which no training and no
    calibration sees; or those of a file or a folder. Pictures are read as they are needed.

    Raises BadInput when there is no such file, or not one pair in it, and what ``read_pairs`` raises.
    """
    if spec == DRAWN:
        return islice(chain.from_iterable(map(_asked, count())), most)
    path = Path(spec)
    if not path.exists() and not is_dataset(path):
        raise BadInput(f"{path}: no such file or folder; give '{DRAWN}', a file of JSON lines, or a folder of pictures")
    found = _pairs(path, most)
    first = next(found, None)
    if first is None:
        raise BadInput(
            f"{path}: there are no pairs in it; write one JSON object with image, question and answer a line"
        )
    return chain([first], found)


def read_pairs(path: Path, samples: int) -> list[Pair]:
    """The first ``samples`` pairs of a file or a folder. Raises BadCalibration naming the line and what is wrong with it."""
    found = list(_pairs(path, samples))
    if len(found) < samples:
        raise BadCalibration(f"{path}: {len(found)} pairs, {samples} are needed: give more, or fewer --samples")
    return found


def is_dataset(spec: Path) -> bool:
    """Whether --calib names a dataset of the datasets library, not a file."""
    return str(spec).startswith("dataset:")


def refuse_chat(path: Path) -> None:
    """Raises BadCalibration for a file that is, by its start, a chat."""
    head, _ = TextFile(path, "calibration text", BadCalibration).text(1 << 16)
    if is_chat(head):
        raise BadCalibration(
            f"{path}: found a chat, expected plain text: write what is said in it to a .txt file, one turn after the other"
        )


def _pairs(path: Path, most: int) -> Iterator[Pair]:
    if is_dataset(path):
        yield from _dataset_pairs(str(path), most)
        return
    if path.is_dir() and not (path / "pairs.jsonl").is_file():
        pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
        if not pictures:
            raise BadCalibration(
                f"{path}: neither a file pairs.jsonl nor pictures ({', '.join(PICTURES)}) are in the folder"
            )
        for picture in pictures[:most]:
            beside = picture.with_suffix(".txt")
            if not beside.is_file():
                raise BadCalibration(f"{picture}: a pair without an answer: write its text to {beside.name}")
            yield _pair([picture], [], CAPTION, read_text(beside).strip(), str(picture))
        return
    file = path / "pairs.jsonl" if path.is_dir() else path
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    for number, line in enumerate(lines[:most], 1):
        yield _of_line(line, file, f"{file}, line {number}")


def _of_line(line: str, file: Path, where: str) -> Pair:
    """One object of JSON."""
    try:
        data = parse_checked(line.encode("utf-8", "surrogatepass"), where)
    except BadCheckpoint as e:
        raise BadCalibration(str(e)) from e
    if isinstance(data, dict) and is_chat(line):
        raise BadCalibration(
            f"{where}: found a chat, expected image (or video), question and answer: write its turns so, or give a text file"
        )
    if not isinstance(data, dict) or "question" not in data or not {"image", "video"} & data.keys():
        raise BadCalibration(
            f"{where}: expected an object with image (or video), question and answer, found {shown(line, 60)}"
        )
    checked(PairLine, data, where, "correct the line", BadCalibration)
    images, frames = ([file.parent / name for name in _names(data.get(field))] for field in ("image", "video"))
    if len(frames) == 1 and frames[0].is_dir():
        frames = sorted(p for p in frames[0].iterdir() if p.suffix.lower() in PICTURES)
    if "video" in data and not frames:
        raise BadCalibration(f"{where}: the video {shown(data['video'])} has no frames ({', '.join(PICTURES)})")
    if not images and not frames:
        raise BadCalibration(f"{where}: a pair without a picture: name it in 'image' or 'video'")
    answer = data.get("answer")
    texts = (data["question"], "" if answer is None else str(answer), where, data.get("kind") or "")
    return _pair(images, frames, *texts)


def _dataset_pairs(spec: str, most: int) -> Iterator[Pair]:
    parts = spec.split(":")[1:]
    if not parts[0] or len(parts) > 3:
        raise UsageError(f"{spec!r} is not a data set of pictures: write dataset:NAME[:config][:split]")
    name, config, split = [*parts, "", ""][:3]
    try:
        import datasets
    except ImportError as e:
        raise Unsupported(f"{spec} needs the datasets package: pip install qkit[eval]") from e
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise BadCalibration(f"{spec}: cannot be loaded ({reason}): check the name and the network") from e
    columns = set(rows.column_names)
    if not columns & {"image", "images"} or not ({"question", "answer"} <= columns or "caption" in columns):
        raise BadCalibration(
            f"{spec}: expected the columns image (or images), question and answer, or caption; found {', '.join(columns)}"
        )
    for number in range(min(most, len(rows))):
        row, where = rows[number], f"{spec}, row {number}"
        images = row["image"] if "image" in columns else row["images"]
        found = [i.convert("RGB") for i in (images if isinstance(images, list) else [images]) if i is not None]
        answer = str((row["answer"] if "answer" in columns else row["caption"]) or "")
        if not found or not answer:
            raise BadCalibration(f"{where}: a pair without {'an answer' if found else 'a picture'}")
        question = str(row["question"]) if "question" in columns else CAPTION
        yield Pair(images=tuple(found), question=question, answer=answer, where=where, kind=str(row.get("kind") or ""))


def _names(value: Any) -> list[str]:
    """One name, several, or none."""
    return [] if value is None else [str(v) for v in (value if isinstance(value, list) else [value])]


def _pair(files: list[Path], frames: list[Path], question: str, answer: str, where: str, kind: str = "") -> Pair:
    with needs("image-text data", "vision"):
        from PIL import Image

    if not answer:
        raise BadCalibration(f"{where}: a pair without an answer: what the model is to say is what is measured")
    images = []
    for file in (*files, *frames):
        if not file.is_file():  # a pipe would block
            raise BadCalibration(f"{where}: the picture {file} cannot be read: there is no such file: correct its name")
        with foreign(f"{where}: the picture {file} cannot be read", "save it again", BadCalibration):
            # From memory: out of a file, a chunk that claims four gigabytes takes them.
            with Image.open(BytesIO(read_bytes(file, MOST_BYTES))) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise BadCalibration(
                        f"{where}: the picture {file} has {image.width} x {image.height} pixels, expected at most "
                        f"{MOST_PIXELS}: scale it down"
                    )
                images.append(image.convert("RGB"))
    return Pair(
        images=tuple(images[: len(files)]),
        question=question,
        answer=answer,
        where=where,
        kind=kind,
        frames=tuple(images[len(files) :]),
    )


def load_processor(folder: Path) -> Any:
    """The processor of a model folder; no code of the folder is run. Raises BadCheckpoint when there is none."""
    from transformers import AutoProcessor

    require("the processor of a vision-language model", "vision", "PIL")
    check_side_files(folder)
    advice = "copy the processor's files of the original model here, or use text without pictures"
    with foreign(f"{folder}: no processor that transformers can load", advice):
        made = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not hasattr(made, "image_processor") or getattr(made, "chat_template", None) is None:
        raise BadCheckpoint(
            f"{folder}: its processor has no image processor or no chat template: copy the original's files"
        )
    return made


def pair_rows(pairs: list[Pair], processor: Any, image_tokens: set[int], source: str) -> Calibration:
    """Rows of pairs. image_tokens: ids that stand for pieces of a picture or a video.

    Raises BadCalibration for a template without a slot for pictures, or that leaves the answer out.
    """
    inputs, prompts = [], []
    for pair in pairs:
        row, prompt = _row(pair, processor)
        ids = row["input_ids"][0]
        if (pair.images or pair.frames) and not any(int(i) in image_tokens for i in ids):
            raise BadCalibration(f"{pair.where}: {_NO_PLACE}")
        if prompt >= len(ids):
            raise BadCalibration(f"{pair.where}: the chat template of the model leaves the answer out")
        inputs.append(row)
        prompts.append(prompt)
    return rows_of(inputs, prompts, image_tokens, source)


def rows_of(inputs: list[dict[str, Tensor]], prompts: list[int], image_tokens: set[int], source: str) -> Calibration:
    """Rows of what a model is called with, filled up at the end to the longest; prompts: tokens of each before its answer."""
    longest = max(x["input_ids"].shape[1] for x in inputs)
    tokens = torch.zeros(len(inputs), longest, dtype=torch.int64)
    kinds = torch.zeros(len(inputs), longest, dtype=torch.uint8)
    pieces = torch.tensor(sorted(image_tokens))
    for i, (row, prompt) in enumerate(zip(inputs, prompts, strict=True)):
        ids = row["input_ids"][0]
        tokens[i, : len(ids)] = ids
        kinds[i, : len(ids)] = KINDS.index("text")
        kinds[i, prompt : len(ids)] = KINDS.index("answer")
        kinds[i, : len(ids)][torch.isin(ids, pieces)] = KINDS.index("vision")
    return Calibration(
        source=source,
        samples=len(inputs),
        seqlen=longest,
        digest=digest_of(tokens, inputs),
        tokens=tokens,
        inputs=tuple(inputs),
        kinds=kinds,
    )


def encoded(pair: Pair, processor: Any, answered: bool) -> dict[str, Tensor]:
    """What the model is called with for a question, as far as its answer begins, or with the answer and its end."""
    slots: list[dict[str, Any]] = [{"type": "image", "image": i} for i in pair.images]
    slots += [{"type": "video", "video": list(pair.frames)}] if pair.frames else []
    messages = [{"role": "user", "content": [*slots, {"type": "text", "text": pair.question}]}]
    if answered:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": pair.answer}]})
    more = {"processor_kwargs": {"do_sample_frames": False}} if pair.frames else {}
    try:
        constant = rendered(processor, messages, not answered)
        made = processor.apply_chat_template(
            messages, chat_template=constant, tokenize=True, return_dict=True, return_tensors="pt", **more
        )
    except Exceeded as e:
        raise BadCalibration(
            f"{pair.where}: the chat template of the model takes {e} to write this pair: get the template again from its source"
        ) from e
    except (TemplateFailure, ValueError, TypeError, ImportError) as e:
        if not isinstance(e, TemplateFailure) and not _has_place(processor, constant):
            raise BadCalibration(f"{pair.where}: {_NO_PLACE}") from e
        reason = str(e).strip().partition("\n")[0]
        raise BadCalibration(f"{pair.where}: the model's processor and chat template refuse it: {reason}") from e
    return {k: v for k, v in made.items() if isinstance(v, Tensor)}


def _has_place(processor: Any, constant: str) -> bool:
    """Whether what the chat template writes has the token of a picture in it, where that is known."""
    token = getattr(processor, "image_token", None)
    return token is None or token in written(constant)


def _row(pair: Pair, processor: Any) -> tuple[dict[str, Tensor], int]:
    """What the model is called with, and how many of its tokens come before the answer."""
    whole, prompt = encoded(pair, processor, True), encoded(pair, processor, False)
    ids, start = whole["input_ids"][0], prompt["input_ids"][0]
    same = int((ids[: len(start)] == start[: len(ids)]).cumprod(0).sum())
    if bool(whole["attention_mask"].all()):
        del whole["attention_mask"]  # of one row without padding: says nothing, and would make blocks build a mask
    return whole, same


def image_tokens(config: Any) -> set[int]:
    """Ids that stand for pieces of a picture or a video in what a model of that config is called with."""
    known = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return {int(i) for i in known if i is not None}
