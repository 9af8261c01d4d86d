"""Whatever the library writes as JSON it reads back equal, and a key that it does not know is named, at any depth.

Values are drawn from the fields' own types, so that a new field is covered as soon as it exists.
"""

import copy
import dataclasses
import json
import string
import types
import typing

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from moeify._config import from_dict, from_tagged, to_dict
from moeify.convert import ConvertConfig
from moeify.data import AugmentConfig, DataConfig
from moeify.errors import CheckpointError, ConfigError, DataError
from moeify.evaluate import METRICS
from moeify.evaluate.sweep import Curve, CurvePoint, DenseQuality
from moeify.manifest import SCHEMA, Manifest, SiteRecord
from moeify.pipeline import CalibrationConfig
from moeify.presets import Preset
from moeify.routers import ROUTERS
from moeify.select import RULES, Threshold, TopK
from moeify.sites import FFNSite, ProjectionPart, ProjectionRecord
from moeify.sparsity.profile import ActivationProfile
from moeify.split import SPLITS
from moeify.train.distill import DistillConfig
from moeify.train.fit import RouterTrainConfig
from moeify.train.loop import TrainConfig

PLAIN = string.ascii_letters + string.digits  # drawn from a list: a regular expression first sorts all of Unicode, for 20 s
TABLES = {"rules": RULES, "splits": SPLITS, "routers": {name: config for name, (config, _) in ROUTERS.items()}}
TAGGED = [cls for table in TABLES.values() for cls in table.values()]
UNTAGGED = [
    Manifest,
    SiteRecord,
    FFNSite,
    ConvertConfig,
    CurvePoint,
    DenseQuality,
    RouterTrainConfig,
    CalibrationConfig,
    DataConfig,
    AugmentConfig,
    TrainConfig,
    DistillConfig,
    Preset,
]

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**20) | finite | st.text(max_size=5),  # beyond, a manifest is refused for its sizes
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
# Valid wherever nothing else is said: not 0, not 1, not empty.
SCALARS = {
    int: st.integers(2, 2**20),  # a manifest has no larger sizes
    float: st.floats(0, 1, exclude_min=True, exclude_max=True),
    str: st.text(min_size=1, max_size=12),
    bool: st.booleans(),
}
policies = st.dictionaries(
    st.sampled_from(["re:.*", r"re:model\.layers\.\d+\.mlp", "model.layers.0.mlp", "", "é"]),
    st.none() | st.dictionaries(st.text(max_size=8), json_values, max_size=3),
    max_size=3,
)
# Parts must be all outputs, each once.
projections = st.sampled_from(
    [
        ProjectionRecord(name="a.q", role="q", d_in=8, d_out=4, width=3, bias=True),
        ProjectionRecord(
            name="a.qkv",
            d_in=8,
            d_out=12,
            activation="gelu",
            bias=False,
            parts=(
                ProjectionPart(name="q", rows=((0, 2, 6, 2),), width=2),
                ProjectionPart(name="k", rows=((2, 2, 6, 2),), width=None),
                ProjectionPart(name="v", rows=((4, 2, 6, 2),), width=3),
            ),
        ),
    ]
)
SPECIAL = {
    Manifest: {"schema": st.integers(1, SCHEMA), "projections": st.lists(projections, max_size=2).map(tuple), "presets": st.just(())},
    Preset: {  # within a manifest its layers must be there, too: tests/unit/test_presets.py
        "name": st.builds("{}{}-x".format, st.sampled_from(PLAIN), st.text(PLAIN + "._-", max_size=8)),  # no number, nor a reserved word
        "rules": st.dictionaries(st.text(max_size=5), st.sampled_from([TopK(k=2), Threshold(theta=0.5)]), min_size=1, max_size=3),
        "asked": st.dictionaries(st.text(max_size=5), finite, max_size=2),
    },
    ConvertConfig: {"policy": policies},
    CurvePoint: dict.fromkeys(("value", "flops_fraction", "quality", "quality_ratio"), finite),
    DenseQuality: {"quality": finite},
}


def configs(cls):
    """Any valid instance of a config dataclass: every field is drawn, none left at its default."""
    hints, special = typing.get_type_hints(cls), SPECIAL.get(cls, {})
    return st.builds(cls, **{f.name: special[f.name] if f.name in special else values_of(hints[f.name]) for f in dataclasses.fields(cls)})


def values_of(hint):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in SCALARS:
        return SCALARS[hint]
    if hint is type(None):
        return st.none()
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, args))
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple and args[1:] == (Ellipsis,):
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    assert dataclasses.is_dataclass(hint), f"no values for a field of type {hint}"
    return configs(hint)


def through_json(value):
    return json.loads(json.dumps(value))


def objects_of(data, cls):
    """(object, its class) of every object in the JSON of a ``cls`` that stands for a dataclass; free-form ones are left out."""
    by_tag = {kind.name: kind for kind in TAGGED}

    def walk(value, hint):
        if isinstance(value, list):
            for item in value:
                yield from walk(item, typing.get_args(hint)[0])
        elif isinstance(value, dict):
            kinds = [k for k in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(k)]
            for kind in kinds if len(kinds) == 1 else [by_tag[value["name"]]] if kinds else []:
                yield value, kind
                hints = typing.get_type_hints(kind)
                for key, inner in value.items():
                    yield from walk(inner, hints.get(key))

    return list(walk(data, cls))


