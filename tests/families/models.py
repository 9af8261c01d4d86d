"""Tiny random-weight models of many families, built from their configs alone, and what discovery must say about each.

`scripts/families.py` writes docs/families.md from the same table. A family that the installed transformers does not have is skipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moeify.hf.inputs import example_inputs

transformers.logging.set_verbosity_error()  # configs of this size warn about their default token ids


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model type at one setting that changes its FFN."""

    id: str
    kind: str
    """decoder, encoder, encoder-decoder, vision, speech, or text+vision."""
    model: str
    """Model class in transformers."""
    config: str
    """Config class in transformers."""
    options: Mapping[str, Any]
    sites: int = 2
    """Number of FFNs to be found."""
    form: str | tuple[str, ...] = "plain"
    """plain, gated (gate and up are two modules), gate_up or up_gate (one module); a tuple gives each site's own."""
    fused_in: str | None = None
    """Name of the one module, gate_up, that older versions of transformers have in place of a gated form's two."""
    activation: str | tuple[str, ...] = "gelu"
    """Key of ACTIVATIONS; a tuple gives each site's own."""
    bias: bool = True
    """Whether every projection has a bias (else none has)."""
    refused: str | None = None
    """What a reason must contain; with sites > 0 only a part of the model is refused."""


def build(family_id: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, in eval mode and with random weights and biases large enough to bend its activations, and inputs for one forward.

    Raises:
        LookupError: the installed transformers lacks the family.
    """
    family = FAMILIES[family_id]
    model_class, config_class = getattr(transformers, family.model, None), getattr(transformers, family.config, None)
    if model_class is None or config_class is None:
        raise LookupError(f"transformers {transformers.__version__} has no {family.model}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(_config(config_class, family.options))
        _randomise(model)
    return model.eval(), example_inputs(model)


def _config(config_class: type, options: Mapping[str, Any]) -> Any:
    """A config; a dict under the key ``*_config`` stays a dict (transformers builds the part)."""
    return config_class(**{key: dict(value) if isinstance(value, Mapping) else value for key, value in options.items()})


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:  # sinusoidal tables are computed, not saved
                noise = torch.randn_like(parameter)
                if parameter.dim() > 1:
                    parameter.copy_(0.2 * noise)
                else:
                    parameter.add_(0.1 * noise)


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    } | more  # fmt: skip


def _llama(**more: Any) -> dict[str, Any]:
    return _text(num_key_value_heads=2) | more


def _seq2seq(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 52, "decoder_ffn_dim": 44, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    } | more  # fmt: skip


def _t5(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 52, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    } | more  # fmt: skip


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
        "num_channels": 3,
    } | more  # fmt: skip


def _speech(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4,
        "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    } | more  # fmt: skip


_SILU: dict[str, Any] = {"activation": "silu", "bias": False}
_GLU: dict[str, Any] = {"form": "gated", **_SILU}
_FUSED: dict[str, Any] = {"form": "gate_up", **_SILU}


def _family(family_id: str, kind: str, model: str, config: str, options: dict[str, Any], **expected: Any) -> Family:
    return Family(id=family_id, kind=kind, model=model, config=config, options=options, **expected)


_ROWS = (
    # decoders: plain FFN
    _family("gpt2", "decoder", "GPT2LMHeadModel", "GPT2Config",
            {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 52}, activation="gelu_tanh"),
    _family("openai-gpt", "decoder", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig",
            {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, activation="gelu_tanh"),
    _family("gpt_bigcode", "decoder", "GPTBigCodeForCausalLM", "GPTBigCodeConfig",
            {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 52}, activation="gelu_tanh"),
    _family("gpt_neo", "decoder", "GPTNeoForCausalLM", "GPTNeoConfig",
            {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
             "max_position_embeddings": 64, "intermediate_size": 52}, activation="gelu_tanh"),
    _family("gptj", "decoder", "GPTJForCausalLM", "GPTJConfig",
            {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 52, "rotary_dim": 4},
            activation="gelu_tanh"),
    _family("codegen", "decoder", "CodeGenForCausalLM", "CodeGenConfig",
            {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 52, "rotary_dim": 4},
            activation="gelu_tanh"),
    _family("gpt_neox", "decoder", "GPTNeoXForCausalLM", "GPTNeoXConfig", _text()),
    _family("persimmon", "decoder", "PersimmonForCausalLM", "PersimmonConfig", _text(), activation="relu2"),
    _family("bloom", "decoder", "BloomForCausalLM", "BloomConfig",
            {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, activation="gelu_tanh"),
    _family("mpt", "decoder", "MptForCausalLM", "MptConfig",
            {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, bias=False),
    _family("falcon", "decoder", "FalconForCausalLM", "FalconConfig",
            {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 52}, bias=False),
    _family("opt", "decoder", "OPTForCausalLM", "OPTConfig",
            {"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 51, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64}, activation="relu"),
    _family("xglm", "decoder", "XGLMForCausalLM", "XGLMConfig",
            {"vocab_size": 64, "d_model": 32, "ffn_dim": 51, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64}),
    _family("biogpt", "decoder", "BioGptForCausalLM", "BioGptConfig", _text()),
    _family("phi", "decoder", "PhiForCausalLM", "PhiConfig", _text(), activation="gelu_tanh"),
    _family("starcoder2", "decoder", "Starcoder2ForCausalLM", "Starcoder2Config", _llama(), activation="gelu_tanh"),
    _family("nemotron", "decoder", "NemotronForCausalLM", "NemotronConfig", _llama(head_dim=8), activation="relu2", bias=False),
    _family("arcee", "decoder", "ArceeForCausalLM", "ArceeConfig", _llama(), activation="relu2", bias=False),
    _family("ctrl", "decoder", "CTRLLMHeadModel", "CTRLConfig",
            {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "dff": 52, "n_layer": 2, "n_head": 4}, activation="relu"),
    _family("rwkv", "decoder", "RwkvForCausalLM", "RwkvConfig",
            {"vocab_size": 64, "context_length": 64, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 52,
             "num_hidden_layers": 2}, activation="relu2", bias=False),
    # decoders: GLU
    _family("llama", "decoder", "LlamaForCausalLM", "LlamaConfig", _llama(intermediate_size=51), **_GLU),
    _family("llama-bias", "decoder", "LlamaForCausalLM", "LlamaConfig", _llama(mlp_bias=True), form="gated", activation="silu"),
    _family("mistral", "decoder", "MistralForCausalLM", "MistralConfig", _llama(), **_GLU),
    _family("ministral", "decoder", "MinistralForCausalLM", "MinistralConfig", _llama(head_dim=8), **_GLU),
    _family("qwen2", "decoder", "Qwen2ForCausalLM", "Qwen2Config", _llama(), **_GLU),
    _family("qwen3", "decoder", "Qwen3ForCausalLM", "Qwen3Config", _llama(head_dim=16), **_GLU),
    _family("gemma", "decoder", "GemmaForCausalLM", "GemmaConfig", _llama(head_dim=8), form="gated", activation="gelu_tanh", bias=False),
    _family("gemma2", "decoder", "Gemma2ForCausalLM", "Gemma2Config", _llama(head_dim=8), form="gated", activation="gelu_tanh", bias=False),
    _family("gemma3", "decoder", "Gemma3ForCausalLM", "Gemma3TextConfig", _llama(head_dim=8),
            form="gated", activation="gelu_tanh", bias=False),
    _family("olmo", "decoder", "OlmoForCausalLM", "OlmoConfig", _llama(), **_GLU),
    _family("olmo2", "decoder", "Olmo2ForCausalLM", "Olmo2Config", _llama(), **_GLU),
    _family("olmo3", "decoder", "Olmo3ForCausalLM", "Olmo3Config", _llama(), **_GLU),
    _family("smollm3", "decoder", "SmolLM3ForCausalLM", "SmolLM3Config", _llama(), **_GLU),
    _family("granite", "decoder", "GraniteForCausalLM", "GraniteConfig", _llama(residual_multiplier=0.5), **_GLU),
    _family("cohere", "decoder", "CohereForCausalLM", "CohereConfig", _llama(), **_GLU),
    _family("stablelm", "decoder", "StableLmForCausalLM", "StableLmConfig", _llama(), **_GLU),
    _family("exaone4", "decoder", "Exaone4ForCausalLM", "Exaone4Config", _llama(), **_GLU),
    _family("helium", "decoder", "HeliumForCausalLM", "HeliumConfig", _llama(head_dim=8), **_GLU),
    _family("phi3", "decoder", "Phi3ForCausalLM", "Phi3Config", _llama(intermediate_size=51), **_FUSED),
    _family("glm", "decoder", "GlmForCausalLM", "GlmConfig", _llama(head_dim=8), **_FUSED),
    _family("glm4", "decoder", "Glm4ForCausalLM", "Glm4Config", _llama(head_dim=8), **_FUSED),
    _family("falcon_h1", "decoder", "FalconH1ForCausalLM", "FalconH1Config",
            _llama(head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8), **_GLU),
    # encoders
    _family("bert", "encoder", "BertForMaskedLM", "BertConfig", _text(intermediate_size=51)),
    _family("roberta", "encoder", "RobertaForMaskedLM", "RobertaConfig", _text()),
    _family("xlm-roberta", "encoder", "XLMRobertaModel", "XLMRobertaConfig", _text()),
    _family("camembert", "encoder", "CamembertModel", "CamembertConfig", _text()),
    _family("electra", "encoder", "ElectraForPreTraining", "ElectraConfig", _text(embedding_size=16), refused="writes width 1"),
    _family("deberta", "encoder", "DebertaModel", "DebertaConfig", _text()),
    _family("deberta-v2", "encoder", "DebertaV2ForSequenceClassification", "DebertaV2Config", _text(pooler_hidden_size=32),
            refused="writes width 2"),
    _family("mpnet", "encoder", "MPNetModel", "MPNetConfig", _text()),
    _family("megatron-bert", "encoder", "MegatronBertModel", "MegatronBertConfig", _text()),
    _family("longformer", "encoder", "LongformerModel", "LongformerConfig", _text(attention_window=4)),
    _family("big_bird", "encoder", "BigBirdModel", "BigBirdConfig", _text(attention_type="original_full"), activation="gelu_tanh"),
    _family("esm", "encoder", "EsmModel", "EsmConfig", _text(mask_token_id=3)),
    _family("roformer", "encoder", "RoFormerModel", "RoFormerConfig", _text(embedding_size=32)),
    _family("fnet", "encoder", "FNetModel", "FNetConfig", _text(), activation="gelu_tanh"),
    _family("convbert", "encoder", "ConvBertModel", "ConvBertConfig", _text(embedding_size=32)),
    _family("distilbert", "encoder", "DistilBertForMaskedLM", "DistilBertConfig",
            {"vocab_size": 64, "dim": 32, "hidden_dim": 51, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}),
    _family("albert", "encoder", "AlbertForMaskedLM", "AlbertConfig", _text(embedding_size=16), sites=1, activation="gelu_tanh"),
    _family("mobilebert", "encoder", "MobileBertModel", "MobileBertConfig",
            _text(embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=3), sites=6, activation="relu"),
    _family("xlnet", "encoder", "XLNetLMHeadModel", "XLNetConfig",
            {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 52}),
    _family("modernbert", "encoder", "ModernBertForMaskedLM", "ModernBertConfig",
            _text(global_attn_every_n_layers=2, local_attention=8, cls_token_id=1, sep_token_id=2), form="gate_up", bias=False),
    _family("nomic_bert", "encoder", "NomicBertModel", "NomicBertConfig", _text(), **_GLU),
    _family("eurobert", "encoder", "EuroBertModel", "EuroBertConfig", _llama(mask_token_id=3), **_GLU),
    # encoder-decoders
    _family("t5", "encoder-decoder", "T5ForConditionalGeneration", "T5Config", _t5(), sites=4, activation="relu", bias=False),
    _family("t5-gated", "encoder-decoder", "T5ForConditionalGeneration", "T5Config", _t5(feed_forward_proj="gated-gelu"),
            sites=4, form="gated", activation="gelu_tanh", bias=False),
    _family("mt5", "encoder-decoder", "MT5ForConditionalGeneration", "MT5Config", _t5(),
            sites=4, form="gated", activation="gelu_tanh", bias=False),
    _family("umt5", "encoder-decoder", "UMT5ForConditionalGeneration", "UMT5Config", _t5(),
            sites=4, form="gated", activation="gelu_tanh", bias=False),
    _family("longt5", "encoder-decoder", "LongT5ForConditionalGeneration", "LongT5Config", _t5(local_radius=3),
            sites=4, activation="relu", bias=False),
    _family("bart", "encoder-decoder", "BartForConditionalGeneration", "BartConfig", _seq2seq(), sites=4),
    _family("mbart", "encoder-decoder", "MBartForConditionalGeneration", "MBartConfig", _seq2seq(), sites=4),
    _family("marian", "encoder-decoder", "MarianMTModel", "MarianConfig", _seq2seq(decoder_vocab_size=64), sites=4),
    _family("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", "PegasusConfig", _seq2seq(), sites=4),
    _family("m2m_100", "encoder-decoder", "M2M100ForConditionalGeneration", "M2M100Config", _seq2seq(), sites=4, activation="relu"),
    _family("blenderbot", "encoder-decoder", "BlenderbotForConditionalGeneration", "BlenderbotConfig", _seq2seq(), sites=4),
    # vision
    _family("vit", "vision", "ViTForImageClassification", "ViTConfig", _vision(intermediate_size=51)),
    _family("deit", "vision", "DeiTModel", "DeiTConfig", _vision()),
    _family("beit", "vision", "BeitModel", "BeitConfig", _vision()),
    _family("dinov2", "vision", "Dinov2Model", "Dinov2Config", _vision(mlp_ratio=2)),
    _family("dinov2-swiglu", "vision", "Dinov2Model", "Dinov2Config", _vision(use_swiglu_ffn=True),
            form="gated", fused_in="weights_in", activation="silu"),
    _family("dinov3", "vision", "DINOv3ViTModel", "DINOv3ViTConfig", _vision()),
    _family("siglip-vision", "vision", "SiglipVisionModel", "SiglipVisionConfig", _vision(),
            activation="gelu_tanh", refused="pooling head"),
    _family("clip-vision", "vision", "CLIPVisionModel", "CLIPVisionConfig", _vision(), activation="quick_gelu"),
    _family("swin", "vision", "SwinModel", "SwinConfig",
            {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}),
    _family("vit_mae", "vision", "ViTMAEForPreTraining", "ViTMAEConfig",
            _vision(decoder_hidden_size=32, decoder_intermediate_size=44, decoder_num_hidden_layers=1,
                    decoder_num_attention_heads=4), sites=3),
    _family("videomae", "vision", "VideoMAEModel", "VideoMAEConfig", _vision(num_frames=2, tubelet_size=2)),
    # text and vision
    _family("clip", "text+vision", "CLIPModel", "CLIPConfig",
            {"text_config": _text(), "vision_config": _vision(), "projection_dim": 16}, sites=4, activation="quick_gelu"),
    _family("siglip", "text+vision", "SiglipModel", "SiglipConfig", {"text_config": _text(), "vision_config": _vision()},
            sites=4, activation="gelu_tanh", refused="pooling head"),
    _family("vilt", "text+vision", "ViltModel", "ViltConfig", _vision(vocab_size=64, max_position_embeddings=64)),
    # speech
    _family("wav2vec2", "speech", "Wav2Vec2ForCTC", "Wav2Vec2Config", _speech()),
    _family("hubert", "speech", "HubertModel", "HubertConfig", _speech()),
    _family("wavlm", "speech", "WavLMModel", "WavLMConfig", _speech()),
    _family("wav2vec2-conformer", "speech", "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", _speech(conv_depthwise_kernel_size=3),
            sites=4),
    _family("whisper", "speech", "WhisperForConditionalGeneration", "WhisperConfig",
            _seq2seq(num_mel_bins=8, max_source_positions=16, max_target_positions=16, suppress_tokens=None, begin_suppress_tokens=None),
            sites=4),
    _family("speech_to_text", "speech", "Speech2TextForConditionalGeneration", "Speech2TextConfig",
            _seq2seq(input_feat_per_channel=8, conv_channels=16, max_source_positions=64, max_target_positions=16),
            sites=4, activation="relu"),
    _family("audio-spectrogram-transformer", "speech", "ASTModel", "ASTConfig",
            _vision(max_length=16, num_mel_bins=8, patch_size=4, frequency_stride=4, time_stride=4)),
    _family("moonshine", "speech", "MoonshineForConditionalGeneration", "MoonshineConfig",
            {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 52, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
             "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            sites=4, form=("plain", "plain", "up_gate", "up_gate"), activation=("gelu", "gelu", "silu", "silu")),
    # refused, wholly or in part
    _family("mixtral", "decoder", "MixtralForCausalLM", "MixtralConfig", _llama(), sites=0, refused="native MoE"),
    _family("qwen2_moe", "decoder", "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
            _llama(moe_intermediate_size=16, shared_expert_intermediate_size=20, num_experts=4, num_experts_per_tok=2),
            sites=0, refused="native MoE"),
    _family("qwen3_moe", "decoder", "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
            _llama(head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2), sites=0, refused="native MoE"),
    _family("gpt_oss", "decoder", "GptOssForCausalLM", "GptOssConfig",
            _llama(head_dim=8, num_local_experts=4, num_experts_per_tok=2), sites=0, refused="native MoE"),
    _family("deepseek_v3", "decoder", "DeepseekV3ForCausalLM", "DeepseekV3Config",
            _llama(num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
                   q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1),
            sites=1, **_GLU, refused="native MoE"),
    _family("olmoe", "decoder", "OlmoeForCausalLM", "OlmoeConfig", _llama(num_experts=4, num_experts_per_tok=2),
            sites=0, refused="native MoE"),
    _family("granitemoeshared", "decoder", "GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig",
            _llama(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=44), sites=0, refused="native MoE"),
    _family("jetmoe", "decoder", "JetMoeForCausalLM", "JetMoeConfig",
            _text(num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2), sites=0, refused="native MoE"),
    _family("llama4", "decoder", "Llama4ForCausalLM", "Llama4TextConfig",
            _llama(head_dim=8, intermediate_size_mlp=44, num_local_experts=4, interleave_moe_layer_step=2),
            sites=1, **_GLU, refused="native MoE"),
    _family("switch_transformers", "encoder-decoder", "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
            _t5(num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1), sites=2, activation="relu", bias=False,
            refused="native MoE"),
    _family("bitnet", "decoder", "BitNetForCausalLM", "BitNetConfig", _llama(), sites=0, refused="not independent"),
    _family("gemma3n", "decoder", "Gemma3nForCausalLM", "Gemma3nTextConfig",
            _llama(head_dim=8, num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=64,
                   hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.9, 0.9]),
            sites=0, refused="not independent"),
    _family("apertus", "decoder", "ApertusForCausalLM", "ApertusConfig", _llama(), sites=0, refused="unknown activation"),
    _family("falcon_h1-multipliers", "decoder", "FalconH1ForCausalLM", "FalconH1Config",
            _llama(head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8,
                   mlp_multipliers=[0.7, 1.3]), sites=0, refused="unknown activation"),
    _family("squeezebert", "encoder", "SqueezeBertModel", "SqueezeBertConfig",
            _text(embedding_size=32, q_groups=1, k_groups=1, v_groups=1, post_attention_groups=1, intermediate_groups=1, output_groups=1),
            sites=0, refused="Conv1d"),
    _family("segformer", "vision", "SegformerModel", "SegformerConfig",
            {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
             "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "image_size": 32}, sites=0, refused="tokens mix"),
    _family("mamba", "decoder", "MambaForCausalLM", "MambaConfig",
            {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, sites=0, refused="no two of its linear layers"),
)  # fmt: skip

FAMILIES = {row.id: row for row in _ROWS}
SUPPORTED = tuple(row.id for row in _ROWS if row.sites)
"""Families of which at least one FFN is found."""
REFUSED = tuple(row.id for row in _ROWS if not row.sites)
"""Families of which nothing can be converted."""
