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

from . import claims
from .accounting import cost_ratio
from .claims import Verdict
from .draw import draw_curves, draw_histograms, draw_ratios
from .measure import Finished, Run, measured_curves, run_experiment, series
from .recipes import NEEDS, Curve, code_version, drawing_version, experiment, identity, pretraining

SCHEMA = 1
"""Version of a figure's JSON file."""
TAUS = (0.1, 0.01, 0.001)
"""Thresholds of the heat maps, shares of a token's largest predicted norm."""
SIZES = (1, 2, 4, 8, 16, 32)
"""Neurons of an expert in figures 10 and 13."""
WEIGHTS = {"relu": 0.0, "relu_hoyer_low": 3e-4, "relu_hoyer": 1e-3, "relu_hoyer_high": 3e-3}
"""Of square-Hoyer in the trainings of figure 12; those of gpt.toml, which a test holds beside them."""
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
            made["pretraining"] = identity(pretraining(self.model, run.inputs, smoke=run.smoke))
            made["experiment"] = identity(experiment(self.model, self.curves(run.smoke), run.inputs, smoke=run.smoke, ztw=self.ztw))
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
    verdicts = figure.claim(result["data"])
    pictures = [path.with_suffix(".png"), path.with_suffix(".svg")]
    is_drawn = earlier is not None and earlier.get("drawn") == drawing_version() and all(picture.exists() for picture in pictures)
    result = {
        **result,
        "drawn": drawing_version(),
        "caption": figure.caption,
        "claims": [{**to_plain(v), "line": v.line()} for v in verdicts],
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


def to_plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON values."""
    return {"claim": verdict.claim, "holds": verdict.holds, "sentence": verdict.sentence, "numbers": dict(verdict.numbers)}


# -- what is measured


def _quality_curves(figure: Figure, run: Run, *, authors: bool = False) -> dict[str, Any]:
    curves = figure.curves(run.smoke)
    assert figure.model is not None
    finished = run_experiment(figure.model, curves, run, stage=figure.last_stage, ztw=figure.ztw)
    return {"stage_seconds": [one.seconds for one in finished], "data": measured_curves(curves, finished, authors=authors)}


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
    return {**found, "data": {"models": apart, "role": role}}


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


# -- what is claimed


def _all_series(data: Mapping[str, Any], axis: str) -> dict[str, claims.Series]:
    return {name: series(data, name, axis) for name in data["curves"]}


def _claim_3(data: Mapping[str, Any]) -> list[Verdict]:
    found = {
        name: [[(layer["mean"], layer["deviation"]) for layer in seed.values()] for seed in one["seeds"]]
        for name, one in data["models"].items()
    }
    return claims.fewer_but_more_varied(found["relu"], found["sadmoe"])


def _claim_5(data: Mapping[str, Any]) -> list[Verdict]:
    curves = _all_series(data, "all")
    claim = "SADMoE's loss is below MoEfication's at every budget"
    return [claims.better_everywhere(claim, curves["sadmoe"], curves["baseline"], lower_is_better=True)]


def _claim_6(data: Mapping[str, Any]) -> list[Verdict]:
    curves = _all_series(data, "all")
    return [
        claims.keeps_quality_at_half(curves["full"], curves["baseline"], dense=data["dense"]),
        claims.lower_floor(curves["full"], curves["sadmoe"]),
        claims.best_only_at_the_lowest(curves["ztw"], curves["full"]),
        claims.saves(curves["full"], dense=data["dense"]),
    ]


def _claim_7(data: Mapping[str, Any]) -> list[Verdict]:
    curves = _all_series(data, "all")
    low, high = claims.MEDIUM
    above = [
        claims.better_everywhere(
            f"SADMoE is above {label} at medium budgets", curves["full"], curves[name], lower_is_better=False, low=low, high=high
        )
        for name, label in (("baseline", "MoEfication"), ("ztw", "ZTW"))
    ]
    return [*above, claims.saves(curves["full"], dense=data["dense"])]


def _claim_8(data: Mapping[str, Any]) -> list[Verdict]:
    curves = _all_series(data, "all")
    return [
        claims.each_step_better({curve.label: curves[curve.name] for curve in _STEPS}, lower_is_better=False),
        claims.lower_floor(curves["full"], curves["sadmoe"]),
        claims.keeps_quality_at_half(curves["full"], curves["baseline"], dense=data["dense"]),
    ]


def _claim_projections(data: Mapping[str, Any]) -> list[Verdict]:
    found = {name: _executed_means(one) for name, one in data["models"].items()}
    return [claims.projections_are_less_sparse(found["projection"], found["ffn"], name=data["role"])]


def _claim_9(data: Mapping[str, Any]) -> list[Verdict]:
    return claims.sparsified_gelu_is_like_relu(_all_series(data, "ffn"))


def _claim_sizes(data: Mapping[str, Any]) -> list[Verdict]:
    verdicts = []
    for axis, accounting in (("ffn", "our accounting"), ("authors_ffn", "the authors' accounting")):
        curves = _all_series(data, axis)
        verdicts += claims.smaller_experts_are_better({_size_of(name): one for name, one in curves.items()}, accounting=accounting)
    return verdicts


def _claim_11(data: Mapping[str, Any]) -> list[Verdict]:
    found = {name: _executed_means(one) for name, one in data["models"].items()}
    everything = {  # the last bin of the histograms
        tau: [fmean(layer["histogram"][-1] / layer["tokens"] for layer in seed[tau].values()) for seed in data["models"]["sadmoe"]["seeds"]]
        for tau in data["models"]["sadmoe"]["seeds"][0]
    }
    return [*claims.fewer_executed_experts(found["relu"], found["sadmoe"]), claims.never_all_experts(everything)]


def _executed_means(model: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """Mean executed share by setting, seed and layer."""
    taus = list(model["seeds"][0])
    return {tau: [[layer["mean"] for layer in seed[tau].values()] for seed in model["seeds"]] for tau in taus}


def _claim_12(data: Mapping[str, Any]) -> list[Verdict]:
    curves = _all_series(data, "ffn")
    trainings = {name: curve["training"] for name, curve in _FIGURE_12.items() if name in curves}
    ours = {WEIGHTS[trainings[name]]: one for name, one in curves.items() if name.startswith("sadmoe")}
    theirs = {WEIGHTS[trainings[name]]: one for name, one in curves.items() if name.startswith("baseline")}
    return claims.sparser_bases_are_better(ours, theirs)


def _claim_14(data: Mapping[str, Any]) -> list[Verdict]:
    return [claims.pays_unless_all_run({int(w): share for w, share in data["break_even"].items()}, width=128)]


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


def _size_of(name: str) -> int:
    return int(name.rpartition("-size")[2])


def _figure_12(smoke: bool) -> tuple[Curve, ...]:
    weights = {name: weight for name, weight in WEIGHTS.items() if not smoke or name in ("relu", "relu_hoyer")}
    return tuple(
        Curve(name=f"{method}-{name}", label=f"{label}, weight {weight:g}", training=name, moefication=method == "baseline")
        for method, label in (("sadmoe", "SADMoE"), ("baseline", "MoEfication"))
        for name, weight in weights.items()
    )


_FIGURE_12 = {curve.name: {"training": curve.training} for curve in _figure_12(smoke=False)}


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


_draw_whole = partial(draw_curves, axes=("all",))  # with projections the converted FLOPs are others: no common share of FFNs
_draw_sizes = partial(draw_curves, axes=("ffn", "authors_ffn", "all", "authors_all"))

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
            claim=_claim_3,
            last_stage="sparsify",
        ),
        Figure(
            number="5",
            caption="GPT: loss against FLOPs of MoEfication and SADMoE.",
            model="gpt",
            curves=_fixed(MOEFICATION, SADMOE),
            measure=_quality_curves,
            draw=draw_curves,
            claim=_claim_5,
        ),
        Figure(
            number="6",
            caption="BERT on emotions: accuracy against FLOPs of MoEfication, SADMoE with and without projections, and early exit.",
            model="bert",
            curves=_fixed(MOEFICATION, replace(SADMOE, label="SADMoE, FFNs only"), FULL),
            measure=_quality_curves,
            draw=_draw_whole,
            claim=_claim_6,
            ztw=True,
        ),
        Figure(
            number="7",
            caption="ViT on Fashion-MNIST: accuracy against FLOPs of the same methods.",
            model="vit",
            curves=_fixed(MOEFICATION, replace(SADMOE, label="SADMoE, FFNs only"), FULL),
            measure=_quality_curves,
            draw=_draw_whole,
            claim=_claim_7,
            ztw=True,
        ),
        Figure(
            number="8",
            caption="BERT on emotions, ablation: accuracy against FLOPs from MoEfication to the full method, step by step.",
            model="bert",
            curves=_fixed(*_STEPS),
            measure=_quality_curves,
            draw=_draw_whole,
            claim=_claim_8,
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
            draw=draw_curves,
            claim=_claim_9,
        ),
        Figure(
            number="10",
            caption="GPT, ReLU with enforcement: loss against FLOPs by size of the experts, counted our way and the authors'.",
            model="gpt",
            curves=partial(_sized, "relu_hoyer"),
            measure=partial(_quality_curves, authors=True),
            draw=_draw_sizes,
            claim=_claim_sizes,
        ),
        Figure(
            number="11",
            caption="BERT: share of executed experts by layer at several thresholds tau, without and with enforcement.",
            model="bert",
            curves=_fixed(_RELU, _SPARSIFIED),
            measure=_executed,
            draw=_draw_executed,
            claim=_claim_11,
            last_stage="convert",
        ),
        Figure(
            number="12",
            caption="GPT: loss against FLOPs of base models with more and more enforcement, converted by both methods.",
            model="gpt",
            curves=_figure_12,
            measure=_quality_curves,
            draw=draw_curves,
            claim=_claim_12,
        ),
        Figure(
            number="13",
            caption="GPT, GELU with enforcement: loss against FLOPs by size of the experts, counted our way and the authors'.",
            model="gpt",
            curves=partial(_sized, "gelu_hoyer"),
            measure=partial(_quality_curves, authors=True),
            draw=_draw_sizes,
            claim=_claim_sizes,
        ),
        Figure(
            number="14",
            caption="Cost of a converted FFN over the dense one's against the executed share, by width of the router; computed.",
            model=None,
            curves=_fixed(),
            measure=_ratios,
            draw=draw_ratios,
            claim=_claim_14,
        ),
        *(
            Figure(
                number=number,
                caption=f"BERT, the full method: share of executed experts of the {role} projections by layer, and of the FFNs.",
                model="bert",
                curves=_fixed(FULL),
                measure=partial(_executed_projections, role=role),
                draw=_draw_executed,
                claim=_claim_projections,
                last_stage="convert",
            )
            for number, role in (("15", "q"), ("16", "k"), ("17", "v"), ("18", "o"))
        ),
    )
}
"""By number."""
