"""Task suites through lm-eval: its own tasks, those shipped with qkit, and a folder of the user's; with images or without.

Shipped tasks are YAML files with their data beside them, so they need no network. The tasks of lm-eval itself are as
trusted as lm-eval; a folder from elsewhere is read by ``taskcode`` before lm-eval sees it. Tasks with images go through
lm-eval's model for images and the chat template; it knows no likelihoods of them, only what is generated (lm-eval 0.4.13).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from qkit.calibration.chat_templates import Confined, TemplateFailure
from qkit.calibration.image_text import held_out_image_text
from qkit.calibration.options import DRAWN, QUESTIONS
from qkit.engines.process import EngineAnswer
from qkit.errors import BadInput, Unsupported, UsageError
from qkit.evaluation.metrics import BATCH, BATCH_BYTES, Z95, bootstrap_ci, wilson_ci
from qkit.evaluation.sources import first_line
from qkit.evaluation.taskcode import refuse_task_code
from qkit.system.confined import Exceeded

BOOTSTRAP = 1000  # resamples for metrics whose standard error has no closed form
FEWSHOT_SEED = 1234  # lm-eval's own default


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    allow_task_code: bool = False,
    include_path: Path | None = None,
    processor: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """The figures of tasks for a transformers model, {task: {"samples": n, "metrics": {metric: figures}}}, on the first
    ``limit`` samples.

    Figures: value, stderr and ci (95 %, normal; both None where lm-eval gives no standard error), higher_is_better, and
    values: the metric of each sample, where it is a number, for ``paired_change``. A metric under a filter of lm-eval
    other than 'none' is called ``metric.filter``.

    include_path: a folder of further task files, refused when they could run code unless ``allow_task_code``.
    processor: gives the processor of a vision-language model, for tasks with images.
    Raises Unsupported without lm-eval or for task code, UsageError for names that do not exist and for images without a
    processor, BadInput for a task that cannot be loaded, above all without the network that most tasks of lm-eval need.
    """

    def lm_of(with_images: bool) -> Any:
        return _with_images(model, processor, tasks) if with_images else _of_text(model, tokenizer)

    return _run(lm_of, tasks, limit, allow_task_code, include_path)


def run_tasks_in_engine(
    ask: Callable[..., EngineAnswer],
    tokenizer: Any,
    positions: int,
    ends: Collection[int],
    tasks: Sequence[str],
    limit: int | None = None,
    allow_task_code: bool = False,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """As ``run_tasks``, with the figures of an engine; ask, positions and ends as for ``EngineRequests``. Raises UsageError for
    tasks with images too."""

    def lm_of(with_images: bool) -> Any:
        from qkit.evaluation.engine_lm import engine_lm

        if with_images:
            raise UsageError(f"{', '.join(tasks)}: tasks with images are not measured in an engine: leave --engine out")
        return engine_lm(ask, tokenizer, positions, ends)

    return _run(lm_of, tasks, limit, allow_task_code, include_path)


def _run(
    lm_of: Callable[[bool], Any],
    tasks: Sequence[str],
    limit: int | None,
    allow_task_code: bool,
    include_path: Path | None,
) -> dict[str, Any]:
    """The figures of tasks. lm_of: makes lm-eval's model, for tasks with images or without."""
    registry = _lm_eval()
    from lm_eval.evaluator import evaluate

    if include_path is not None and not allow_task_code:
        refuse_task_code(include_path, registry.METRIC_REGISTRY)
    with tempfile.TemporaryDirectory(prefix="qkit-tasks-") as cache, _quiet():
        loaded = _load(tasks, include_path, cache)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        kinds = {name: bool(getattr(task, "MULTIMODAL", False)) for name, task in loaded["tasks"].items()}
        task_figures: dict[str, Any] = {}
        for with_images in sorted(set(kinds.values())):
            group = loaded
            if len(set(kinds.values())) > 1:  # groups may hold both, so that they have no figures of their own here
                group = {"tasks": {n: task for n, task in loaded["tasks"].items() if kinds[n] == with_images}}
            lm = lm_of(with_images)
            try:
                results = evaluate(
                    lm=lm, task_dict=group, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=True,
                    apply_chat_template=with_images,
                )  # fmt: skip
            except Exceeded as error:
                raise BadInput(
                    f"{', '.join(tasks)}: the chat template of the model needs {error}: download it again"
                ) from error
            except (ValueError, NotImplementedError, TemplateFailure) as error:
                raise BadInput(f"lm-eval cannot run {', '.join(tasks)}: {first_line(error)}") from error
            task_figures |= _figures(results)
    return task_figures


def _of_text(model: Any, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    # a copy, because lm-eval gives the tokenizer a padding token
    return HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=_batch_size(model),
        softmax_dtype=torch.float32,
    )


def _with_images(model: Any, processor: Callable[[], Any] | None, tasks: Sequence[str]) -> Any:
    from lm_eval.models.hf_vlms import HFMultimodalLM

    if processor is None:
        raise UsageError(f"{', '.join(tasks)}: tasks with images are for a vision-language model, and this is none")

    class Model(HFMultimodalLM):  # type: ignore[misc]
        """lm-eval's own loads the processor from where the model came from, which here has no name."""

        def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **kwargs: Any) -> None:
            self.processor, self.tokenizer = Confined(tokenizer), tokenizer.tokenizer

    return Model(pretrained=model, tokenizer=processor(), batch_size=_batch_size(model))


