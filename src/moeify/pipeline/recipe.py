"""What a recipe says: a TOML file as frozen dataclasses, with paths made absolute and options of the command line put in.

A recipe trains a model without enforcement (the control), the same model in one or more variants that become sparse, converts each, tunes
and measures the results, and does the same by MoEfication and, for classifiers, by early exit. `pipeline.run_recipe` carries it out.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from .._config import LATER, did_you_mean, from_dict, to_dict
from ..baselines.ztw import ZTWConfig
from ..convert import ConvertConfig
from ..data import AugmentConfig, DataConfig
from ..errors import ConfigError
from ..routers import MLPRouterConfig
from ..select import RULES, TopK
from ..split import BalancedKMeans
from ..train.calibration import TARGETS
from ..train.finetune import FinetuneConfig
from ..train.fit import RouterTrainConfig
from ..train.loop import TrainConfig
from ..train.regress import RegressConfig
from ..train.sparsify import SparsifyConfig
from .builtin import builtin_recipe, recipe_names
from .convert import CalibrationConfig
from .project import ProjectionsConfig, check_teaching
from .tasks import TASKS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Teacher = Literal["source", "dense", "sparsified"]
Metric = Literal["perplexity", "accuracy"]
MOEFICATION = "moefication"
"""What stages and results of the baseline are called."""
ZTW = "ztw"
"""The same of early exit."""
VALIDATION = "validation"
"""What the measurements on ``[validation]`` are called."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_PART_OF_NAME = re.compile(r"[A-Za-z0-9][\w-]*")  # of names that are joined by dots
_OF_THE_CONTROL = {"steps", "batch_sequences"}  # in the baseline's training, which reads as many tokens as the control's
_C = TypeVar("_C")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that everything starts from: a checkpoint, or an architecture with random weights."""

    source: str | None = None
    """Folder, .gguf file or Hub id."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Instead of a source: model_type and fields of its transformers config; weights are drawn with the recipe's seed."""
    tokenizer: str | None = None
    """With an architecture that reads text: 'bytes', or the folder or Hub id of a tokenizer."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""

    def __post_init__(self) -> None:
        if (self.source is None) == (not self.architecture):
            raise ConfigError("[model] needs either a source or an architecture: --set model.source=PATH gives one.")
        if self.architecture and not isinstance(self.architecture.get("model_type"), str):
            raise ConfigError("[model] architecture needs a model_type, such as 'gpt2'.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Further data that qualities are reported on; nothing is trained, tuned or calibrated with it."""

    name: str
    """What the result calls it."""
    data: DataConfig
    """Where it comes from; all of it is read unless max_tokens says otherwise."""


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """The same model, trained without enforcement."""

    tokens: Literal["recipe", "train"] = "recipe"
    """'recipe': for as many tokens as all stages of the main variant together read of the training data, [train]'s schedule stretched over
    them; 'train': those of [train] alone, so that the control is the dense model."""


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """One way to make the model sparse."""

    name: str
    """What results and folders call it."""
    main: bool = False
    """The variant whose numbers are the recipe's; needed where there are several."""
    train: dict[str, Any] = field(default_factory=dict)
    """Options to change of [train]."""
    sparsify: SparsifyConfig | None = None
    """Activation, enforcement and distillation; none trains the model as it is, with nothing added."""
    regress: RegressConfig | None = None
    """Before training, each FFN is fitted to what the model's former FFN put out; none leaves that out."""
    regress_tokens: int = 40_000
    """Tokens of the training data that regress fits on."""
    projections: ProjectionsConfig | None = field(default=None, metadata=LATER)
    """Before training, linear layers are replaced by MLPs that are distilled from them; training and conversion then have FFNs and MLPs
    alike. None replaces none."""
    teacher: Literal["source", "dense"] = "source"
    """Model that sparsify.distill follows: the one everything starts from, or the one trained without enforcement."""
    convert: dict[str, Any] = field(default_factory=dict)
    """Options to change of [convert]: tables config and calibration."""
    finetune: bool = True
    """Whether [finetune] and [routers] are for this variant, too."""

    def __post_init__(self) -> None:
        if self.regress is not None and self.sparsify is not None and self.sparsify.anneal_frac:
            raise ConfigError(f"variant {self.name}: regress starts with the final activation, so anneal_frac must be 0.")
        if self.projections is not None and self.sparsify is not None:
            check_teaching(self.sparsify.distill)


