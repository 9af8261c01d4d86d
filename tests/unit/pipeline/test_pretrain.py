"""Pre-training from a recipe to a checkpoint: what comes out, what a stopped or killed run leaves, sparse phases that go wrong."""

import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch
from pretraining import BERT, RECIPE, T5, recipe_file
from safetensors.torch import load_file

from moeify import cli
from moeify.controls import set_mode
from moeify.errors import CheckpointError, ConfigError, DataError, DivergedError, StoppedError
from moeify.hf.load import load_model
from moeify.layers import moe_layers
from moeify.pipeline import pretrain, read_pretrain
from moeify.ssd import SSD
from moeify.train import loop, state


def recipe(folder, *settings, text=RECIPE):
    return read_pretrain(recipe_file(folder, text), settings=settings)


def rows(path, kind=None):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in found if kind is None or row["kind"] == kind]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(one, other):
    """Two finished runs came out the same to the bit."""
    assert one[0].losses == other[0].losses
    assert one[0].evals == other[0].evals
    assert one[0].evaluation == other[0].evaluation
    assert one[0].decisions == other[0].decisions
    assert one[0].probes == other[0].probes
    first, second = weights(one[1]), weights(other[1])
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    said = []
    result = pretrain(recipe(folder), folder / "out", say=said.append)
    return result, folder / "out", said


# -- what comes out --------------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_checkpoint_that_serves_both_modes_and_says_what_went_on(whole):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    result, out, _said = whole
    assert result.losses[-1] < result.losses[0] - 0.5
    assert json.loads((out / "pretrain.json").read_text())["run"] == result.run
    assert not out.with_name("out.work").exists()
    model, tokenizer = GPT2LMHeadModel.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("a fox").input_ids) == "a fox"
    assert len(moe_layers(model)) == 2
    ids = torch.tensor([tokenizer("the quick brown fox").input_ids])
    losses = {}
    for mode in ("dense", "moe"):
        set_mode(model, mode)
        with torch.no_grad():
            losses[mode] = model(input_ids=ids, labels=ids).loss.item()
    assert losses["dense"] != losses["moe"]
    assert result.evaluation["dense"]["perplexity"] == pytest.approx(math.exp(result.evaluation["dense"]["loss"]))
    assert abs(result.evaluation["moe"]["loss"] - result.evaluation["dense"]["loss"]) < 0.5
    assert "dense and sparse steps | 11, 9 |" in (out / "README.md").read_text()


def test_flops_are_counted_by_hand(whole):
    result, _out, _said = whole
    d, f, layers, s, vocabulary, experts = 16, 32, 2, 32, 257, 8
    attention = layers * (2 * 4 * d * d + 2 * 2 * s * d)
    ffn, head = layers * 2 * 2 * d * f, 2 * d * vocabulary
    sequence = {"dense": s * (attention + ffn + head)}
    sequence["sparse"] = s * (attention + 3 / 8 * ffn + layers * 2 * d * experts + head)
    assert result.flops["dense_flops"] == pytest.approx(3 * 11 * 4 * sequence["dense"])
    assert result.flops["sparse_flops"] == pytest.approx(3 * 9 * 4 * sequence["sparse"])
    # measured before steps 0, 4, 8, 12, 16, in a sparse phase three times
    assert result.flops["probe_flops"] == pytest.approx(4 * (5 * sequence["dense"] + 3 * sequence["sparse"]))
    assert result.flops["total_flops"] == sum(result.flops[f"{part}_flops"] for part in ("dense", "sparse", "probe", "lost"))
    assert result.flops["all_dense_flops"] == pytest.approx(3 * 20 * 4 * sequence["dense"])
    assert result.estimate["sparse_flops"] == result.flops["sparse_flops"]  # a fixed schedule is known before


