"""lm-evaluation-harness on tasks from files: what is read, what is refused, and that its results are the model's."""

import json
import os

import pytest
import torch
from tiny import byte_tokenizer, save_converted_tiny

import moeify
from moeify.errors import ConfigError, DataError
from moeify.pipeline import harness
from moeify.pipeline.harness import evaluate_checkpoint, find_tasks, task_config
from moeify.select import TopK

QUESTIONS = [
    {"query": "Question: which?", "choices": ["left ", "right"], "gold": 0},
    {"query": "It rained, so ", "choices": ["she ran", "he swam", "they sat"], "gold": 2},
    {"query": "One two", "choices": ["three", "four"], "gold": 0},
]
CONTEXTS = [{"context_options": ["The cat so the cat", "The dog so the dog"], "continuation": "slept.", "gold": 1}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def best(model, pairs):
    """The index of the likeliest continuation."""
    tokenizer, scores = byte_tokenizer(), []
    for context, text in pairs:
        start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + text, return_tensors="pt")["input_ids"]
        log_probs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        scores.append(log_probs.gather(1, ids[0, start:, None]).sum().item())
    return scores.index(max(scores))


def test_results_are_the_models_with_their_cost_and_dense_beside(tmp_path):
    pytest.importorskip("lm_eval")
    folder = save_converted_tiny(tmp_path / "moe", rule=TopK(k=2))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write(tasks / "mc.jsonl", QUESTIONS)
    write(tasks / "contexts.jsonl", CONTEXTS)
    write(tmp_path / "text.jsonl", [{"text": "abc def"}])
    (tasks / "_base.yaml").write_text("output_type: multiple_choice\ntest_split: test\ndataset_path: json\n")
    (tasks / "own.yaml").write_text(
        "include: _base.yaml\ntask: own\ndataset_kwargs: {data_files: {test: mc.jsonl}}\ndoc_to_text: query\n"
        "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    out = tmp_path / "result.json"
    before = os.environ.get("HF_HUB_OFFLINE")
    record = evaluate_checkpoint(folder, tasks=[str(tasks)], dense=True, out=out)
    assert json.loads(out.read_text()) == record
    assert os.environ.get("HF_HUB_OFFLINE") == before

    model, _ = moeify.load_model(folder)
    for mode in ("moe", "dense"):
        moeify.set_mode(model, mode)
        texts = [q["query"].rstrip() + ("\nAnswer:" if q["query"].startswith("Question:") else "") for q in QUESTIONS]
        pairs = [[(text, " " + choice.strip()) for choice in q["choices"]] for text, q in zip(texts, QUESTIONS, strict=True)]
        right = [best(model, p) == q["gold"] for p, q in zip(pairs, QUESTIONS, strict=True)]
        found = record["results"][mode]
        assert found["mc"]["acc"] == pytest.approx(sum(right) / 3)
        assert found["mc"]["examples"] == found["own"]["examples"] == 3
        context = best(model, [(option, " slept.") for option in CONTEXTS[0]["context_options"]])
        assert found["contexts"]["acc"] == float(context == 1)
    assert record["cost"]["active_fraction"] == pytest.approx(2 / 6), "two of six experts, and the dense pass is not counted"
    assert 0 < record["cost"]["ffn_flops_fraction"] < 0.6
    assert record["cost"]["params_fraction"] > 1
    assert set(record["tasks"]) == {"mc", "contexts", "own"}

    # A template that would reach Python through a string: the sandbox stops it, and trust lets it through.
    (tasks / "escape.yaml").write_text(
        (tasks / "own.yaml").read_text().replace("doc_to_text: query", "doc_to_text: '{{query.__class__.__mro__}}'")
    )
    with pytest.raises(DataError, match="the tasks cannot be run: SecurityError: access to attribute '__class__'"):
        evaluate_checkpoint(folder, tasks=[str(tasks / "escape.yaml")])
    with pytest.raises(ConfigError, match="two tasks named 'own'"):
        evaluate_checkpoint(folder, tasks=[str(tasks / "own.yaml"), str(tasks / "escape.yaml")])


def test_a_folder_is_its_files_and_anything_else_a_name(tmp_path):
    for name in ("b.jsonl", "a.yaml", "_shared.yaml", "notes.txt"):
        (tmp_path / name).write_text("{}")
    files, names = find_tasks([str(tmp_path), "arc_easy", " "])
    assert [f.name for f in files] == ["a.yaml", "b.jsonl"]
    assert names == ["arc_easy"]
    for tasks, error, message in (
        ([" "], ConfigError, "names no task"),
        ([str(tmp_path / "none.yaml")], DataError, "no file of tasks"),
        ([str(tmp_path / "notes.txt")], DataError, "no file of tasks"),
    ):
        with pytest.raises(error, match=message):
            find_tasks(tasks)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"text": 1}', "has the columns text; questions have one of: "),
        ("x.jsonl", "no", "its first line is not JSON"),
        ("x.jsonl", "[1]", "its first line is not a JSON object"),
        ("x.yaml", "task: x\nprocess_docs: !function os.getcwd", r"runs Python code \(!function os.getcwd\); --trust-tasks"),
        ("x.yaml", "task: x\ny: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("x.yaml", "group: x\ntask: [a, b]", "is not the configuration of one task"),
        ("x.yaml", "include: x.yaml", "includes itself"),
        ("x.yaml", "- 1", "is not the configuration of a task"),
        ("x.parquet", "no", "is not a parquet file"),
    ],
)
def test_files_that_are_no_tasks_are_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        task_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metric_list: [{metric: METRIC}]", "the metric '.*evil.py' is not lm-eval's own"),
        ("metric_list: [{metric: [METRIC]}]", "the metric .* is not lm-eval's own"),
        ("metric_list: [{aggregation: mean}]", "the metric 'None' is not lm-eval's own"),
        ("metric_list: {metric: METRIC}", "metric_list is no list of metrics"),
        ("metric_list: [{metric: acc, aggregation: METRIC}]", "the aggregation '.*evil.py' is not lm-eval's own"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "a metric has the key 'hf_evaluate'"),
        ("dataset_path: pandas", "dataset_path 'pandas' is none of json, parquet, csv, text"),
        ("dataset_path: ./folder", "dataset_path './folder' is none of json, parquet, csv, text"),
        ("dataset_path: [json]", "dataset_path .* is none of json, parquet, csv, text"),
        ("dataset_kwargs: {trust_remote_code: true}", "dataset_kwargs have other keys than data_files, split, name"),
        ("dataset_kwargs: {data_files: {test: ['https://example.com/x']}}", "its data is at the address 'https://example.com/x'"),
        ("dataset_kwargs: {data_files: 'zip::a.zip'}", "its data is at the address 'zip::a.zip'"),
        ("class: os.getcwd", "it has the key 'class'"),
        ("use_prompt: 'other.yaml:x'", "it has the key 'use_prompt'"),
    ],
)
def test_what_can_run_code_is_refused_unless_trusted(tmp_path, text, message):
    pytest.importorskip("lm_eval")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    path = tmp_path / "x.yaml"
    path.write_text("task: x\n" + text.replace("METRIC", str(tmp_path / "evil.py")))
    with pytest.raises(DataError, match=f"{message}, which can run code; --trust-tasks"):
        task_config(path)
    assert task_config(path, trust=True)["task"] == "x"
    (tmp_path / "outer.yaml").write_text("include: x.yaml\ntask: y")
    with pytest.raises(DataError, match="which can run code"):
        task_config(tmp_path / "outer.yaml")


def test_old_datasets_which_run_scripts_are_refused(monkeypatch):
    monkeypatch.setattr(harness.importlib.metadata, "version", lambda _name: "3.6.0")
    with pytest.raises(moeify.MoeifyError, match=r"datasets 3.6.0 can run scripts of data sets; pip install 'datasets>=4'"):
        harness._check_datasets()


def test_a_function_hidden_in_an_included_file_is_refused_too(tmp_path):
    (tmp_path / "base.yaml").write_text("process_docs: !function os.getcwd")
    (tmp_path / "x.yaml").write_text("include: base.yaml\ntask: x")
    with pytest.raises(DataError, match=r"base.yaml' runs Python code"):
        task_config(tmp_path / "x.yaml")


def test_without_the_extra_the_error_names_it(monkeypatch):
    def missing(_name):
        raise ImportError("No module named 'lm_eval'")

    monkeypatch.setattr(harness.importlib, "import_module", missing)
    with pytest.raises(moeify.MoeifyError, match=r"pip install 'moeify\[eval\]'"):
        harness._check_installed()
