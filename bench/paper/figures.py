"""The figures of the paper by number: what each measures, draws and claims, and the JSON file that all of it is kept in."""

import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from moeify import find_ffn_sites
from moeify._config import to_dict
from moeify.errors import DataError
from moeify.evaluate import executed_experts, nonzero_activations, rules_at
from moeify.hf.inputs import example_inputs
from moeify.hf.load import load_model, read_manifest
from moeify.hf.save import library_versions
from moeify.pipeline.inputs import evaluation_batches, take_tokens, tokens_per_image
from moeify.pipeline.names import torch_device
from moeify.pipeline.results import source_commit
from moeify.pipeline.stages import differences, key_of, write_json
from moeify.select import DynKMax

from . import judge
from .accounting import cost_ratio
from .claims import Verdict
from .draw import draw_curves, draw_histograms, draw_ratios
from .measure import Finished, Run, distance, measured_curves, run_experiment
from .recipes import NEEDS, WEIGHTS, Curve, code_version, drawing_version, experiment, identity, pretraining

SCHEMA = 1
"""Version of a figure's JSON file."""
TAUS = (0.1, 0.01, 0.001)
"""Thresholds of the heat maps, shares of a token's largest predicted norm."""
SIZES = (1, 2, 4, 8, 16, 32)
"""Neurons of an expert in figures 10 and 13."""
_HISTOGRAM_TOKENS = 8192

SADMOE = Curve(name="sadmoe", label="SADMoE", training="relu_hoyer")
MOEFICATION = Curve(name="baseline", label="MoEfication", training="relu", moefication=True)
FULL = Curve(name="full", label="SADMoE with projections", training="full")
_RELU = Curve(name="relu", label="ReLU", training="relu")
_SPARSIFIED = replace(SADMOE, label="ReLU, sparsified")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure."""

    number: str
    """Of the paper."""
    caption: str
    """What it shows, in our words."""
    model: str | None
    """Whose recipes it takes, a key of `NEEDS`; None computes."""
    curves: Callable[[bool], tuple[Curve, ...]]
    """What is trained and converted for it; of a smoke run, less."""
    measure: Callable[["Figure", Run], dict[str, Any]]
    """JSON values that all else follows from."""
    draw: Callable[..., None]
    """``draw(data, paths, title=...)``."""
    claim: Callable[[Mapping[str, Any]], list[Verdict]]
    """The paper's claims of the data."""
    ztw: bool = False
    """Whether early exit is beside the curves."""
    last_stage: str = "sweep"
    """Of `moeify.pipeline.run_recipe.STAGES`, the last that is run for it."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Inputs without which it cannot be made."""
        return NEEDS[self.model] if self.model is not None else ()

    def settings(self, run: Run) -> dict[str, Any]:
        """All that decides its numbers, as JSON values; files by their content."""
        made: dict[str, Any] = {}
        if self.model is not None:
            made["library"] = list(run.library)
            size = {"smoke": run.smoke, "large": run.large}
            made["pretraining"] = identity(pretraining(self.model, run.inputs, **size))
            made["experiment"] = identity(experiment(self.model, self.curves(run.smoke), run.inputs, **size, ztw=self.ztw))
        return {
            "figure": self.number,
            "schema": SCHEMA,
            "code": code_version(),
            "moeify": importlib.metadata.version("moeify"),
            "seeds": list(run.seeds),
            "smoke": run.smoke,
            "device": torch_device(run.device).type,
            **made,
        }


