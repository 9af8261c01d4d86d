"""``docs/paper.md`` from the figures' JSON files: settings, every claim with its verdict, what does not hold first; pictures, numbers."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from moeify.errors import DataError
from moeify.pipeline.stages import write_json

from .claims import values_at
from .figures import FIGURES, read_figure, stated
from .measure import is_measured, series
from .recipes import HERE
from .wording import spread

BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9)
"""Columns of a figure's table, fractions of the dense FLOPs."""
_SHARED = ("code", "seeds", "smoke", "device", "moeify")
_WORDS = {False: "**does not hold**", None: "cannot be told", True: "holds"}
_AXES = {
    "ffn": "share of the dense FLOPs of the FFNs, routers included",
    "all": "share of the dense FLOPs of the whole model, routers included",
    "authors_ffn": "share of the dense FLOPs of the FFNs as the authors count",
    "authors_all": "share of the dense FLOPs of the whole model as the authors count",
}

_NAMES = {"gpt": "GPT", "bert": "BERT", "vit": "ViT"}
_WHOLE = (
    "The FLOPs are of the whole model, over the dense one's in which nothing was replaced. Early exit has a head after each block but the"
    " last; it reads as many examples for them as the others do for their training, on top of the dense model's own."
)

_PROJECTIONS = (
    "Thresholds as in figure 11. A projection's MLP has 192 neurons in experts of 4, the FFN 1536 in experts of 6. At tau = 0.001 both run"
    " next to all of their experts, so that little is left there to vary, or to compare."
    " The paper's sentence on the variance of projections is garbled in the text that"
    " we have; we read that it is higher than in FFNs."
)

NOTES: dict[str, str] = {
    "3": "Counted on the trained models before any conversion, on the first 8192 tokens of validation.",
    "5": "What SADMoE loses near full cost is what its training gave for sparse activations: MoEfication starts from a model that was"
    " trained for as many steps without the penalty.",
    "6": _WHOLE + " A point of accuracy is ten texts of a thousand, and a seed's standard error is 0.8 points: where a flat curve crosses"
    " such a limit differs from seed to seed as the claim says. On seed 0, while projections still took four fifths of the penalty's weight"
    " from the FFNs beside them, twice the weight moved the ratio of costs from 0.53 to 0.57; with three times the weight the full method"
    " never was within the point, 0.910 at 64 % of the FLOPs where 0.915 is asked for (docs/log)."
    " The first suspect for what is missing is the training under the penalty, 300 steps, which have not won back at full cost"
    " what the penalty takes; longer runs were not made.",
    "7": _WHOLE
    + " Fashion-MNIST's classes are told apart after the first of four blocks, so that early exit loses little at a third of the"
    " FLOPs; the paper's ImageNet does not allow that. Nor is the model trained to its end: the dense one was 1.7 points above its first"
    " exit after 800 steps of pre-training and 2.2 after 1600 (docs/log), so what later blocks are worth was still growing. Between 60 and"
    " 70 % of the FLOPs all methods are at the dense model's accuracy.",
    "8": "The paper's step to dynamic k has smaller experts in it; here they are a step of their own, split by co-activation and not by"
    " k-means. Steps are compared at the budgets that both reach, so what a step gains by reaching lower ones is not in its number."
    " Changes of a few tenths of a point are what the seeds differ by; of the steps that do not gain, dynamic k loses 0.2 points, and"
    " enforcement 0.5 with a deviation of 1.2, both with MoEfication's experts of 32 neurons. On half of MoEfication's FLOPs see figure 6.",
    "9": "Sparsified GELU pushes pre-activations below -2.5, the paper's below -10; at that square-Hoyer hardly pulls (docs/log). In 250"
    " steps GELU does not win back what the penalty takes: before conversion its loss is 0.017 above that of GELU without the penalty, the"
    " sparsified ReLU's 0.007 above that of ReLU. MiniLM, trained on emotion for three epochs, has the paper's order: sparsified GELU keeps"
    " up with sparsified ReLU down to 25 to 30 % of the FLOPs, and plain GELU falls off first (docs/log).",
    "10": "The authors' counter adds D multiply-adds for every executed expert, half an expert of one neuron; a product that adds experts"
    " up as it goes has none of them. So their curve of size 1 is dearer than ours: nine tenths of what experts of one neuron are behind by"
    " in their accounting is the accounting. By ours, sizes 2 and 4 differ by less than the seeds do. Routers cost 10 % of the dense FFNs"
    " at size 1, 6 % at 2, 4 % at 4 and 3 % at 8, computed, and are in both ways to count.",
    "11": "Thresholds are shares of a token's largest predicted norm; a smaller tau executes more: at 0.001 only an expert that is"
    " predicted a thousand times smaller than the largest is left out. Base is ReLU without enforcement. Why shallow layers execute"
    " more here we have not found; MiniLM has six layers of 384 and reads short texts, the paper's BERT twelve of 768.",
    "12": "MoEfication's loss is lower than without the penalty at the smallest weight alone; above it both its loss and the seeds'"
    " deviation grow. The same trained models, converted as SADMoE, gain with every weight: what differs is the conversion alone"
    " (MoEfication's has experts of 32 neurons, its classifier, as many experts for every token)."
    " Which part of it, this figure does not tell apart.",
    "13": "As figure 10. The accounting is half of what experts of one neuron are behind by in the authors' way to count; by ours, too,"
    " they are behind by more than the seeds differ. Experts of 2 neurons are behind those of 4 in both; their routers cost 6 % and 4 %"
    " of the dense FFNs, computed.",
    "14": "Computed, not measured.",
    "15": _PROJECTIONS,
    "16": _PROJECTIONS,
    "17": _PROJECTIONS,
    "18": _PROJECTIONS,
}
"""What a reader of a figure has to know, where ours differs from the paper's; reasons of claims that do not hold belong here, too."""