@dataclass(frozen=True, kw_only=True)
class ConvertStageConfig:
    """How trained models become mixtures of experts."""

    config: ConvertConfig = field(default_factory=ConvertConfig)
    """Experts, routers and rule."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Tokens of the training data that routers and rules are fitted to, and how."""


@dataclass(frozen=True, kw_only=True)
class FinetuneStageConfig:
    """Further training of the converted model."""

    config: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Selection, routers and distillation."""
    train: dict[str, Any] = field(default_factory=dict)
    """Options to change of [train]."""
    teacher: Teacher = "sparsified"
    """Model that config.distill follows: the one everything starts from, the one trained without enforcement, or the variant before its
    conversion."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which points of the converted models are measured."""

    rule: str | None = None
    """Selection rule of the variants; none takes the one that each was converted with, as MoEfication always does."""
    targets: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    """Active fractions, multiples of 0.05; the one that a model's own rule is calibrated to is measured, too."""
    batch_size: int = 16
    """Sequences per forward of every evaluation."""

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule not in RULES:
            raise ConfigError(f"[sweep] rule {self.rule!r} is unknown{did_you_mean(self.rule, RULES)}")
        if not self.targets or any(target != 1 and round(target, 4) not in TARGETS for target in self.targets):
            raise ConfigError(f"[sweep] targets must be multiples of 0.05 up to 1, got {list(self.targets)}.")
        if self.batch_size < 1:
            raise ConfigError(f"[sweep] batch_size must be at least 1, got {self.batch_size}.")


