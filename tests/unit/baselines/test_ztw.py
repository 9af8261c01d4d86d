"""Early exit: the published formulas against plain loops, a base that stays as it is, and a real exit that is what was evaluated."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import training
from torch.nn import functional as F

from moeify._config import from_dict, to_dict
from moeify.baselines import places, ztw
from moeify.baselines.features import capture_features
from moeify.cost import estimate_flops
from moeify.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from moeify.evaluate import accuracy, model_cost
from moeify.train.loop import TrainConfig

THETAS = (0.0, 0.35, 0.45, 0.6, 0.9, 1.0)


def tiny_bert(layers):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "max_position_embeddings": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers, num_labels=3, initializer_range=0.3, **sizes))
    return model.eval()


def tiny_vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_channels": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = ViTConfig(image_size=8, patch_size=4, num_labels=3, initializer_range=0.3, **sizes)
        return ViTForImageClassification(config).eval()


def images(rows=20):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    return training.Rows(pixel_values=torch.randn(rows, 1, 8, 8, generator=generator) + 3 * labels[:, None, None, None], labels=labels)


def config(**options):
    stage = TrainConfig(steps=12, batch_sequences=8, lr=1e-2, compute="float32")
    return ztw.ZTWConfig(**{"hidden": 8, "depth": 2, "train": stage, "ensemble": replace(stage, steps=4)} | options)


MODELS = {"bert": (lambda: tiny_bert(3), lambda: training.emotions(rows=20)), "vit": (tiny_vit, images)}


@pytest.fixture(scope="module", params=MODELS)
def fitted(request):
    """(early, batches of its training data, state of the base before)."""
    make_model, make_data = MODELS[request.param]
    model, data = make_model(), make_data()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    early = ztw.fit(model, data, config())
    return early, [data.batch(range(i, i + 5), generator=torch.Generator()) for i in range(0, 20, 5)], before


def heads_of(widths, *, depth=2, hidden=5, classes=3, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = ztw.ZTWHeads(widths, classes, depth=depth, hidden=hidden).double()
        torch.nn.init.normal_(heads.weights_PP)
        torch.nn.init.normal_(heads.biases_PC)
    return heads


# ---- formulas


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_cascade_is_the_plain_loop(depth):
    heads = heads_of([4, 6, 4], depth=depth)
    x = torch.randn(7, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, before = [], None
    for i, (start, stop) in enumerate([(0, 4), (4, 10), (10, 14)]):
        h = x[:, start:stop]
        linears = [module for module in heads.bodies[i] if isinstance(module, torch.nn.Linear)]
        assert len(linears) == depth - 1
        for linear in linears:
            a = h @ linear.weight.T + linear.bias
            h = a * 0.5 * (1 + torch.erf(a / math.sqrt(2)))
        if before is not None:
            centred = before - before.mean(1, keepdim=True)
            norm = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
            h = torch.cat([h, norm * heads.norms[i].weight + heads.norms[i].bias], 1)
        before = h @ heads.outs[i].weight.T + heads.outs[i].bias
        expected.append(before)
    assert torch.allclose(heads.cascade(x), torch.stack(expected))


def test_ensemble_is_the_plain_loop():
    heads = heads_of([4, 4, 4, 4])
    z = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = heads.ensembles(z)
    for i in range(4):
        for n in range(5):
            for c in range(3):
                total = 0.0
                for j in range(i + 1):
                    log_sum = math.log(sum(math.exp(v) for v in z[j, n].tolist()))
                    total += math.exp(heads.weights_PP[i, j].item()) * (z[j, n, c].item() - log_sum)
                assert got[i, n, c].item() == pytest.approx(total / (i + 1) + heads.biases_PC[i, c].item(), abs=1e-12)
    assert torch.allclose(heads.ensembles(z[:2]), got[:2]), "an ensemble knows nothing of later heads"


def test_each_head_learns_from_its_own_loss_alone():
    heads = heads_of([4, 4])
    x = torch.randn(6, 8, dtype=torch.float64)
    F.cross_entropy(heads.cascade(x)[1], torch.randint(0, 3, (6,))).backward()
    assert not heads.outs[0].weight.grad.any()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in heads.bodies[0].parameters())
    assert heads.outs[1].weight.grad.abs().sum() > 0
    assert heads.norms[1].weight.grad.abs().sum() > 0


def test_stages_train_their_own_parameters_only():
    model, data = tiny_bert(2), training.emotions(rows=16)
    one_step = replace(config().ensemble, lr=0.0)
    first = ztw.fit(model, data, config(ensemble=one_step)).heads.state_dict()
    second = ztw.fit(model, data, config()).heads.state_dict()
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}
    assert changed == {"weights_PP", "biases_PC"}


def test_pooled_leaves_padding_out():
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert places.pooled(hidden, mask, "mean").tolist() == [[1.0, 2.0], [8.0, 9.0]]
    assert places.pooled(hidden, mask, "first").tolist() == [[0.0, 1.0], [6.0, 7.0]]
    assert places.pooled(hidden, None, "mean").tolist() == [[2.0, 3.0], [8.0, 9.0]]


# ---- places


def test_places_follow_the_blocks_and_the_models_own_head(fitted):
    early, _, _ = fitted
    assert [place.module.rpartition(".")[2] for place in early.places] == ["0", "1"]
    assert early.token == "first"


def test_half_blocks_are_the_hidden_state_after_attention():
    model, batch = tiny_bert(2), training.emotions(rows=2).batch([0, 1], generator=None)
    found = places.find_places(model, batch, half_blocks=True)
    assert [(place.reads, place.d_model) for place in found] == [("input", 16), ("output", 16)] * 2
    seen, wanted = [], []
    handle = model.bert.encoder.layer[0].attention.register_forward_hook(lambda _m, _a, out: wanted.append(out[0]))
    with torch.no_grad(), places.visited(model, found, lambda _i, hidden: seen.append(hidden)):
        model(**batch)
    handle.remove()
    assert torch.equal(seen[0], wanted[0])


def test_a_head_that_averages_is_seen():
    from transformers import BeitConfig, BeitForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    model = BeitForImageClassification(BeitConfig(image_size=16, patch_size=4, **sizes)).eval()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert places.own_token(model, batch, places.find_places(model, batch)[-1]) == "mean"


# ---- the base, exits, costs


def test_the_base_is_untouched_bit_for_bit(fitted):
    early, _, before = fitted
    after = early.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in early.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in early.model.modules())


@torch.no_grad()
def test_a_real_exit_is_what_was_evaluated_and_runs_no_later_block(fitted):
    early, batches, _ = fitted
    confidences = [point.theta for point in ztw.exits(early, batches, "quantiles", num=9).points]
    # between examples' own confidences, so that rounding decides nothing
    found = ztw.exits(early, batches, [(a + b) / 2 for a, b in itertools.pairwise(confidences)])
    last_block = early.model.get_submodule(early.places[-1].module[:-1] + "2")
    ran = []
    handle = last_block.register_forward_pre_hook(lambda _m, _a: ran.append(1))
    kinds = set()
    for point in found.points:
        left, hits = [0] * (len(early.places) + 1), 0
        for batch in batches:
            logits = early.all_logits(batch)
            for row in range(5):
                ran.clear()
                one = {name: value[row : row + 1] for name, value in batch.items()}
                out = early(theta=point.theta, **one)
                assert torch.allclose(out.logits[0], logits[out.exit, row], atol=1e-5)
                assert len(ran) == (out.exit == len(early.places))
                left[out.exit] += 1
                hits += int(out.logits.argmax() == one["labels"])
        assert [n / 20 for n in left] == pytest.approx(list(point.exits))
        assert hits / 20 == pytest.approx(point.quality)
        kinds |= {i for i, n in enumerate(left) if n}
    handle.remove()
    assert len(kinds) == 3, "the thresholds reach every exit, or this proves little"


def test_quality_at_the_ends_is_the_first_heads_and_the_models_own(fitted):
    early, batches, _ = fitted
    found = ztw.exits(early, batches, THETAS)
    assert found.points[0].exits == (1.0, 0.0, 0.0)
    assert found.points[0].quality == found.qualities[0]
    assert found.points[-1].exits == (0.0, 0.0, 1.0)
    assert found.points[-1].quality == found.dense_quality == pytest.approx(accuracy(early.model, batches))


def test_cost_rises_with_theta_and_is_blocks_plus_heads(fitted):
    early, batches, _ = fitted
    found = ztw.exits(early, batches)
    assert len(found.points) == 100
    costs = [point.flops for point in found.points]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]
    assert list(found.costs) == sorted(found.costs)
    linears = [[m for m in early.heads.bodies[i] if isinstance(m, torch.nn.Linear)] + [early.heads.outs[i]] for i in range(2)]
    heads = sum(2 * m.in_features * m.out_features for head in linears for m in head)
    # einsum of an ensemble is a product, too: i + 1 vectors of C
    mixing = sum(2 * (i + 1) ** 2 * 3 for i in range(2))
    one = {name: value[:1] for name, value in batches[0].items()}
    assert found.dense_flops == estimate_flops(early.model, one).dense_flops
    assert found.costs[-1] - found.dense_flops == pytest.approx(heads, abs=mixing)
    assert found.points[-1].macs == found.costs[-1] / 2
    blocks = (found.costs[1] - found.costs[0]) / found.dense_flops
    assert 0.2 < blocks < 0.5, "one of three blocks and a head"


def test_fractions_are_of_the_same_whole_as_a_curves(fitted):
    early, batches, _ = fitted
    found = ztw.exits(early, batches, [0.0, 1.0])
    tokens = batches[0]["input_ids"].shape[1] if "input_ids" in batches[0] else None
    if tokens is not None:
        assert found.dense_flops == pytest.approx(model_cost(early.model, batches[0]).dense_flops_per_token * tokens)
    assert found.line() == [(point.flops_fraction, point.quality) for point in found.points]
    assert found.points[-1].flops_fraction == found.costs[-1] / found.dense_flops > 1


def test_measuring_leaves_every_modules_mode(fitted):
    early, batches, _ = fitted
    dropout = next(module for module in early.model.modules() if isinstance(module, torch.nn.Dropout))
    dropout.train()
    before = {module: module.training for module in early.modules()}
    ztw.exits(early, batches, [0.5])
    early(theta=0.5, **{name: value[:1] for name, value in batches[0].items()})
    assert {module: module.training for module in early.modules()} == before
    dropout.eval()


def test_quantiles_spread_the_thresholds(fitted):
    early, batches, _ = fitted
    thetas = [point.theta for point in ztw.exits(early, batches, "quantiles", num=8).points]
    assert thetas == sorted(thetas)
    assert (len(thetas), thetas[0], thetas[-1]) == (8, 0.0, 1.0)


def test_labels_that_do_not_count_are_left_out(fitted):
    early, batches, _ = fitted
    half = [{**batch, "labels": batch["labels"].clone()} for batch in batches]
    for batch in half:
        batch["labels"][2:] = -100
    kept = [{name: value[:2] for name, value in batch.items()} for batch in batches]
    found, wanted = ztw.exits(early, half, THETAS), ztw.exits(early, kept, THETAS)
    assert [(p.quality, p.exits) for p in found.points] == [(p.quality, p.exits) for p in wanted.points]


def test_heads_learn():
    data = images(rows=64)
    early = ztw.fit(tiny_vit(), data, config(hidden=32, train=TrainConfig(steps=150, batch_sequences=32, lr=1e-2, compute="float32")))
    found = ztw.exits(early, [data.batch(range(64), generator=torch.Generator())], [0.0])
    assert min(found.qualities) > 0.75, "a third is chance"
    assert early.records[0].losses[-1] < 0.5 * early.records[0].losses[0]


# ---- resume, disk


class KilledError(Exception):
    pass


class Fragile:
    """Data that fails after some batches."""

    def __init__(self, data, batches):
        self.data, self.left, self.asked = data, batches, []

    def __len__(self):
        return len(self.data)

    def batch(self, rows, *, generator):
        self.asked.append(list(rows))
        if self.left == 0:
            raise KilledError
        self.left -= 1
        return self.data.batch(rows, generator=generator)


def test_a_killed_capture_and_training_go_on_to_the_same_heads(tmp_path):
    model, data = tiny_vit(), images(rows=200)
    options = config(train=replace(config().train, steps=25, save_every=5))
    whole = ztw.fit(model, data, options)
    with pytest.raises(KilledError):
        ztw.fit(model, Fragile(data, 3), options, work=tmp_path)  # the example, and two batches of 64
    state = json.loads((tmp_path / "features/state.json").read_text())
    assert state["rows"] == 128
    with (tmp_path / "features/features.bf16").open("ab") as file:
        file.write(b"half a row")
    again = Fragile(data, -1)

    class Stop:
        def task(self, label, *, total):
            return self

        def __enter__(self):
            self.steps = 0
            return self

        def __exit__(self, *_):
            return None

        def advance(self, steps):
            self.steps += steps
            if steps == 1 and self.steps == 7:
                raise KilledError

    with pytest.raises(KilledError):
        ztw.fit(model, again, options, work=tmp_path, progress=Stop())
    assert again.asked[1:] == [list(range(128, 192)), list(range(192, 200))]
    assert [path.name for path in (tmp_path / "heads").glob("step-*")] == ["step-00000005"]
    last = Fragile(data, -1)
    resumed = ztw.fit(model, last, options, work=tmp_path)
    assert last.asked[1:] == []
    assert all(torch.equal(a, b) for a, b in zip(whole.heads.state_dict().values(), resumed.heads.state_dict().values(), strict=True))


class Varied:
    """Images that every call varies at random, as augmentation does."""

    def __init__(self, rows):
        self.tensors, self.asked = images(rows=rows).tensors, []

    def __len__(self):
        return len(self.tensors["labels"])

    def batch(self, rows, *, generator):
        self.asked.append(list(rows))
        pixels = self.tensors["pixel_values"][rows]
        return {"pixel_values": pixels + torch.randn(pixels.shape, generator=generator), "labels": self.tensors["labels"][rows]}


def test_only_examples_that_a_step_comes_to_are_run_and_they_give_what_all_would(monkeypatch):
    model, options = tiny_vit(), config(train=replace(config().train, steps=4), views=2)  # 32 of 400 rows, and the same order twice
    ran = []
    handle = model.register_forward_pre_hook(lambda _m, _a, kwargs: ran.append(len(kwargs["pixel_values"])), with_kwargs=True)
    few = ztw.fit(model, Varied(200), options)
    captured = sum(ran)
    ran.clear()
    monkeypatch.setattr(ztw, "sequences_read", lambda count, _config: list(range(count)))
    whole = ztw.fit(model, Varied(200), options)
    handle.remove()
    assert sum(ran) - captured == 400 - 32
    for name, tensor in whole.heads.state_dict().items():
        assert torch.allclose(few.heads.state_dict()[name], tensor, rtol=1e-2, atol=1e-3), name


def test_a_row_that_was_not_captured_is_no_other_row():
    model, data = tiny_vit(), images(rows=20)
    found = places.find_places(model, data.batch([0, 1], generator=None))
    features = capture_features(model, data, found, token="first", num_classes=3, rows=[3, 7, 12])
    whole = capture_features(model, data, found, token="first", num_classes=3)
    assert len(features) == len(whole) == 20
    assert torch.allclose(features.batch([12, 3], generator=None)["x_NF"], whole.batch([12, 3], generator=None)["x_NF"], rtol=1e-2)
    with pytest.raises(IndexError, match="not captured"):
        features.batch([3, 4], generator=None)


def test_features_of_other_data_are_not_used(tmp_path):
    model = tiny_vit()
    ztw.fit(model, images(), config(), work=tmp_path)
    other = training.Rows(**{name: value.flip(0) for name, value in images().tensors.items()})
    watched = Fragile(other, -1)
    with pytest.raises(CheckpointError, match=r"features' is the state of another run \(features.first was"):
        ztw.fit(model, watched, config(), work=tmp_path)
    assert len(watched.asked) == 1, "it is seen before anything is captured"
    with pytest.raises(CheckpointError, match=r"heads' is the state of another run \(run.depth was 2, is 3"):
        ztw.fit(model, images(), config(depth=3), work=tmp_path)


def test_views_are_draws_of_the_data_each():
    class Noisy:
        def __len__(self):
            return 3

        def batch(self, rows, *, generator):
            pixels = torch.randn(len(rows), 1, 8, 8, generator=generator)
            return {"pixel_values": pixels, "labels": torch.zeros(len(rows), dtype=torch.int64)}

    model = tiny_vit()
    found = places.find_places(model, Noisy().batch([0, 1], generator=torch.Generator()))
    rows = [capture_features(model, Noisy(), found, token="first", num_classes=3, views=2, seed=seed) for seed in (0, 0, 1)]
    first, same, other = (one.batch(range(6), generator=None)["x_NF"] for one in rows)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:3], first[3:])


def test_saved_heads_are_the_same_and_belong_to_their_model(fitted, tmp_path):
    early, batches, _ = fitted
    ztw.save(early, tmp_path / "heads")
    again = ztw.load(tmp_path / "heads", early.model)
    assert torch.equal(again.all_logits(batches[0]), early.all_logits(batches[0]))
    assert (again.places, again.token, again.config) == (early.places, early.token, early.config)
    with pytest.raises(CheckpointError, match=r"are of a .* with weights .*: load the model they were trained on"):
        ztw.load(tmp_path / "heads", tiny_bert(2))


def test_damaged_heads_are_refused(fitted, tmp_path):
    early, _, _ = fitted
    ztw.save(early, tmp_path)
    path = tmp_path / "ztw.json"
    meta = json.loads(path.read_text())
    for change, message in (
        ({"schema": 99}, "has schema 99"),
        ({"places": [{"module": "x"}]}, "is damaged"),
        ({"config": {"dept": 2}}, "did you mean 'depth'"),
        ({"num_classes": 7}, "damaged or of other heads"),
    ):
        path.write_text(json.dumps(meta | change))
        with pytest.raises(CheckpointError, match=message):
            ztw.load(tmp_path, early.model)
    path.write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ztw.load(tmp_path, early.model)
    with pytest.raises(CheckpointError, match=r"has no ztw.json; ztw.save writes one"):
        ztw.load(tmp_path / "none", early.model)


# ---- bad input


def test_a_language_model_is_refused():
    data = training.Rows(**tiny.tiny_inputs(), labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM gives logits \(2, 9, 257\) .* sequence and image classifiers"):
        ztw.fit(tiny.tiny_llama(), data, config())


def test_a_head_that_reads_the_last_token_needs_a_choice():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    model = GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, num_labels=3, pad_token_id=0)).eval()
    data = training.emotions(rows=6)
    with pytest.raises(UnsupportedModelError, match="set token to choose"):
        ztw.fit(model, data, config())
    assert ztw.fit(model, data, config(token="mean")).token == "mean"


def test_blocks_that_share_weights_are_refused():
    from transformers import AlbertConfig, AlbertForSequenceClassification

    sizes = {"vocab_size": 64, "embedding_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = AlbertForSequenceClassification(AlbertConfig(num_hidden_layers=2, num_labels=3, **sizes)).eval()
    with pytest.raises(UnsupportedModelError, match="runs several times in a forward"):
        ztw.fit(model, training.emotions(rows=6), config())


@pytest.mark.parametrize("theta", [-0.1, 1.1, math.nan])
def test_thresholds_are_probabilities(fitted, theta):
    early, batches, _ = fitted
    with pytest.raises(ConfigError, match=r"theta must be in \[0, 1\]"):
        ztw.exits(early, batches, [theta])
    with pytest.raises(ConfigError, match=r"theta must be in \[0, 1\]"):
        early(theta=theta, **{name: value[:1] for name, value in batches[0].items()})


def test_exits_need_labelled_batches_and_one_example_at_a_time(fitted):
    early, batches, _ = fitted
    with pytest.raises(ConfigError, match="one example at a time, got 5"):
        early(theta=0.5, **batches[0])
    with pytest.raises(DataError, match="no batch"):
        ztw.exits(early, [])
    with pytest.raises(DataError, match="needs labels"):
        ztw.exits(early, [{name: value for name, value in batches[0].items() if name != "labels"}])
    with pytest.raises(DataError, match="no label"):
        ztw.exits(early, [{**batches[0], "labels": torch.full((5,), -100)}])
    with pytest.raises(ConfigError, match="'linspace' or 'quantiles'"):
        ztw.exits(early, batches, "quantile")


@pytest.mark.parametrize(
    ("labels", "message"),
    [(None, "got none"), (torch.rand(4, 3), "got torch.float32"), (torch.tensor([0, 1, 2, 3]), r"in \[0, 3\), got 0 to 3")],
)
def test_labels_must_be_classes(labels, message):
    tensors = {"pixel_values": torch.randn(4, 1, 8, 8)} | ({} if labels is None else {"labels": labels})
    with pytest.raises(DataError, match=message):
        ztw.fit(tiny_vit(), training.Rows(**tensors), config())


def test_positions_are_checked():
    with pytest.raises(ConfigError, match="at most 3, the number of places of the model, got 4"):
        ztw.fit(tiny_vit(), images(), config(positions=(1, 4)))
    with pytest.raises(ConfigError, match="single block"):
        ztw.fit(tiny_bert(1), training.emotions(rows=6), config())
    assert len(ztw.fit(tiny_bert(1), training.emotions(rows=6), config(half_blocks=True)).places) == 1
    for positions in ((), (0,), (2, 1), (1, 1)):
        with pytest.raises(ConfigError, match="rising numbers from 1"):
            config(positions=positions)
    with pytest.raises(ConfigError, match="depth must be at least 1"):
        config(depth=0)


def test_config_is_json_and_scales_to_a_number_of_examples():
    chosen = config(positions=(1, 2))
    assert from_dict(ztw.ZTWConfig, json.loads(json.dumps(to_dict(chosen)))) == chosen
    scaled = ztw.ZTWConfig().for_sequences(256 * 100)
    assert (scaled.train.steps, scaled.ensemble.steps) == (95, 5)


def test_the_block_of_the_docs_runs(request, tmp_path, monkeypatch):
    page = (request.config.rootpath / "docs" / "baselines.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert "ztw.ZTWConfig()" in block
    monkeypatch.chdir(tmp_path)
    model, data = tiny_vit(), images()
    one = {name: value[:1] for name, value in data.batch([0], generator=None).items()}
    names = {
        "model": model,
        "data": data,
        "batches": [data.batch(range(8), generator=None)],
        "one_example": one,
        "small": config(),
        "Path": Path,
    }
    exec(block.replace("ztw.ZTWConfig()", "small"), names)
    assert len(names["found"].points) == 100
    assert {path.name for path in tmp_path.iterdir()} == {"work", "heads"}
