"""Strict dataclasses from and to JSON: what is refused, how it is named, and what survives the round trip."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import pytest

from moeify._config import LATER, did_you_mean, field_docs, from_dict, from_tagged, lookup, to_dict
from moeify.convert import ConvertConfig
from moeify.data import DataConfig
from moeify.errors import CheckpointError, ConfigError, DataError, KernelError, MoeifyError, TrainingError, UnsupportedModelError
from moeify.manifest import Manifest, SiteRecord
from moeify.pipeline import CalibrationConfig
from moeify.routers import ROUTERS
from moeify.select import RULES
from moeify.sites import FFNSite
from moeify.split import SPLITS
from moeify.ssd import ControllerState, Decision, Probe, Signals, SSDConfig, SwitchRecord
from moeify.train.distill import DistillConfig
from moeify.train.fit import RouterTrainConfig
from moeify.train.loop import TrainConfig, TrainRecord
from moeify.train.sparsify import SparsifyConfig


@dataclass(frozen=True, kw_only=True)
class Small:
    """A part."""

    size: int = 1
    """How large."""


@dataclass(frozen=True, kw_only=True)
class Red:
    name: ClassVar[str] = "red"

    depth: float = 0.5
    """How deep."""

    def __post_init__(self):
        if self.depth < 0:
            raise ValueError(f"depth must not be negative, got {self.depth}.")


@dataclass(frozen=True, kw_only=True)
class Blue:
    name: ClassVar[str] = "blue"

    size: int
    """How large."""


@dataclass(frozen=True, kw_only=True)
class Everything(Small):
    """All kinds of fields."""

    ratio: float = 1.0
    """A number,
    over two lines."""
    word: str = "a"
    """A string."""
    flag: bool = False
    """A switch."""
    maybe: int | None = None
    """Perhaps a number."""
    choice: Literal["x", "y"] = "x"
    """One of two."""
    many: tuple[int, ...] = ()
    """Some numbers."""
    pair: tuple[str, int] = ("a", 1)
    """Two things."""
    part: Small = field(default_factory=Small)
    """A config."""
    colour: Red | Blue = field(default_factory=Red)
    """A tagged config."""
    table: dict[str, float] = field(default_factory=dict)
    """Numbers by name."""
    parts: tuple[Small, ...] = ()
    """Configs."""
    number_or_word: int | str = 0
    """Either."""
    anything: Any = None
    """Whatever."""
    undocumented: int = 0


FULL = Everything(
    size=3, ratio=0.25, word="b", flag=True, maybe=4, choice="y", many=(1, 2), pair=("c", 5), part=Small(size=6), colour=Blue(size=7),
    table={"k": 1.5}, parts=(Small(), Small(size=8)), number_or_word="nine", anything=[1, {"a": None}],
)  # fmt: skip


def test_round_trip_through_json_gives_an_equal_object():
    for value in (Everything(), FULL):
        assert from_dict(Everything, json.loads(json.dumps(to_dict(value)))) == value
    assert to_dict(FULL)["colour"] == {"name": "blue", "size": 7}
    assert from_dict(Everything, {}) == Everything()


@dataclass(frozen=True, kw_only=True)
class Grown:
    """A config that got a field later."""

    old: int = 1
    """There from the start, and written always."""
    new: dict[str, int] = field(default_factory=dict, metadata=LATER)
    """Written where it says something."""
    newer: int = field(default=2, metadata=LATER)
    """The same."""


def test_to_dict_leaves_later_fields_out_where_they_have_their_default():
    assert to_dict(Grown()) == {"old": 1}
    full = Grown(old=0, new={"a": 1}, newer=0)
    assert to_dict(full) == {"old": 0, "new": {"a": 1}, "newer": 0}
    for value in (Grown(), full):
        assert from_dict(Grown, to_dict(value)) == value


WRONG = [
    pytest.param({"rtaio": 1}, "unknown option 'rtaio' of Everything; did you mean 'ratio'?", id="unknown key, one near"),
    pytest.param({"zzzzzz": 1}, "unknown option 'zzzzzz' of Everything; known: size, ratio, ", id="unknown key, none near"),
    pytest.param({"size": "1"}, "Everything.size must be int, got '1'.", id="string for int"),
    pytest.param({"size": 1.0}, "Everything.size must be int, got 1.0.", id="float for int"),
    pytest.param({"size": True}, "Everything.size must be int, got True.", id="bool for int"),
    pytest.param({"ratio": True}, "Everything.ratio must be float, got True.", id="bool for float"),
    pytest.param({"ratio": None}, "Everything.ratio must be float, got None.", id="null for float"),
    pytest.param({"flag": 1}, "Everything.flag must be bool, got 1.", id="int for bool"),
    pytest.param({"word": 1}, "Everything.word must be str, got 1.", id="int for str"),
    pytest.param({"maybe": "x"}, "Everything.maybe must be int, got 'x'.", id="string for optional int"),
    pytest.param({"choice": "z"}, "Everything.choice must be one of 'x', 'y', got 'z'.", id="not a choice"),
    pytest.param({"many": 3}, "Everything.many must be a list, got 3.", id="number for list"),
    pytest.param({"many": [1, "b"]}, "Everything.many[1] must be int, got 'b'.", id="wrong item"),
    pytest.param({"pair": ["a"]}, "Everything.pair must have 2 items, got 1.", id="too few items"),
    pytest.param({"pair": [1, 1]}, "Everything.pair[0] must be str, got 1.", id="wrong item of a pair"),
    pytest.param({"part": 3}, "Everything.part: Small must be a JSON object, got int.", id="number for config"),
    pytest.param({"part": {"sizes": 3}}, "Everything.part: unknown option 'sizes' of Small; did you mean 'size'?", id="unknown key inside"),
    pytest.param({"parts": [{}, {"size": "x"}]}, "Everything.parts[1]: Small.size must be int, got 'x'.", id="wrong type inside a list"),
    pytest.param({"colour": {"name": "rde"}}, "Everything.colour: unknown name 'rde'; did you mean 'red'?", id="unknown tag"),
    pytest.param({"colour": {"depth": 1.0}}, "Everything.colour: unknown name None", id="no tag"),
    pytest.param({"colour": {"name": "blue"}}, "Everything.colour: Blue lacks 'size'.", id="missing field"),
    pytest.param(
        {"colour": {"name": "red", "depth": -1}}, "Everything.colour: depth must not be negative, got -1.0.", id="refused by the class"
    ),
    pytest.param({"table": [1]}, "Everything.table must be an object, got [1].", id="list for object"),
    pytest.param({"table": {"a": "b"}}, "Everything.table['a'] must be float, got 'b'.", id="wrong value in an object"),
    pytest.param({"number_or_word": []}, "Everything.number_or_word must be int, got [].", id="none of a union"),
]


@pytest.mark.parametrize(("data", "message"), WRONG)
def test_from_dict_of_bad_data_names_the_field_and_the_way_out(data, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(Everything, data, where="file.json")
    assert str(caught.value).startswith(f"file.json: {message}")


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_from_dict_of_no_object_is_an_error(data):
    with pytest.raises(ConfigError, match="Everything must be a JSON object"):
        from_dict(Everything, data)
    with pytest.raises(ConfigError, match="expected a JSON object with a 'name'"):
        from_tagged({"red": Red}, data)


def test_an_integer_is_taken_as_a_float_and_becomes_one():
    assert isinstance(from_dict(Everything, {"ratio": 2}).ratio, float)
    assert from_dict(Everything, {"number_or_word": 2}).number_or_word == 2


def test_a_tag_may_be_given_to_its_own_class_but_no_other():
    assert from_dict(Red, {"name": "red", "depth": 1.0}) == Red(depth=1.0)
    with pytest.raises(ConfigError, match="name must be 'red' for Red"):
        from_dict(Red, {"name": "blue"})


def test_lookup_names_the_nearest():
    assert lookup({"abc": 1}, "abc") == 1
    with pytest.raises(ConfigError, match=r"--x: unknown name 'abd'; did you mean 'abc'\?"):
        lookup({"abc": 1, "xyz": 2}, "abd", where="--x")
    with pytest.raises(ConfigError, match=r"unknown name \['a'\]"):
        lookup({"abc": 1}, ["a"])
    assert did_you_mean("q", ["abc", "xyz"]) == "; known: abc, xyz."


def test_to_dict_refuses_what_json_has_not():
    with pytest.raises(ConfigError, match="object is not a JSON value"):
        to_dict(Everything(anything=object()))


def test_field_docs_are_the_docstrings_under_the_fields_those_of_bases_too():
    docs = field_docs(Everything)
    assert docs["size"] == "How large."
    assert docs["ratio"] == "A number,\nover two lines."
    assert "undocumented" not in docs


CONFIGS = [
    ConvertConfig, SiteRecord, Manifest, FFNSite, DataConfig, CalibrationConfig, RouterTrainConfig, TrainConfig, TrainRecord,
    DistillConfig, SparsifyConfig, SSDConfig, ControllerState, Decision, Signals, Probe, SwitchRecord,
    *(config for config, _ in ROUTERS.values()), *RULES.values(), *SPLITS.values(),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_every_field_of_every_config_is_documented_and_frozen(config):
    assert {f.name for f in fields(config)} <= set(field_docs(config))
    assert config.__dataclass_params__.frozen


@pytest.mark.parametrize("table", [{n: c for n, (c, _) in ROUTERS.items()}, RULES, SPLITS], ids=["routers", "rules", "splits"])
def test_every_class_of_a_table_stands_under_its_own_name(table: Mapping[str, type]):
    assert [config.name for config in table.values()] == list(table)


@pytest.mark.parametrize("error", [ConfigError, UnsupportedModelError, CheckpointError, DataError])
def test_errors_about_arguments_are_value_errors(error):
    assert issubclass(error, ValueError)
    assert issubclass(error, MoeifyError)
    assert not issubclass(KernelError, ValueError)
    assert not issubclass(TrainingError, ValueError)
    assert issubclass(KernelError, RuntimeError)
