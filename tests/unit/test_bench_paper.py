"""The paper's figures: the authors' accounting, fingerprints, missing inputs, the page."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from bench.paper import figures, measure
from bench.paper.__main__ import main
from bench.paper.accounting import authors_flops_fractions, cost_ratio
from bench.paper.code import check_stages, checksum, library_code
from bench.paper.draw import _density, draw_curves, draw_histograms
from bench.paper.figures import FIGURES, make_figure, read_figure, stated
from bench.paper.inputs import INPUTS, check_needs, find_inputs, write_stand_ins
from bench.paper.measure import Finished, Run, measured_curves
from bench.paper.page import NOTES, check_page, page_text, write_page
from bench.paper.recipes import HERE, WEIGHTS, Curve, experiment, pretraining
from moeify._config import to_dict
from moeify.data import DataConfig, read_texts
from moeify.errors import CheckpointError, ConfigError, DataError
from moeify.evaluate import CurvePoint
from moeify.pipeline.stages import Stage, key_of
from moeify.sites import FFNSite


def test_what_cannot_be_run_is_one_line(tmp_path, capsys):
    (tmp_path / "emotion").mkdir()
    (tmp_path / "minilm").mkdir()
    for options, message in (
        (["--figure", "11", "--inputs", str(tmp_path)], "emotion"),
        (["--figure", "5", "--smoke", "--device", "warp"], "warp"),
    ):
        assert main([*options, "--out", str(tmp_path / options[1])]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert sum(line.startswith("error: ") for line in error.splitlines()) == 1


# -- accounting


def point(active, ffn, whole):
    return CurvePoint(
        rule="dynk_max", value=0.1, active_fraction=active, ffn_flops_fraction=ffn, flops_fraction=whole, quality=1.0, quality_ratio=1.0
    )


def site(**changes):
    base = {"name": "mlp", "up": "mlp.up", "down": "mlp.down", "activation": "relu", "d_model": 96, "d_ff": 384, "d_out": 96}
    return FFNSite(**{**base, **changes})


@pytest.mark.parametrize(
    ("size", "gated", "extra"),
    [
        pytest.param(1, False, 0.5, id="one neuron: half an expert"),
        pytest.param(4, False, 0.125, id="four"),
        pytest.param(32, False, 1 / 64, id="thirty-two"),
        pytest.param(4, True, 1 / 12, id="gated: three projections"),
    ],
)
def test_the_authors_count_d_more_for_each_expert(size, gated, extra):
    sites = [site(gate="mlp.gate" if gated else None)] * 3
    cost = {"ffn_dense": 60.0, "ffn_unconverted": 0.0, "router": 6.0, "experts": 60.0}
    ffn, whole = authors_flops_fractions(point(0.4, 0.5, 0.7), cost, sites, [384 // size] * 3, dense_flops=100.0)
    assert ffn == pytest.approx(0.5 + 0.4 * extra)
    assert whole == pytest.approx(0.7 + 0.6 * 0.4 * extra)


def test_the_authors_count_of_ffns_and_projections_is_a_sum_over_layers():
    """Layers that run different shares of their experts, counted one by one."""
    names = ("q", "k")
    ffns, mlps = [site(name="a"), site(name="b")], [site(name=name, d_ff=48) for name in names]
    active, experts = {"a": 0.2, "b": 0.6, "q": 0.9, "k": 0.5}, {"a": 96, "b": 96, "q": 12, "k": 12}
    dense = {s.name: 2 * 2 * 96 * s.d_ff for s in (*ffns, *mlps)}
    router = {"a": 1000, "b": 1000, "q": 300, "k": 300}
    layers = 2 * 96 * 96 * len(names)  # what the MLPs replaced; ours cost as much
    ffn_dense, dense_flops = dense["a"] + dense["b"] + layers, 4e5
    executed = {name: active[name] * dense[name] + router[name] for name in active}
    in_projections = sum(executed[name] for name in names)
    found = replace(point(0.5, sum(executed.values()) / ffn_dense, 0.8), projection_flops_fraction=in_projections / layers)
    cost = {"ffn_dense": ffn_dense, "ffn_unconverted": 0.0, "router": 2000.0, "experts": dense["a"] + dense["b"]}
    cost |= {"projections_dense": layers, "projections": sum(dense[name] + router[name] for name in names)}
    counts = [experts[s.name] for s in (*ffns, *mlps)]
    ffn, whole = authors_flops_fractions(found, cost, [*ffns, *mlps], counts, dense_flops=dense_flops, replaced=set(names))
    added = sum(2 * 96 * active[name] * experts[name] for name in active)
    assert ffn == pytest.approx(found.ffn_flops_fraction + added / ffn_dense)
    assert whole == pytest.approx(found.flops_fraction + added / dense_flops)


def test_ffns_whose_experts_add_unequal_shares_are_refused():
    cost = {"ffn_dense": 60.0, "ffn_unconverted": 0.0, "router": 6.0, "experts": 60.0}
    with pytest.raises(ValueError, match="differ in what their experts add"):
        authors_flops_fractions(point(0.4, 0.5, 0.7), cost, [site(), site()], [96, 48], dense_flops=100.0)
    with pytest.raises(ValueError, match="one of each"):
        authors_flops_fractions(point(0.4, 0.5, 0.7), cost, [site()], [], dense_flops=100.0)


def test_cost_ratio_is_the_closed_form():
    assert cost_ratio(0.0, width=128, d_model=768) == pytest.approx(128 * (768 + 3072) / (2 * 4 * 768**2))
    assert cost_ratio(0.3, width=128, d_model=768, expert_size=24) == pytest.approx(0.3 + 128 * (768 + 128) / (8 * 768**2))


# -- recipes, fingerprints, files


def test_weights_of_figure_12_are_those_of_the_recipe():
    recipe = experiment("gpt", [Curve(name=name, label=name, training=name) for name in WEIGHTS], {})
    assert {v.name: v.sparsify.enforcement.weight for v in recipe.variant} == WEIGHTS


def test_a_checksum_is_of_what_code_does(tmp_path):
    def of(text, name="a.py"):
        (tmp_path / name).write_text(text)
        found = checksum([tmp_path / name], tmp_path)
        (tmp_path / name).unlink()
        return found

    plain = of("def f(x):\n    if x < 0:\n        raise ValueError('no')\n    return x + 1\n")
    said = '"""M."""\ndef f(x):\n    """What."""\n    # why\n    if x < 0:\n        raise ValueError(f"not {x}")\n    return (x  + 1)\n'
    assert of(said) == plain
    assert of(said.replace("+ 1", "+ 2")) != plain
    assert of(said.replace("x < 0", "x <= 0")) != plain
    assert of("a = 1", "a.toml") != of("a = 2", "a.toml")


def test_the_librarys_code_is_that_of_its_numbers(tmp_path):
    for name in ("train/loop.py", "report/plots.py", "hf/card.py", "cli/use.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = library_code(tmp_path)
    for name in ("report/plots.py", "hf/card.py", "cli/use.py"):
        (tmp_path / name).write_text("x = 2\n")
    assert library_code(tmp_path) == before
    (tmp_path / "train/loop.py").write_text("x = 2\n")
    assert library_code(tmp_path) != before


def test_stages_of_other_code_are_refused_in_one_line_unless_they_are_kept(tmp_path, capsys):
    stages = tmp_path / "out" / "stages"
    assert check_stages(stages, now="a") == check_stages(stages, now="a") == ("a",)
    with pytest.raises(ConfigError, match=r"made by other code of moeify \(a; now b\): choose another --out, or --keep-stages") as error:
        check_stages(stages, now="b")
    assert "\n" not in str(error.value)
    assert check_stages(stages, keep=True, now="b") == check_stages(stages, now="b") == check_stages(stages, now="a") == ("a", "b")
    assert main(["--figure", "5", "--smoke", "--out", str(tmp_path / "out")]) == 2
    assert "--keep-stages" in capsys.readouterr().err
    assert not list(stages.glob("*/seed0")), "nothing is trained"
    (tmp_path / "old" / "paper_gpt").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"other code of moeify \(unknown; now a\)"):
        check_stages(tmp_path / "old", now="a")
    (stages / "library.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"library.json' cannot be read .*; choose another --out\."):
        check_stages(stages, now="a")
    with pytest.raises(CheckpointError, match="choose another --work\\."):
        check_stages(stages, now="a", options=("--work", "--keep-runs"))


def test_another_command_names_its_own_options(tmp_path):
    (tmp_path / "library.json").write_text('{"codes": ["a"]}')
    with pytest.raises(ConfigError, match="choose another --folder, or --keep where the change") as error:
        check_stages(tmp_path, now="b", options=("--folder", "--keep"))
    assert "--out" not in str(error.value)


def test_a_figure_knows_the_code_that_its_stages_are_of(tmp_path):
    keys = {key_of(FIGURES["5"].settings(Run(inputs={}, out=tmp_path, library=codes))) for codes in ((), ("a",), ("a", "b"))}
    assert len(keys) == 3


def test_steps_of_the_ablation_change_one_thing_each():
    recipe = experiment("bert", FIGURES["8"].curves(False), {})
    steps = [(variant, recipe.convert_of(variant).config) for variant in recipe.variant]

    def changed(i):
        (a, before), (b, after) = steps[i : i + 2]
        parts = {key for key, value in to_dict(after).items() if to_dict(before)[key] != value}
        ways = [replace(variant, name="", main=False, convert={}) for variant in (a, b)]
        return parts | ({"training"} if ways[0] != ways[1] else set())

    assert [variant.name for variant, _ in steps] == ["baseline", "enforced", "norm_router", "dynamic_k", "sadmoe", "full"]
    assert [changed(i) for i in range(4)] == [{"training"}, {"router"}, {"rule"}, {"expert_size", "split"}]
    assert changed(4) == {"training"}


_TOKENS_OF_A_STEP = {"bert": 16 * 22, "vit": 64 * 49}  # tokens of a text on average; patches of an image


def test_every_figures_recipes_can_be_read_and_train_the_same_tokens(tmp_path):
    inputs = {name: tmp_path / name for name in INPUTS}
    for figure in FIGURES.values():
        if figure.model is not None:
            recipe = experiment(figure.model, figure.curves(False), inputs, ztw=figure.ztw)
            assert (recipe.ztw is not None) == figure.ztw
            for variant in recipe.variant:  # distillation is paid for in steps, roughly: no text has the mean's length
                steps, replaced = recipe.train_of(variant).steps, variant.projections
                tokens = replaced.tokens / _TOKENS_OF_A_STEP[figure.model] if replaced is not None else 0
                assert steps + tokens == pytest.approx(recipe.train.steps, abs=1)
            assert pretraining(figure.model, inputs).metric == recipe.metric


def test_a_curve_of_an_unknown_training_is_refused():
    with pytest.raises(ConfigError, match=r"gpt.toml has no variant 'swish'; it has relu"):
        experiment("gpt", [Curve(name="a", label="a", training="swish")], {})


@pytest.fixture
def novels(tmp_path):
    folder = tmp_path / "novels"
    folder.mkdir()
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [f"A long story of {split}. " * 200]}), folder / f"{split}.parquet")
    return folder


def test_a_fingerprint_is_of_settings_and_content_not_of_places(novels, tmp_path):
    def key(path, figure="5", **changes):
        return key_of(FIGURES[figure].settings(Run(inputs={"novels": path}, out=tmp_path, **changes)))

    moved = shutil.copytree(novels, tmp_path / "elsewhere")
    assert key(novels) == key(moved) == key(novels, seeds=(0, 1, 2))
    assert len({key(novels), key(novels, seeds=(0,)), key(novels, smoke=True), key(novels, figure="9")}) == 4
    pyarrow.parquet.write_table(pyarrow.table({"text": ["Another story. " * 200]}), moved / "train.parquet")
    assert key(novels) != key(moved)


def test_a_changed_recipe_is_another_fingerprint(monkeypatch, tmp_path):
    run = Run(inputs={}, out=tmp_path)
    before = FIGURES["5"].settings(run)
    changed = lambda *args, **options: (lambda r: replace(r, train=replace(r.train, steps=r.train.steps + 1)))(experiment(*args, **options))  # noqa: E731
    monkeypatch.setattr(figures, "experiment", changed)
    assert key_of(FIGURES["5"].settings(run)) != key_of(before)


def test_numbers_are_used_again_and_a_stale_file_is_said_and_not_used(tmp_path, capsys, monkeypatch):
    arguments = ["--figure", "14", "--out", str(tmp_path)]
    assert main(arguments) == 0
    path = tmp_path / "fig14.json"
    first = json.loads(path.read_text())
    assert (tmp_path / "fig14.png").stat().st_size > 1000
    assert "14" in capsys.readouterr().out

    def again(*_args, **_options):
        raise AssertionError("measured again")

    monkeypatch.setitem(FIGURES, "14", replace(FIGURES["14"], measure=again, draw=again))
    assert main(arguments) == 0  # nothing is measured or drawn
    monkeypatch.setattr(figures, "drawing_version", lambda: "other")
    with pytest.raises(AssertionError, match="measured again"):  # drawn
        main(arguments)
    monkeypatch.undo()
    stale = {**first, "fingerprint": "0", "settings": {**first["settings"], "seeds": [7]}}
    stale["data"] = {**first["data"], "break_even": {"128": 0.0}}
    path.write_text(json.dumps(stale))
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert "fig14.json' is of other settings (seeds [7] -> [0, 1, 2]) and is not used; it is measured again" in error
    assert json.loads(path.read_text()) == first


def test_a_file_that_is_no_figure_is_an_error(tmp_path, capsys):
    (tmp_path / "fig14.json").write_text("{}")
    assert main(["--figure", "14", "--out", str(tmp_path)]) == 2
    assert "is no figure of this version" in capsys.readouterr().err


# -- what is read off stages


def stage(folder, result, *, dense_flops=100.0):
    folder.mkdir(parents=True)
    cost = {"ffn_dense": 60.0, "ffn_unconverted": 0.0, "experts": 60.0, "router": 0.0}
    (folder / "curve.json").write_text(json.dumps({"dense": {"flops_per_token": dense_flops}, "cost": cost}))
    return Stage(label=folder.name, key=folder.name, folder=folder, result=result, seconds=1.0)


def finished(root, *, seed=0, **sweeps):
    """A seed whose sweeps found perplexities e and e^2; "full" cost 5 % more than the layers that it replaced."""
    quality = {"quality": {"validation": math.e}}
    stages = {name: stage(root / name, quality) for name in ("start", "dense.quality")}
    for name, dense_flops in sweeps.items():
        points = [to_dict(replace(point(x, x, 0.4 + 0.6 * x), quality=math.e**power)) for x, power in ((1.0, 1), (0.5, 2))]
        stages[f"sweep.{name}.validation"] = stage(root / f"sweep.{name}", {"points": points}, dense_flops=dense_flops)
        stages[f"convert.{name}"] = stage(root / f"convert.{name}", {})
        stages[f"sparsify.{name}.quality"] = stage(root / f"quality.{name}", quality)
    recipe = experiment("gpt", [Curve(name="a", label="a", training="relu")], {})
    return Finished(seed=seed, stages=stages, recipe=recipe)


@pytest.fixture
def manifest(monkeypatch):
    """Every converted model has experts of four neurons."""
    record = SimpleNamespace(site=site(), num_experts=96)
    monkeypatch.setattr(measure, "read_manifest", lambda _folder: SimpleNamespace(sites=(record,), projections=()))


@pytest.mark.usefixtures("manifest")
def test_curves_are_losses_over_the_flops_of_the_unchanged_model(tmp_path):
    curves = [Curve(name=name, label=name, training="relu") for name in ("plain", "full")]
    data = measured_curves(curves, [finished(tmp_path / str(seed), seed=seed, plain=100.0, full=105.0) for seed in (0, 1)])
    assert (data["y"], data["dense"], data["ffn_share"]) == ("loss", [1.0, 1.0], 0.6)
    cheap, dear = data["curves"]["plain"]["points"][1]
    assert (cheap["ffn"], cheap["all"], cheap["y"]) == (0.5, 0.7, 2.0)
    assert (dear["all"], dear["y"]) == (1.0, 1.0)
    assert data["curves"]["full"]["points"][0][1]["all"] == pytest.approx(1.05)
    assert measure.series(data, "plain", "ffn") == [[(0.5, 2.0), (1.0, 1.0)]] * 2


@pytest.mark.usefixtures("manifest")
def test_curves_with_the_authors_accounting_and_early_exit(tmp_path):
    one = finished(tmp_path, plain=100.0, full=105.0)
    exits = stage(tmp_path / "exits", {"points": [{"theta": 0.5, "quality": math.e, "flops_fraction": 0.3}]})
    one = replace(one, stages={**one.stages, "sweep.ztw.validation": exits})
    data = measured_curves([Curve(name=name, label=name, training="relu") for name in ("plain", "full")], [one])
    cheap = data["curves"]["plain"]["points"][0][0]
    assert cheap["authors_ffn"] == pytest.approx(0.5 + 0.5 * 0.125)
    assert cheap["authors_all"] == pytest.approx(0.7 + 0.6 * 0.5 * 0.125)
    of_full = data["curves"]["full"]["points"][0][0]
    assert of_full["authors_all"] == pytest.approx(1.05 * 0.7 + 0.6 * 0.5 * 0.125), "over the model in which nothing was replaced"
    assert data["curves"]["ztw"]["points"] == [[{"theta": 0.5, "all": 0.3, "authors_all": 0.3, "y": 1.0}]]
    assert measure.is_measured(data, "authors_all")
    assert not measure.is_measured(data, "authors_ffn"), "early exit has none"
    for name in ("both.svg", "again.svg"):
        draw_curves(data, [tmp_path / name], title="both", axes=("all", "authors_ffn"))
    assert (tmp_path / "both.svg").read_text().count("ZTW") == 1  # early exit is no share of the FFNs
    assert (tmp_path / "both.svg").read_text() == (tmp_path / "again.svg").read_text()


# -- inputs and the command line


def test_a_figure_without_its_inputs_says_what_is_missing_and_how_to_get_it(tmp_path, capsys):
    assert main(["--figure", "11", "--out", str(tmp_path), "--emotion", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: figure 11: no --minilm (all-MiniLM-L6-v2); get it by: hf download sentence-transformers/")
    assert "--emotion" not in error
    assert error.count("\n") == 1
    with pytest.raises(DataError, match=r"figures 7, 11: no --emotion .* and --fashion .* && hf download"):
        check_needs({"5": (), "7": ("fashion",), "11": ("emotion",)}, {})


@pytest.mark.parametrize("number", [number for number, figure in FIGURES.items() if figure.needs])
def test_every_figure_without_inputs_is_one_line(number, tmp_path, capsys):
    assert main(["--figure", number, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: figure {number}: no --")
    assert "get it by: hf download" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--figure", "14", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inputs_are_found_by_name_and_options_win(tmp_path):
    for name in ("novels", "fashion_mnist", "mine"):
        (tmp_path / name).mkdir()
    found = find_inputs(tmp_path, {"novels": tmp_path / "mine", "emotion": None})
    assert found == {"novels": tmp_path / "mine", "fashion": tmp_path / "fashion_mnist"}
    with pytest.raises(DataError, match=r"--minilm '.*none' does not exist; it is all-MiniLM"):
        find_inputs(None, {"minilm": tmp_path / "none"})
    with pytest.raises(DataError, match="is no folder"):
        find_inputs(tmp_path / "none", {})


def test_stand_ins_are_readable_and_the_same_every_time(tmp_path):
    one, two = (write_stand_ins(tmp_path / name, ["emotion", "fashion", "minilm"]) for name in "ab")
    assert set(one) == {"emotion", "fashion"}
    assert next(read_texts(DataConfig(data=str(one["emotion"]), split="train")))
    for name in one:
        for file in one[name].iterdir():
            assert file.read_bytes() == (two[name] / file.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --figure NUMBER"),
        (["--figure", "2"], "no figure '2'"),
        (["--all", "--figure", "5"], "give --all or --figure, not both"),
        (["--check"], "--check is about a page"),
    ],
)
def test_what_the_command_refuses(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["0,0", "-1", "x"])
def test_bad_seeds_are_refused(seeds, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--figure", "14", f"--seeds={seeds}"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument --seeds")


# -- the page


def synthetic(number, **settings):
    """A figure's file with two curves, of which the paper's claim does not hold."""
    points = [[{"active": x, "ffn": x, "all": x, "y": 3 + x} for x in (0.1, 1.0)] for _ in range(2)]
    data = {
        "y": "loss",
        "dense": [3.0, 3.2],
        "curves": {name: {"label": name.title(), "points": points} for name in ("sadmoe", "baseline")},
    }
    shared = {"code": "c", "seeds": [0, 1], "smoke": False, "device": "cpu", "moeify": "0", **settings}
    train = {"train": {"steps": 10}}
    return {
        "figure": number,
        "model": "gpt",
        "caption": "What it shows.",
        "commit": "abc",
        "versions": {"torch": "2"},
        "settings": {**shared, "pretraining": train, "experiment": {**train, "variant": [number], "ztw": None if number == "9" else {}}},
        "data": data,
        "claims": [{"claim": "better", "holds": number != "5", "sentence": "By 1."}],
    }


def test_the_page_says_what_holds_and_what_does_not():
    text = page_text([synthetic("5"), synthetic("9")], pictures="fig/")
    assert "| 5 | better | **does not hold** | By 1. |" in text
    assert "| 9 | better | holds | By 1. |" in text
    assert "![Figure 5](fig/fig5.svg)" in text
    assert "| Sadmoe | 3.1000 ± 0.0000 |" in text
    assert "dense 3.1000 ± 0.1414" in text
    assert "Not made: figures 3, " in text
    assert "smoke" not in text
    assert "It shows that figures are made" in page_text([synthetic("5", smoke=True)], pictures="")


def test_the_page_begins_with_what_does_not_hold():
    text = page_text([synthetic("3"), synthetic("5")], pictures="")
    assert "## Claims: 1 of 2 hold, 1 do not" in text
    assert text.index("| 5 | better | **does not hold**") < text.index("| 3 | better | holds")
    assert NOTES["3"] in text
    assert set(NOTES) <= set(FIGURES)
    one = page_text([synthetic("9", seeds=[0], library=["a", "b"])], pictures="")
    assert "One seed, 0;" in one
    assert "Stages are of 2 versions of the library's code (a, b)." in one
    with pytest.raises(DataError, match="gpt's training or data"):
        page_text([synthetic("5", library=["a"]), synthetic("9", library=["b"])], pictures="")


def test_layers_are_drawn_from_the_top_with_their_means(tmp_path):
    pytest.importorskip("matplotlib")
    layer = {"histogram": [0] * 49 + [4] + [0] * 50, "mean": 0.495, "num_values": 48}
    rows = {"tau = 0.1": {"first": [layer, layer], "second": [layer]}, "tau = 0.01": {"first": [layer], "second": [layer]}}
    draw_histograms(rows, [tmp_path / "a.svg"], title="t", xlabel="x", abreast=1)
    assert (tmp_path / "a.svg").stat().st_size > 1000
    density = _density([layer, layer])
    assert math.fsum(math.expm1(d) for d in density) / 100 == pytest.approx(1), "a density"
    assert len({round(float(d), 6) for d in density}) == 2, "no stripes: bins of 48 possible shares are merged"


def test_methods_that_save_outside_of_ffns_are_compared_by_all_flops():
    figure = synthetic("6")
    exits = {"label": "ZTW", "points": [[{"theta": 0.5, "all": x, "y": 0.5} for x in (0.2, 1.0)]] * 2}
    figure["data"] = {**figure["data"], "y": "accuracy", "curves": {**figure["data"]["curves"], "ztw": exits}}
    text = page_text([figure], pictures="")
    assert "By share of the dense FLOPs of the whole model, routers included (accuracy, higher is better;" in text
    assert "By share of the dense FLOPs of the whole model as the authors count: not measured." in text
    assert "| ZTW |  | 0.5000 ± 0.0000 |" in text


def test_figures_of_different_settings_do_not_share_a_page():
    with pytest.raises(DataError, match=r"figures 5 and 9 are of different settings \(seeds\)"):
        page_text([synthetic("5"), synthetic("9", seeds=[0])], pictures="")
    other = synthetic("9")
    other["settings"]["pretraining"] = {"train": {"steps": 11}}
    with pytest.raises(DataError, match=r"different settings \(gpt's training or data\)"):
        page_text([synthetic("5"), other], pictures="")
    with pytest.raises(DataError, match="no figure to write about"):
        page_text([], pictures="")


def test_a_page_elsewhere_takes_its_figures_with_it(tmp_path):
    make_figure(FIGURES["14"], Run(inputs={}, out=tmp_path / "out"))
    page = tmp_path / "docs" / "paper.md"
    write_page(page, tmp_path / "out")
    assert "(paper/fig14.svg)" in page.read_text()
    assert {path.name for path in (tmp_path / "docs" / "paper").iterdir()} == {"fig14.json", "fig14.svg"}
    check_page(page, tmp_path / "out")
    check_page(page, tmp_path / "docs" / "paper")


def test_a_page_is_checked_against_its_figures(tmp_path, capsys):
    make_figure(FIGURES["14"], Run(inputs={}, out=tmp_path / "docs" / "figures"))
    page = tmp_path / "docs" / "paper.md"
    with pytest.raises(DataError, match="is not what the figures in"):
        check_page(page, tmp_path / "docs" / "figures")
    write_page(page, tmp_path / "docs" / "figures")
    assert "(figures/fig14.svg)" in page.read_text()
    assert main(["--page", str(page), "--out", str(tmp_path / "docs" / "figures"), "--check"]) == 0
    page.write_text(page.read_text().replace("holds", "fails"))
    assert main(["--page", str(page), "--out", str(tmp_path / "docs" / "figures"), "--check"]) == 2
    assert "write it: python -m bench.paper" in capsys.readouterr().err


def test_what_a_page_says_of_claims_is_asked_anew_of_the_numbers(tmp_path):
    make_figure(FIGURES["14"], Run(inputs={}, out=tmp_path / "out"))
    path = tmp_path / "out" / "fig14.json"
    first = json.loads(path.read_text())
    path.write_text(json.dumps({**first, "claims": [{"claim": "of another day", "holds": True, "sentence": "."}]}))
    write_page(tmp_path / "out" / "paper.md", tmp_path / "out")
    assert "of another day" not in (tmp_path / "out" / "paper.md").read_text()
    assert json.loads(path.read_text()) == first, "the file says the same as the page"


def test_tables_are_by_both_ways_to_count():
    figure = synthetic("9")
    for curve in figure["data"]["curves"].values():
        curve["points"] = [[{**point, "authors_ffn": point["ffn"] + 0.1} for point in points] for points in curve["points"]]
    text = page_text([figure], pictures="")
    assert text.count("| Sadmoe | 3.1000 ± 0.0000 | 3.2000") == 1
    assert "By share of the dense FLOPs of the FFNs as the authors count (loss" in text
    assert "| Sadmoe |  | 3.1000 ± 0.0000 |" in text
    assert "not measured" not in text


_PAGE = HERE.parent.parent / "docs" / "paper"


@pytest.mark.parametrize("number", [number for number in FIGURES if (_PAGE / f"fig{number}.json").exists()])
def test_a_claim_that_does_not_hold_has_a_note(number):
    """Of the figures that docs/paper.md shows."""
    figure = read_figure(_PAGE / f"fig{number}.json")
    failed = [claim["claim"] for claim in stated(FIGURES[number], figure["data"]) if claim["holds"] is False]
    assert not failed or number in NOTES, failed


def test_a_large_gpt_is_another_model_of_the_same_curves():
    curves = FIGURES["5"].curves(False)
    small, large = (experiment("gpt", curves, {}, large=large) for large in (False, True))
    assert [variant.name for variant in small.variant] == [variant.name for variant in large.variant]
    assert (small.train.steps, large.train.steps, large.data.window) == (250, 1000, 256)
    sizes = [pretraining("gpt", {}, large=large).model.architecture for large in (False, True)]
    assert [(size["n_layer"], size["n_embd"], size["n_positions"]) for size in sizes] == [(4, 192, 128), (12, 768, 256)]
    for model in ("bert", "vit"):  # theirs are what they are
        assert pretraining(model, {"minilm": HERE}, large=True) == pretraining(model, {"minilm": HERE})