def test_the_log_has_every_step_measurement_and_decision_once(whole):
    result, out, said = whole
    steps = rows(out / "log.jsonl", "step")
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert [row["loss"] for row in steps] == list(result.losses)
    assert [row["mode"] for row in steps] == ["dense"] * 7 + ["sparse"] * 9 + ["dense"] * 4
    assert steps[-1]["tokens"] == result.tokens == 20 * 4 * 32
    assert [row["step"] for row in rows(out / "log.jsonl", "probe")] == [0, 4, 8, 12, 16]
    assert [row["reason"] for row in rows(out / "log.jsonl", "decision")] == [d.reason for d in result.decisions]
    assert [(row["step"], row["loss"]) for row in rows(out / "log.jsonl", "eval")] == list(result.evals)
    text = "\n".join(said)
    assert "training FLOPs:" in text
    assert "with 45% of the steps sparse" in text
    assert "step 7/20: dense to sparse: fixed schedule" in text
    assert " tokens/s, dense, " in text


@pytest.mark.parametrize(("text", "mode"), [(BERT, "bytes"), (T5, "bytes"), (BERT, "bpe"), (T5, "bpe"), (RECIPE, "bpe")])
def test_every_kind_of_model_trains_on_bytes_and_on_a_tokenizer_of_its_own(tmp_path, text, mode):
    from transformers import AutoTokenizer

    settings = ["train.steps=10", "ssd.switches=[0.5]"]
    size = 420 if text is T5 else 320
    if mode == "bpe":
        settings.append(f'model.tokenizer={{train={{kind="bpe", vocab_size={size}}}}}')
    result = pretrain(recipe(tmp_path, *settings, text=text), tmp_path / "out")
    assert (result.flops["dense_steps"], result.flops["sparse_steps"]) == (5, 5)
    assert result.losses[-1] < result.losses[0]
    model, tokenizer = load_model(tmp_path / "out")
    assert len(moe_layers(model)) == 2
    assert len(tokenizer) == model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert (len(tokenizer) == size) == (mode == "bpe")


def test_without_ssd_the_checkpoint_is_an_ordinary_one(tmp_path):
    from transformers import GPT2LMHeadModel

    result = pretrain(recipe(tmp_path, "ssd=none", "train.steps=6"), tmp_path / "out")
    assert not (tmp_path / "out" / "moeify.json").exists()
    assert not moe_layers(GPT2LMHeadModel.from_pretrained(tmp_path / "out"))
    assert result.flops["total_flops"] == result.flops["all_dense_flops"]
    assert set(result.evaluation) == {"dense"}


def test_dense_training_is_that_of_the_loop(tmp_path):
    """The command adds nothing: the loop, on the same model and windows."""
    from moeify.data import DataConfig, WindowData, text_windows
    from moeify.hf.random import random_model
    from moeify.hf.tokenizer import byte_level
    from moeify.train.loop import TrainConfig, train

    chosen = recipe(tmp_path, "ssd=none", "train.steps=6")
    result = pretrain(chosen, tmp_path / "out")
    tokenizer = byte_level("causal-lm", context=32)
    fields = {"vocab_size": 257, "eos_token_id": 256, "bos_token_id": None}
    model = random_model({**chosen.model.architecture, **fields}, auto_class="AutoModelForCausalLM", seed=0)
    windows = text_windows(DataConfig(data=chosen.data.data, split="train", window=32, max_tokens=None), tokenizer)
    config = TrainConfig(steps=6, batch_sequences=4, lr=3e-3, compute="float32")
    assert train(model, WindowData(windows), config).losses == result.losses


def test_repeated_data_is_said_before_and_at_every_turn(tmp_path):
    said = []
    result = pretrain(recipe(tmp_path, "data.max_tokens=320", "ssd=none", "train.steps=7"), tmp_path / "out", say=said.append)
    assert result.epochs == pytest.approx(2.4)  # of 10 sequences: 3 + 3 + 1 steps
    assert sum("passed over 2.4 times" in line for line in said) == 1
    assert [line for line in said if "at its end" in line] == [
        "step 3/7: the data is at its end, pass 2 over it begins.",
        "step 6/7: the data is at its end, pass 3 over it begins.",
    ]
    assert [row["step"] for row in rows(tmp_path / "out" / "log.jsonl", "epoch")] == [3, 6]


