"""The case that puts training-free methods side by side."""

import copy
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.cases import compare
from bench.pruning import prune
from bench.tiny import save_tiny
from bench.zeroshot import Question, accuracies, read_questions
from bench.zeroshot import _scores as compare_scores
from moeify import find_ffn_sites
from moeify.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def rows():
    methods = ("teal", "ffn sensitivity", "chess", "top-k activation", "d2dmoe", "moefication", "cfsp", "random", "oracle")
    return list(compare.run(quick=True, methods=methods, skip=(0.25, 0.5)))


def test_every_method_reaches_its_budget_and_costs_what_it_keeps(rows):
    dense, *others = rows
    assert dense["method"] == "dense" and dense["ratio"] == 1
    assert len(others) == 2 * 9
    for row in others:
        assert row["reached"] == pytest.approx(row["skip"], abs=0.12), row
        assert row["ratio"] > 0.9 and row["kl"] > 0 and 0 < row["top1"] < 1, row
        assert row["block_weights"] > 0.4 and row["bytes"] > 0.4 and row["flops"] > 0.4, row  # no more than half is skipped
    teal = [row for row in others if row["method"] == "teal"]
    assert [row["block_weights"] for row in teal] == pytest.approx([1 - row["reached"] for row in teal], abs=0.01)
    ffn = [row for row in others if row["method"] == "ffn sensitivity"]
    assert all(row["block_weights"] > 1 - row["reached"] + 0.05 for row in ffn)  # attention stays whole
    chess = [row for row in others if row["method"] == "chess"]
    ffn_share = 3 * 48 / (3 * 48 + 2 * 32 + 2 * 16)  # of the tiny Llama's block
    assert [row["block_weights"] for row in chess] == pytest.approx([1 - 2 / 3 * ffn_share * row["reached"] for row in chess], abs=1e-3)
    cfsp = [row for row in others if row["method"] == "cfsp"]
    assert [row["block_weights"] for row in cfsp] == pytest.approx([1 - ffn_share * row["reached"] for row in cfsp], abs=1e-3)
    assert all(row["speed"] > 0 for row in rows)


def test_skipping_more_loses_more_and_the_oracle_beats_chance(rows):
    kl = {(row["method"], row["skip"]): row["kl"] for row in rows[1:]}
    assert all(kl[name, 0.25] < kl[name, 0.5] for name, _ in kl)
    assert kl["oracle", 0.5] < kl["random", 0.5]


def test_questions_plot_and_table_are_there_and_earlier_rows_are_not_measured_again(tmp_path, monkeypatch):
    questions = [{"query": "Question: one?", "choices": ["yes", "no"], "gold": i % 2} for i in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(questions), tmp_path / "task.parquet")
    options = {"quick": True, "methods": ("teal", "cfsp"), "skip": (0.25, 0.5), "zeroshot": tmp_path, "zeroshot_skip": (0.5,), "rounds": 0}
    rows = list(compare.run(**options, plot=tmp_path / "compare.png", table=tmp_path / "table.md"))
    assert (tmp_path / "compare.png").stat().st_size > 1000
    assert {row["skip"] for row in rows if "zeroshot" in row} == {0.0, 0.5}
    assert all(row["tasks"]["task"] == row["zeroshot"] == 0.5 for row in rows if "zeroshot" in row)  # one answer to all: half are right
    head, _, *lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == len(rows) == 5
    assert all(line.count("|") == head.count("|") for line in lines)
    assert "speed" not in rows[1] and "tokens/s" not in head

    done = tmp_path / "rows.jsonl"
    done.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    monkeypatch.setattr(compare, "thin_model", None)  # teal's rows are there
    again = list(compare.run(**options, done=done))
    assert [(row["method"], row["skip"]) for row in again] == [(row["method"], row["skip"]) for row in rows]
    assert [row["ratio"] for row in again] == pytest.approx([row["ratio"] for row in rows])
    with pytest.raises(ConfigError, match="was measured with split 'all', and this is 'test'"):
        list(compare.run(**options, done=done, split="test"))


def test_scores_of_choices_are_log_probabilities_of_what_follows_the_question(tmp_path):
    from moeify.hf.load import load_model

    model, tokenizer = load_model(save_tiny(tmp_path / "dense"), dtype=torch.float32)
    pairs = (("ab", " cd"), ("abc", " d"))
    found = list(compare_scores(model, tokenizer, Question(pairs, 0)))
    for score, (context, text) in zip(found, pairs, strict=True):
        ids = torch.tensor(tokenizer(context + text, add_special_tokens=False)["input_ids"])
        rows = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        expected = sum(rows[i - 1, ids[i]].item() for i in range(start, len(ids))) / len(text)
        assert score == pytest.approx(expected, rel=1e-4)
    best = max(range(2), key=found.__getitem__)
    assert accuracies(model, tokenizer, {"a": [Question(pairs, best)], "b": [Question(pairs, 1 - best)]}) == {"a": 1.0, "b": 0.0}


def test_files_of_all_known_columns_are_read_and_others_refused(tmp_path):
    rows = {
        "arc": {"query": "Question: why?", "choices": ["so", "not"], "gold": 1},
        "hellaswag": {"ind": 0, "ctx": "He ", "endings": ["sat", "ran"], "label": 0},
        "winogrande": {"context_options": ["A so A", "A so B"], "continuation": "left.", "gold": 1},
    }
    for name, row in rows.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), tmp_path / f"{name}.parquet")
    found = read_questions(tmp_path, most=2)
    assert {name: len(questions) for name, questions in found.items()} == {"arc": 2, "hellaswag": 2, "winogrande": 2}
    assert found["arc"][0] == Question((("Question: why?\nAnswer:", " so"), ("Question: why?\nAnswer:", " not")), 1)
    assert found["hellaswag"][0] == Question((("He", " sat"), ("He", " ran")), 0)
    assert found["winogrande"][0] == Question((("A so A", " left."), ("A so B", " left.")), 1)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}]), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="none of the known formats"):
        read_questions(tmp_path, most=1)
    with pytest.raises(DataError, match=r"no \.parquet file"):
        read_questions(tmp_path / "none", most=1)


@pytest.mark.parametrize("score", ["activation", "weights"])
def test_pruned_neurons_are_those_that_matter_least_and_come_back(tmp_path, score):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "dense"))
    batch = {"input_ids": torch.arange(64)[None]}
    sites = find_ffn_sites(model, batch)
    with torch.no_grad():
        for site in sites:
            model.get_submodule(site.up).weight[10:] *= 1e-4  # these neurons say nothing
        before, dense = model(**batch).logits, copy.deepcopy(model.state_dict())
        pruned = prune(model, sites, [batch], keep_frac=0.5, score=score)
        assert pruned.neurons == [48, 96]
        for site in sites:
            kept = model.get_submodule(site.up).weight
            assert model.get_submodule(site.down).weight.shape == (32, kept.shape[0]) and kept.shape[0] < 48
            assert (kept.norm(dim=1) > 1e-2).sum() == 10
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-2, atol=1e-2)
        pruned.undo()
        assert torch.equal(model(**batch).logits, before)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_unknown_methods_and_shares_are_refused():
    with pytest.raises(ConfigError, match="--methods: unknown name 'teel'"):
        list(compare.run(quick=True, methods=("teel",)))
    with pytest.raises(ConfigError, match="takes multiples of"):
        list(compare.run(quick=True, skip=(0.33,)))
