"""What a report runs a checkpoint for: tokens of a text, patches of an image, and what is refused before anything is loaded."""

import json

import pytest
import tiny
import torch
import transformers as hf

from moeify.convert import ConvertConfig, convert
from moeify.errors import CheckpointError, ConfigError, DataError
from moeify.evaluate import TokenCosts, token_costs
from moeify.hf.random import image_processor
from moeify.pipeline import PanelRequest, measure, report_checkpoint
from moeify.pipeline.panels import tokens_of
from moeify.routers import NormRouterConfig
from moeify.select import DynKMax
from moeify.sites import find_ffn_sites


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A converted image classifier with its processor, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("panels") / "vit"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.ViTConfig(
            image_size=12,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.5,
        )
        model = hf.ViTForImageClassification(config).eval()
        options = ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), rule=DynKMax(tau=0.9))
        convert(model, options, sites=find_ffn_sites(model, {"pixel_values": torch.rand(1, 1, 12, 12)}))
    model.save_pretrained(folder)
    image_processor(config).save_pretrained(folder)
    (folder / "moeify.json").write_text(json.dumps({"schema": 1, "sites": [], "calibration": {}}))
    return folder


@pytest.fixture
def picture(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    image.linear_gradient("L").resize((24, 24)).save(path)
    return path


def test_report_of_an_image_shows_its_patches(vit, picture, tmp_path):
    pytest.importorskip("matplotlib")
    files = report_checkpoint(vit, out=tmp_path / "page", request=PanelRequest(image=picture))
    assert set(files) == {"html", "page", "analysis", "patches"}
    assert 'src="data:image/png;base64,' in (tmp_path / "page" / "report.html").read_text()
    found = json.loads((tmp_path / "page" / "analysis.json").read_text())
    costs = TokenCosts.from_json(found["image"]["costs"])
    assert costs.grid == (3, 3)
    assert costs.fraction_BS.shape == (1, 10)
    assert "![cost of patches](patches.png)" in (tmp_path / "page" / "report.md").read_text()
    assert (tmp_path / "page" / "patches.png").read_bytes().startswith(b"\x89PNG")


def test_bad_requests_are_refused_before_the_model_is_loaded(vit, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    monkeypatch.setattr(measure, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "notes.png").write_text("no image")
    for request, message in (
        (PanelRequest(text="a"), "ViTForImageClassification reads images; give --image"),
        (PanelRequest(image=tmp_path / "missing.png"), "cannot read '.*missing.png': No such file"),
        (PanelRequest(image=tmp_path / "notes.png"), "notes.png': not a readable image"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            report_checkpoint(vit, request=request)
    dense = tiny.save_dense_tiny(tmp_path / "dense")
    (dense / "moeify.json").write_text(json.dumps({"schema": 1, "sites": [], "calibration": {}}))
    with pytest.raises(CheckpointError, match="is of a dense model; convert it first"):
        report_checkpoint(dense, request=PanelRequest(text="a"))
    assert not (vit / "report").exists()


def test_tokens_of_a_text_put_together_are_the_text():
    model, tokenizer = tiny.convert_tiny(tiny.tiny_llama()), tiny.byte_tokenizer()
    inputs, tokens = tokens_of(model, tokenizer, "The  end\n<|end|>?")
    assert inputs["input_ids"].shape == (1, len(tokens))
    assert "".join(tokens) == "The  end\n<|end|>?"
    assert tokens[-2] == "<|end|>"
    assert token_costs(model, inputs).flops_LBS.shape == (2, 1, len(tokens))
    assert tokens_of(model, tokenizer, "é")[1] == ("é", "é"), "two bytes of one character"


def test_tokens_of_words_keep_their_spaces_and_specials_have_names():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "the": 3, "fo": 4, "##x": 5}
    plain = Tokenizer(models.WordPiece(vocab=words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=plain, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    _, tokens = tokens_of(tiny.tiny_llama(), tokenizer, "the fox  zz")
    assert tokens == ("[CLS]", "the", " fo", "x", "  zz", "[SEP]")


def test_tokens_of_an_encoder_decoder_or_of_nothing_are_refused():
    model = tiny.tiny_llama()
    with pytest.raises(DataError, match="no token"):
        tokens_of(model, tiny.byte_tokenizer(), "")
    model.config.is_encoder_decoder = True
    with pytest.raises(ConfigError, match="leave --text out"):
        tokens_of(model, tiny.byte_tokenizer(), "a")
