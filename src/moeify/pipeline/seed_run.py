"""The stages of one seed of a recipe: what each reads, runs and keeps."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from .._config import from_dict, to_dict
from .._progress import NO_PROGRESS, Progress
from ..baselines import ztw as early_exit
from ..convert import ConvertConfig, plan_conversion, tried_projections
from ..data import DataConfig
from ..errors import ConfigError
from ..evaluate import CurvePoint, measure_quality, quality_at
from ..evaluate.sweep import CostAxis
from ..hf.folders import MANIFEST_FILE
from ..hf.inputs import example_inputs
from ..hf.load import load_model, read_calibration
from ..hf.save import save_checkpoint, save_dense
from ..sites import FFNSite, find_ffn_sites
from ..sparsity import EnforcementConfig, profile_activations, set_activation
from ..train.calibration import recalibrate
from ..train.finetune import finetune_converted, train_routers
from ..train.loop import TrainConfig, TrainRecord, train
from ..train.regress import regress_layers
from ..train.sparsify import SparsifyConfig, sparsify
from .content import data_id, model_id
from .convert import CalibrationConfig, card_of, convert_checkpoint
from .heldout import measure_converted
from .inputs import calibration_batches, check_window, evaluation_batches, hold_out, num_tokens, take_tokens, tokens_per_image
from .measure import sweep_checkpoint
from .names import torch_device, torch_dtype
from .project import ProjectionsConfig, distil_and_replace, projection_records
from .recipe import MOEFICATION, VALIDATION, ZTW, RecipeConfig, VariantConfig, merged
from .sparsify import check_enforcement
from .stages import SCRATCH, Stage, Stages, StageTakenError
from .start import start_model
from .tasks import TASKS, Loaded, training_data

AT_FLOPS = tuple(round(0.1 * i, 1) for i in range(1, 10))
"""Fractions of the dense FLOPs, of FFNs and of the whole model, at which results state qualities."""

_PROFILE_TOKENS = 8192
_EPS = 1e-3
_CALIBRATED = ("rule", "value", "active_fraction", "router_scores")


def evaluation_data(recipe: RecipeConfig) -> dict[str, DataConfig]:
    """What qualities are measured on, by name; validation first."""
    return {VALIDATION: recipe.validation, **{extra.name: extra.data for extra in recipe.extra_evaluation}}


class _Done(dict[str, Stage]):
    """Finished stages by name. One that is not there was left to another process: what needs it is left, too."""

    def __missing__(self, name: str) -> Stage:
        raise StageTakenError(f"{name}: another process works on it.")


class SeedRun:
    """The stages of one seed; each method that has a name of `run_recipe.STAGES` runs that stage for all variants."""

    def __init__(self, recipe: RecipeConfig, stages: Stages, *, seed: int, device: str) -> None:
        self.recipe, self.seed = recipe, seed
        self.done = _Done()
        """Finished stages by name."""
        self.timed: set[str] = set()
        """Names of those that train or convert."""
        self._stages, self._device = stages, device
        self._model_id = {"model": model_id(recipe), "seed": seed}
        self._data_id = {**data_id(recipe.data), "augment": None if recipe.augment is None else to_dict(recipe.augment)}

    # -- the stages

    def dense(self) -> None:
        """The starting model measured, and trained without enforcement."""
        self._measure("start", None)  # first: it finds what is wrong with the data of all measurements before hours of training
        self._train("dense", self.recipe.train)
        self._measure("dense.quality", self.done["dense"])

    def sparsify(self) -> None:
        """Every variant trained."""
        for variant in self.recipe.variant:
            name = f"sparsify.{variant.name}"
            config = self.recipe.train_of(variant)
            self._train(name, config, variant)
            self._measure(f"{name}.quality", self.done[name])

    def convert(self) -> None:
        """Every variant converted."""
        for variant in self.recipe.variant:
            options = self.recipe.convert_of(variant)
            self._convert(f"convert.{variant.name}", self.done[f"sparsify.{variant.name}"], options.config, options.calibration)

    def finetune(self) -> None:
        """Every converted variant trained further."""
        if self.recipe.finetune is not None:
            for variant in self.recipe.variant:
                if variant.finetune:
                    self._finetune(variant)

    def routers(self) -> None:
        """Their routers fitted, and rules calibrated, anew."""
        if self.recipe.finetune is not None or self.recipe.routers is not None:
            for variant in self.recipe.variant:
                if variant.finetune:
                    self._routers(variant)

    def control(self) -> None:
        """The dense model trained for as many tokens as the main variant took."""
        self._train("control", replace(self.recipe.train, steps=self._control_steps()))
        self._measure("control.quality", self.done["control"])

    def moefication(self) -> None:
        """The same model in ReLU, trained for as many, converted by MoEfication."""
        baseline = self.recipe.moefication
        if baseline is None:
            return
        config = merged(self.recipe.train, baseline.train, where="moefication.train")
        relu = SparsifyConfig(enforcement=EnforcementConfig(weight=0.0)) if baseline.activation == "relu" else None
        config = replace(config, steps=self._baseline_steps())
        self._train(MOEFICATION, config, VariantConfig(name=MOEFICATION, sparsify=relu))
        self._measure(f"{MOEFICATION}.quality", self.done[MOEFICATION])
        self._convert(f"convert.{MOEFICATION}", self.done[MOEFICATION], baseline.config, self._baseline_calibration())

    def ztw(self) -> None:
        """Heads for early exit trained on the dense model."""
        options, dense = self.recipe.ztw, self.done["dense"]
        if options is None:
            return
        config = replace(options.config, seed=options.config.seed + self.seed)
        if options.tokens == "recipe":
            config = config.for_sequences(self._baseline_steps() * self.recipe.train.batch_sequences)
        decisive = {**to_dict(config), "train": config.train.decisive(), "ensemble": config.ensemble.decisive()}
        inputs = {"stage": ZTW, "of": dense.key, "data": self._data_id, "config": decisive}

        def work(folder: Path, progress: Progress) -> dict[str, Any]:
            model, processor = self._load(dense.folder / "model", progress)
            loaded = Loaded(model, processor, task_of(model), has_new_head=False)
            data = training_data(loaded, self.recipe.data, augment=self.recipe.augment, progress=progress)
            model.to(torch_device(self._device))
            early = early_exit.fit(model, data, config, work=folder / SCRATCH, run=inputs, progress=progress)
            early_exit.save(early, folder / "heads")
            stages = zip(("heads", "ensemble"), early.records, (config.train, config.ensemble), strict=True)
            return {"places": [to_dict(place) for place in early.places], **{n: _summary(record, stage) for n, record, stage in stages}}

        self._run(ZTW, inputs, work, timed=True)

    def sweep(self) -> None:
        """Quality against cost of every converted model."""
        models = [(name, converted, self.recipe.sweep.rule) for name, converted in self._converted().items()]
        if self.recipe.moefication is not None:
            models.append((MOEFICATION, self.done[f"convert.{MOEFICATION}"], None))  # whose rule is a part of it
        for name, converted, rule in models:
            for evaluation, data in evaluation_data(self.recipe).items():
                self._sweep(f"sweep.{name}.{evaluation}", converted, data, rule=rule)
        if self.recipe.ztw is not None:
            for evaluation, data in evaluation_data(self.recipe).items():
                self._sweep_exits(f"sweep.{ZTW}.{evaluation}", data, points=self.recipe.ztw.points)

    # -- one stage of one model

    def _run(self, name: str, inputs: Mapping[str, Any], work: Callable[[Path, Progress], Mapping[str, Any]], *, timed: bool) -> None:
        self.done[name] = self._stages.run(f"seed{self.seed}/{name}", inputs, work)
        if timed:
            self.timed.add(name)

    def _train(self, name: str, config: TrainConfig, variant: VariantConfig | None = None) -> None:
        """Train the starting model as a variant has it, or as it is."""
        variant = variant or VariantConfig(name=name)
        config = self._seeded(config)
        options, regress, projections = variant.sparsify, variant.regress, variant.projections
        if projections is not None:
            projections = replace(projections, seed=projections.seed + self.seed)
        follows = options is not None and options.distill is not None
        inputs = {
            "stage": "train",
            **self._model_id,
            "data": self._data_id,
            "train": config.decisive(),
            "sparsify": None if options is None else to_dict(options),
            "regress": None if regress is None else {**to_dict(regress), "tokens": variant.regress_tokens},
            "teacher": self._teacher_key(variant.teacher, None) if follows else None,
            # Only where there are some: other variants' stages keep the keys that they had before there were any.
            **({} if projections is None else {"projections": to_dict(replace(projections, workers=1))}),
        }

        def work(folder: Path, progress: Progress) -> dict[str, Any]:
            start = self._start(progress)
            model, processor = start.model, start.processor
            data = training_data(start, self.recipe.data, augment=self.recipe.augment, progress=progress)
            model.to(torch_device(self._device))
            sites = find_ffn_sites(model, example_inputs(model))
            self._check_stages(start, sites)
            tokens, errors, replaced = 0, None, {"tokens": 0}
            chosen = options
            if projections is not None:  # first: they are fitted to what the model as it was reads there
                replaced = self._replace_projections(model, processor, projections, folder / SCRATCH / "projections", progress)
            if regress is not None:
                tokens, errors, sites = self._regress(model, processor, sites, variant, folder / SCRATCH / "regress", progress)
                # The functions have changed; a threshold may be in a bias, and would be subtracted once more.
                chosen = None if options is None else replace(options, activation="keep", threshold=0.0, policy={})
            if projections is not None:
                sites = find_ffn_sites(model, example_inputs(model))
                self._check_replaced(model, sites, variant, chosen)
            kept: dict[str, Any] = {"state": folder / SCRATCH / "state", "run": inputs, "progress": progress}
            kept["evaluate"] = self._evaluator(model, processor, config, progress)
            if chosen is None:
                record = train(model, data, config, **kept)
            else:
                teacher = self._teacher(variant.teacher, None, progress) if follows else None
                record = sparsify(model, sites, data, chosen, config, teacher=teacher, **kept)
            _replace_dense(model.to("cpu"), processor, folder / "model")
            found = {"regress_errors": errors, "regress_tokens": tokens, "projection_errors": replaced.get("errors")}
            return {**_summary(record, config), **found, "projection_tokens": replaced["tokens"]}

        self._run(name, inputs, work, timed=True)

    def _check_stages(self, start: Loaded, sites: Sequence[FFNSite]) -> None:
        """Refuse, before anything is trained, what a later stage would refuse after hours."""
        recipe, variants = self.recipe, self.recipe.variant
        # Of a variant whose projections are replaced the policies may name these, which are not there yet.
        plain = [variant for variant in variants if variant.projections is None]
        conversions = [(stage.config, stage.calibration) for stage in map(recipe.convert_of, plain)]
        if recipe.moefication is not None:
            conversions.append((recipe.moefication.config, self._baseline_calibration()))
        for config, calibration in conversions:
            plan_conversion(start.model, sites, config)
            if TASKS[start.task].has_windows:
                check_window(start.model, calibration.window)
        if recipe.ztw is not None:
            early_exit.find_heads(start.model, example_inputs(start.model), recipe.ztw.config)
        lessons = [] if recipe.finetune is None else [("finetune", recipe.finetune.teacher, recipe.finetune.config.distill)]
        for variant in variants:
            if variant.projections is not None:
                with tried_projections(start.model, projection_records(start.model, variant.projections)):
                    tried = find_ffn_sites(start.model, example_inputs(start.model))
                    self._check_replaced(start.model, tried, variant, None if variant.regress is not None else variant.sparsify)
                if TASKS[start.task].has_windows:
                    check_window(start.model, recipe.convert_of(variant).calibration.window)
            if variant.sparsify is not None:
                if variant.projections is None:
                    check_enforcement(start.model, sites, variant.sparsify)
                lessons.append((f"variant {variant.name}", variant.teacher, variant.sparsify.distill))
        for where, teacher, distill in lessons:
            if start.has_new_head and teacher == "source" and distill is not None and distill.logits_weight:
                raise ConfigError(f"{where}: the head of the starting model is new and has nothing to teach; set its teacher to 'dense'.")

    def _baseline_calibration(self) -> CalibrationConfig:
        assert self.recipe.moefication is not None
        return merged(self.recipe.convert.calibration, self.recipe.moefication.calibration, where="moefication.calibration")

    def _regress(
        self, model: nn.Module, processor: Any, sites: Sequence[FFNSite], variant: VariantConfig, folder: Path, progress: Progress
    ) -> tuple[int, dict[str, Any], list[FFNSite]]:
        """Fit every FFN, with its new activation, to what it put out before; tokens read, errors, and the sites as they are now."""
        before = self._teacher("source", None, progress)
        if variant.sparsify is not None and (functions := variant.sparsify.functions()) is not None:
            sites = set_activation(model, sites, functions)
        data = replace(self.recipe.data, max_tokens=variant.regress_tokens)
        batches = calibration_batches(model, processor, data, progress=progress)
        errors = regress_layers(model, before, sites, batches, variant.regress, work=folder, progress=progress)
        return sum(num_tokens(batch, tokens_per_image=1) for batch in batches), errors, list(sites)

    def _replace_projections(
        self, model: nn.Module, processor: Any, config: ProjectionsConfig, folder: Path, progress: Progress
    ) -> dict[str, Any]:
        """Put MLPs in the places of a variant's projections, in place; what `distil_and_replace` returns."""
        data = replace(self.recipe.data, max_tokens=config.tokens)
        batches = calibration_batches(model, processor, data, progress=progress)
        replaced = distil_and_replace(model, projection_records(model, config), batches, config, work=folder, progress=progress)
        return {**replaced, "tokens": math.ceil(replaced["tokens"] / tokens_per_image(model.config))}  # in training an image counts as one

    def _check_replaced(self, model: nn.Module, sites: Sequence[FFNSite], variant: VariantConfig, config: SparsifyConfig | None) -> None:
        """What `_check_stages` asks of the other variants, of one whose projections have been replaced now."""
        plan_conversion(model, sites, self.recipe.convert_of(variant).config)
        if config is not None:
            check_enforcement(model, sites, config)

    def _measure(self, name: str, trained: Stage | None) -> None:
        evaluations = evaluation_data(self.recipe)
        inputs = {
            "stage": "measure",
            **(self._model_id if trained is None else {"of": trained.key}),
            "metric": self.recipe.metric,
            "data": {key: data_id(data) for key, data in evaluations.items()},
        }

        def work(_folder: Path, progress: Progress) -> dict[str, Any]:
            model, processor = self._start(progress)[:2] if trained is None else self._load(trained.folder / "model", progress)
            model.to(torch_device(self._device))
            quality, counts = {}, {}
            for key, data in evaluations.items():
                batches = self._batches(model, processor, data, progress)
                quality[key] = measure_quality(model, batches, metric=self.recipe.metric, progress=progress).value
                if key == VALIDATION:
                    counts = count_nonzeros(model, batches, progress=progress)
            return {"quality": quality, **counts}

        self._run(name, inputs, work, timed=False)

    def _convert(self, name: str, trained: Stage, config: ConvertConfig, calibration: CalibrationConfig) -> None:
        config, calibration = replace(config, seed=config.seed + self.seed), replace(calibration, seed=calibration.seed + self.seed)
        inputs = {
            "stage": "convert",
            "of": trained.key,
            "data": self._data_id,
            "config": to_dict(config),
            "calibration": to_dict(calibration),
        }

        def work(folder: Path, progress: Progress) -> dict[str, Any]:
            moe = folder / "moe"
            if (moe / MANIFEST_FILE).is_file():  # killed after its last step
                shutil.rmtree(folder / f"{moe.name}.work", ignore_errors=True)
            else:
                convert_checkpoint(
                    str(trained.folder / "model"),
                    moe,
                    data=self.recipe.data,
                    config=config,
                    calibration=calibration,
                    dtype=self.recipe.model.dtype,
                    device=self._device,
                    progress=progress,
                )
            record = read_calibration(moe)
            size = SimpleNamespace(**json.loads((moe / "config.json").read_text()))  # all that `tokens_per_image` reads of a config
            tokens = math.ceil(int(record["tokens"]) / tokens_per_image(size))  # in training an image counts as one, too
            return {"tokens": tokens, **{key: record[key] for key in _CALIBRATED}}

        self._run(name, inputs, work, timed=True)

    def _finetune(self, variant: VariantConfig) -> None:
        stage = self.recipe.finetune
        assert stage is not None
        converted = self.done[f"convert.{variant.name}"]
        config = merged(self.recipe.train, stage.train, where="finetune.train")
        config = self._seeded(config)
        follows = stage.config.distill is not None
        inputs = {
            "stage": "finetune",
            "of": converted.key,
            "data": self._data_id,
            "train": config.decisive(),
            "config": to_dict(stage.config),
            "teacher": self._teacher_key(stage.teacher, variant) if follows else None,
        }

        def work(folder: Path, progress: Progress) -> dict[str, Any]:
            model, processor = self._load(converted.folder / "moe", progress)
            loaded = Loaded(model, processor, task_of(model), has_new_head=False)
            data = training_data(loaded, self.recipe.data, augment=self.recipe.augment, progress=progress)
            model.to(torch_device(self._device))
            teacher = self._teacher(stage.teacher, variant, progress) if follows else None
            options: dict[str, Any] = {"state": folder / SCRATCH / "state", "run": inputs, "progress": progress}
            evaluate = self._evaluator(model, processor, config, progress)
            record = finetune_converted(model, data, stage.config, config, teacher=teacher, evaluate=evaluate, **options)
            self._save_converted(model, processor, folder / "moe", {**read_calibration(converted.folder / "moe"), "measured": None})
            return _summary(record, config)

        self._run(f"finetune.{variant.name}", inputs, work, timed=True)

    def _routers(self, variant: VariantConfig) -> None:
        *_, before_name, name = self._stages_of(variant)
        before = self.done[before_name]
        calibration = self.recipe.convert_of(variant).calibration
        calibration = replace(calibration, seed=calibration.seed + self.seed)
        config = None if self.recipe.routers is None else to_dict(self.recipe.routers)
        inputs = {"stage": "routers", "of": before.key, "data": self._data_id, "routers": config, "calibration": to_dict(calibration)}

        def work(folder: Path, progress: Progress) -> dict[str, Any]:
            model, processor = self._load(before.folder / "moe", progress)
            model.to(torch_device(self._device))
            data = replace(self.recipe.data, window=calibration.window, max_tokens=calibration.max_tokens)
            batches, held_out = hold_out(model, calibration_batches(model, processor, data, progress=progress))
            options: dict[str, Any] = {"target_active": calibration.target_active, "scope": calibration.scope, "progress": progress}
            if self.recipe.routers is None:
                record = recalibrate(model, batches, **options)
            else:
                train_config = replace(self.recipe.routers, seed=self.recipe.routers.seed + self.seed)
                record = train_routers(model, batches, train_config, work=folder / SCRATCH / "routers", **options)
            record["measured"] = measure_converted(model, held_out, progress=progress)
            self._save_converted(model, processor, folder / "moe", {**read_calibration(before.folder / "moe"), **record})
            tokens = sum(num_tokens(batch, tokens_per_image=1) for batch in batches)
            return {"tokens": tokens, **{key: record[key] for key in _CALIBRATED}}

        self._run(name, inputs, work, timed=True)

    def _sweep(self, name: str, converted: Stage, data: DataConfig, *, rule: str | None) -> None:
        config = self.recipe.sweep
        inputs = {
            "stage": "sweep",
            "of": converted.key,
            "data": data_id(data),
            "rule": rule,
            "targets": list(config.targets),
            "metric": self.recipe.metric,
        }

        def work(folder: Path, progress: Progress) -> dict[str, Any]:
            curve = sweep_checkpoint(
                converted.folder / "moe",
                data=data,
                rule=rule,
                targets=config.targets,
                batch_size=config.batch_size,
                dtype=self.recipe.model.dtype,
                device=self._device,
                out=folder / "curve.json",
                progress=progress,
            )
            if curve.metric != self.recipe.metric:
                raise ConfigError(f"the recipe's metric is {self.recipe.metric}, but its model is measured by {curve.metric}.")
            # with a rule, the curve has the point of the checkpoint's own one, too
            points = [to_dict(point) for point in curve.points if rule in (None, point.rule)]
            return {"dense": curve.dense.quality, "points": points}

        self._run(name, inputs, work, timed=False)

    def _sweep_exits(self, name: str, data: DataConfig, *, points: int) -> None:
        dense, heads = self.done["dense"], self.done[ZTW]
        inputs = {"stage": "sweep", "of": heads.key, "data": data_id(data), "points": points}

        def work(_folder: Path, progress: Progress) -> dict[str, Any]:
            model, processor = self._load(dense.folder / "model", progress)
            model.to(torch_device(self._device))
            early = early_exit.load(heads.folder / "heads", model)
            batches = self._batches(model, processor, data, progress)
            return to_dict(early_exit.exits(early, batches, "quantiles", num=points, progress=progress))

        self._run(name, inputs, work, timed=False)

    # -- what the stages share

    def _seeded(self, config: TrainConfig) -> TrainConfig:
        return replace(config, seed=config.seed + self.seed).saving()

    def _start(self, progress: Progress) -> Loaded:
        return start_model(self.recipe, seed=self.seed, progress=progress)

    def _load(self, folder: Path, progress: Progress) -> tuple[Any, Any]:
        return load_model(folder, dtype=torch_dtype(self.recipe.model.dtype), progress=progress)

    def _teacher_key(self, teacher: str, variant: VariantConfig | None) -> str:
        found = self._teacher_stage(teacher, variant)
        return teacher if found is None else found.key

    def _teacher_stage(self, teacher: str, variant: VariantConfig | None) -> Stage | None:
        if teacher == "source":
            return None
        return self.done["dense" if teacher == "dense" or variant is None else f"sparsify.{variant.name}"]

    def _teacher(self, teacher: str, variant: VariantConfig | None, progress: Progress) -> nn.Module:
        found = self._teacher_stage(teacher, variant)
        model: nn.Module = self._start(progress).model if found is None else self._load(found.folder / "model", progress)[0]
        return model.to(torch_device(self._device))

    def _batches(self, model: nn.Module, processor: Any, data: DataConfig, progress: Progress) -> list[dict[str, Tensor]]:
        return evaluation_batches(model, processor, data, batch_size=self.recipe.sweep.batch_size, progress=progress)

    def _evaluator(self, model: nn.Module, processor: Any, config: TrainConfig, progress: Progress) -> Callable[[nn.Module], float] | None:
        """Measures a model in training, where the recipe asks for it."""
        if config.eval_every is None:
            return None
        batches = self._batches(model, processor, self.recipe.validation, progress)
        return lambda trained: measure_quality(trained, batches, metric=self.recipe.metric).value

    def _save_converted(self, model: nn.Module, processor: Any, out: Path, record: Mapping[str, Any]) -> None:
        model.to("cpu")
        card = card_of(model, record, name=out.name)
        save_checkpoint(model, processor, out, calibration=record, card=card, overwrite=True)

    def _converted(self) -> dict[str, Stage]:
        """The last converted model of every variant."""
        return {variant.name: self.done[self._stages_of(variant)[-1]] for variant in self.recipe.variant}

    def _stages_of(self, variant: VariantConfig) -> list[str]:
        """Names of the stages that make a variant's last converted model."""
        kinds = ["sparsify", "convert"]
        if variant.finetune and self.recipe.finetune is not None:
            kinds += ["finetune", "routers"]
        elif variant.finetune and self.recipe.routers is not None:
            kinds.append("routers")
        return [f"{kind}.{variant.name}" for kind in kinds]

    def _main_names(self) -> list[str]:
        """Stages that made the main variant's converted model."""
        main = self.recipe.main
        names = self._stages_of(main)
        teachers: list[str] = [main.teacher] if main.sparsify is not None and main.sparsify.distill is not None else []
        tune = self.recipe.finetune
        teachers += [tune.teacher] if tune is not None and main.finetune and tune.config.distill is not None else []
        return (["dense"] if "dense" in teachers else []) + names

    def _main_tokens(self) -> int:
        """Tokens of the training data that the main variant's stages read."""
        return sum(_tokens(self.done[name]) for name in self._main_names())

    def _trained_tokens(self) -> int:
        """The same without those that conversion itself reads, which MoEfication's conversion reads, too."""
        return self._main_tokens() - _tokens(self.done[f"convert.{self.recipe.main.name}"])

    def _control_steps(self) -> int:
        """Steps of the control: as many as read the tokens that the main variant's stages read together."""
        return self.recipe.train.steps if self.recipe.control.tokens == "train" else self._steps_for(self._main_tokens())

    def _baseline_steps(self) -> int:
        """Steps of a baseline: for at least the tokens that the main variant is trained for."""
        return max(self._control_steps(), self._steps_for(self._trained_tokens()))

    def _steps_for(self, tokens: int) -> int:
        """Steps of [train] that read at least so many tokens, and never less than it has."""
        dense = self.done["dense"].result
        return max(self.recipe.train.steps, math.ceil(tokens * int(dense["steps"]) / int(dense["tokens"])))

    # -- the result

    def found(self) -> dict[str, Any]:
        """What `recipe_result` takes of this seed."""
        main, evaluations = self.recipe.main.name, evaluation_data(self.recipe)
        baseline = [MOEFICATION] if self.recipe.moefication is not None else []

        def quality(name: str, evaluation: str = VALIDATION) -> float | None:
            stage = self.done.get(f"{name}.quality" if name != "start" else name)
            return None if stage is None else stage.result["quality"][evaluation]

        def points(name: str, evaluation: str = VALIDATION) -> list[Any]:
            return sorted(self.done[f"sweep.{name}.{evaluation}"].result["points"], key=lambda point: float(point["ffn_flops_fraction"]))

        def ztw_points(evaluation: str = VALIDATION) -> list[Any]:
            return [] if self.recipe.ztw is None else self.done[f"sweep.{ZTW}.{evaluation}"].result["points"]

        def at_flops(evaluation: str = VALIDATION, *, cost: CostAxis = "ffn_flops_fraction") -> dict[str, dict[str, float | None]]:
            curves = {name: [from_dict(CurvePoint, point) for point in points(name, evaluation)] for name in (*variants, *baseline)}
            return {name: {f"{share:g}": quality_at(curve, share, cost=cost) for share in AT_FLOPS} for name, curve in curves.items()}

        variants = {}
        for variant in self.recipe.variant:
            trained, measured = self.done[f"sparsify.{variant.name}"], self.done[f"sparsify.{variant.name}.quality"].result
            variants[variant.name] = {
                "main": variant.name == main,
                "quality": quality(f"sparsify.{variant.name}"),
                "train_tokens": _tokens(trained),
                "epochs": trained.result["epochs"],
                "train_s": trained.seconds,
                "regress_errors": trained.result["regress_errors"],
                "projection_errors": trained.result.get("projection_errors"),
                "nonzeros_before": self.done["start"].result["nonzeros"],
                **{key: measured[key] for key in ("nonzeros", "active", "neurons", "eps")},
                "converted_dense": self.done[f"sweep.{variant.name}.{VALIDATION}"].result["dense"],
                "points": points(variant.name),
            }
        extra = {
            name: {
                **{key: quality(key, name) for key in ("start", "dense", "control", "moefication")},
                "sparsified": quality(f"sparsify.{main}", name),
                "points": points(main, name),
                "moefication_points": points(MOEFICATION, name) if baseline else [],
                "ztw_points": ztw_points(name),
                "at_flops": at_flops(name),
                "at_all_flops": at_flops(name, cost="flops_fraction"),
                "variants": {
                    variant.name: {"quality": quality(f"sparsify.{variant.name}", name), "points": points(variant.name, name)}
                    for variant in self.recipe.variant
                },
            }
            for name in evaluations
            if name != VALIDATION
        }
        return {
            "seed": self.seed,
            **{key: quality(key) for key in ("start", "dense", "control", "moefication")},
            "sparsified": quality(f"sparsify.{main}"),
            "points": points(main),
            "moefication_points": points(MOEFICATION) if baseline else [],
            "ztw_points": ztw_points(),
            "at_flops": at_flops(),
            "at_all_flops": at_flops(cost="flops_fraction"),
            "variants": variants,
            "extra_evaluations": extra,
            "train_tokens": self._main_tokens(),
            "control_tokens": _tokens(self.done["control"]),
            "main_s": sum(self.done[name].seconds for name in self._main_names()),
        }