def write_page(page: Path, folder: Path) -> None:
    """Write the page about the figures in a folder. Figures that do not lie below the page are copied into ``<page>/``, the page's name
    without its ending: the page can go where it belongs, and be checked there.

    Raises:
        DataError: as `page_text`, or it cannot be written.
    """
    figures, beside = read_figures(folder), _beside(page, folder)
    text = page_text(figures, pictures=_link(beside, page), readme=_readme(page))
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            name = f"fig{figure['figure']}"
            write_json(beside / f"{name}.json", figure)  # with what is claimed now
            if beside.resolve() != folder.resolve():
                shutil.copyfile(folder / f"{name}.svg", beside / f"{name}.svg")
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write '{error.filename or page}': {error.strerror}.") from None


def check_page(page: Path, folder: Path) -> None:
    """Refuse a page that is not what the figures in a folder give.

    Raises:
        DataError: it is not, or as `page_text`.
    """
    text = page_text(read_figures(folder), pictures=_link(_beside(page, folder), page), readme=_readme(page))
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        raise DataError(
            f"'{page}' is not what the figures in '{folder}' give; write it: python -m bench.paper --out {folder} --page {page}"
        )


def read_figures(folder: Path) -> list[dict[str, Any]]:
    """The figures in a folder, in the paper's order; what is claimed of their numbers is asked anew, whenever these were measured."""
    paths = {number: folder / f"fig{number}.json" for number in FIGURES}
    return [_judged(number, read_figure(path)) for number, path in paths.items() if path.exists()]


def _judged(number: str, figure: dict[str, Any]) -> dict[str, Any]:
    return {**figure, "caption": FIGURES[number].caption, "claims": stated(FIGURES[number], figure["data"])}


def page_text(figures: Sequence[Mapping[str, Any]], *, pictures: str, readme: str = "bench/paper/README.md") -> str:
    """The page.

    Args:
        figures: what `read_figures` returned.
        pictures: folder of the pictures as the page links to it.
        readme: that of this folder, as the page names or links to it.

    Raises:
        DataError: no figure, or figures of different settings: they do not belong on one page.
    """
    if not figures:
        raise DataError("there is no figure to write about; python -m bench.paper --figure N makes one.")
    check_same_suite(figures)
    first = figures[0]["settings"]
    lines = ["# The paper's figures, drawn again", ""]
    lines += ["Generated by `python -m bench.paper --page`; do not edit.", ""]
    if first["smoke"]:
        lines += ["**Of a smoke run: tiny models and a handful of steps. It shows that figures are made, not what they show.**", ""]
    lines += [
        "SADMoE (Szatkowski et al., arXiv 2310.04361) trains a model to have sparse activations, splits its FFNs into experts and runs for"
        " each token those whose predicted output is large. MoEfication runs the same number of experts for every token; early exit (ZTW)"
        " leaves out whole blocks. Below, each figure of the paper is measured again on small models, and each of its claims is held"
        " against the numbers, by our way to count FLOPs and by the authors', who add D multiply-adds for every executed expert. What is"
        f" trained and how, and what it costs to run: {readme}.",
        "",
    ]
    lines += [_about(figures), ""]
    rows = [(figure["figure"], claim) for figure in figures for claim in figure["claims"]]
    counts = {holds: sum(claim["holds"] is holds for _, claim in rows) for holds in _WORDS}
    told = f", {counts[None]} cannot be told" if counts[None] else ""
    lines += [f"## Claims: {counts[True]} of {len(rows)} hold, {counts[False]} do not{told}", ""]
    lines += ["What does not hold comes first. A claim is judged by the means over the seeds; ± is the seeds' standard deviation.", ""]
    lines += ["| figure | claim | | found |", "|---|---|---|---|"]
    for holds, word in _WORDS.items():
        lines += [f"| {number} | {c['claim']} | {word} | {c['sentence']} |" for number, c in rows if c["holds"] is holds]
    missing = [number for number in FIGURES if number not in {figure["figure"] for figure in figures}]
    if missing:
        lines += ["", f"Not made: figures {', '.join(missing)}."]
    for figure in figures:
        number = figure["figure"]
        lines += ["", f"## Figure {number}", "", figure["caption"], "", f"![Figure {number}]({pictures}fig{number}.svg)"]
        if number in NOTES:
            lines += ["", NOTES[number]]
        if "curves" in figure["data"]:
            lines += ["", *_tables(figure["data"])]
    return "\n".join(lines) + "\n"


