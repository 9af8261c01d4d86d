"""PEFT's adapters and transformers' Trainer on converted models: what runs, what is saved, and that merging gives the kernels back."""

import copy

import peft
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moeify.controls import record_active, set_impl, set_mode
from moeify.convert import ConvertConfig, convert
from moeify.layers import moe_layers
from moeify.routers import NormRouterConfig
from moeify.select import TopK
from moeify.sites import find_ffn_sites

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # older ones have no other name

TARGETS = {
    "attention": ["q_proj", "v_proj"],
    "experts": ["gate_proj", "up_proj", "down_proj"],
    "down alone": ["down_proj"],
    "routers": ["router.hidden", "router.out"],
    "all": ["q_proj", "gate_proj", "up_proj", "down_proj", "router.hidden", "router.out"],
}
MASKED = {"experts", "down alone", "all"}
"""Targets whose layers run dense and masked until they are merged (D7)."""
NO_NATIVE = {"routers"}
"""Targets whose layers run by kernels, but not as one native call."""


def converted(*, seed=0):
    return tiny.convert_tiny(tiny.tiny_llama(seed=seed), rule=TopK(k=3))


def adapted(model, targets, **options):
    """With adapters that do something: LoRA's start as zeros."""
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)).eval()


def logits(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or tiny.tiny_inputs())).logits


def close(a, b):
    return (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.parametrize("kind", TARGETS)
def test_lora_runs_as_its_merged_weights_and_merging_gives_the_kernels_back(kind):
    plain = logits(converted())
    model = adapted(converted(), TARGETS[kind])
    layers = list(moe_layers(model).values())
    x_TD = torch.zeros(1, 32)
    with torch.no_grad():
        reasons = [(moe.masked_reason(), moe.native_refusal(x_TD)) for moe in layers]
    assert all((masked is not None) == (kind in MASKED) for masked, _ in reasons)
    if kind in NO_NATIVE:
        assert all("router" in native for _, native in reasons)
    with record_active(model) as stats:
        found = logits(model)
    assert stats.active_fraction() == 0.5, "adapters or not, three of six experts run"
    assert not close(found, plain)
    merged = copy.deepcopy(model).merge_and_unload()
    assert all(moe.masked_reason() is None for moe in moe_layers(merged).values())
    with torch.no_grad():
        assert all(moe.native_refusal(x_TD) is None for moe in moe_layers(merged).values())
    by_kernels = logits(merged)
    set_impl(merged, "reference")
    assert close(by_kernels, logits(merged))
    assert close(found, logits(merged))
    with model.disable_adapter():
        assert close(logits(model), plain)


def test_adapters_are_saved_alone_loaded_by_the_base_and_merged_into_a_converted_checkpoint(tmp_path):
    base = tiny.save_converted_tiny(tmp_path / "base", rule=TopK(k=3))
    model = adapted(AutoModelForCausalLM.from_pretrained(base), TARGETS["all"])
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(moe_layers(loaded)) == 2
    assert all(moe.rule == TopK(k=3) and moe.masked_reason() is None for moe in moe_layers(loaded).values())
    assert close(logits(loaded), expected)


def test_lora_on_replaced_projections():
    model = tiny.replaced_llama()
    sites = find_ffn_sites(model, tiny.tiny_inputs())
    config = ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), projection_router=NormRouterConfig(width=4), rule=TopK(k=2))
    convert(model, config, sites=sites)
    model = adapted(model, r".*self_attn\.[qkvo]_proj\.(up|down)")
    layers = moe_layers(model)
    assert sum(moe.masked_reason() is not None for moe in layers.values()) == 8, "the projections, not the FFNs"
    found = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert all(moe.masked_reason() is None for moe in moe_layers(merged).values())
    assert close(logits(merged), found)


class _Windows(torch.utils.data.Dataset):
    """One window again and again, so that losses of steps can be compared."""

    def __len__(self):
        return 8

    def __getitem__(self, _):
        ids = torch.arange(12) * 5 % tiny.VOCAB
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder, **options):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return Trainer(model=model, args=TrainingArguments(str(folder), **settings | options), train_dataset=_Windows())


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["attention", "all"])
def test_trainer_trains_adapters_with_checkpointing_as_without(kind, tmp_path):
    found = {}
    for checkpointing in (False, True):
        model = adapted(converted(), TARGETS[kind])
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        made = trainer(model, tmp_path / "out", gradient_checkpointing=checkpointing)
        made.train()
        found[checkpointing] = losses(made)
        for name, p in model.named_parameters():
            if "lora" not in name:
                assert torch.equal(p, before[name]), f"{name} is frozen"
            elif ".router." not in name:
                assert not torch.equal(p, before[name]), f"{name} trains"
    assert found[True] == pytest.approx(found[False], rel=1e-5)
    assert found[True][-1] < found[True][0]


def test_trainer_resumes_a_converted_model_and_its_adapters_to_the_same_losses(tmp_path):
    for name, make in {"whole": converted, "adapters": lambda: adapted(converted(), TARGETS["all"])}.items():
        whole = trainer(make(), tmp_path / name, save_strategy="steps", save_steps=1, max_steps=2)
        whole.train()
        resumed = trainer(make(), tmp_path / name, max_steps=2)
        resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-1"))
        assert losses(resumed) == losses(whole)


def test_finetuning_teaches_lora_on_routers(tmp_path):
    from moeify.train.finetune import FinetuneConfig
    from moeify.train.hf_callbacks import FinetuneCallback

    model = adapted(converted(), TARGETS["routers"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}
    made = trainer(model, tmp_path / "out")
    made.add_callback(FinetuneCallback(FinetuneConfig()))
    made.train()
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], old) for name, old in before.items())


def test_dense_mode_with_adapters_is_the_adapted_dense_model():
    model = adapted(converted(), TARGETS["experts"])
    set_mode(model, "dense")
    merged = copy.deepcopy(model).merge_and_unload()
    assert close(logits(model), logits(merged))
    assert isinstance(next(iter(moe_layers(merged).values())).host.up_proj, nn.Linear)
