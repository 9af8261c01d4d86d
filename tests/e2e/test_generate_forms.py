"""Everything that Hugging Face `generate` offers, on converted and thinned models: the text that the reference kernel gives."""

import copy
import math
import threading

import pytest
import tiny
import torch
import transformers
from families.models import build
from numpy.testing import assert_allclose
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer

import moeify
from moeify import ConfigError, DynKMax, Speculation, Threshold, UnsupportedModelError, moe_layers, self_draft, set_impl, set_mode
from moeify.channels import SparseInput, attach_channels, sparse_inputs
from moeify.convert import ConvertConfig, convert
from moeify.hf.speculate import _Text, expected_speedup, expected_tokens
from moeify.routers import NormRouterConfig
from moeify.sites import find_ffn_sites, find_linear_sites

HIGH, LOW = DynKMax(tau=0.1), DynKMax(tau=0.7)
NEW = 12
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def prompt():
    return tiny.tiny_inputs(batch=1)["input_ids"][:, 1:]  # without 0, which is padding to `generate`


def llama():
    return tiny.convert_tiny(tiny.tiny_llama(), rule=HIGH), prompt()


def gpt2():
    model, inputs = build("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(3)  # else it says one token for ever
    convert(model, ConvertConfig(expert_size=4, router=NormRouterConfig(width=4), rule=HIGH), sites=find_ffn_sites(model, inputs))
    return model, torch.arange(1, 8)[None] * 5


def thinned():
    model = tiny.tiny_llama()
    for site in find_linear_sites(model, tiny.tiny_inputs()):
        attach_channels(model, SparseInput(site, first_dense=1))
    for executor in sparse_inputs(model).values():
        executor.level_K.fill_(0.15)
    return model, prompt()


MODELS = {"llama": llama, "gpt2": gpt2, "thinned": thinned}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """The model with whatever kernel `auto` takes, the same by the definition of its arithmetic, and a prompt."""
    model, ids = MODELS[request.param]()
    reference = copy.deepcopy(model)
    set_impl(reference, "reference" if moe_layers(model) else "masked")
    text = reference.generate(ids, **GREEDY)
    assert len(set(text[0, ids.shape[1] :].tolist())) > 3, "a text that repeats one token tells nothing"
    return model, reference, ids, text


def draft_rule(model):
    return LOW if moe_layers(model) else Threshold(theta=1.5)


def compiled():
    config = CompileConfig(backend="aot_eager", mode=None, dynamic=False, fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on GPUs alone unless told so
    return {"cache_implementation": "static", "compile_config": config}


FORMS = {
    "dynamic": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "n-grams": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_text_of_the_reference_kernel(pair, form):
    model, reference, ids, text = pair
    options = GREEDY | FORMS[form]
    torch.manual_seed(3)
    found = model.generate(ids, **options)
    if form not in ("dynamic", "no cache", "static"):
        torch.manual_seed(3)
        text = reference.generate(ids, **options)
    assert torch.equal(found, text)


def test_compiled_steps_on_a_static_cache_give_the_same_text():
    model, ids = llama()
    text = model.generate(ids, **GREEDY)
    torch.compiler.reset()
    assert torch.equal(model.generate(ids, **GREEDY, **compiled()), text)
    assert model._compiled_call is not None
    # a view of a model that is compiled must not run the compiled model
    low = self_draft(model, draft_rule(model))
    assert not hasattr(low, "_compiled_call")


def test_rows_of_a_batch_with_padding_on_the_left_say_what_they_say_alone(pair):
    model, _, ids, _ = pair
    short = ids[:, 3:]
    alone = [model.generate(row, **GREEDY)[0, row.shape[1] :] for row in (ids, short)]
    padded = torch.cat([ids, torch.cat([torch.zeros(1, 3, dtype=ids.dtype), short], dim=1)])
    mask = torch.ones_like(padded)
    mask[1, :3] = 0
    both = model.generate(padded, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    assert torch.equal(both, torch.stack(alone))


@pytest.mark.parametrize("kind", ["llama", "thinned"])
def test_continuous_batching_gives_each_request_its_own_text(kind):
    model, ids = MODELS[kind]()
    text = model.generate(ids, **GREEDY)
    prompts = [ids[0].tolist(), ids[0, 2:].tolist(), ids[0].tolist()]
    config = GenerationConfig(**GREEDY, eos_token_id=None)
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no sizes for continuous batching, and would take all memory")
    size = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32, use_cuda_graph=False)
    found = model.generate_batch(prompts, config, size, progress_bar=False, warmup=False)
    said = [request.generated_tokens for request in found.values()]
    assert len(said) == 3
    expected = text[0, ids.shape[1] :].tolist()
    assert said[0] == said[2] == expected
    assert said[1] == model.generate(ids[:, 2:], **GREEDY)[0, ids.shape[1] - 2 :].tolist()


# -- the model as its own draft ------------------------------------------------------------------------------------------------------------


def test_draft_shares_every_tensor_and_leaves_the_model_as_it_is(pair):
    model, _, ids, text = pair
    rules = [str(layer) for layer in (*moe_layers(model).values(), *sparse_inputs(model).values())]
    low = self_draft(model, draft_rule(model))
    for ours, theirs in ((model.named_parameters(), low.named_parameters()), (model.named_buffers(), low.named_buffers())):
        assert all(a is b for (_, a), (_, b) in zip(ours, theirs, strict=True))
    assert rules == [str(layer) for layer in (*moe_layers(model).values(), *sparse_inputs(model).values())]
    assert not torch.equal(low.generate(ids, **GREEDY), text), "a draft that says the same tells nothing"
    assert torch.equal(model.generate(ids, **GREEDY), text)


@pytest.mark.parametrize("form", ["custom loop", "assistant_model", "dense verifies"])
def test_drafting_by_a_low_budget_gives_the_text_of_the_high_one(pair, form):
    model, _, ids, _ = pair
    low, options = self_draft(model, draft_rule(model)), GREEDY | {"max_new_tokens": 24}
    if form == "dense verifies":
        model = copy.deepcopy(model)
        set_mode(model, "dense")
        low = self_draft(model, draft_rule(model))
    long = model.generate(ids, **options)
    if form == "assistant_model":
        assert torch.equal(model.generate(ids, assistant_model=low, **options), long)
        return
    for speculation in (Speculation(low), Speculation(low, draft_tokens=2, adapt=False), Speculation(low, confidence=0.5)):
        assert torch.equal(model.generate(ids, custom_generate=speculation, **options), long)
        counts = speculation.counts
        assert counts.new_tokens == 24
        assert 0 < counts.accepted < counts.drafted <= counts.rounds * speculation.draft_tokens
        assert_allclose(counts.tokens_per_round, (counts.accepted + counts.rounds) / counts.rounds)
        assert counts.alpha >= counts.acceptance


def test_what_generate_returns_beside_the_text_is_the_models_own(pair):
    model, _, ids, _ = pair
    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    plain = model.generate(ids, **options)
    ours = model.generate(ids, custom_generate=Speculation(self_draft(model, draft_rule(model))), **options)
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("scores", "logits"):
        assert_allclose(torch.cat(getattr(ours, name)), torch.cat(getattr(plain, name)), atol=1e-4)
    length = plain.past_key_values.get_seq_length()
    assert ours.past_key_values.get_seq_length() == length == ids.shape[1] + NEW - 1
    # and the cache is as good as the plain one's: who goes on from it says the same
    more = [model.generate(out.sequences, past_key_values=out.past_key_values, **GREEDY) for out in (plain, ours)]
    assert torch.equal(*more)


def test_drafting_stops_where_the_text_stops(pair):
    model, _, ids, text = pair
    low, said = self_draft(model, draft_rule(model)), text[0, ids.shape[1] :].tolist()
    end = next(token for token in said[2:] if token != said[0])
    stop = {"eos_token_id": end}
    plain = model.generate(ids, **GREEDY, **stop)
    for drafts in (3, 8):
        assert torch.equal(model.generate(ids, custom_generate=Speculation(low, draft_tokens=drafts), **GREEDY, **stop), plain)
    one = GREEDY | {"max_new_tokens": 1}
    assert torch.equal(model.generate(ids, custom_generate=Speculation(low), **one), text[:, : ids.shape[1] + 1])


def test_padding_on_the_left_of_one_sequence_does_not_change_what_is_drafted():
    model, ids = llama()
    padded, mask = torch.cat([ids[:, :2], ids], dim=1), torch.ones(1, ids.shape[1] + 2, dtype=torch.long)
    mask[0, :2] = 0
    speculation = Speculation(self_draft(model, LOW))
    found = model.generate(padded, attention_mask=mask, custom_generate=speculation, **GREEDY)
    assert torch.equal(found[:, 2:], model.generate(ids, **GREEDY))


def test_streams_tell_every_token_once_and_end():
    model, ids = llama()
    tokenizer, text = tiny.byte_tokenizer(), model.generate(ids, **GREEDY)
    expected = tokenizer.decode(text[0])
    low = self_draft(model, LOW)
    for options in ({}, {"assistant_model": low}, None):
        streamer = TextIteratorStreamer(tokenizer, timeout=30)
        if options is None:
            options = {"custom_generate": Speculation(low).streaming(streamer)}
        else:
            options = options | {"streamer": streamer}
        thread = threading.Thread(target=model.generate, args=(ids,), kwargs=GREEDY | options)
        thread.start()
        assert "".join(streamer) == expected
        thread.join()


def test_threads_with_other_budgets_do_not_disturb_each_other():
    model, ids = llama()
    low = self_draft(model, LOW)
    speculation, options = Speculation(low), GREEDY | {"max_new_tokens": 30}
    expected = {"model": model.generate(ids, **options), "draft": low.generate(ids, **options)}
    found: dict[str, list[torch.Tensor]] = {"model": [], "draft": [], "both": []}
    calls = {
        "model": lambda: model.generate(ids, **options),
        "draft": lambda: low.generate(ids, **options),
        "both": lambda: model.generate(ids, custom_generate=speculation, **options),
    }
    threads = [threading.Thread(target=lambda n=name: found[n].extend(calls[n]() for _ in range(2))) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, texts in found.items():
        assert len(texts) == 2
        assert all(torch.equal(text, expected["draft" if name == "draft" else "model"]) for text in texts), name
    assert speculation.counts.new_tokens == 60


@torch.no_grad()
def test_sampling_with_a_draft_has_the_distribution_of_the_model():
    model, ids = llama()
    low, draws = self_draft(model, LOW), 600
    exact, drafted = (_warped(side(ids).logits[0, -1]).softmax(-1) for side in (model, low))
    assert float((exact - drafted).abs().sum()) / 2 > 0.1, "of the same distribution a draft tells nothing"
    options = {"past_key_values": DynamicCache()}
    text = _Text(model, low, ids, lambda _ids, logits: _warped(logits), GenerationConfig(do_sample=True), options)
    text._forward(model, ids[:, :-1])
    counts = torch.zeros_like(exact)
    for _ in range(draws):
        kept = text.verify(text.propose(1, 0.0))
        counts[kept[0]] += 1
        text._cut(ids.shape[1] - 1)
    error, sigma = (counts / draws - exact).abs(), (exact * (1 - exact) / draws).sqrt()
    assert (error <= 4 * sigma + 1e-6).all()
    # what it would be without refusals is far enough to be seen
    assert ((drafted - exact).abs() > 4 * sigma + 1e-6).any()


def test_sampling_with_a_seed_gives_the_same_text_again():
    model, ids = llama()
    speculation, texts = Speculation(self_draft(model, LOW)), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = GREEDY | {"do_sample": True, "temperature": 2.0}
        texts.append(model.generate(ids, custom_generate=speculation, **options))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def _warped(logits):
    logits = logits.float() / 3
    return logits.masked_fill(logits < logits.topk(6).values[..., -1:], -math.inf)


def test_formulas_of_leviathan():
    assert_allclose(expected_tokens(0.8, 4), (1 - 0.8**5) / (1 - 0.8))
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.0, 4) == 1
    assert_allclose(expected_speedup(0.8, 4, draft_cost=0.1, verify_cost=1.0), expected_tokens(0.8, 4) / 1.4)


# -- what cannot be --------------------------------------------------------------------------------------------------------------------


def test_what_cannot_draft_is_one_line():
    model, ids = llama()
    dense = tiny.tiny_llama()
    with pytest.raises(UnsupportedModelError, match="is dense and has no rules to draft with"):
        self_draft(dense, LOW)
    with pytest.raises(ConfigError, match=r"no MoE layer 'layer\.9'"):
        self_draft(model, {"layer.9": LOW})
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        self_draft(copy.deepcopy(model).to("meta"), LOW)
    low = self_draft(model, LOW)
    other, _ = llama()
    for draft in (low, dense):
        with pytest.raises(UnsupportedModelError, match="the draft is of another LlamaForCausalLM"):
            other.generate(ids, custom_generate=Speculation(draft), **GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"num_beams": 2}, "no beams", id="beams"),
        pytest.param({"cache_implementation": "static", "disable_compile": True}, "cache_implementation='static'", id="static"),
        pytest.param({"past_key_values": "static"}, "a StaticCache cannot", id="static cache object"),
        pytest.param({"use_cache": False}, "needs a cache", id="no cache"),
        pytest.param({"return_dict_in_generate": True, "output_attentions": True}, "neither hidden states nor attentions", id="attentions"),
        pytest.param({"inputs": 2}, "got 2 sequences", id="batch"),
    ],
)
def test_what_generate_cannot_do_with_a_draft_is_one_line(options, message):
    model, ids = llama()
    if options.get("past_key_values") == "static":
        options = {"past_key_values": StaticCache(config=model.config, max_cache_len=64), "disable_compile": True}
    ids = ids.repeat(options.pop("inputs", 1), 1) if "inputs" in options else ids
    with pytest.raises(ConfigError, match=message):
        model.generate(ids, custom_generate=Speculation(self_draft(model, LOW)), **GREEDY, **options)


@pytest.mark.parametrize(("options", "name"), [({"draft_tokens": 0}, "draft_tokens"), ({"confidence": 1.5}, "confidence")])
def test_options_out_of_range_are_one_line(options, name):
    model, _ = llama()
    with pytest.raises(moeify.ConfigError, match=f"{name} must be"):
        Speculation(self_draft(model, LOW), **options)
