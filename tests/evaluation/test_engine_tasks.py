"""lm-eval's tasks with an engine's answers: the same figures as with lm-eval's own model.

The engine here is the program for transformers (``engines.transformers_script``) with a model in this process;
``tests/engines/test_real_engines.py`` has whole engines.
"""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval.models.huggingface")

from test_evaluation import TASK, make_model, make_task, make_text, make_tokenizer

from qkit.engines.process import EngineAnswer
from qkit.engines.transformers_script import continued, scores
from qkit.errors import BadInput, UsageError
from qkit.evaluation.harness import run_tasks, run_tasks_in_engine
from qkit.workflows.engine_eval import end_tokens, positions_of

GENERATION = """\
task: continue
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["river", "cat dog"], max_gen_toks: 12, do_sample: {draw}, temperature: {heat}}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
DOCUMENTS = """\
task: documents
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
"""


class Engine:
    """Answers as the program for transformers does."""

    def __init__(self, model) -> None:
        self.model, self.jobs = model, []

    def __call__(self, prompts, *, scored, new_tokens, stops=()) -> EngineAnswer:
        self.jobs.append([*prompts])
        stops = stops or [[]] * len(prompts)
        with torch.no_grad():
            rows = [scores(self.model, torch.tensor(ids), n) for ids, n in zip(prompts, scored, strict=True)]
            made = [
                continued(self.model, torch.tensor(ids), n, ends)
                for ids, n, ends in zip(prompts, new_tokens, stops, strict=True)
            ]
        return EngineAnswer(
            version="",
            device="",
            dtype="",
            logprobs=[row for row, _ in rows],
            best=[best for _, best in rows],
            tokens=made,
            seconds={},
        )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(folder: Path, task: str, rows: list[dict], **fields: object) -> Path:
    data = folder / f"{task.split()[1]}.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    data.with_suffix(".yaml").write_text(task.format(data=data, **fields))
    return folder


def both(tokenizer, folder: Path, tasks: list[str], positions: int) -> tuple[dict, dict, Engine]:
    engine = Engine(make_model(0))
    own = run_tasks(make_model(0), tokenizer, tasks, include_path=folder)
    return own, run_tasks_in_engine(engine, tokenizer, positions, (), tasks, include_path=folder), engine


def test_choices(tokenizer, tmp_path):
    folder = make_task(tmp_path / "tasks")
    write(folder, GENERATION, [{"text": "the", "answer": "a"}], draw="false", heat=0.0)
    own, found, engine = both(tokenizer, folder, ["my_task", "continue"], 128)
    assert own["my_task"]["metrics"]["acc"]["values"] == found["my_task"]["metrics"]["acc"]["values"]
    assert len(set(found["my_task"]["metrics"]["acc"]["values"])) == 2
    assert len(engine.jobs) == 2  # one run for each kind of request


def test_generated_answers(tokenizer, tmp_path):
    rows = [{"text": make_text(9, i), "answer": ""} for i in range(12)]
    rows = [row | {"answer": made} for row, made in zip(rows, answers(tokenizer, rows), strict=True)]
    assert {len(row["answer"].split()) for row in rows} > {12}  # some go on to the end, and some end before
    write(tmp_path, GENERATION, rows, draw="false", heat=0.0)
    own, found, _ = both(tokenizer, tmp_path, ["continue"], 128)
    values = [kind["continue"]["metrics"]["exact_match"]["values"] for kind in (own, found)]
    assert values[0] == values[1] and sum(values[0]) > 6  # blanks before the end make the others unequal


def answers(tokenizer, rows: list[dict]) -> list[str]:
    """What the model says, token by token, up to what ends it."""
    model, made = make_model(0), []
    for row in rows:
        ids = tokenizer(row["text"])["input_ids"]
        for _ in range(12):
            with torch.no_grad():
                ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        text = tokenizer.decode(ids[len(tokenizer(row["text"])["input_ids"]) :])
        for end in ("river", "cat dog", "[EOS]"):
            text = text.split(end)[0]
        made.append(text)
    return made


def test_documents_longer_than_the_model_sees(tokenizer, tmp_path):
    folder = write(tmp_path, DOCUMENTS, [{"text": make_text(n, n)} for n in (5, 127, 400)])
    # One position more than lm-eval's own model is told, since it does not feed the last token: the same windows.
    own, found, engine = both(tokenizer, folder, ["documents"], 129)
    figures = [kind["documents"]["metrics"]["word_perplexity"]["value"] for kind in (own, found)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-6)
    assert max(map(len, engine.jobs[0])) == 129
    _, _, engine = both(tokenizer, folder, ["documents"], 64)
    assert max(map(len, engine.jobs[0])) == 64


@pytest.mark.parametrize(
    ("draw", "heat", "positions", "words"),
    [("true", 0.8, 128, "draws its answers"), ("false", 0.0, 12, "wants 12 tokens, and the model can see 12")],
    ids=["drawn", "too long"],
)
def test_what_an_engine_is_not_asked(tokenizer, tmp_path, draw, heat, positions, words):
    folder = write(tmp_path, GENERATION, [{"text": "the", "answer": "a"}], draw=draw, heat=heat)
    with pytest.raises(BadInput, match=words):
        run_tasks_in_engine(Engine(make_model(0)), tokenizer, positions, (), ["continue"], include_path=folder)


def test_an_answer_that_is_too_long(tokenizer, tmp_path):
    write(tmp_path, TASK, [{"text": "the", "choices": [make_text(9, 0), "a"], "answer": 1}])
    with pytest.raises(BadInput, match="an answer has 9 tokens, and the model can see 8"):
        run_tasks_in_engine(Engine(make_model(0)), tokenizer, 8, (), ["my_task"], include_path=tmp_path)


def test_tasks_with_images_are_refused(tokenizer):
    with pytest.raises(UsageError, match="tasks with images are not measured in an engine"):
        run_tasks_in_engine(Engine(make_model(0)), tokenizer, 128, (), ["qkit_scenes"])


def test_what_a_folder_says_of_its_texts(tiny, tmp_path):
    model = tiny("llama")
    config = json.loads((model / "config.json").read_text())
    assert positions_of(model) == config["max_position_embeddings"]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    assert end_tokens(tmp_path) == {3, 7} and end_tokens(tmp_path / "nowhere") == set()