@dataclass(frozen=True, kw_only=True)
class MoeficationConfig:
    """The baseline: static experts of similar weights, a classifier for each layer, the same number of experts for every token."""

    activation: Literal["relu", "keep"] = "relu"
    """ReLU in place of the model's own function, as MoEfication has it, or the model's own."""
    train: dict[str, Any] = field(default_factory=dict)
    """Options to change of [train], but for steps and batch_sequences: it is trained for as many tokens as the main variant."""
    config: ConvertConfig = field(
        default_factory=lambda: ConvertConfig(expert_size=32, router=MLPRouterConfig(), split=BalancedKMeans(), rule=TopK(k=2**31))
    )
    """Experts, routers and rule."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """Options to change of convert.calibration."""


@dataclass(frozen=True, kw_only=True)
class ZTWStageConfig:
    """The other baseline, for classifiers: heads on the dense model, which stays as it is, and examples that leave early."""

    config: ZTWConfig = field(default_factory=ZTWConfig)
    """Heads and their training."""
    tokens: Literal["recipe", "config"] = "recipe"
    """'recipe': both stages of the heads' training together read as many examples as MoEfication's training, whatever steps config has;
    'config': its steps."""
    points: int = 20
    """Thresholds to measure, at least 2."""

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ConfigError(f"[ztw] points must be at least 2, got {self.points}.")


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """A whole experiment."""

    name: str
    """Of the result files."""
    metric: Metric
    """Quality that is reported."""
    task: str | None = None
    """What the model's head does, a key of `TASKS`; none means the checkpoint's own head."""
    seeds: tuple[int, ...] = (0,)
    """Of weights, order of data and conversion; everything is done once for each."""
    model: ModelConfig
    """What everything starts from."""
    data: DataConfig
    """Training data, also for routers and rules; all of it unless max_tokens says otherwise."""
    validation: DataConfig
    """What qualities are measured on; all of it unless max_tokens says otherwise."""
    extra_evaluation: tuple[EvaluationConfig, ...] = ()
    """Further data to report on."""
    augment: AugmentConfig | None = None
    """Variations of training images; none shows them as they are."""
    train: TrainConfig
    """Training of the control and of every variant. States are saved every save_every steps; where that is not given 20 times,
    or less often if it would take much of the time."""
    control: ControlConfig = field(default_factory=ControlConfig)
    """How long the control is trained."""
    variant: tuple[VariantConfig, ...]
    """Ways to make the model sparse, at least one."""
    convert: ConvertStageConfig = field(default_factory=ConvertStageConfig)
    """Conversion of the variants."""
    finetune: FinetuneStageConfig | None = None
    """Training of the converted variants; none leaves it out."""
    routers: RouterTrainConfig | None = None
    """Routers of the converted (and tuned) variants fitted anew; none keeps them."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Points to measure."""
    moefication: MoeficationConfig | None = None
    """The baseline; none leaves it out."""
    ztw: ZTWStageConfig | None = None
    """Early exit; none leaves it out."""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ConfigError(f"name {self.name!r} must be letters, digits, '_', '-' and '.', to name files.")
        if self.task is not None and self.task not in TASKS:
            raise ConfigError(f"task {self.task!r} is unknown{did_you_mean(self.task, TASKS)}")
        if self.task is not None:
            self.check_task(self.task)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds must be different integers >= 0, at least one, got {list(self.seeds)}.")
        if not self.variant:
            raise ConfigError("a recipe needs at least one [[variant]].")
        for kind, names, taken in (
            ("variant", [v.name for v in self.variant], MOEFICATION),
            ("variant", [v.name for v in self.variant], ZTW),
            ("extra_evaluation", [e.name for e in self.extra_evaluation], VALIDATION),
        ):
            if bad := next((name for name in names if not _PART_OF_NAME.fullmatch(name)), None):
                raise ConfigError(f"[[{kind}]] name {bad!r} must be letters, digits, '_' and '-'.")
            if taken in map(str.lower, names):
                raise ConfigError(f"[[{kind}]] name {taken!r} is that of [{taken}]; choose another.")
            if len(set(names)) != len(names):
                raise ConfigError(f"[[{kind}]] names must differ, got {names}.")
        if self.ztw is not None and self.metric != "accuracy":
            raise ConfigError(f"[ztw] is for classifiers, measured by accuracy; this recipe's metric is {self.metric}.")
        if len(self.variant) > 1 and sum(v.main for v in self.variant) != 1:
            raise ConfigError("exactly one [[variant]] must have main = true.")
        for variant in self.variant:  # what is wrong in an exception shows now, not hours later
            self.train_of(variant)
            self.convert_of(variant)
        if self.finetune is not None:
            merged(self.train, self.finetune.train, where="finetune.train")
        if self.moefication is not None:
            merged(self.train, self.moefication.train, where="moefication.train")
            if fixed := _OF_THE_CONTROL & set(self.moefication.train):
                raise ConfigError(f"[moefication] train cannot change {min(fixed)}: the baseline is trained for the control's tokens.")
            merged(self.convert.calibration, self.moefication.calibration, where="moefication.calibration")

    def check_task(self, task: str) -> None:
        """Refuse a task that the metric is not of."""
        if TASKS[task].metric not in get_args(Metric):
            raise ConfigError(f"there are no recipes for {task}; moeify sparsify, convert and sweep do the steps one by one.")
        if TASKS[task].metric != self.metric:
            raise ConfigError(f"the metric of a recipe for {task} is {TASKS[task].metric}, not {self.metric}.")

    @property
    def main(self) -> VariantConfig:
        """The variant whose numbers are the recipe's."""
        return next((variant for variant in self.variant if variant.main), self.variant[0])

    def train_of(self, variant: VariantConfig) -> TrainConfig:
        """Training of a variant: [train] with its changes."""
        return merged(self.train, variant.train, where=f"variant {variant.name}: train")

    def convert_of(self, variant: VariantConfig) -> ConvertStageConfig:
        """Conversion of a variant: [convert] with its changes."""
        return merged(self.convert, variant.convert, where=f"variant {variant.name}: convert")


