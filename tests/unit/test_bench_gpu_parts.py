"""What the GPU's case is made of and needs no GPU: predictions, masks of a real run."""

import json

import pytest
import torch
from tiny import convert_tiny, tiny_inputs, tiny_llama

from bench import masks, predict
from bench.gpu import SHAPES
from moeify.layers import moe_layers


def test_predictions_name_every_target_and_say_which_is_missed(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert predict.main(["--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    for regime in ("decode, 1 token", "batch 32, recorded", "prefill 4096", "training step", "ViT-B", "f = 1"):
        assert any(row["target"].startswith(regime) for row in rows), regime
    for row in rows:
        assert row["ratio"] == pytest.approx(row["dense_us"] / row["ours_us"]) and row["ours_us"] > 0
        assert row["reaches"] == (row["aim"] is None or row["ratio"] >= row["aim"])
        assert "parts_us" not in row or sum(row["parts_us"].values()) == pytest.approx(row["ours_us"])


def test_a_product_takes_its_bytes_or_its_flops():
    bandwidth, rate = predict.CHIP.bytes_per_s, predict.CHIP.flops_per_s * 0.5
    assert predict.product_us(1, 4096, 14336, frac=0.5) == pytest.approx(2 * (4096 * 14336 + 4096 + 14336) / bandwidth * 1e6)
    assert predict.product_us(8192, 4096, 14336, frac=0.5) == pytest.approx(2 * 8192 * 4096 * 14336 / rate * 1e6)
    assert predict.dense_us(SHAPES["gpt2"], 1) < predict.dense_us(SHAPES["gpt2"], 1, passes=3)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(128, 0, 4, 4), (64, 48 << 10, 4, 4), (209, 72 << 10, 8, 1), (24, 0, 1, 32), (33, 0, 4, 12)],
)
def test_blocks_that_a_unit_holds(registers, shared, warps, blocks):
    assert predict.occupancy(registers, shared, num_warps=warps) == blocks


@pytest.mark.parametrize("fraction", masks.FRACTIONS)
def test_recorded_masks_have_the_share_they_are_named_after_and_neighbours_in_common(fraction):
    mask_TE = masks.recorded(512, 384, fraction, device="cpu")
    assert mask_TE.float().mean().item() == pytest.approx(fraction, abs=2e-3)
    union = masks.recorded(32, 224, fraction, device="cpu").any(0).float().mean().item()
    assert union < 1 - (1 - fraction) ** 32, "neighbours share no more than tokens that draw alone"
    assert masks.recorded(1030, 500, fraction, device="cpu")[[0, 600]].any(1).all()
    assert masks.recorded(3, 4, fraction, device="cpu").shape == (3, 4)


def test_what_is_recorded_is_what_the_routers_scored(tmp_path, monkeypatch):
    model, inputs = convert_tiny(tiny_llama()).eval(), tiny_inputs()
    monkeypatch.setattr(masks, "load_model", lambda _: (model, None))
    monkeypatch.setattr(masks, "calibration_batches", lambda *_: [inputs])
    scores = {name: [] for name in moe_layers(model)}
    hooks = [moe.router.register_forward_hook(lambda _m, _a, y, n=n: scores[n].append(y)) for n, moe in moe_layers(model).items()]
    out = tmp_path / "masks.npz"
    shares = masks.record("checkpoint", data="text", num_tokens=18, window=9, out=out)
    for hook in hooks:
        hook.remove()
    expected_TE = torch.cat([s[0] >= s[0].flatten().kthvalue(s[0].numel() // 2 + 1).values for s in scores.values()], 1)
    assert shares == {"0.5": 0.5, "0.25": pytest.approx(0.25, abs=0.01), "0.1": pytest.approx(0.1, abs=0.01)}
    assert masks.recorded(18, 12, 0.5, device="cpu", file=out).equal(expected_TE)
