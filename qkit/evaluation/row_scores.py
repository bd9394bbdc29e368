"""Figures of models that do not continue a text, beside those of the original model on the same rows.

Embedding models and encoders are compared by the cosine of their embeddings and by the nearest neighbours that these give;
classifiers by their classes; reward models, which give one number, by the order in which they put rows; models that fill in
masks, or read one text (or a sound) and write another, by the likelihood of the tokens that they are to tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qkit.errors import UsageError
from qkit.evaluation.metrics import Interval, bootstrap_ci, divergence, exp, quantile, ratio_ci, wilson_ci
from qkit.evaluation.model_kinds import CLASSES, EMBEDDINGS, ModelKind
from qkit.evaluation.row_inputs import RowInput
from qkit.files.foreign import foreign_errors
from qkit.system.progress import Advance

BATCH = 8  # rows of one shape in a pass, at most
_PAIRWISE = 2000  # rows, at most, that are compared with each other


@dataclass
class Scores:
    """What a model gave for each row: a vector (an embedding, or the scores of classes); or of each scored token its loss, and
    against the baseline the divergence and whether both put the same token first."""

    vectors: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    kls: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)


def score(
    models: Sequence[Any],
    baseline: Any,
    kind: ModelKind,
    rows: Sequence[RowInput],
    pooling: str,
    progress: Advance | None,
) -> tuple[list[Scores], Scores]:
    """The scores of every model, and of the baseline (empty where there is none), on rows in their order."""
    found, reference = [Scores() for _ in models], Scores()
    done = 0
    for batch in _batches(rows, _most_rows(models[0], kind)):
        wanted = None if baseline is None else _outputs(baseline, kind, batch, pooling)
        _keep(reference, wanted, None, batch)
        for scores, model in zip(found, models, strict=True):
            _keep(scores, _outputs(model, kind, batch, pooling), wanted, batch)
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))
    return found, reference


def _batches(rows: Sequence[RowInput], most: int) -> Iterator[list[RowInput]]:
    """Neighbours that are called with tensors of one shape: nothing is padded."""
    batch: list[RowInput] = []
    for row in rows:
        if batch and (len(batch) == most or _shapes(batch[0]) != _shapes(row)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _shapes(row: RowInput) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in row.arguments.items()}


def _most_rows(model: Any, kind: ModelKind) -> int:
    """Classifiers of transformers that have no padding token take one row at a time."""
    return (
        1 if kind.kind == CLASSES and getattr(model.config.get_text_config(), "pad_token_id", None) is None else BATCH
    )


@torch.inference_mode()
def _outputs(model: Any, kind: ModelKind, batch: Sequence[RowInput], pooling: str) -> list[Tensor]:
    """Of each row a vector, or log probabilities [tokens, choices], float32 on the CPU."""
    arguments = {k: torch.cat([row.arguments[k] for row in batch]) for k in batch[0].arguments}
    arguments = {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in arguments.items()}
    reads = model
    if kind.kind == EMBEDDINGS and getattr(model.config, "is_encoder_decoder", False):
        reads = model.get_encoder()
    advice = "check that the tokenizer in the folder is the model's"
    with foreign_errors(f"{kind.class_name}: transformers cannot run it on these rows", advice, UsageError):
        output = reads(**arguments)
    if kind.kind == EMBEDDINGS:
        return list(pooled(output[0].float().cpu(), pooling))
    logits = output.logits.float().cpu()
    if kind.kind == CLASSES:
        return list(logits)
    picked = [x if row.places is None else x[row.places] for x, row in zip(logits, batch, strict=True)]
    return [x.log_softmax(-1) for x in picked]


def pooled(hidden: Tensor, pooling: str) -> Tensor:
    """One vector for each row of hidden states [rows, tokens, width]."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[:, -1]
    return hidden.amax(1) if pooling == "max" else hidden.mean(1)


def _keep(scores: Scores, outputs: list[Tensor] | None, wanted: list[Tensor] | None, batch: Sequence[RowInput]) -> None:
    for i, found in enumerate(outputs or ()):
        if found.dim() == 1:
            scores.vectors.append(found)
            continue
        tokens = batch[i].scored
        if tokens is not None:
            scores.losses.append(-found.gather(1, tokens[:, None])[:, 0].double())
        if wanted is not None:
            kl = divergence(wanted[i], found)
            scores.kls.append(kl)
            scores.same.append((found.argmax(-1) == wanted[i].argmax(-1)) & ~kl.isnan())


# ---- figures -----------------------------------------------------------------------------------------------------


def figures(
    kind: ModelKind, rows: Sequence[RowInput], ours: Scores, theirs: Scores, several: bool = False
) -> dict[str, Any]:
    """The figures of one model; those against the baseline where ``theirs`` has some.

    several: a row may have several classes
    """
    found: dict[str, Any] = {"kind": kind.kind, "rows": len(rows), "cut": sum(row.cut for row in rows)}
    if kind.kind == EMBEDDINGS:
        return found | _embeddings(torch.stack(ours.vectors), torch.stack(theirs.vectors))
    if kind.kind != CLASSES:
        return found | _tokens(ours, theirs)
    scores = torch.stack(ours.vectors)
    reference = torch.stack(theirs.vectors) if theirs.vectors else None
    if scores.shape[1] == 1:
        return found | {"kind": "scores"} | _rewards(scores[:, 0], None if reference is None else reference[:, 0], rows)
    found["labels"] = scores.shape[1]
    if several:
        return found | {"kind": "labels"} | _labels(scores, reference)
    return found | _classes(scores, reference, rows)