def _tokens(stage: Stage) -> int:
    """Tokens of the training data that a stage read."""
    return sum(int(stage.result.get(key, 0)) for key in ("tokens", "regress_tokens", "projection_tokens"))


def task_of(model: nn.Module) -> str:
    """The task of a model's head."""
    return next(name for name, task in TASKS.items() if type(model).__name__.endswith(task.heads))


def _summary(record: TrainRecord, config: TrainConfig) -> dict[str, Any]:
    return {
        "tokens": record.tokens,
        "steps": config.steps,
        "epochs": record.epochs,
        "losses": list(record.losses),
        "evals": [list(pair) for pair in record.evals],
        "parts": list(record.parts),
    }


def _replace_dense(model: nn.Module, processor: Any, out: Path) -> None:
    """Save a model over what a run that was killed here had saved."""
    if out.exists():
        shutil.rmtree(out)
    save_dense(model, processor, out)


def count_nonzeros(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *, progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    """Mean number of neurons that are not zero on a token, by FFN: exactly ("nonzeros"), and by more than "eps" ("active"); of "neurons".

    Cost: forwards of the first 8192 tokens, padding left out.
    """
    inputs = ({key: value for key, value in batch.items() if key != "labels"} for batch in batches)  # nobody reads the loss
    taken = take_tokens(inputs, _PROFILE_TOKENS, tokens_per_image=tokens_per_image(model.config))
    profiles = profile_activations(model, find_ffn_sites(model, example_inputs(model)), taken, eps=_EPS, progress=progress)
    found = {name: profile.summary() for name, profile in profiles.items()}
    return {
        "nonzeros": {name: s["nonzeros_per_token"]["mean"] for name, s in found.items()},
        "active": {name: s["num_neurons"] * (1 - s["near_zero_frac"]) for name, s in found.items()},
        "neurons": {name: float(s["num_neurons"]) for name, s in found.items()},
        "eps": _EPS,
    }