def make_figure(figure: Figure, run: Run) -> dict[str, Any]:
    """Measure a figure, or take its numbers from its file where they are of the same settings; draw it; state what its claims come to.

    Returns:
        What ``fig<number>.json`` holds, and the paths of all "files".

    Raises:
        MoeifyError: whatever a stage refuses; what was finished before stays.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    path = run.out / f"fig{figure.number}.json"
    settings = figure.settings(run)
    fingerprint = key_of(settings)
    earlier = read_figure(path) if path.exists() else None
    if earlier is not None and earlier.get("fingerprint") != fingerprint:
        changes = "; ".join(differences(earlier.get("settings"), settings)[:3])
        run.say(f"figure {figure.number}: '{path}' is of other settings ({changes}) and is not used; it is measured again.")
        earlier = None
    result = earlier or {
        "schema": SCHEMA,
        "figure": figure.number,
        "model": figure.model,
        "fingerprint": fingerprint,
        "settings": settings,
        "commit": source_commit(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **library_versions()},
        **figure.measure(figure, run),
    }
    # claims, their wording and drawing are no part of the fingerprint: they follow from the numbers
    pictures = [path.with_suffix(".png"), path.with_suffix(".svg")]
    is_drawn = earlier is not None and earlier.get("drawn") == drawing_version() and all(picture.exists() for picture in pictures)
    result = {
        **result,
        "drawn": drawing_version(),
        "caption": figure.caption,
        "claims": stated(figure, result["data"]),
    }
    if not is_drawn:
        write_json(path, {**result, "drawn": None})  # numbers first: they are what takes hours
        figure.draw(result["data"], pictures, title=f"Figure {figure.number}" + (" (smoke run)" if run.smoke else ""))
    write_json(path, result)
    return {**result, "files": {"json": str(path), "png": str(pictures[0]), "svg": str(pictures[1])}}


def read_figure(path: Path) -> dict[str, Any]:
    """The JSON file of a figure.

    Raises:
        DataError: it cannot be read, or is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read ({error}); delete it, and the figure is made again.") from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA or not {"fingerprint", "settings", "data"} <= set(value):
        raise DataError(f"'{path}' is no figure of this version of bench.paper; delete it, and the figure is made again.")
    return value


