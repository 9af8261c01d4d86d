"""Which data and which head a model gets for its task; what cannot be served is said in one line."""

import json
import math

import pytest
import tiny
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from moeify.data import AugmentConfig, DataConfig
from moeify.errors import ConfigError, DataError, UnsupportedModelError
from moeify.pipeline import tasks
from moeify.pipeline.tasks import load_for_task, measure_task, task_batches, training_data, window_tokens

BERT = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT["max_position_embeddings"] = 32
SIX = ("sadness", "joy", "love", "anger", "fear", "surprise")


def seeded():
    return torch.Generator().manual_seed(0)


def save_bert(directory, cls="BertModel", **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, cls)(transformers.BertConfig(**BERT, **options)).save_pretrained(directory)
    tokenizer = tiny.byte_tokenizer(mask_token="<mask>", cls_token="<s>", sep_token="</s>")
    around = [("<s>", tokenizer.cls_token_id), ("</s>", tokenizer.sep_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    tokenizer.save_pretrained(directory)
    return str(directory)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(data=str(path), max_tokens=None)


@pytest.fixture
def emotions(tmp_path):
    return write_rows(tmp_path / "emotions.jsonl", [{"text": f"i feel {name}", "label": name} for name in SIX * 2])


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("some words of text " * 40)
    return DataConfig(data=str(tmp_path / "text.txt"), window=16, max_tokens=None)


# -- the task ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "task"),
    [("BertForMaskedLM", "masked-lm"), ("BertForSequenceClassification", "sequence-classification"), ("BertLMHeadModel", "causal-lm")],
)
def test_task_without_a_name_is_that_of_the_head(tmp_path, text, cls, task):
    loaded = load_for_task(save_bert(tmp_path / "bert", cls), text)
    assert (loaded.task, loaded.has_new_head) == (task, False)
    assert type(loaded.model).__name__ == cls
    assert loaded.processor.mask_token == "<mask>"


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
def test_new_classification_head_has_the_classes_of_the_labels(tmp_path, emotions, cls):
    source = save_bert(tmp_path / "bert", cls)
    loaded = load_for_task(source, emotions, task="sequence-classification")
    assert loaded.has_new_head
    assert type(loaded.model).__name__ == "BertForSequenceClassification"
    assert loaded.model.config.label2id == {name: i for i, name in enumerate(sorted(SIX))}
    assert loaded.model.config.id2label == dict(enumerate(sorted(SIX)))
    assert loaded.model.classifier.weight.shape == (6, 16)
    same, other = (load_for_task(source, emotions, task="sequence-classification", seed=seed).model for seed in (0, 1))
    assert torch.equal(same.classifier.weight, loaded.model.classifier.weight)
    assert not torch.equal(other.classifier.weight, loaded.model.classifier.weight)
    labels = training_data(loaded, emotions).batch(range(6), generator=seeded())["labels"]
    assert labels.tolist() == [sorted(SIX).index(name) for name in SIX]


def test_new_classification_head_of_numbered_classes_has_one_more_than_the_largest(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 3}])
    loaded = load_for_task(save_bert(tmp_path / "bert"), data, task="sequence-classification")
    assert loaded.model.config.num_labels == 4


def test_a_head_that_is_there_is_read_though_the_task_is_named(tmp_path, emotions):
    source = save_bert(
        tmp_path / "bert", "BertForSequenceClassification", id2label=dict(enumerate(SIX)), label2id={n: i for i, n in enumerate(SIX)}
    )
    loaded = load_for_task(source, emotions, task="sequence-classification")
    assert not loaded.has_new_head
    assert training_data(loaded, emotions).batch([0, 5], generator=seeded())["labels"].tolist() == [0, 5]


def test_a_decoder_with_a_new_classification_head_learns_what_padding_is(tmp_path, emotions):
    loaded = load_for_task(str(tiny.save_dense_tiny(tmp_path / "llama")), emotions, task="sequence-classification")
    assert type(loaded.model).__name__ == "LlamaForSequenceClassification"
    assert loaded.model.config.pad_token_id == 256
    batch = training_data(loaded, emotions).batch([1, 0], generator=seeded())
    assert torch.isfinite(loaded.model(**batch).loss)


# -- its data ------------------------------------------------------------------------------------------------------------------------


