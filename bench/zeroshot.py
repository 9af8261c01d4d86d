"""Multiple-choice questions from parquet files, answered by a language model without examples.

A choice's score is the log-probability of its text after the question's over its bytes; the best score is the answer. Files have the
columns query, choices, gold (ARC, BoolQ, COPA, OpenBookQA, PIQA), ctx, endings, label (HellaSwag), or context_options, continuation, gold
(WinoGrande, where the contexts differ and the continuation is scored).
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import nn

from moeify.errors import DataError


@dataclass(frozen=True)
class Question:
    """Texts of which one is right."""

    pairs: tuple[tuple[str, str], ...]
    """(context, continuation) of each choice."""
    gold: int


def read_questions(folder: Path, *, most: int, seed: int = 0) -> dict[str, list[Question]]:
    """Questions by the file's name.

    Args:
        folder: with ``.parquet`` files.
        most: questions of each, drawn evenly.
        seed: of the draw.

    Raises:
        DataError: no file, or one of unknown columns.
    """
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise DataError(f"there is no .parquet file in '{folder}'; give a folder of multiple-choice questions.")
    found = {}
    for path in paths:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        draw = random.Random(seed).sample(range(len(rows)), min(most, len(rows)))
        found[path.stem] = [_question(rows[i], path) for i in draw]
    return found


@torch.no_grad()
def accuracies(model: nn.Module, tokenizer: Any, tasks: Mapping[str, Sequence[Question]]) -> dict[str, float]:
    """Share of right answers of each task, in [0, 1]. The choices of a question are one batch."""
    return {name: sum(_is_right(model, tokenizer, q) for q in questions) / len(questions) for name, questions in tasks.items()}


def _question(row: Mapping[str, Any], path: Path) -> Question:
    if {"query", "choices", "gold"} <= row.keys():
        context = row["query"].rstrip()
        if context.startswith("Question:") or "\nQuestion:" in context:
            context += "\nAnswer:"
        return Question(tuple((context, " " + choice.strip()) for choice in row["choices"]), int(row["gold"]))
    if {"ctx", "endings", "label"} <= row.keys():
        return Question(tuple((row["ctx"].rstrip(), " " + ending.strip()) for ending in row["endings"]), int(row["label"]))
    if {"context_options", "continuation", "gold"} <= row.keys():
        continuation = " " + row["continuation"].strip()
        return Question(tuple((context.rstrip(), continuation) for context in row["context_options"]), int(row["gold"]))
    raise DataError(f"'{path}' has the columns {', '.join(row)}, which are none of the known formats.")


def _is_right(model: nn.Module, tokenizer: Any, question: Question) -> bool:
    scores = list(_scores(model, tokenizer, question))
    return scores.index(max(scores)) == question.gold


def _scores(model: nn.Module, tokenizer: Any, question: Question) -> Iterator[float]:
    whole = [tokenizer(context + text, add_special_tokens=False)["input_ids"] for context, text in question.pairs]
    starts = [len(tokenizer(context, add_special_tokens=False)["input_ids"]) for context, _ in question.pairs]
    longest = max(map(len, whole))
    ids_BS = torch.tensor([ids + [0] * (longest - len(ids)) for ids in whole])  # on the right of a causal model: seen by nothing
    logits_BSV = model(input_ids=ids_BS).logits
    for i, (ids, start, (_, text)) in enumerate(zip(whole, starts, question.pairs, strict=True)):
        logits_SV = logits_BSV[i, start - 1 : len(ids) - 1].float()
        loss = nn.functional.cross_entropy(logits_SV, ids_BS[i, start : len(ids)], reduction="sum")
        yield -loss.item() / len(text.encode())