def with_unknown_key(data, draw, cls):
    """A copy of ``data`` with one key too many in one of its objects, and that key."""
    data = copy.deepcopy(data)
    broken, kind = draw(st.sampled_from(objects_of(data, cls)))
    known = {f.name for f in dataclasses.fields(kind)} | {"name"}
    key = draw((st.sampled_from(sorted(known)).map(lambda k: k + "s") | st.text(max_size=8)).filter(lambda k: k not in known))
    broken[key] = draw(json_values)
    return data, key


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_entry_of_a_table_comes_back_by_its_name(table, data):
    name = data.draw(st.sampled_from(sorted(table)))
    config = data.draw(configs(table[name]))
    written = through_json(to_dict(config))
    assert written["name"] == name
    assert from_tagged(table, written) == config
    assert type(from_tagged(table, written)) is table[name]


@pytest.mark.parametrize("cls", UNTAGGED)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_config_comes_back_equal(cls, data):
    config = data.draw(configs(cls))
    assert from_dict(cls, through_json(to_dict(config))) == config


@pytest.mark.parametrize("cls", [*TAGGED, *UNTAGGED])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_unknown_key_at_any_depth_is_named(cls, data):
    written, key = with_unknown_key(through_json(to_dict(data.draw(configs(cls)))), data.draw, cls)
    with pytest.raises(ConfigError) as caught:
        from_dict(cls, written)
    assert f"unknown option {key!r}" in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(configs(Manifest))
def test_manifest_comes_back_equal(manifest):
    assert Manifest.from_dict(through_json(manifest.to_dict())) == manifest


@settings(deadline=None, max_examples=60)
@given(manifest=configs(Manifest), data=st.data())
def test_manifest_with_an_unknown_key_is_a_bad_checkpoint(manifest, data):
    written, key = with_unknown_key(through_json(manifest.to_dict()), data.draw, Manifest)
    with pytest.raises(CheckpointError) as caught:
        Manifest.from_dict(written, where="moeify.json")
    assert str(caught.value).startswith("moeify.json: ")
    assert f"unknown option {key!r}" in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(config=configs(ConvertConfig), data=st.data())
def test_policy_with_whole_configs_is_those_configs_after_json(config, data):
    there = dataclasses.replace(data.draw(configs(ConvertConfig)), policy={})
    change = {key: value for key, value in to_dict(there).items() if key != "policy"}
    config = from_dict(ConvertConfig, through_json(to_dict(dataclasses.replace(config, policy={"re:x": None, "a": change}))))
    assert config.for_site("a") == there
    assert config.for_site("x") is None
    assert config.for_site("b") == config
    written, key = with_unknown_key(change, data.draw, ConvertConfig)
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config, policy={"a": written}).for_site("a")
    assert f"unknown option {key!r}" in str(caught.value)


OWN_KEYS = {"schema", "model", "metric", "dense", "points", "calibrated", "cost", "versions"}
curves = st.builds(
    Curve,
    model=st.text(max_size=8),
    metric=st.sampled_from(sorted(METRICS)),
    dense=configs(DenseQuality),
    points=st.lists(configs(CurvePoint), max_size=3).map(tuple),
    extra=st.dictionaries(
        st.text(max_size=8).filter(
            lambda key: key not in ("schema", "model", "metric", "dense", "points", "calibrated", "cost", "versions")
        ),
        json_values,
        max_size=3,
    ),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("curve") / "curve.json"


@settings(deadline=None, max_examples=40)
@given(curve=curves)
def test_curve_comes_back_from_its_file(path, curve):
    curve.write(path)
    assert Curve.read(path) == curve
    assert Curve.read(path).is_same_run(curve)


@settings(deadline=None, max_examples=40)
@given(curve=curves, data=st.data())
def test_curve_whose_point_has_an_unknown_key_is_refused(path, curve, data):
    written = through_json(curve.to_json())
    part = data.draw(st.sampled_from(["dense", *range(len(curve.points))]))
    if part == "dense":
        written["dense"], key = with_unknown_key(written["dense"], data.draw, DenseQuality)
    else:
        written["points"][part], key = with_unknown_key(written["points"][part], data.draw, CurvePoint)
    path.write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        Curve.read(path)
    assert f"unknown option {key!r}" in str(caught.value)


@settings(deadline=None, max_examples=25)
@given(neurons=st.integers(1, 6), tokens=st.integers(0, 40), seed=st.integers(0, 99), eps=st.floats(0, 1), pairs=st.booleans())
def test_profile_comes_back_equal(neurons, tokens, seed, eps, pairs):
    rng = torch.Generator().manual_seed(seed)
    profile = ActivationProfile(neurons, eps=eps, coactivation=pairs)
    if tokens:
        profile.update(torch.randn(tokens, neurons, generator=rng).relu(), torch.rand(neurons, generator=rng))
    written = through_json(profile.to_json_dict())
    again = ActivationProfile.from_json_dict(written, tensors=profile.tensors())
    assert again.to_json_dict() == profile.to_json_dict()
    assert again.tensors().keys() == profile.tensors().keys()
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in profile.tensors().items())
