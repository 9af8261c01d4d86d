"""A GGUF file gives the same model as an ordinary checkpoint of the same weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moeify.errors import CheckpointError
from moeify.hf.load import load_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

TOKENS = ["<unk>", "<s>", "</s>", *"abcdefgh", "ab", "cd"]
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def llama():
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def gguf_name(name):
    if not name.startswith("model.layers."):
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def interleaved(weight, num_heads):
    """Rotary pairs next to each other, as GGUF has them, not in two halves."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, model, *, tokenizer=True):
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_merges(["a b", "c d"])  # transformers 5.17 does not read one alone as a list
        writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        array = tensor.numpy() if heads is None else interleaved(tensor, heads).contiguous().numpy()
        writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_load_model_of_a_gguf_file_equals_the_checkpoint_of_the_same_weights(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "plain")
    expected, _ = load_model(tmp_path / "plain")
    found, tokenizer = load_model(write_gguf(tmp_path / "model.gguf", model))

    assert type(found) is type(expected)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    ids = torch.arange(2 * 9).view(2, 9) % len(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    assert tokenizer("abc", add_special_tokens=False).input_ids == [TOKENS.index("ab"), TOKENS.index("c")]


@pytest.mark.parametrize("size", [20, 100, 600, 3000, -100])
def test_load_model_of_a_truncated_gguf_file_is_one_line(tmp_path, size):
    path = write_gguf(tmp_path / "model.gguf", llama())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.gguf' is truncated or damaged \(.*\); download it again") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