def stated(figure: Figure, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a figure's claims come to, as JSON values; it follows from the numbers, whenever these were measured."""
    return [
        {"claim": v.claim, "holds": v.holds, "sentence": v.sentence, "numbers": dict(v.numbers), "line": v.line()}
        for v in figure.claim(data)
    ]


# -- what is measured


def _quality_curves(figure: Figure, run: Run) -> dict[str, Any]:
    curves = figure.curves(run.smoke)
    assert figure.model is not None
    finished = run_experiment(figure.model, curves, run, stage=figure.last_stage, ztw=figure.ztw)
    return {"stage_seconds": [one.seconds for one in finished], "data": measured_curves(curves, finished)}


def _nonzeros(figure: Figure, run: Run) -> dict[str, Any]:
    """The distribution of non-zero activations by layer of the trained models before conversion."""
    curves = figure.curves(run.smoke)
    assert figure.model is not None
    finished = run_experiment(figure.model, curves, run, stage=figure.last_stage)

    def of(one: Finished, curve: Curve) -> dict[str, Any]:
        model, batches = _loaded(one, f"sparsify.{curve.name}", "model", run)
        found = nonzero_activations(model, find_ffn_sites(model, example_inputs(model)), batches, progress=run.progress)
        return {name: to_dict(layer) for name, layer in found.layers.items()}

    models = {curve.name: {"label": curve.label, "seeds": [of(one, curve) for one in finished]} for curve in curves}
    return {"stage_seconds": [one.seconds for one in finished], "data": {"models": models}}


def _executed(figure: Figure, run: Run) -> dict[str, Any]:
    """The distribution of executed experts by layer of the converted models, at each of `TAUS`."""
    curves = figure.curves(run.smoke)
    assert figure.model is not None
    finished = run_experiment(figure.model, curves, run, stage=figure.last_stage)

    def replaced(curve: Curve) -> list[dict[str, Any]]:
        manifest = read_manifest(finished[0].stages[f"convert.{curve.name}"].folder / "moe")
        return [{"name": record.name, "role": record.role} for record in manifest.projections]

    def of(one: Finished, curve: Curve) -> dict[str, Any]:
        model, batches = _loaded(one, f"convert.{curve.name}", "moe", run)
        found = executed_experts(model, batches, rules_at(DynKMax, TAUS), progress=run.progress)
        return {tau: {name: to_dict(layer) for name, layer in layers.items()} for tau, layers in found.settings.items()}

    models = {
        curve.name: {"label": curve.label, "projections": replaced(curve), "seeds": [of(one, curve) for one in finished]}
        for curve in curves
    }
    return {"stage_seconds": [one.seconds for one in finished], "data": {"models": models}}


def _executed_projections(figure: Figure, run: Run, *, role: str) -> dict[str, Any]:
    """The same of the full method, apart for one kind of projection and for the FFNs."""
    found = _executed(figure, run)
    ((_, full),) = found["data"]["models"].items()
    roles = {record["name"]: record["role"] for record in full["projections"]}
    apart = {}
    for name, label, wanted in (("projection", f"{role} projections", role), ("ffn", "FFNs", None)):
        seeds = [
            {tau: {layer: d for layer, d in layers.items() if roles.get(layer) == wanted} for tau, layers in seed.items()}
            for seed in full["seeds"]
        ]
        apart[name] = {"label": label, "seeds": seeds}
    pairs = {f"{a} and {b}": (a, b) for a, b in (("q", "k"), ("v", "o"))}
    distances = {
        name: {tau: [_apart(seed[tau], roles, *pair) for seed in full["seeds"]] for tau in full["seeds"][0]} for name, pair in pairs.items()
    }
    return {**found, "data": {"models": apart, "role": role, "distances": distances}}


def _apart(layers: Mapping[str, Any], roles: Mapping[str, str], one: str, other: str) -> float:
    """Distance between the executed shares of two kinds of projections, mean over blocks."""
    kinds = [[found for name, found in layers.items() if roles.get(name) == role] for role in (one, other)]
    return fmean(distance(*pair) for pair in zip(*kinds, strict=True))


def _loaded(one: Finished, stage: str, folder: str, run: Run) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A model that a stage made, and the first tokens of validation."""
    model, processor = load_model(one.stages[stage].folder / folder)
    model.to(torch_device(run.device))
    batches = evaluation_batches(model, processor, one.recipe.validation, batch_size=one.recipe.sweep.batch_size)
    inputs = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    return model, take_tokens(inputs, _HISTOGRAM_TOKENS, tokens_per_image=tokens_per_image(model.config))


def _ratios(figure: Figure, run: Run) -> dict[str, Any]:
    """Figure 14: cost ratios of BERT-base's width with experts of one neuron."""
    d_model, widths = 768, (32, 64, 128, 256, 512)
    fractions = [i / 20 for i in range(21)]
    ratios = {str(w): [cost_ratio(k, width=w, d_model=d_model) for k in fractions] for w in widths}
    break_even = {str(w): 1 - cost_ratio(0.0, width=w, d_model=d_model) for w in widths}
    return {"stage_seconds": [], "data": {"d_model": d_model, "fractions": fractions, "ratios": ratios, "break_even": break_even}}


# -- what is drawn


def _draw_nonzeros(data: Mapping[str, Any], paths: Sequence[Path], *, title: str) -> None:
    rows = {one["label"]: _all_seeds(one["seeds"]) for one in data["models"].values()}
    draw_histograms(rows, paths, title=title, xlabel="non-zero activations / FFN width")


def _draw_executed(data: Mapping[str, Any], paths: Sequence[Path], *, title: str) -> None:
    rows = {
        f"{one['label']}, {tau}": _all_seeds([seed[tau] for seed in one["seeds"]])
        for one in data["models"].values()
        for tau in one["seeds"][0]
    }
    draw_histograms(rows, paths, title=title, xlabel="executed experts / all", abreast=len(TAUS))


def _all_seeds(seeds: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Distributions by layer, of every seed."""
    return {name: [seed[name] for seed in seeds] for name in seeds[0]}


# -- which curves


def _sized(training: str, smoke: bool) -> tuple[Curve, ...]:
    sizes = (1, 8, 32) if smoke else SIZES
    return tuple(
        Curve(
            name=f"{training}-size{size}",
            label="1 neuron" if size == 1 else f"{size} neurons",
            training=training,
            convert={"config": {"expert_size": size}},
        )
        for size in sizes
    )


def _figure_12(smoke: bool) -> tuple[Curve, ...]:
    weights = {name: weight for name, weight in WEIGHTS.items() if not smoke or name in ("relu", "relu_hoyer")}
    return tuple(
        Curve(name=f"{method}-{name}", label=f"{label}, weight {weight:g}", training=name, moefication=method == "baseline")
        for method, label in (("sadmoe", "SADMoE"), ("baseline", "MoEfication"))
        for name, weight in weights.items()
    )


_STEPS = (
    MOEFICATION,
    Curve(name="enforced", label="+ enforcement", training="relu_hoyer", moefication=True),
    Curve(
        name="norm_router",
        label="+ norm router",
        training="relu_hoyer",
        moefication=True,
        convert={"config": {"router": {"name": "norm", "width": 64}}},
    ),
    Curve(
        name="dynamic_k",
        label="+ dynamic k",
        training="relu_hoyer",
        moefication=True,
        convert={"config": {"router": {"name": "norm", "width": 64}, "rule": {"name": "dynk_max", "tau": 0.0}}},
    ),
    replace(SADMOE, label="+ small experts"),
    replace(FULL, label="+ projections"),
)
"""Of figure 8, each with all before it."""


def _fixed(*curves: Curve) -> Callable[[bool], tuple[Curve, ...]]:
    return lambda _smoke: curves


_draw_whole = partial(draw_curves, axes=("all", "authors_all"))  # with projections the converted FLOPs are others: no common share of FFNs
_draw_both_ways = partial(draw_curves, axes=("ffn", "authors_ffn", "all", "authors_all"))

FIGURES: dict[str, Figure] = {
    figure.number: figure
    for figure in (
        Figure(
            number="3",
            caption="How many activations of each FFN of the GPT are not zero on a token: ReLU without and with enforcement.",
            model="gpt",
            curves=_fixed(_RELU, _SPARSIFIED),
            measure=_nonzeros,
            draw=_draw_nonzeros,
            claim=judge.figure_3,
            last_stage="sparsify",
        ),
        Figure(
            number="5",
            caption="GPT: loss against FLOPs of MoEfication and SADMoE.",
            model="gpt",
            curves=_fixed(MOEFICATION, SADMOE),
            measure=_quality_curves,
            draw=_draw_both_ways,
            claim=judge.figure_5,
        ),
        Figure(
            number="6",
            caption="BERT on emotions: accuracy against FLOPs of MoEfication, SADMoE with and without projections, and early exit.",
            model="bert",
            curves=_fixed(MOEFICATION, replace(SADMOE, label="SADMoE, FFNs only"), FULL),
            measure=_quality_curves,
            draw=_draw_whole,
            claim=judge.figure_6,
            ztw=True,
        ),
        Figure(
            number="7",
            caption="ViT on Fashion-MNIST: accuracy against FLOPs of the same methods.",
            model="vit",
            curves=_fixed(MOEFICATION, replace(SADMOE, label="SADMoE, FFNs only"), FULL),
            measure=_quality_curves,
            draw=_draw_whole,
            claim=judge.figure_7,
            ztw=True,
        ),
        Figure(
            number="8",
            caption="BERT on emotions, ablation: accuracy against FLOPs from MoEfication to the full method, step by step.",
            model="bert",
            curves=_fixed(*_STEPS),
            measure=_quality_curves,
            draw=_draw_whole,
            claim=judge.figure_8,
        ),
        Figure(
            number="9",
            caption="GPT: loss against FLOPs of ReLU and GELU, each without and with enforcement, all converted with dynamic k.",
            model="gpt",
            curves=_fixed(
                _RELU,
                Curve(name="relu_hoyer", label="ReLU, square-Hoyer", training="relu_hoyer"),
                Curve(name="gelu", label="GELU", training="gelu"),
                Curve(name="gelu_hoyer", label="GELU, square-Hoyer", training="gelu_hoyer"),
            ),
            measure=_quality_curves,
            draw=_draw_both_ways,
            claim=judge.figure_9,
        ),
        Figure(
            number="10",
            caption="GPT, ReLU with enforcement: loss against FLOPs by size of the experts.",
            model="gpt",
            curves=partial(_sized, "relu_hoyer"),
            measure=_quality_curves,
            draw=_draw_both_ways,
            claim=judge.sizes,
        ),
        Figure(
            number="11",
            caption="BERT: share of executed experts by layer at several thresholds tau, without and with enforcement.",
            model="bert",
            curves=_fixed(_RELU, _SPARSIFIED),
            measure=_executed,
            draw=_draw_executed,
            claim=judge.figure_11,
            last_stage="convert",
        ),
        Figure(
            number="12",
            caption="GPT: loss against FLOPs of base models with more and more enforcement, converted by both methods.",
            model="gpt",
            curves=_figure_12,
            measure=_quality_curves,
            draw=_draw_both_ways,
            claim=judge.figure_12,
        ),
        Figure(
            number="13",
            caption="GPT, GELU with enforcement: loss against FLOPs by size of the experts.",
            model="gpt",
            curves=partial(_sized, "gelu_hoyer"),
            measure=_quality_curves,
            draw=_draw_both_ways,
            claim=judge.sizes,
        ),
        Figure(
            number="14",
            caption="Cost of a converted FFN over the dense one's against the executed share, by width of the router; computed.",
            model=None,
            curves=_fixed(),
            measure=_ratios,
            draw=draw_ratios,
            claim=judge.figure_14,
        ),
        *(
            Figure(
                number=number,
                caption=f"BERT, the full method: share of executed experts of the {role} projections by layer, and of the FFNs.",
                model="bert",
                curves=_fixed(FULL),
                measure=partial(_executed_projections, role=role),
                draw=_draw_executed,
                claim=judge.projections,
                last_stage="convert",
            )
            for number, role in (("15", "q"), ("16", "k"), ("17", "v"), ("18", "o"))
        ),
    )
}
"""By number."""