def test_trainer_with_the_callback_agrees(tmp_path, whole):
    from training import trainer_losses, trainer_of

    from moeify.data import DataConfig, WindowData, text_windows
    from moeify.hf.inputs import example_inputs
    from moeify.hf.random import random_model
    from moeify.hf.tokenizer import byte_level
    from moeify.sites import find_ffn_sites
    from moeify.train.hf_callbacks import SSDCallback
    from moeify.train.loop import TrainConfig

    chosen, tokenizer = recipe(tmp_path), byte_level("causal-lm", context=32)
    fields = {"vocab_size": 257, "eos_token_id": 256, "bos_token_id": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = random_model({**chosen.model.architecture, **fields}, auto_class="AutoModelForCausalLM", seed=0)
    model.accepts_loss_kwargs = False  # Trainer would count the first label, which GPT-2 never predicts
    source = DataConfig(data=chosen.data.data, split="train", window=32, max_tokens=None)
    held_out = DataConfig(data=chosen.data.data, split="validation", window=32, max_tokens=320)
    training, validation = (WindowData(text_windows(data, tokenizer)) for data in (source, held_out))
    callback = SSDCallback(find_ffn_sites(model, example_inputs(model)), chosen.ssd, probe=[validation.batch(range(4), generator=None)])
    config = TrainConfig(steps=20, batch_sequences=4, lr=3e-3, compute="float32")
    losses = trainer_losses(trainer_of(model, training, config, tmp_path / "trainer", callbacks=[callback]))
    result = pretrain(recipe(tmp_path, *(f"model.architecture.{key}=0.0" for key in fields if key.endswith("pdrop"))), tmp_path / "out")
    assert losses == pytest.approx(result.losses, rel=1e-5)
    assert [(d.step, d.after, d.reason) for d in callback.ssd.decisions] == [(d.step, d.after, d.reason) for d in result.decisions]


# -- stopped and killed ----------------------------------------------------------------------------------------------------------------


class Dies(Exception):  # noqa: N818 - stands for a kill
    pass


def when(monkeypatch, step, action):
    """Do something when the step has been done, once."""
    set_step, left = SSD.set_step, [step]

    def patched(self, done):
        if left and done == left[0]:
            left.clear()
            action()
        return set_step(self, done)

    monkeypatch.setattr(SSD, "set_step", patched)


def dies():
    raise Dies


@pytest.mark.parametrize("step", [5, 9, 18])
def test_a_killed_run_goes_on_to_the_same_bits_and_its_log_has_no_step_twice(tmp_path, monkeypatch, whole, step):
    chosen = recipe(tmp_path)
    with monkeypatch.context() as patch:
        when(patch, step, dies)
        with pytest.raises(Dies):
            pretrain(chosen, tmp_path / "out")
    assert rows(tmp_path / "out.work" / "log.jsonl", "step")[-1]["step"] == step
    result = pretrain(chosen, tmp_path / "out")
    assert_equal((result, tmp_path / "out"), whole)
    for kind in (None, "step", "probe", "decision", "eval"):
        first, second = ([(row["kind"], row["step"]) for row in rows(out / "log.jsonl", kind)] for out in (tmp_path / "out", whole[1]))
        assert first == second


def test_a_signal_finishes_the_step_and_saves_it(tmp_path, monkeypatch, capsys, whole):
    number = signal.SIGTERM
    file = recipe_file(tmp_path)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        when(patch, 8, lambda: signal.raise_signal(number))  # in a sparse phase, between two saved states
        code = cli.run(["pretrain", str(file), "--out", str(tmp_path / "out")])
    assert code == 128 + number
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"stopped: {number.name}: stopped after step 9 of 20, which is saved; the same command goes on there."
    assert signal.getsignal(number) == before
    assert state.latest_step(tmp_path / "out.work" / "train") == 9
    said = []
    result = pretrain(read_pretrain(file), tmp_path / "out", say=said.append)
    assert "goes on after step 9 of 20." in said
    assert_equal((result, tmp_path / "out"), whole)


def test_a_signal_within_the_last_step_leaves_the_rest_to_the_next_call(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        when(patch, 19, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(StoppedError, match=r"SIGINT: stopped after step 20 of 20") as caught:
            pretrain(recipe(tmp_path), tmp_path / "out")
    assert (caught.value.step, caught.value.signum) == (20, signal.SIGINT)
    assert not (tmp_path / "out").exists()
    assert_equal((pretrain(recipe(tmp_path), tmp_path / "out"), tmp_path / "out"), whole)


@pytest.fixture
def interrupts():
    """Ctrl-C interrupts, as in a terminal: processes in the background, and those of pytest-xdist, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_second_signal_acts_at_once(tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    when(monkeypatch, 8, twice)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe(tmp_path), tmp_path / "out")


@pytest.mark.usefixtures("interrupts")
def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    from moeify.pipeline.stopping import stopping

    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with stopping(repeats_s=5.0) as stop:
        signal.raise_signal(signal.SIGTERM)
        now[0] += 4.9
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGTERM
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_full_disk_is_one_line_and_the_state_before_stays(tmp_path, monkeypatch, capsys, whole):
    file, saved = recipe_file(tmp_path), []

    def full(tensors, path, **options):
        saved.append(path)
        if len(saved) > 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(tensors, path, **options)

    save = state.save_file
    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        code = cli.run(["pretrain", str(file), "--out", str(tmp_path / "out")])
    assert code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in last
    assert "the last state is kept" in last
    assert [p.name for p in sorted((tmp_path / "out.work" / "train").iterdir())] == ["run.json", "step-00000005"]
    assert_equal((pretrain(read_pretrain(file), tmp_path / "out"), tmp_path / "out"), whole)


def test_a_log_that_cannot_be_written_is_one_line_too(tmp_path, monkeypatch):
    from moeify.pipeline import pretrain_log

    class Full:
        def write(self, _text):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    made = pretrain_log.JsonLines.__init__

    def init(self, path, *, start):
        made(self, path, start=start)
        self._file.close()
        self._file = Full()

    monkeypatch.setattr(pretrain_log.JsonLines, "__init__", init)
    with pytest.raises(CheckpointError, match=r"log.jsonl': No space left on device; free space and run again, the last state is kept"):
        pretrain(recipe(tmp_path), tmp_path / "out")


def test_a_finished_run_killed_while_it_cleans_up_is_not_done_again(tmp_path, monkeypatch):
    module = __import__("moeify.pipeline.pretrain", fromlist=["remove_work"])
    chosen = recipe(tmp_path, "train.steps=4")
    with monkeypatch.context() as patch:
        patch.setattr(module, "remove_work", lambda _work: dies())
        with pytest.raises(Dies):
            pretrain(chosen, tmp_path / "out")
        patch.setattr(module, "remove_work", lambda _work: None)
        patch.setattr(module, "train", None)
        again = pretrain(chosen, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pretrain.json").read_text())["losses"] == list(again.losses)
    with pytest.raises(CheckpointError, match="is not empty; --overwrite replaces it"):
        pretrain(recipe(tmp_path, "train.steps=5"), tmp_path / "out")


def test_the_state_of_another_run_is_neither_used_nor_deleted_unasked(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        when(patch, 6, dies)
        with pytest.raises(Dies):
            pretrain(recipe(tmp_path), tmp_path / "out")
    other = recipe(tmp_path, "train.lr=1e-3", "train.steps=4")
    with pytest.raises(CheckpointError, match=r"recipe.train.lr was 0.003, is 0.001.*--overwrite"):
        pretrain(other, tmp_path / "out")
    assert len(pretrain(other, tmp_path / "out", overwrite=True).losses) == 4


# -- sparse phases that go wrong -------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch):
    """Multiply the loss of sparse steps by a factor, by step."""
    factors, now = {}, []
    set_step, loss = SSD.set_step, loop._loss

    def patched(self, done):
        set_step(self, done)
        now[:] = [done, self.controller.mode]

    def patched_loss(model, batch):
        found = loss(model, batch)
        return found * factors[now[0]] if now and now[1] == "sparse" and now[0] in factors and model.training else found

    monkeypatch.setattr(SSD, "set_step", patched)
    monkeypatch.setattr(loop, "_loss", patched_loss)
    return factors


SHORT_MEAN = ("ssd.spike_steps=5", "ssd.fallback_frac=0.1")


@pytest.mark.parametrize(("factor", "failed"), [(math.nan, 13), (4.0, 14)])
def test_a_sparse_phase_that_goes_wrong_goes_on_dense_from_the_last_state(tmp_path, broken, factor, failed):
    broken[13] = factor
    said = []
    result = pretrain(recipe(tmp_path, *SHORT_MEAN), tmp_path / "out", say=said.append)
    (fallback,) = result.fallbacks
    assert (fallback.step, fallback.failed, fallback.until) == (10, failed, failed + 2)
    assert (fallback.dense_steps, fallback.sparse_steps) == (0, failed - 10)
    assert result.flops["lost_flops"] == pytest.approx(result.flops["sparse_flops"] / result.flops["sparse_steps"] * (failed - 10))
    (decision,) = [d for d in result.decisions if d.reason.startswith("fallback: ")]
    assert (decision.step, decision.before, decision.after) == (10, "sparse", "dense")
    assert decision.numbers["dense_until"] == failed + 2
    modes = [row["mode"] for row in rows(tmp_path / "out" / "log.jsonl", "step")]
    # dense where it failed and until the step said; the schedule's sparse phase, to step 16, goes on then
    assert modes == ["dense"] * 7 + ["sparse"] * 3 + ["dense"] * (failed - 8) + ["sparse"] * (14 - failed) + ["dense"] * 4
    assert any(f"back to step 10, dense until step {failed + 2}" in line for line in said)
    assert all(map(math.isfinite, result.losses))
    if factor == 4.0:
        assert decision.numbers["loss"] > 2 * decision.numbers["mean_loss"]


@pytest.mark.parametrize("step", [12, 15])
def test_a_run_with_a_fallback_resumes_to_the_same_bits(tmp_path, monkeypatch, broken, step):
    broken[13] = math.nan
    results = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        chosen = recipe(tmp_path / name, *SHORT_MEAN)
        if name == "killed":
            with monkeypatch.context() as patch:

                def die(self, done, left=[2 if step < 13 else 1], set_step=SSD.set_step):  # noqa: B006 - a counter
                    if done == step:
                        left[0] -= 1
                        if left[0] == 0:  # the second time: after the fallback
                            raise Dies
                    set_step(self, done)

                patch.setattr(SSD, "set_step", die)
                with pytest.raises(Dies):
                    pretrain(chosen, tmp_path / name / "out")
            assert (tmp_path / name / "out.work" / "fallbacks.json").exists()
        results.append((pretrain(chosen, tmp_path / name / "out"), tmp_path / name / "out"))
    assert_equal(*results)
    assert results[0][0].fallbacks == results[1][0].fallbacks


def test_before_the_first_state_a_fallback_begins_anew(tmp_path, broken):
    broken[9] = math.nan
    result = pretrain(recipe(tmp_path, "train.save_every=50", *SHORT_MEAN), tmp_path / "out")
    assert result.fallbacks[0].step == 0
    assert (result.fallbacks[0].dense_steps, result.fallbacks[0].sparse_steps) == (7, 2)


def test_too_many_fallbacks_end_the_run(tmp_path, broken):
    broken.update({7: math.nan, 10: math.nan, 13: math.nan})
    settings = ("ssd.fallback_frac=0.05", "ssd.max_fallbacks=1")
    with pytest.raises(DivergedError, match=r"failed at step 10 .*after 1 fallbacks, which is ssd.max_fallbacks"):
        pretrain(recipe(tmp_path, *settings), tmp_path / "out")


def test_a_loss_that_is_no_number_in_a_dense_phase_stays_an_error(tmp_path, monkeypatch):
    loss = loop._loss
    monkeypatch.setattr(loop, "_loss", lambda model, batch: loss(model, batch) * math.nan)
    with pytest.raises(DivergedError, match="the loss is nan at step 0"):
        pretrain(recipe(tmp_path), tmp_path / "out")


# -- bad input -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ssd.selcted=3", "unknown option 'selcted' of SSDConfig; did you mean 'selected'"),
        ("ssd.selected=9", r"selected must be in \[1, num_experts = 8\], got 9"),
        ("ssd.num_experts=64", "num_experts 64 is more than the 32 neurons"),
        ("ssd.spike_factor=1.0", "spike_factor must be finite and greater than 1"),
        ("trian.steps=3", "unknown option 'trian' of PretrainConfig; did you mean 'train'"),
        ("task=causal", "must be one of 'causal-lm'"),
        ("model.architecture.vocab_size=100", "vocab_size 100 is less than the tokenizer's 257"),
        ("data.window=64", "window 64 is more than the 32 positions"),
        ("model.architecture.n_embed=3", "unknown field 'n_embed' of GPT2Config"),
        ("model.tokenizer=/nowhere", "no tokenizer can be loaded"),
        ('model.tokenizer={train={kind="unigram"}}', "must be one of 'bpe'"),
        ("model.tokenizer={train={vocab_size=100000}}", "different tokens only"),
        ("data.data=/nowhere.txt", "no such file"),
        ("log.wandb=project", "wandb is not installed"),
        ("name=a/b", "must be letters"),
        ("probe_sequences=0", "probe_sequences must be at least 1"),
        ("validation.window=16", "must be that of"),
    ],
)
def test_bad_recipes_end_in_one_line(tmp_path, capsys, setting, message):
    file = recipe_file(tmp_path)
    assert cli.run(["pretrain", str(file), "--out", str(tmp_path / "out"), "--set", setting]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_what_the_task_needs_is_refused(tmp_path):
    from moeify.hf.tokenizer import byte_level

    byte_level("causal-lm", context=32).save_pretrained(tmp_path / "tok")
    for text, message in ((BERT, "no mask_token"), (T5, "no pad_token")):
        with pytest.raises((DataError, ConfigError), match=message):
            pretrain(recipe(tmp_path, f"model.tokenizer={tmp_path / 'tok'}", text=text), tmp_path / "out")


def test_the_command_prints_what_came_out(tmp_path, capsys):
    file = recipe_file(tmp_path)
    assert cli.run(["pretrain", str(file), "--out", str(tmp_path / "out"), "--set", "train.steps=4"]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert "sparse_steps" in out
    assert "losses" not in out


# -- recipes and docs ------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "pretrain").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_that_come_with_the_library_run(file, tmp_path):
    small = ["train.steps=2", "train.batch_sequences=2", "train.eval_every=1", "validation.max_tokens=600", "ssd.probe_frac=1.0"]
    small += ["model.architecture.num_hidden_layers=1"] if file.stem == "bert" else []
    chosen = read_pretrain(file, settings=small)
    assert chosen.ssd is not None
    assert read_pretrain(file, settings=["ssd=none"]).ssd is None
    result = pretrain(chosen, tmp_path / file.stem)
    assert len(result.losses) == 2
    assert result.name == file.stem


def test_the_block_of_the_pre_training_page_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    file = recipe_file(tmp_path)
    assert "recipes/pretrain/gpt.toml" in block
    exec(block.replace("recipes/pretrain/gpt.toml", str(file)).replace("steps=200", "steps=10"), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("6 4 ")  # dense and sparse steps


def test_the_result_can_be_swept(tmp_path, whole):
    from moeify.data import DataConfig
    from moeify.pipeline import sweep_checkpoint

    data = DataConfig(data="builtin:pydoc", window=32, max_tokens=128)
    curve = sweep_checkpoint(whole[1], data=data, targets=[0.25, 1.0])
    assert sorted({round(point.active_fraction, 3) for point in curve.points}) == [0.25, 0.375, 1.0]