def check_same_suite(figures: Sequence[Mapping[str, Any]]) -> None:
    """Refuse figures whose numbers do not belong together: of other seeds, sizes, code, or other base models and data.

    Raises:
        DataError: names two such figures and what differs.
    """
    first = figures[0]
    by_model: dict[str, Mapping[str, Any]] = {}
    for figure in figures:
        for key in _SHARED:
            if figure["settings"][key] != first["settings"][key]:
                raise DataError(_differ(first, figure, key))
        if (model := figure["model"]) is not None:
            other = by_model.setdefault(model, figure)
            if _base(figure) != _base(other):
                raise DataError(_differ(other, figure, f"{model}'s training or data"))


def _base(figure: Mapping[str, Any]) -> dict[str, Any]:
    """What all figures of a model share, whatever methods they compare."""
    settings = figure["settings"]
    experiment = {key: value for key, value in settings["experiment"].items() if key not in ("variant", "ztw")}
    return {"pretraining": settings["pretraining"], "experiment": experiment, "library": settings.get("library")}


def _differ(one: Mapping[str, Any], other: Mapping[str, Any], what: str) -> str:
    return f"figures {one['figure']} and {other['figure']} are of different settings ({what}); make both again with the same --out."


def _about(figures: Sequence[Mapping[str, Any]]) -> str:
    settings = figures[0]["settings"]
    commits = sorted({str(figure["commit"])[:12] for figure in figures})
    seeds = ", ".join(map(str, settings["seeds"]))
    versions = figures[0]["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    models = {f["model"]: f["settings"] for f in figures if f["model"] is not None}
    codes = sorted({code for settings_of in models.values() for code in settings_of.get("library", ())})
    kept = f" Stages are of {len(codes)} versions of the library's code ({', '.join(codes)})." if len(codes) > 1 else ""
    steps = ", ".join(
        f"{_NAMES[name]} {of['pretraining']['train']['steps']} and {of['experiment']['train']['steps']}" for name, of in models.items()
    )
    trained = f" Steps of pre-training and of every method: {steps}." if steps else ""
    spread_told = f"Means over seeds {seeds}, ± their standard deviation" if len(settings["seeds"]) > 1 else f"One seed, {seeds}"
    return (
        f"{spread_told}; device {settings['device']}; commit {', '.join(commits)}; {libraries}.{trained}{kept}"
        " Every method is trained for the same tokens from the same pre-trained model of its seed."
    )


def _tables(data: Mapping[str, Any]) -> list[str]:
    """Qualities at budgets of the FFNs' FLOPs, or of all FLOPs where a method has others than the FFNs', by both ways to count."""
    axis = "ffn" if {"full", "ztw"}.isdisjoint(data["curves"]) else "all"
    if not is_measured(data, f"authors_{axis}"):
        return [*_table(data, axis), "", f"By {_AXES[f'authors_{axis}']}: not measured."]
    return [*_table(data, axis), "", *_table(data, f"authors_{axis}")]


def _table(data: Mapping[str, Any], axis: str) -> list[str]:
    better = "loss in nats, lower is better" if data["y"] == "loss" else f"{data['y']}, higher is better"
    lines = [f"By {_AXES[axis]} ({better}; dense {_cell(data['dense'])}):", ""]
    lines += ["| |" + "".join(f" {100 * budget:g} % |" for budget in BUDGETS), "|---|" + "---|" * len(BUDGETS)]
    for name, curve in data["curves"].items():
        found = (values_at(series(data, name, axis), budget) for budget in BUDGETS)
        lines.append(f"| {curve['label']} | " + " | ".join("" if values is None else _cell(values) for values in found) + " |")
    return lines


def _cell(values: Sequence[float]) -> str:
    """Mean over the seeds, with their deviation where there are several."""
    return f"{fmean(values):.4f}" + (f" ± {spread(values):.4f}" if len(values) > 1 else "")


def _beside(page: Path, folder: Path) -> Path:
    """Where the page's figures lie: the folder itself if it is the page's or below that, else one of the page's own."""
    return folder if folder.resolve().is_relative_to(page.resolve().parent) else page.with_suffix("")


def _link(folder: Path, page: Path) -> str:
    path = Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()
    return "" if path == "." else f"{path}/"


def _readme(page: Path) -> str:
    """A link within the repository, a name outside of it."""
    if not page.resolve().is_relative_to(HERE.parent.parent):
        return "bench/paper/README.md"
    return f"[bench/paper]({Path(os.path.relpath(HERE / 'README.md', page.resolve().parent)).as_posix()})"