def _embeddings(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    cosines = torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=1)
    mean = bootstrap_ci(cosines)
    found: dict[str, Any] = {"cosine": {"mean": mean.mean, "ci": mean.ends, "p1": quantile(cosines, 0.01)}}
    if len(ours) < 3:
        return found
    a, b = (_similarities(x[:_PAIRWISE]) for x in (ours, theirs))
    same = wilson_ci(_nearest(a) == _nearest(b))
    upper = torch.triu_indices(len(a), len(a), 1)
    return found | {
        "same_nearest": {"share": same.mean, "ci": same.ends},
        "similarities": correlation(a[upper[0], upper[1]], b[upper[0], upper[1]]),
    }


def _similarities(x: Tensor) -> Tensor:
    """Cosines of all pairs of rows."""
    x = torch.nn.functional.normalize(x.double(), dim=1)
    return x @ x.t()


def _nearest(similarities: Tensor) -> Tensor:
    return (similarities - 3 * torch.eye(len(similarities))).argmax(1)


def _classes(ours: Tensor, theirs: Tensor | None, rows: Sequence[RowInput]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    classes = ours.argmax(1)
    if theirs is not None:
        same = wilson_ci((classes == theirs.argmax(1)) & ours.isfinite().all(1))
        kl = divergence(theirs.log_softmax(-1), ours.log_softmax(-1))
        mean = bootstrap_ci(kl)
        found["same_class"] = {"share": same.mean, "ci": same.ends}
        found["kl"] = {"mean": mean.mean, "ci": mean.ends, "p99": quantile(kl, 0.99)}
    labels = torch.tensor([-1 if row.label is None else row.label for row in rows])
    known = labels >= 0
    if known.any():
        before = None if theirs is None else (theirs.argmax(1) == labels)[known]
        found["accuracy"] = _share((classes == labels)[known], before)
    return found


def _labels(ours: Tensor, theirs: Tensor | None) -> dict[str, Any]:
    """Each class of each row by itself: it is given where its score is above 0."""
    if theirs is None:
        return {}
    same = bootstrap_ci(((ours > 0) == (theirs > 0)).double().mean(1))
    return {"same_class": {"share": same.mean, "ci": same.ends}}


def _rewards(ours: Tensor, theirs: Tensor | None, rows: Sequence[RowInput]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if theirs is not None and len(ours) > 1:
        upper = torch.triu_indices(min(len(ours), _PAIRWISE), min(len(ours), _PAIRWISE), 1)
        a, b = ((x[upper[0]] - x[upper[1]]).sign() for x in (ours, theirs))
        found |= {
            "correlation": correlation(ours, theirs),
            "rank_correlation": correlation(_ranks(ours), _ranks(theirs)),
            "same_order": float((a == b).double().mean()),
            "error": float((ours - theirs).double().abs().mean()),
            "spread": float(theirs.double().std()),
        }
    pairs = [(i, row.row.better) for i, row in enumerate(rows) if row.row is not None and row.row.better is not None]
    if pairs:
        first, second = torch.tensor(pairs).unbind(1)
        before = None if theirs is None else theirs[first] > theirs[second]
        found["preferred"] = _share(ours[first] > ours[second], before)
    return found


def _share(right: Tensor, before: Tensor | None) -> dict[str, Any]:
    """The share of true values, in per cent, and its change against the baseline's."""
    value = wilson_ci(right).map(lambda share: 100 * share)
    found: dict[str, Any] = {"percent": value.mean, "ci": value.ends, "rows": len(right)}
    if before is not None:
        change = bootstrap_ci(100 * (right.double() - before.double()))
        found |= {
            "baseline_percent": 100 * float(before.double().mean()),
            "change": change.mean,
            "change_ci": change.ends,
        }
    return found


def _tokens(ours: Scores, theirs: Scores) -> dict[str, Any]:
    scored = ours.losses or ours.kls
    found: dict[str, Any] = {"tokens": sum(x.numel() for x in scored)}
    if ours.losses:
        value = _per_token(ours.losses).map(exp)
        found |= {"perplexity": value.mean, "ci": value.ends}
    if theirs.losses:
        before = _per_token(theirs.losses).map(exp)
        changes = [a - b for a, b in zip(ours.losses, theirs.losses, strict=True)]
        change = _per_token(changes).map(lambda d: 100 * (exp(d) - 1))
        found |= {"baseline_perplexity": before.mean, "baseline_ci": before.ends}
        found |= {"change_percent": change.mean, "change_ci": change.ends}
    if ours.kls:
        kl = _per_token(ours.kls)
        found["kl"] = {"mean": kl.mean, "ci": kl.ends, "p99": quantile(torch.cat(ours.kls), 0.99)}
        found["same_top1"] = float(torch.cat(ours.same).double().mean())
    return found


def _per_token(values: Sequence[Tensor]) -> Interval:
    return ratio_ci(torch.stack([v.sum() for v in values]), torch.tensor([v.numel() for v in values]))


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation; 1 where both are constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norms = float(a.norm()) * float(b.norm())
    if norms == 0:
        return float(float(a.norm()) == float(b.norm()))
    return float(a @ b) / norms


def _ranks(x: Tensor) -> Tensor:
    """The rank of each value; equal values share the mean of theirs."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks: Tensor = ends - (counts.double() - 1) / 2
    return ranks[inverse]
