"""Captured FFN inputs: the same numbers as plain hooks, padding left out, and the same bytes after a kill."""

import functools
import json

import pytest
import torch
from tiny import tiny_inputs, tiny_llama
from torch import nn
from transformers import AlbertConfig, AlbertModel, BartConfig, BartModel

from moeify.errors import DataError
from moeify.sites import find_ffn_sites
from moeify.train.capture import capture_ffn_inputs, fast_dtype

PADDED = {"input_ids": torch.arange(1, 19).reshape(3, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3])}


def by_hooks(model, sites, batches):
    """Every call's input of every site, as the whole forward gives it."""
    seen = {site.name: [] for site in sites}
    handles = [
        model.get_submodule(s.first[0]).register_forward_pre_hook(
            functools.partial(lambda name, _m, args: seen[name].append(args[0]), s.name)
        )
        for s in sites
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in calls]).bfloat16() for name, calls in seen.items()}


def batches_of(count, *, length=5):
    return [{"input_ids": torch.arange(2 * length).reshape(2, length) * (i + 3) % 257} for i in range(count)]


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_capture_equals_hooks_run_directly(tmp_path):
    model, batches = tiny_llama(), batches_of(3)
    sites = find_ffn_sites(model, tiny_inputs())
    expected = by_hooks(model, sites, batches)
    captured = capture_ffn_inputs(model, sites, batches, tmp_path)
    for site in sites:
        assert captured.num_tokens(site.name) == 30
        assert torch.equal(captured.read(site.name), expected[site.name])
        assert torch.equal(captured.read(site.name, start=7, stop=11), expected[site.name][7:11])
    assert captured.widths == {site.name: 32 for site in sites}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_capture_leaves_padding_and_labels_out(tmp_path):
    model = tiny_llama()
    sites = find_ffn_sites(model, tiny_inputs())
    expected = by_hooks(model, sites, [PADDED])
    captured = capture_ffn_inputs(model, sites, [{**PADDED, "labels": PADDED["input_ids"]}], tmp_path)
    keep = PADDED["attention_mask"].reshape(-1).bool()
    for site in sites:
        assert torch.equal(captured.read(site.name), expected[site.name][keep])


def test_capture_counts_every_call_of_layers_that_share_weights(tmp_path):
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4
    )
    model, batches = AlbertModel(config).eval(), [{"input_ids": torch.arange(10).reshape(2, 5)}] * 2
    sites = find_ffn_sites(model, batches[0])
    captured = capture_ffn_inputs(model, sites, batches, tmp_path)
    (site,) = sites
    assert captured.num_tokens(site.name) == 2 * 3 * 10
    assert torch.equal(captured.read(site.name), by_hooks(model, sites, batches)[site.name])


def test_capture_of_an_encoder_decoder_masks_the_encoder_only(tmp_path):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(vocab_size=64, d_model=32, encoder_ffn_dim=52, decoder_ffn_dim=44, max_position_embeddings=32, **sizes)
    model = BartModel(config).eval()
    batch = {**PADDED, "decoder_input_ids": torch.arange(12).reshape(3, 4)}
    sites = find_ffn_sites(model, batch)
    captured = capture_ffn_inputs(model, sites, [batch], tmp_path)
    assert [captured.num_tokens(site.name) for site in sites] == [13, 12]


def test_capture_of_a_decoder_as_long_as_its_encoder_takes_the_decoders_mask(tmp_path):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(vocab_size=64, d_model=32, encoder_ffn_dim=52, decoder_ffn_dim=44, max_position_embeddings=32, **sizes)
    model = BartModel(config).eval()
    batch = {**PADDED, "decoder_input_ids": torch.arange(18).reshape(3, 6)}
    sites = find_ffn_sites(model, batch)
    for mask, tokens in ((None, 18), (torch.tensor([[1] * 6, [1] * 5 + [0], [1] * 6]), 17)):
        if mask is not None:
            batch["decoder_attention_mask"] = mask
        captured = capture_ffn_inputs(model, sites, [batch], tmp_path / str(tokens))
        assert [captured.num_tokens(site.name) for site in sites] == [13, tokens]


def test_capture_ends_each_forward_after_the_last_ffn_has_its_input(tmp_path):
    model, ran = tiny_llama(), []
    sites = find_ffn_sites(model, tiny_inputs())
    model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: ran.append("last down"))
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: ran.append("first down"))
    capture_ffn_inputs(model, sites, batches_of(3), tmp_path)
    # one short whole forward counts the calls; then every batch stops
    assert ran == ["first down", "last down", "head", "first down", "first down", "first down"]