def test_causal_lm_reads_windows(tmp_path, text):
    loaded = load_for_task(str(tiny.save_dense_tiny(tmp_path / "llama")), text)
    data = training_data(loaded, text)
    batch = data.batch([0, 1], generator=seeded())
    assert loaded.processor.decode(batch["input_ids"].flatten()) == ("some words of text " * 2)[:32]
    assert len(data) == 19 * 40 // 16
    assert window_tokens(loaded, text) == 16
    batches = task_batches(loaded, text, batch_size=3)
    assert [len(b["input_ids"]) for b in batches] == [3] * 15 + [2]
    with torch.no_grad():
        losses = [loaded.model(**data.batch([i], generator=seeded())).loss.item() for i in range(len(data))]
    assert measure_task(loaded.model, loaded.task, batches) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_masked_lm_reads_windows_as_long_as_the_model_and_masks_always_the_same(tmp_path, text):
    loaded = load_for_task(save_bert(tmp_path / "bert", "BertForMaskedLM"), text)
    wide = DataConfig(data=text.data, window=1024, max_tokens=100)
    assert window_tokens(loaded, wide) == 32
    first, again = (task_batches(loaded, wide) for _ in range(2))
    assert [b["input_ids"].shape for b in first] == [(3, 32)]  # two of them special: three windows of 30 in 100 tokens
    assert torch.equal(first[0]["labels"], again[0]["labels"])
    assert (first[0]["input_ids"] == loaded.processor.mask_token_id).any()
    assert (first[0]["input_ids"][:, [0, -1]] == torch.tensor([loaded.processor.cls_token_id, loaded.processor.sep_token_id])).all()
    with torch.no_grad():
        loss = loaded.model(**first[0]).loss.item()
    assert measure_task(loaded.model, loaded.task, first) == pytest.approx(math.exp(loss), rel=1e-4)


def test_sequence_classification_reads_texts_up_to_the_models_length_and_max_tokens(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"text": "a" * 40, "label": i % 2} for i in range(10)])
    loaded = load_for_task(save_bert(tmp_path / "bert", "BertForSequenceClassification"), data)
    assert training_data(loaded, data).batch([0], generator=seeded())["input_ids"].shape == (1, 32)
    few = DataConfig(data=data.data, window=12, max_tokens=30)
    assert [tuple(b["input_ids"].shape) for b in task_batches(loaded, few)] == [(3, 12)]
    batches = task_batches(loaded, data)
    with torch.no_grad():
        best = torch.cat([loaded.model(**b).logits.argmax(-1) for b in batches])
    right = (best == torch.arange(10) % 2).float().mean().item()
    assert measure_task(loaded.model, loaded.task, batches) == pytest.approx(right)


