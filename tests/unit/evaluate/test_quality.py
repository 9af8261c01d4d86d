"""Against the plainest formulas in fp64; both modes; padding."""

import math

import pytest
import torch
import transformers
from torch import nn

from moeify.controls import set_mode, set_rule
from moeify.errors import CheckpointError, ConfigError, DataError
from moeify.evaluate import DenseReference, accuracy, agreement, default_metric, measure_quality, perplexity
from moeify.layers import MoEFFN, attach, moe_layers
from moeify.routers import OracleRouterConfig, build_router
from moeify.select import TopK
from moeify.sites import find_ffn_sites


def _logits(model, batch, mode):
    set_mode(model, mode)
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits.double()


def _perplexity(logits_BSV, ids_BS):
    total = [-logits_BSV[b, s].log_softmax(-1)[ids_BS[b, s + 1]].item() for b in range(ids_BS.shape[0]) for s in range(ids_BS.shape[1] - 1)]
    return math.exp(sum(total) / len(total))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["dense", "moe"])
def test_perplexity_in_any_batches_equals_plain_loop(gpt, windows, mode, batch_size):
    expected = _perplexity(_logits(gpt, {"input_ids": windows}, mode), windows)
    assert perplexity(gpt, windows, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_perplexity_with_tiny_chunks_equals_one_chunk(gpt, windows, monkeypatch):
    expected = perplexity(gpt, windows)
    monkeypatch.setattr("moeify.evaluate.quality._CHUNK_ELEMENTS", 48 * 5)
    assert perplexity(gpt, windows) == pytest.approx(expected, rel=1e-6)


def test_measure_quality_with_padding_ignores_it(gpt, windows):
    set_mode(gpt, "dense")
    expected = perplexity(gpt, windows[:1, :7])
    padded = torch.cat([windows[:1, :7], torch.zeros(1, 5, dtype=torch.int64)], 1)
    batch = {"input_ids": padded, "attention_mask": torch.tensor([[1] * 7 + [0] * 5])}
    assert measure_quality(gpt, [batch], metric="perplexity").value == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_bf16_model_takes_loss_in_fp32(gpt, windows):
    gpt.to(torch.bfloat16)
    set_mode(gpt, "dense")
    expected = _perplexity(_logits(gpt, {"input_ids": windows}, "dense"), windows)
    assert perplexity(gpt, windows, batch_size=3) == pytest.approx(expected, rel=1e-5)


def test_perplexity_with_nan_weights_raises_checkpoint_error(gpt, windows):
    gpt.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        perplexity(gpt, windows)
    with pytest.raises(CheckpointError, match="dense model's perplexity"):
        DenseReference(gpt, [{"input_ids": windows}], metric="perplexity")


def test_perplexity_keeps_training_flag_and_modes(gpt, windows):
    gpt.train()
    first, second = moe_layers(gpt).values()
    first.mode, second.mode = "dense", "moe"
    perplexity(gpt, windows)
    assert gpt.training
    assert (first.mode, second.mode) == ("dense", "moe")


def test_accuracy_with_ignored_label_counts_the_others(classifier, padded_batch):
    best = _logits(classifier, padded_batch, "dense").argmax(-1)
    batches = [padded_batch | {"labels": best}, padded_batch | {"labels": torch.stack([(best[0] + 1) % 3, torch.tensor(-100)])}]
    assert accuracy(classifier, batches) == pytest.approx(2 / 3)


def test_accuracy_without_labels_names_the_way_out(classifier, padded_batch):
    with pytest.raises(DataError, match="label column"):
        accuracy(classifier, [padded_batch])


def test_accuracy_with_nan_logits_raises(classifier, padded_batch):
    classifier.classifier.weight.data[0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        accuracy(classifier, [padded_batch | {"labels": torch.tensor([0, 1])}])


def masked_lm(**options):
    config = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.BertForMaskedLM(transformers.BertConfig(**config, **options, initializer_range=0.5)).eval()


def test_pseudo_perplexity_counts_the_labelled_positions_of_all_batches(padded_batch):
    model = masked_lm()
    labels = torch.full((2, 6), -100)
    labels[0, 1], labels[0, 4], labels[1, 2] = 6, 40, 13
    total = 0.0
    logits = _logits(model, padded_batch, "dense").log_softmax(-1)
    for row, position in ((0, 1), (0, 4), (1, 2)):
        total -= logits[row, position, labels[row, position]].item()
    batches = [{key: value[i : i + 1] for key, value in {**padded_batch, "labels": labels}.items()} for i in range(2)]
    assert default_metric(model, batches[0]) == "pseudo_perplexity"
    found = measure_quality(model, batches, metric="pseudo_perplexity")
    assert found.count == 3
    assert found.value == pytest.approx(math.exp(total / 3), rel=1e-4)  # the first text is longer: padding stays out


@pytest.mark.parametrize(
    ("labels", "message"),
    [({}, "needs labels at masked positions"), ({"labels": torch.full((2, 6), -100)}, "nothing to measure pseudo_perplexity on")],
    ids=["none", "nothing masked"],
)
def test_pseudo_perplexity_without_labels_says_so(padded_batch, labels, message):
    with pytest.raises(DataError, match=message):
        measure_quality(masked_lm(), [padded_batch | labels], metric="pseudo_perplexity")


def test_agreement_equals_plain_loop(gpt, windows):
    batches = [{"input_ids": windows[:2]}, {"input_ids": windows[2:]}]
    set_rule(gpt, TopK(k=1))
    p, q = (_logits(gpt, {"input_ids": windows}, mode).log_softmax(-1) for mode in ("dense", "moe"))
    result = agreement(gpt, batches)
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert result.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result.hidden_cosine is None
    assert all(layer.mode == "moe" for layer in moe_layers(gpt).values())


def test_agreement_with_all_experts_is_perfect(gpt, encoder, windows, padded_batch):
    for model, batch in ((gpt, {"input_ids": windows}), (encoder, padded_batch)):
        set_rule(model, TopK(k=10))
        result = agreement(model, [batch])
        if model is gpt:
            assert result.kl == pytest.approx(0.0, abs=1e-6)
            assert result.top1 == 1.0
        else:
            assert result.hidden_cosine == pytest.approx(1.0, abs=1e-6)
            assert result.sentence_cosine == pytest.approx(1.0, abs=1e-6)


def test_agreement_of_encoder_pools_without_padding(encoder, padded_batch):
    set_rule(encoder, TopK(k=1))
    keep = padded_batch["attention_mask"].bool()
    hidden = {}
    for mode in ("dense", "moe"):
        set_mode(encoder, mode)
        with torch.no_grad():
            hidden[mode] = encoder(**padded_batch).last_hidden_state.double()
    dense, moe = hidden["dense"], hidden["moe"]
    cosine = nn.functional.cosine_similarity
    pooled = [torch.stack([h[i][keep[i]].mean(0) for i in range(2)]) for h in (dense, moe)]
    result = agreement(encoder, [padded_batch])
    assert result.hidden_cosine == pytest.approx(cosine(dense[keep], moe[keep], dim=-1).mean().item(), abs=1e-6)
    assert result.sentence_cosine == pytest.approx(cosine(pooled[0], pooled[1], dim=-1).mean().item(), abs=1e-6)
    assert result.kl is None
    assert result.sentence_cosine < 0.9999


@pytest.mark.parametrize(
    ("cache_bytes", "keeps"),
    [
        pytest.param(1 << 20, "outputs", id="outputs fit"),
        pytest.param(3 * 12 * 16 * 4, "head inputs", id="only hidden states fit"),
        pytest.param(10, "nothing", id="nothing fits: dense runs again"),
    ],
)
def test_dense_reference_whatever_it_keeps_gives_the_same_agreement(gpt, windows, cache_bytes, keeps):
    batches = [{"input_ids": window_S[None]} for window_S in windows]
    expected = agreement(gpt, batches)
    reference = DenseReference(gpt, batches, metric="perplexity", cache_bytes=cache_bytes)
    assert reference.keeps == keeps
    set_mode(gpt, "dense")
    assert reference.quality == pytest.approx(perplexity(gpt, windows))
    set_mode(gpt, "moe")
    measured = measure_quality(gpt, batches, metric="perplexity", reference=reference)
    assert measured.count == 33
    assert measured.agreement.kl == pytest.approx(expected.kl, rel=1e-4)
    assert measured.agreement.top1 == expected.top1


def test_dense_reference_with_scale_after_head_does_not_trust_the_head(gpt, windows):
    plain = type(gpt).forward

    def forward(**inputs):
        out = plain(gpt, **inputs)
        out.logits = 0.5 * out.logits
        return out

    gpt.forward = forward
    reference = DenseReference(gpt, [{"input_ids": windows}], metric="perplexity", cache_bytes=3 * 12 * 16 * 4)
    assert reference.keeps == "nothing"


def test_dense_reference_of_model_that_is_never_right_asks_about_labels(classifier, padded_batch):
    wrong = (_logits(classifier, padded_batch, "dense").argmax(-1) + 1) % 3
    with pytest.raises(DataError, match="labels match"):
        DenseReference(classifier, [padded_batch | {"labels": wrong}], metric="accuracy")


def test_measure_quality_of_headless_encoder_gives_cosine(encoder, padded_batch):
    reference = DenseReference(encoder, [padded_batch], metric="cosine")
    assert reference.quality == 1.0
    measured = measure_quality(encoder, [padded_batch], metric="cosine", reference=reference)
    assert measured.value == agreement(encoder, [padded_batch]).sentence_cosine


def test_measure_quality_with_bad_arguments_says_what_to_do(encoder, gpt, padded_batch, windows):
    with pytest.raises(ConfigError, match="known: perplexity"):
        measure_quality(gpt, [], metric="bleu")
    with pytest.raises(ConfigError, match="has no head"):
        measure_quality(encoder, [padded_batch], metric="perplexity")
    with pytest.raises(ConfigError, match="give a reference"):
        measure_quality(encoder, [padded_batch], metric="cosine")
    with pytest.raises(DataError, match="nothing to measure"):
        measure_quality(gpt, [], metric="perplexity")
    with pytest.raises(DataError, match="no batch"):
        DenseReference(gpt, [], metric="perplexity")


def test_default_metric_by_model_and_batch(gpt, encoder, classifier, padded_batch, windows):
    assert default_metric(gpt, {"input_ids": windows}) == "perplexity"
    assert default_metric(encoder, padded_batch) == "cosine"
    assert default_metric(classifier, padded_batch | {"labels": torch.tensor([0, 1])}) == "accuracy"


def _converted(model, batch):
    for site in find_ffn_sites(model, batch):
        router = build_router(OracleRouterConfig(), site=site, num_experts=10)
        attach(model, MoEFFN(site, num_experts=10, router=router, rule=TopK(k=5)))
    return model


def _bert(cls):
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32
    )
    return cls(config).eval()


def test_masked_language_model_is_measured_by_the_cosine_of_its_hidden_states(padded_batch):
    model = _converted(_bert(transformers.BertForMaskedLM), padded_batch)
    assert default_metric(model, padded_batch) == "cosine"
    set_rule(model, TopK(k=10))
    for cache_bytes in (0, 1 << 20):
        reference = DenseReference(model, [padded_batch], metric="cosine", cache_bytes=cache_bytes)
        measured = measure_quality(model, [padded_batch], metric="cosine", reference=reference)
        assert measured.value == pytest.approx(1, abs=1e-5)
        assert measured.agreement.kl is None


@pytest.mark.parametrize("cls", [transformers.BertForTokenClassification, transformers.BertForQuestionAnswering])
def test_default_metric_of_a_head_with_another_task_names_it(cls, padded_batch):
    with pytest.raises(ConfigError, match=f"{cls.__name__} cannot be measured; supported are"):
        default_metric(_bert(cls), padded_batch)