def test_capture_under_autocast_equals_the_models_own_dtype_up_to_rounding(tmp_path):
    model, batches = tiny_llama(), batches_of(2)
    sites = find_ffn_sites(model, tiny_inputs())
    plain = capture_ffn_inputs(model, sites, batches, tmp_path / "a")
    low = capture_ffn_inputs(model, sites, batches, tmp_path / "b", compute=torch.bfloat16)
    for site in sites:
        a, b = plain.read(site.name).float(), low.read(site.name).float()
        assert (a - b).abs().max() < 0.1 * a.abs().max()
    assert fast_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_capture_of_a_family_that_fails_under_autocast_reads_it_in_its_own_dtype(tmp_path):
    class Picky(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **batch):
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("mat1 and mat2 must have the same dtype")
            return self.inner(**batch)

    model = Picky(tiny_llama()).eval()
    sites = find_ffn_sites(model, tiny_inputs())
    captured = capture_ffn_inputs(model, sites, batches_of(1), tmp_path, compute=torch.bfloat16)
    assert torch.equal(captured.read(sites[0].name), by_hooks(model, sites, batches_of(1))[sites[0].name])


class KilledError(Exception):
    pass


class Breaks:
    """Kills the run in its ``at``-th forward, after the first FFN has been read and before the second."""

    def __init__(self, model, at):
        self.model, self.at, self.seen = model, at, 0

    def __enter__(self):
        self.handle = self.model.model.layers[1].self_attn.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.seen += 1
        if self.seen == self.at:
            raise KilledError

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("killed_at", [1, 2, 3, 5], ids=["counting calls", "first batch", "second batch", "last batch"])
def test_capture_killed_and_run_again_gives_the_same_bytes(tmp_path, killed_at):
    model, batches = tiny_llama(), batches_of(4)
    sites = find_ffn_sites(model, tiny_inputs())
    capture_ffn_inputs(model, sites, batches, tmp_path / "whole")

    with Breaks(model, killed_at), pytest.raises(KilledError):
        capture_ffn_inputs(model, sites, batches, tmp_path / "killed")
    done = json.loads((tmp_path / "killed/capture.json").read_text())["done"] if killed_at > 2 else 0
    assert done == max(killed_at - 2, 0)
    assert not any(module._forward_pre_hooks for module in model.modules())

    calls = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    capture_ffn_inputs(model, sites, batches, tmp_path / "killed")
    handle.remove()
    assert len(calls) == 1 + 4 - done
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_capture_with_a_lost_tail_or_other_sites_starts_anew(tmp_path):
    model, batches = tiny_llama(), batches_of(2)
    sites = find_ffn_sites(model, tiny_inputs())
    capture_ffn_inputs(model, sites, batches, tmp_path)
    whole = files_of(tmp_path)
    (tmp_path / "site0001.bf16").write_bytes(b"")  # the state reached the disk, the rows did not
    capture_ffn_inputs(model, sites, batches, tmp_path)
    assert files_of(tmp_path) == whole
    captured = capture_ffn_inputs(model, sites[:1], batches, tmp_path)
    assert torch.equal(captured.read(sites[0].name), by_hooks(model, sites, batches)[sites[0].name])


def test_capture_keeps_the_training_flag(tmp_path):
    model = tiny_llama()
    sites = find_ffn_sites(model, tiny_inputs())
    model.train()
    capture_ffn_inputs(model, sites, batches_of(1), tmp_path)
    assert model.training
    with Breaks(model, 1), pytest.raises(KilledError):
        capture_ffn_inputs(model, sites, batches_of(2), tmp_path)
    assert model.training


def test_capture_of_damaged_weights_names_the_first_ffn_that_sees_it(tmp_path):
    model = tiny_llama()
    sites = find_ffn_sites(model, tiny_inputs())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"the input of 'model\.layers\.1\.mlp' holds NaN or infinity"):
        capture_ffn_inputs(model, sites, batches_of(1), tmp_path)


def test_capture_of_no_data_is_an_error_each_time(tmp_path):
    model = tiny_llama()
    sites = find_ffn_sites(model, tiny_inputs())
    with pytest.raises(DataError, match="no calibration batch"):
        capture_ffn_inputs(model, sites, [], tmp_path)
    padding = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    for _ in range(2):
        with pytest.raises(DataError, match=r"'model\.layers\.0\.mlp' saw no token"):
            capture_ffn_inputs(model, sites, [padding], tmp_path)
