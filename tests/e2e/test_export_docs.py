"""docs/export.md and docs/peft.md run as they stand on a tiny model; what is for two processes runs in two, beside FSDP2."""

import re

import pytest
import ranks
import ranks_peft
import tiny
import torch
from transformers import AutoModelForCausalLM

import moeify
from moeify.select import TopK


def blocks(request, page):
    text = (request.config.rootpath / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def save_moe(folder):
    model = tiny.convert_tiny(tiny.tiny_llama(hidden_act="silu"), rule=TopK(k=3))
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
def test_every_block_of_the_peft_page_runs(tmp_path, monkeypatch, request, capsys):
    *single, script = blocks(request, "peft.md")
    assert len(single) == 4
    save_moe(tmp_path / "smollm2-moe")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in single:
        exec(block.replace("report_to=[]", "report_to=[], use_cpu=True, disable_tqdm=True"), namespace)
    assert "is a peft.tuners.lora.layer.Linear" in capsys.readouterr().out
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(name)(**tiny.tiny_inputs()).logits for name in ("adapter", "smollm2-moe-tuned"))
    assert (a - b).abs().max() < 1e-4 * b.abs().max()

    jobs = [
        ("weights", ranks_peft.gradients_under_fsdp2, {"targets": []}),
        ("adapters", ranks_peft.gradients_under_fsdp2, {"targets": ["q_proj", "up_proj", "router.out"]}),
        ("script", ranks_peft.run_script, {"script": script, "folder": str(tmp_path)}),
    ]
    found = ranks.results(2, jobs, tmp_path / "ranks")
    for name in ("weights", "adapters"):
        assert found[name]["error"] < 1e-5
        assert found[name]["active"] == 0.5
    assert found["script"]["processes"] == 2
    assert (tmp_path / "adapter-of-two" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning")  # torch.export.save, of weights that lie by neuron
def test_every_block_of_the_export_page_runs(tmp_path, monkeypatch, request):
    found = blocks(request, "export.md")
    assert len(found) == 3
    save_moe(tmp_path / "smollm2-moe")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in found:
        exec(block, namespace)
    assert namespace["report"].max_error < 1e-5
    assert set(namespace["report"].ffns.values()) == {"loop"}
    model, _ = moeify.load_model(tmp_path / "smollm2-moe")
    for batch, length in ((1, 1), (4, 13)):  # few tokens, many, and padding
        ids, mask = torch.arange(batch * length).reshape(batch, length) * 5 % tiny.VOCAB, torch.ones(batch, length, dtype=torch.int64)
        mask[batch - 1, 9:] = 0
        (found,) = namespace["session"].run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert namespace["logits"].shape == (1, 12, tiny.VOCAB)
    operators = {str(node.target) for node in namespace["program"].graph.nodes}
    assert "moeify.routed_ffn_cpu.default" in operators or "moeify.ffn_cpu.default" in operators
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2-qwen2moe")).__name__ == "Qwen2MoeForCausalLM"