def merged(config: _C, changes: Mapping[str, Any], *, where: str) -> _C:
    """A config with some options changed; tables are merged, but for tagged ones of another name, which take their place.

    Raises:
        ConfigError: as `from_dict`.
    """
    return from_dict(type(config), _merged(to_dict(config), changes), where=where)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(old)
    for key, value in new.items():
        before = result.get(key)
        same = isinstance(before, Mapping) and isinstance(value, Mapping) and value.get("name", before.get("name")) == before.get("name")
        result[key] = _merged(before, value) if same else value  # type: ignore[arg-type]
    return result


def read_recipe(path: str | Path, *, settings: Iterable[str] = (), smoke: bool = False) -> RecipeConfig:
    """Read a recipe file.

    Args:
        path: TOML file, or the name of one that moeify brings along; a path in it that exists relative to the file's folder is meant so.
        settings: "dotted.path=value" each, put in over what the file has; a value is TOML, or else a string as it stands. Entries of a
            list are named by their ``name`` or by number: "variant.relu.train.lr=1e-4".
        smoke: shrink every stage to seconds (`shrunk`): whether a recipe runs through, not what it gives.

    Raises:
        ConfigError: not a file, not TOML, or an option that is unknown, missing, of the wrong type or out of range.
    """
    raw = read_toml(path, settings, places=(("model", "source"), ("model", "tokenizer"), ("data", "data"), ("validation", "data")))
    for data in (raw.get("data"), raw.get("validation"), *(e.get("data") for e in _tables(raw.get("extra_evaluation")))):
        if isinstance(data, dict):
            data.setdefault("max_tokens", None)  # which TOML has no word for; a sample by default is for commands, not for experiments
    recipe = from_dict(RecipeConfig, raw, where=str(path))
    return shrunk(recipe) if smoke else recipe