def shipped_tasks() -> dict[str, Path]:
    """The task files of qkit_data, by task name; none where it is not installed."""
    if find_spec("qkit_data") is None:
        return {}
    import qkit_data

    return {path.stem: path for path in sorted(qkit_data.task_dir().glob("*.yaml"))}


def paired_change(value: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any] | None:
    """Mean difference of a metric, sample by sample, with its 95 % interval; None where there is nothing to pair.

    Both are figures of ``run_tasks`` of the same task. Two models mostly agree, so the paired interval is much narrower
    than the two intervals suggest. Where a sample is right or wrong also flips and flips_ci: the share of samples that are
    right for one model alone (arXiv 2407.09141).
    """
    values, baseline_values = value.get("values"), baseline.get("values")
    if not values or not baseline_values or len(values) != len(baseline_values):
        return None
    ours, theirs = (torch.tensor(numbers, dtype=torch.float64) for numbers in (values, baseline_values))
    difference = bootstrap_ci(ours - theirs)
    change: dict[str, Any] = {"change": difference.mean, "change_ci": difference.ends}
    if {*values, *baseline_values} <= {0.0, 1.0}:
        flips = wilson_ci(ours != theirs)
        change |= {"flips": flips.mean, "flips_ci": flips.ends}
    return change


def _lm_eval() -> Any:
    try:
        import lm_eval.api.metrics  # fills the registry
        import lm_eval.api.registry
        import lm_eval.models.huggingface
    except ImportError as error:
        raise Unsupported(f"tasks need lm-eval ({error.msg}): pip install qkit[eval]") from error
    return lm_eval.api.registry


def _load(names: Sequence[str], include_path: Path | None, cache: str) -> Any:
    """lm-eval's dict of loaded tasks. The index of its own thousands of tasks is built only when a name needs it."""
    import datasets
    import jinja2
    from lm_eval.tasks import TaskManager

    shipped = shipped_tasks()
    include = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=include, include_defaults=False)
    for name in set(shipped).intersection(manager.all_tasks):
        raise UsageError(f"{include_path} has a task called '{name}', and so has qkit; rename yours")
    known_names = {*shipped, *manager.all_tasks}
    if not known_names.issuperset(names):
        manager = TaskManager(include_path=include)
        known_names.update(manager.all_tasks)
    for name in names:
        if name not in known_names:
            nearest = get_close_matches(name, known_names, n=1)
            advice = f"did you mean '{nearest[0]}'?" if nearest else f"shipped with qkit: {', '.join(shipped)}"
            raise UsageError(f"there is no task called '{name}'; {advice}")
    try:
        return manager.load([_shipped(shipped[name], cache) if name in shipped else name for name in names])
    except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
        failure: Exception = error
    except (datasets.exceptions.DatasetsError, jinja2.TemplateError, yaml.YAMLError) as error:
        failure = error
    raise BadInput(
        f"lm-eval cannot load {', '.join(names)}: {first_line(failure)}; check the task's data and the network, "
        f"or use a task that needs none: {', '.join(shipped)}"
    ) from failure


def _shipped(path: Path, cache: str) -> dict[str, Any]:
    """The configuration of a shipped task, its data file made absolute, its cache where it leaves nothing behind."""
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if config["dataset_path"] == DRAWN:
        return {**config, "custom_dataset": _scenes}
    import qkit_data  # the file of the task lies in it

    kwargs = config["dataset_kwargs"]
    kwargs["data_files"] = str(qkit_data.data_path(kwargs["data_files"]))
    kwargs["cache_dir"] = cache
    return config


def _scenes(**metadata: Any) -> dict[str, Any]:
    """The project's held-out scenes, as lm-eval asks for a data set."""
    import datasets

    scenes = held_out_image_text(DRAWN, QUESTIONS)
    rows = [{"image": p.images[0], "question": p.question, "answer": p.answer, "kind": p.kind} for p in scenes]
    return {"test": datasets.Dataset.from_list(rows)}


def _batch_size(model: Any) -> int:
    config = model.config.get_text_config()
    row: int = 4 * getattr(config, "max_position_embeddings", 2048) * config.vocab_size
    return max(1, min(BATCH, BATCH_BYTES // row))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval prints and warns about the ordinary; its progress bars are kept for a terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    errors = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stdout(errors), contextlib.redirect_stderr(errors):
            yield
    finally:
        logger.setLevel(level)


def _figures(results: Mapping[str, Any]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task, row in results["results"].items():
        samples = results.get("samples", {}).get(task, [])
        metrics = {}
        for key, value in row.items():
            metric, _, choice = key.partition(",")
            if not choice or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = row.get(f"{metric}_stderr,{choice}")
            stderr = float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None
            metrics[metric if choice == "none" else f"{metric}.{choice}"] = {
                "value": float(value),
                "stderr": stderr,
                "ci": None if stderr is None else [value - Z95 * stderr, value + Z95 * stderr],
                "higher_is_better": results.get("higher_is_better", {}).get(task, {}).get(metric),
                "values": _values(samples, metric, choice),
            }
        if metrics:
            tasks[task] = {"samples": len({sample["doc_id"] for sample in samples}), "metrics": metrics}
    return tasks


def _values(samples: Sequence[Mapping[str, Any]], metric: str, choice: str) -> list[float] | None:
    values = [s.get(metric) for s in samples if s.get("filter", choice) == choice]
    if not values or not all(isinstance(value, (int, float)) for value in values):
        return None
    return [float(value) for value in values if value is not None]