@pytest.fixture
def vit(tmp_path):
    pytest.importorskip("PIL.Image")
    config = transformers.ViTConfig(
        **{**BERT, "image_size": 4, "patch_size": 2, "num_channels": 1, "id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessorPil(size={"height": 4, "width": 4}, image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.fixture
def pets(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label, shade in (("cat", 0), ("dog", 255)):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for i in range(3):
            picture = image.new("L", (4, 4), shade)
            picture.putpixel((0, 0), 128)
            picture.save(tmp_path / "pets" / label / f"{i}.png")
    return DataConfig(data=str(tmp_path / "pets"), max_tokens=None)


def test_image_classification_reads_images_up_to_max_tokens_in_patches(vit, pets):
    loaded = load_for_task(vit, pets)
    assert loaded.task == "image-classification"
    batch = training_data(loaded, pets).batch([0, 1], generator=seeded())
    assert batch["labels"].tolist() == [0, 1]
    assert batch["pixel_values"].shape == (2, 1, 4, 4)
    assert batch["pixel_values"][:, 0, 3, 3].tolist() == [-1, 1]
    assert len(training_data(loaded, DataConfig(data=pets.data, max_tokens=9))) == 3  # of four patches each
    assert torch.isfinite(loaded.model(**batch).loss)


def test_image_classification_varies_images_as_asked_but_not_to_measure(vit, pets):
    loaded = load_for_task(vit, pets)
    varied = training_data(loaded, pets, augment=AugmentConfig(flip=True)).batch([0] * 50, generator=seeded())["pixel_values"]
    assert len(varied.unique(dim=0)) == 2
    plain = torch.cat([b["pixel_values"] for b in task_batches(loaded, pets, batch_size=2)])
    assert len(plain.unique(dim=0)) == 2, "of cats and dogs one each"


# -- what cannot be served -------------------------------------------------------------------------------------------------------------


def test_a_model_without_a_head_needs_the_tasks_name(tmp_path, text):
    with pytest.raises(UnsupportedModelError, match="BertModel has no head for a known task; name one: --task causal-lm, masked-lm"):
        load_for_task(save_bert(tmp_path / "bert"), text)


def test_an_unknown_task_names_the_nearest(tmp_path, text):
    with pytest.raises(ConfigError, match=r"--task: unknown name 'masked_lm'; did you mean 'masked-lm'\?"):
        load_for_task("nothing", text, task="masked_lm")


def test_a_head_that_the_family_does_not_have_is_refused(vit, emotions):
    with pytest.raises(UnsupportedModelError, match="no head for sequence-classification in the family 'vit'"):
        load_for_task(vit, emotions, task="sequence-classification")


def test_a_model_without_a_tokenizer_is_refused(tmp_path, text):
    source = save_bert(tmp_path / "bert", "BertForMaskedLM")
    for path in (tmp_path / "bert").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match="BertForMaskedLM came without a tokenizer or processor"):
        load_for_task(source, text)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param([{"text": "a", "emotion": 1}], "has no column 'label'; it has 'text', 'emotion'", id="no label column"),
        pytest.param(
            [{"text": "a", "label": "joi"}], r"'.*data\.jsonl': label 'joi' is not a class of the model's head", id="unknown class"
        ),
        pytest.param([{"text": "a", "label": 2}], r"'.*data\.jsonl': label 2 is not a class .* whose 2 are 0 to 1", id="unknown number"),
    ],
)
def test_labels_that_the_head_does_not_know_are_refused(tmp_path, rows, message):
    data = write_rows(tmp_path / "data.jsonl", rows)
    loaded = load_for_task(save_bert(tmp_path / "bert", "BertForSequenceClassification"), data)
    with pytest.raises(DataError, match=message):
        training_data(loaded, data)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["joy"] * 3, "every label is 'joy'; a head needs two classes"), ([0, -1], "label -1 is not a class"), ([0, "joy"], "mix integers")],
)
def test_labels_that_make_no_head_are_refused(tmp_path, labels, message):
    data = write_rows(tmp_path / "data.jsonl", [{"text": "a", "label": label} for label in labels])
    with pytest.raises(DataError, match=message):
        load_for_task(save_bert(tmp_path / "bert"), data, task="sequence-classification")


def test_plain_text_for_a_classifier_is_refused(tmp_path, text):
    loaded = load_for_task(save_bert(tmp_path / "bert", "BertForSequenceClassification"), text)
    with pytest.raises(DataError, match="is plain text and has no labels"):
        training_data(loaded, text)


def test_texts_for_an_image_classifier_are_refused(vit, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"text": "a", "label": "cat"}])
    with pytest.raises(DataError, match=r"data\.jsonl': the data holds text, and the model reads images"):
        training_data(load_for_task(vit, data), data)


def test_a_number_of_tokens_is_none_of_sequences_of_many_lengths(tmp_path, emotions):
    loaded = load_for_task(save_bert(tmp_path / "bert"), emotions, task="sequence-classification")
    with pytest.raises(ConfigError, match="--batch-tokens is for windows of text; give --batch-sequences for sequence-classification"):
        window_tokens(loaded, emotions)


def test_augmentation_of_text_is_refused(tmp_path, text):
    loaded = load_for_task(str(tiny.save_dense_tiny(tmp_path / "llama")), text)
    with pytest.raises(ConfigError, match="vary images; LlamaForCausalLM reads text"):
        training_data(loaded, text, augment=AugmentConfig(crop=1))


def test_windows_that_special_tokens_fill_are_refused(tmp_path, text):
    loaded = load_for_task(save_bert(tmp_path / "bert", "BertForMaskedLM"), text)
    with pytest.raises(DataError, match="--window 3 leaves 1 tokens of text beside 2 special ones"):
        training_data(loaded, DataConfig(data=text.data, window=3))


def test_windows_longer_than_the_model_are_refused(tmp_path, text):
    loaded = load_for_task(str(tiny.save_dense_tiny(tmp_path / "llama")), text)
    with pytest.raises(DataError, match="--window 1024 is more than the 128 positions"):
        training_data(loaded, DataConfig(data=text.data))


def test_every_task_is_measured_by_a_known_metric():
    from moeify.evaluate import METRICS

    assert all(task.metric in METRICS and hasattr(transformers, task.auto_class) for task in tasks.TASKS.values())