def read_toml(path: str | Path, settings: Iterable[str], *, places: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A TOML file with settings put in, paths made absolute.

    Args:
        path: the file, or the name of one that moeify brings along (`builtin_recipe`), if there is no such file.
        settings: as in `read_recipe`.
        places: (table, key) of what may be a path relative to the file's folder.

    Raises:
        ConfigError: not a file, not TOML, or a setting that names nothing.
    """
    path = Path(path)
    try:
        if not path.is_file():
            path = builtin_recipe(path.as_posix()) or path
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = f"; built in are {', '.join(recipe_names())}" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"cannot read the recipe '{path}': {error.strerror}{known}.") from None
    except ValueError as error:  # TOML's errors and those of the encoding
        raise ConfigError(f"'{path}' is not TOML: {error}") from None
    _make_absolute(raw, path.parent, places)
    for setting in settings:
        _put(raw, setting)
    return raw


def is_name(text: str) -> bool:
    """Whether files may be called so."""
    return _NAME.fullmatch(text) is not None


def _make_absolute(raw: Mapping[str, Any], base: Path, named: Iterable[tuple[str, str]]) -> None:
    """Paths relative to the recipe's folder; Hub ids, builtin data and paths that do not exist stay as they are."""
    places = [(raw.get(table), key) for table, key in named]
    places += [(extra.get("data"), "data") for extra in _tables(raw.get("extra_evaluation"))]
    for table, key in places:
        if isinstance(table, dict) and isinstance(table.get(key), str) and (base / table[key]).exists():
            table[key] = str((base / table[key]).resolve())


def _tables(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _put(raw: dict[str, Any], setting: str) -> None:
    """Put one "dotted.path=value" into the parsed file."""
    name, equals, text = setting.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"--set takes dotted.name=value, got {setting!r}.")
    place: Any = raw
    for depth, key in enumerate(keys[:-1]):
        if isinstance(place, list):
            place = place[_index(place, key, name)]
        else:
            place = place.setdefault(key, {})
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"--set {name}: {'.'.join(keys[: depth + 1])} is a value, not a table.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text
    place[_index(place, keys[-1], name) if isinstance(place, list) else keys[-1]] = value


def _index(entries: list[Any], key: str, name: str) -> int:
    """Where the entry called ``key`` stands in a list of tables."""
    names = [str(entry.get("name")) if isinstance(entry, dict) else "" for entry in entries]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(entries):
        return int(key)
    raise ConfigError(f"--set {name}: no entry {key!r}{did_you_mean(key, names)}")


def shrunk(recipe: RecipeConfig) -> RecipeConfig:
    """The same recipe, under another name, with so few steps, tokens and points that every stage takes seconds."""

    def few(train: TrainConfig) -> dict[str, Any]:
        return {
            "steps": min(4, train.steps),
            "warmup_steps": min(1, train.warmup_steps),
            "batch_sequences": min(4, train.batch_sequences),
            "micro_sequences": None,
            "save_every": None,
            "eval_every": None,
        }

    def short(data: DataConfig, tokens: int) -> DataConfig:
        return replace(data, window=min(data.window, 64), max_tokens=min(tokens, data.max_tokens or tokens))

    def changed(changes: Mapping[str, Any]) -> dict[str, Any]:
        return {**changes, **few(merged(recipe.train, changes, where="train"))} if changes else {}

    def heads(config: ZTWConfig) -> ZTWConfig:
        train, ensemble = (replace(stage, **few(stage)) for stage in (config.train, config.ensemble))
        return replace(config, train=train, ensemble=ensemble, hidden=min(32, config.hidden or 32), views=1)

    calibration = recipe.convert.calibration
    calibration = replace(
        calibration,
        max_tokens=min(4096, calibration.max_tokens or 4096),
        window=min(64, calibration.window),
        router=replace(calibration.router, epochs=1),
    )
    targets = tuple(target for target in (0.2, 0.5, 1.0) if target in recipe.sweep.targets) or recipe.sweep.targets[:2]
    return replace(
        recipe,
        name=f"{recipe.name}_smoke",
        data=short(recipe.data, 16_384),
        validation=short(recipe.validation, 1024),
        extra_evaluation=tuple(replace(extra, data=short(extra.data, 1024)) for extra in recipe.extra_evaluation),
        train=replace(recipe.train, **few(recipe.train)),
        variant=tuple(
            replace(
                variant,
                train=changed(variant.train),
                regress=None if variant.regress is None else replace(variant.regress, epochs=1),
                regress_tokens=min(2048, variant.regress_tokens),
                projections=None
                if variant.projections is None
                else replace(variant.projections, epochs=1, tokens=min(2048, variant.projections.tokens)),
                convert={key: value for key, value in variant.convert.items() if key != "calibration"},
            )
            for variant in recipe.variant
        ),
        convert=replace(recipe.convert, calibration=calibration),
        finetune=None
        if recipe.finetune is None
        else replace(recipe.finetune, train=changed({"lr": recipe.train.lr, **recipe.finetune.train})),
        routers=None if recipe.routers is None else replace(recipe.routers, epochs=1),
        sweep=replace(recipe.sweep, targets=targets, batch_size=4),
        moefication=None
        if recipe.moefication is None
        else replace(
            recipe.moefication,
            train={key: value for key, value in changed(recipe.moefication.train).items() if key not in _OF_THE_CONTROL},
            calibration={},
        ),
        ztw=None if recipe.ztw is None else replace(recipe.ztw, config=heads(recipe.ztw.config), points=min(4, recipe.ztw.points)),
    )
