"""Image-text data for vision-language models: images with a question and an answer.

A file of JSON lines has on each line ``image`` (a path, or a list of them, seen from the file), or ``video`` (a folder of
frames, or a list of them), ``question`` and ``answer``, and may have ``kind``, which groups answers. A folder has such
a file, pairs.jsonl, or images with a text file of the same name beside each (a caption; the question is then CAPTION).
``dataset:NAME[:config][:split]`` is a data set of the ``datasets`` package (a hub id or a local folder; the default
split is train) with a column image, or images, and either question and answer or caption. Without data the
project's own drawn scenes are used (``qkit_data.scenes``).

The model's own processor and chat template make the rows. Every token of a row is of one of four kinds: vision (from an
image), answer (scored by the training loss, the end of the answer included), text (the rest of the prompt) and padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.chat_templates import TemplateFailure, rendered_each, written
from qkit.calibration.dataset import KINDS, Calibration, digest_of, read_text
from qkit.calibration.options import DRAWN
from qkit.calibration.readers import load_dataset
from qkit.calibration.sources import CalibSource, parse_source
from qkit.errors import BadCalibration, BadCheckpoint, BadInput
from qkit.files.folder import check_side_files, parse_checked
from qkit.files.foreign import foreign_errors
from qkit.files.safefile import read_bytes, shown
from qkit.files.schema import ImageTextLine, validate
from qkit.files.text_file import HEAD, TextFile, has_images, is_chat
from qkit.system.confined import Exceeded
from qkit.system.extras import needs, require

CAPTION = "Describe the picture."
_NO_PLACE = "the chat template of the model has no place for an image"
MAX_IMAGE_BYTES = 1 << 28  # of an image file
MAX_IMAGE_PIXELS = 1 << 26  # of an image: three bytes each in memory, and models use far fewer
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class ImageText:
    """One question about images or a video.

    images, frames (of a video): PIL images in RGB
    where: place in the source, for error messages; kind: topic of the question, '' if unknown
    """

    images: tuple[Any, ...]
    question: str
    answer: str
    where: str
    kind: str = ""
    frames: tuple[Any, ...] = ()


def drawn_scenes(start: int, samples: int) -> Iterator[ImageText]:
    """One question about each of ``samples`` drawn scenes, from seed ``start`` on."""
    return (next(_scene_questions(seed)) for seed in range(start, start + samples))


def _scene_questions(seed: int) -> Iterator[ImageText]:
    """All questions about the scene with this seed."""
    with needs("a drawn scene", "data"):
        from qkit_data.scenes import scene
    with needs("a drawn scene", "vision"):
        from PIL import Image

    drawing = scene(seed)
    image = Image.fromarray(drawing.image)
    return (
        ImageText(images=(image,), question=t.question, answer=t.answer, where=f"scene {seed}", kind=t.kind)
        for t in drawing.turns
    )


def held_out_image_text(spec: str | Path, count_limit: int) -> Iterator[ImageText]:
    """At most ``count_limit`` samples for evaluation, read one by one.

    spec: DRAWN, for all questions about the scenes from seed 0 on, which neither training nor calibration uses; or a file or
    folder. Raises BadInput when there is no such file, or no sample in it, and what ``read_image_text`` raises.
    """
    if spec == DRAWN:
        return islice(chain.from_iterable(map(_scene_questions, count())), count_limit)
    path = Path(spec)
    if not path.exists() and not is_dataset(path):
        raise BadInput(f"{path}: no such file or folder: use '{DRAWN}', a .jsonl file, or a folder of images")
    samples = _read_source(path, count_limit)
    first_sample = next(samples, None)
    if first_sample is None:
        raise BadInput(f"{path}: the file is empty: write one JSON object per line, with image, question and answer")
    return chain([first_sample], samples)


def read_image_text(path: Path, count: int) -> list[ImageText]:
    "The first ``samples`` pairs of a file or a folder. Raises BadCalibration naming the line and what is wrong"
    "with it."
    samples = list(_read_source(path, count))
    if len(samples) < count:
        raise BadCalibration(
            f"{path}: {len(samples)} image-text samples, {count} are needed: add more, or use fewer --samples"
        )
    return samples


def is_dataset(spec: Path) -> bool:
    """Whether --calib names a dataset of the datasets library, not a file."""
    return str(spec).startswith("dataset:")


def is_image_text(source: CalibSource, images_expected: bool) -> bool:
    """Whether a source of calibration data has images: a folder, or JSON lines with the fields of images.

    images_expected: for a vision-language model, for which a data set without a named column has them, and JSON lines that are
    neither texts nor chats.
    """
    if source.is_dataset:
        return images_expected and source.column is None
    if source.path.is_dir():
        return True
    if source.path.suffix.lower() != ".jsonl" or source.column is not None:
        return False
    head = TextFile(source.path, "calibration data", BadCalibration).text(HEAD)[0]
    return has_images(head) or (images_expected and not is_chat(head) and '"text"' not in head)


def _read_source(path: Path, limit: int) -> Iterator[ImageText]:
    if is_dataset(path):
        yield from _read_dataset(str(path), limit)
        return
    if path.is_dir() and not (path / "pairs.jsonl").is_file():
        images = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise BadCalibration(
                f"{path}: no file pairs.jsonl and no images ({', '.join(IMAGE_SUFFIXES)}) in the folder"
            )
        for image in images[:limit]:
            text_file = image.with_suffix(".txt")
            if not text_file.is_file():
                raise BadCalibration(f"{image}: an image without an answer: write the answer to {text_file.name}")
            yield _load_images([image], [], CAPTION, read_text(text_file).strip(), str(image))
        return
    file = path / "pairs.jsonl" if path.is_dir() else path
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    for number, line in enumerate(lines[:limit], 1):
        yield _parse_line(line, file, f"{file}, line {number}")


def _parse_line(line: str, file: Path, where: str) -> ImageText:
    """The sample that one JSON line describes. Raises BadCalibration."""
    try:
        data = parse_checked(line.encode("utf-8", "surrogatepass"), where)
    except BadCheckpoint as e:
        raise BadCalibration(str(e)) from e
    if isinstance(data, dict) and is_chat(line):
        raise BadCalibration(
            f"{where}: found a chat, expected image (or video), question and answer: write the turns in "
            "this form, or use a text file"
        )
    if not isinstance(data, dict) or "question" not in data or not {"image", "video"} & data.keys():
        raise BadCalibration(
            f"{where}: expected an object with image (or video), question and answer, found {shown(line, 60)}"
        )
    validate(ImageTextLine, data, where, "correct the line", BadCalibration)
    images, frames = ([file.parent / name for name in _names(data.get(field))] for field in ("image", "video"))
    if len(frames) == 1 and frames[0].is_dir():
        frames = sorted(p for p in frames[0].iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if "video" in data and not frames:
        raise BadCalibration(f"{where}: the video {shown(data['video'])} has no frames ({', '.join(IMAGE_SUFFIXES)})")
    if not images and not frames:
        raise BadCalibration(f"{where}: a sample without an image: add 'image' or 'video'")
    answer = data.get("answer")
    texts = (data["question"], "" if answer is None else str(answer), where, data.get("kind") or "")
    return _load_images(images, frames, *texts)


def _read_dataset(spec: str, limit: int) -> Iterator[ImageText]:
    rows = load_dataset(parse_source(spec))
    columns = set(rows.column_names)
    if not columns & {"image", "images"} or not ({"question", "answer"} <= columns or "caption" in columns):
        raise BadCalibration(
            f"{spec}: expected the columns image (or images), question and answer, or caption; found {', '.join(columns)}"
        )
    for number in range(min(limit, len(rows))):
        row, where = rows[number], f"{spec}, row {number}"
        images = row["image"] if "image" in columns else row["images"]
        pil_images = [i.convert("RGB") for i in (images if isinstance(images, list) else [images]) if i is not None]
        answer = str((row["answer"] if "answer" in columns else row["caption"]) or "")
        if not pil_images or not answer:
            raise BadCalibration(f"{where}: a sample without {'an answer' if pil_images else 'a picture'}")
        question = str(row["question"]) if "question" in columns else CAPTION
        yield ImageText(
            images=tuple(pil_images), question=question, answer=answer, where=where, kind=str(row.get("kind") or "")
        )


def _names(value: Any) -> list[str]:
    """File names of a field that has one name, several, or none."""
    return [] if value is None else [str(v) for v in (value if isinstance(value, list) else [value])]


def _load_images(
    files: list[Path], frames: list[Path], question: str, answer: str, where: str, kind: str = ""
) -> ImageText:
    with needs("image-text data", "vision"):
        from PIL import Image

    if not answer:
        raise BadCalibration(f"{where}: a sample without an answer: add the answer that the model should give")
    images = []
    for file in (*files, *frames):
        if not file.is_file():  # a pipe would block
            raise BadCalibration(f"{where}: the image {file} cannot be read: there is no such file: correct its name")
        with foreign_errors(f"{where}: the image {file} cannot be read", "save it again", BadCalibration):
            # From memory: PIL would allocate four gigabytes for a chunk of a file that claims this size.
            with Image.open(BytesIO(read_bytes(file, MAX_IMAGE_BYTES))) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise BadCalibration(
                        f"{where}: the image {file} has {image.width} x {image.height} pixels, expected at most "
                        f"{MAX_IMAGE_PIXELS}: scale it down"
                    )
                images.append(image.convert("RGB"))
    return ImageText(
        images=tuple(images[: len(files)]),
        question=question,
        answer=answer,
        where=where,
        kind=kind,
        frames=tuple(images[len(files) :]),
    )


def load_processor(folder: Path) -> Any:
    """The processor of a model folder. No code of the folder is run. Raises BadCheckpoint when there is none."""
    from transformers import AutoProcessor

    require("the processor of a vision-language model", "vision", "PIL")
    check_side_files(folder)
    advice = "copy the processor's files of the original model here, or use text without images"
    with foreign_errors(f"{folder}: no processor that transformers can load", advice):
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not hasattr(processor, "image_processor") or getattr(processor, "chat_template", None) is None:
        raise BadCheckpoint(
            f"{folder}: its processor has no image processor or no chat template: copy the original's files"
        )
    return processor


def image_text_rows(samples: list[ImageText], processor: Any, image_tokens: set[int], source: str) -> Calibration:
    """Calibration rows of image-text samples. image_tokens: ids that represent patches of an image or a video.

    Raises BadCalibration for a chat template that has no slot for images, or that leaves the answer out.
    """
    inputs, prompts = [], []
    asked = [(sample, answered) for sample in samples for answered in (True, False)]
    encoded = _encoded(asked, processor)
    for sample in samples:
        row, prompt = _row(next(encoded), next(encoded))
        ids = row["input_ids"][0]
        if (sample.images or sample.frames) and not any(int(i) in image_tokens for i in ids):
            raise BadCalibration(f"{sample.where}: {_NO_PLACE}")
        if prompt >= len(ids):
            raise BadCalibration(f"{sample.where}: the chat template of the model leaves the answer out")
        inputs.append(row)
        prompts.append(prompt)
    return rows_of(inputs, prompts, image_tokens, source)


def rows_of(inputs: list[dict[str, Tensor]], prompts: list[int], image_tokens: set[int], source: str) -> Calibration:
    """Calibration rows from arguments of the model, padded to the longest; prompts: number of tokens before each answer."""
    longest = max(x["input_ids"].shape[1] for x in inputs)
    tokens = torch.zeros(len(inputs), longest, dtype=torch.int64)
    kinds = torch.zeros(len(inputs), longest, dtype=torch.uint8)
    vision_tokens = torch.tensor(sorted(image_tokens))
    for i, (row, prompt) in enumerate(zip(inputs, prompts, strict=True)):
        ids = row["input_ids"][0]
        tokens[i, : len(ids)] = ids
        kinds[i, : len(ids)] = KINDS.index("text")
        kinds[i, prompt : len(ids)] = KINDS.index("answer")
        kinds[i, : len(ids)][torch.isin(ids, vision_tokens)] = KINDS.index("vision")
    return Calibration(
        source=source,
        samples=len(inputs),
        seqlen=longest,
        digest=digest_of(tokens, inputs),
        tokens=tokens,
        inputs=tuple(inputs),
        kinds=kinds,
    )


def encode(sample: ImageText, processor: Any, answered: bool) -> dict[str, Tensor]:
    """Arguments of the model for a question. answered: with the answer and its end, else up to the beginning of the answer."""
    return next(_encoded([(sample, answered)], processor))


def _encoded(asked: Sequence[tuple[ImageText, bool]], processor: Any) -> Iterator[dict[str, Tensor]]:
    """``encode`` of each sample; the chat template writes all texts first."""
    messages = [_messages(sample, answered) for sample, answered in asked]
    answers = [answered for _, answered in asked]
    templates = rendered_each(processor, [(m, not a) for m, a in zip(messages, answers, strict=True)])
    for (sample, _), turns, template in zip(asked, messages, templates, strict=False):  # one over a limit ends them
        yield _encode_with(template, sample, turns, processor)


def _messages(sample: ImageText, answered: bool) -> list[dict[str, Any]]:
    slots: list[dict[str, Any]] = [{"type": "image", "image": i} for i in sample.images]
    slots += [{"type": "video", "video": list(sample.frames)}] if sample.frames else []
    messages = [{"role": "user", "content": [*slots, {"type": "text", "text": sample.question}]}]
    if answered:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": sample.answer}]})
    return messages


def _encode_with(
    template: str | Exception, sample: ImageText, messages: list[dict[str, Any]], processor: Any
) -> dict[str, Tensor]:
    """template: constant, or what came of the model's own."""
    options = {"processor_kwargs": {"do_sample_frames": False}} if sample.frames else {}
    try:
        if isinstance(template, Exception):
            raise template
        encoding = processor.apply_chat_template(
            messages, chat_template=template, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
    except Exceeded as e:
        raise BadCalibration(
            f"{sample.where}: the chat template of the model needs {e} for this sample: download the template again"
        ) from e
    except (TemplateFailure, ValueError, TypeError, ImportError) as e:
        if not isinstance(template, Exception) and not _has_place(processor, template):
            raise BadCalibration(f"{sample.where}: {_NO_PLACE}") from e
        reason = str(e).strip().partition("\n")[0]
        raise BadCalibration(f"{sample.where}: the model's processor and chat template refuse it: {reason}") from e
    return {k: v for k, v in encoding.items() if isinstance(v, Tensor)}


def _has_place(processor: Any, constant: str) -> bool:
    """Whether the text of the chat template has an image token; True where the token is unknown."""
    token = getattr(processor, "image_token", None)
    return token is None or token in written(constant)


def _row(answered: dict[str, Tensor], unanswered: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Arguments of the model, and the number of tokens before the answer."""
    ids, prompt_ids = answered["input_ids"][0], unanswered["input_ids"][0]
    prompt_length = int((ids[: len(prompt_ids)] == prompt_ids[: len(ids)]).cumprod(0).sum())
    if bool(answered["attention_mask"].all()):
        del answered["attention_mask"]  # of one row without padding: says nothing, and would make blocks build a mask
    return answered, prompt_length


def image_tokens(config: Any) -> set[int]:
    """Token ids that represent patches of an image or a video, for a model of that config."""
    token_ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return {int(i) for i in token_ids if i is not None}
