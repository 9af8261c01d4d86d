"""Data sets with random access: what a batch holds, and that the generator alone decides what is random in it."""

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer

from moeify.data import AugmentConfig, Example, LabelledImageData, LabelledTextData, MaskedData, WindowData, class_ids
from moeify.errors import ConfigError, DataError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_window_batch_gives_the_windows_of_its_rows_as_labels_too():
    data = WindowData(torch.arange(12).view(4, 3))
    batch = data.batch([2, 0], generator=seeded())
    assert len(data) == 4
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[6, 7, 8], [0, 1, 2]]


# -- masked language models ------------------------------------------------------------------------------------------------------------


class WithSpecials:
    """Ids below 5 are special: 1 starts a text, 2 ends it, 4 is the mask; characters are 5 and more."""

    mask_token_id = 4
    all_special_ids = (0, 1, 2, 3, 4)

    def __len__(self):
        return 105

    def __call__(self, text, *, add_special_tokens):
        ids = [5 + ord(c) % 100 for c in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    def convert_ids_to_tokens(self, ids):
        raise NotImplementedError


def masked_batch(*, windows=400, length=50, special=None, frac=0.15, seed=0):
    ids_WS = torch.randint(5, 105, (windows, length), generator=seeded(9))
    if special is not None:
        ids_WS[:, special] = 3
    data = MaskedData(ids_WS, WithSpecials(), frac=frac)
    return ids_WS, data.batch(range(windows), generator=seeded(seed))


def test_masked_batch_has_special_tokens_around_each_window_and_predicts_none_of_them():
    ids_WS, batch = masked_batch(special=7)
    labels, seen = batch["labels"], batch["input_ids"]
    assert seen.shape == (400, 52)
    assert batch["attention_mask"].eq(1).all()
    assert (seen[:, 0] == 1).all()
    assert (seen[:, -1] == 2).all()
    assert (labels[:, [0, 8, -1]] == -100).all()
    assert (seen[:, 8] == 3).all()
    chosen = labels[:, 1:-1] != -100
    assert torch.equal(labels[:, 1:-1][chosen], ids_WS[chosen])
    assert torch.equal(seen[:, 1:-1][~chosen], ids_WS[~chosen])


def test_masked_batch_predicts_15_percent_and_shows_80_10_10():
    ids_WS, batch = masked_batch()
    chosen = batch["labels"][:, 1:-1] != -100
    seen, true = batch["input_ids"][:, 1:-1][chosen], ids_WS[chosen]
    count = int(chosen.sum())
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.008)  # three standard deviations of 20000 draws
    assert (seen == 4).sum().item() / count == pytest.approx(0.8, abs=0.022)
    assert (seen == true).sum().item() / count == pytest.approx(0.1, abs=0.017)
    others = seen[(seen != 4) & (seen != true)]
    assert len(others) / count == pytest.approx(0.1, abs=0.017)
    assert len(others.unique()) > 60


def test_masked_batch_depends_on_the_generator_alone():
    first, same, other = (masked_batch(seed=seed)[1] for seed in (0, 0, 1))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["labels"], other["labels"])


def test_masked_batch_of_short_windows_predicts_one_token_of_each_at_least():
    _, batch = masked_batch(length=3, frac=0.01)
    assert ((batch["labels"] != -100).sum(1) >= 1).all()
    assert ((batch["labels"] != -100).sum(1) == 1).float().mean() > 0.9


def test_masked_batch_of_special_tokens_alone_predicts_nothing():
    data = MaskedData(torch.full((2, 3), 3), WithSpecials())
    assert (data.batch([0, 1], generator=seeded())["labels"] == -100).all()


@pytest.mark.parametrize(
    ("tokenizer", "frac", "error", "message"),
    [
        pytest.param(byte_tokenizer(), 0.15, DataError, "has no mask token", id="no mask token"),
        pytest.param(WithSpecials(), 0.0, ConfigError, r"frac must be in \(0, 1\], got 0.0", id="nothing to predict"),
    ],
)
def test_masked_data_refuses_what_cannot_be_masked(tokenizer, frac, error, message):
    with pytest.raises(error, match=message):
        MaskedData(torch.zeros(2, 3, dtype=torch.int64), tokenizer, frac=frac)


# -- labelled texts --------------------------------------------------------------------------------------------------------------------


def texts(*pairs):
    return [Example(text=text, label=label) for text, label in pairs]


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), lambda text: [byte_tokenizer()(c)["input_ids"][0] for c in text]])
def test_labelled_texts_are_cut_and_padded_to_the_longest_of_the_batch(tokenizer):
    data = LabelledTextData(texts(("abcdefgh", "b"), ("ab", "a"), ("abc", "b")), tokenizer, max_length=5)
    batch = data.batch([2, 1], generator=seeded())
    a, b, c = byte_tokenizer()("abc")["input_ids"]
    pad = getattr(tokenizer, "eos_token_id", 0)
    assert len(data) == 3
    assert batch["input_ids"].tolist() == [[a, b, c], [a, b, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert data.batch([0], generator=seeded())["input_ids"].shape == (1, 5)


def test_labelled_texts_are_taken_up_to_max_tokens():
    data = LabelledTextData(texts(*[("abcd", 0)] * 600), byte_tokenizer(), max_length=5, max_tokens=9)
    assert len(data) == 3


def test_labelled_texts_are_numbered_as_the_head_knows_them():
    data = LabelledTextData(texts(("a", "joy"), ("b", "fear")), byte_tokenizer(), max_length=5, known={"joy": 4, "fear": 2})
    assert data.batch([0, 1], generator=seeded())["labels"].tolist() == [4, 2]


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        pytest.param([], {}, "no labelled example", id="nothing"),
        pytest.param([Example(image=object(), label=1)], {}, "the data holds images, and the model reads text", id="images"),
        pytest.param(texts(("a", "joi")), {"known": {"joy": 0}}, "'joi' is not a class .* did you mean 'joy'", id="unknown name"),
        pytest.param(texts(("a", 6)), {"num_classes": 6}, "label 6 is not a class .* whose 6 are 0 to 5", id="number too large"),
        pytest.param(texts(("a", -1)), {"num_classes": 6}, "label -1 is not a class", id="number below 0"),
    ],
)
def test_labelled_texts_refuse_what_the_model_cannot_learn(examples, options, message):
    with pytest.raises(DataError, match=message):
        LabelledTextData(examples, byte_tokenizer(), max_length=5, **options)


def test_class_ids_without_a_head_takes_any_integer():
    assert class_ids([7, 3]) == {3: 3, 7: 7}


# -- images ----------------------------------------------------------------------------------------------------------------------------

image = pytest.importorskip("PIL.Image")


def stack(picture):
    """Pixels as they are, (C, H, W)."""
    return torch.from_numpy(np.atleast_3d(np.array(picture))).movedim(-1, 0)


class Processor:
    """Scales and normalises, as transformers' processors do; counts what it is asked for."""

    do_rescale, rescale_factor, do_normalize, image_mean, image_std = True, 1 / 255, True, (0.5,), (0.25,)

    def __init__(self, *, more=lambda pixels: pixels):
        self.more, self.images = more, 0

    def __call__(self, images, *, return_tensors, do_rescale=True, do_normalize=True):
        self.images += len(images)
        pixels = torch.stack([stack(i) for i in images])
        if do_rescale:
            pixels = self.more(pixels.float() / 255)
        return {"pixel_values": (pixels - 0.5) / 0.25 if do_normalize else pixels}


def shade(*values):
    return [Example(image=image.new("RGB", (3, 2), (v, v, v)), label=i % 2) for i, v in enumerate(values)]


def gradient():
    """One image of 4 x 3 with the pixels 0 to 11."""
    picture = image.new("L", (4, 3))
    picture.putdata(range(12))
    return Example(image=picture, label=0)


@pytest.mark.parametrize(
    ("more", "dtype"),
    [
        pytest.param(lambda pixels: pixels, torch.uint8, id="bytes"),
        pytest.param(torch.square, torch.float32, id="floats: other values"),
        pytest.param(lambda pixels: pixels[..., :1], torch.float32, id="floats: another size"),
    ],
)
def test_images_are_kept_as_bytes_only_where_that_loses_nothing(more, dtype):
    processor = Processor(more=more)
    data = LabelledImageData(shade(0, 100, 255), processor, mode="L")
    batch = data.batch([2, 1], generator=seeded())
    assert data._groups[0].dtype == dtype
    expected = (more(torch.tensor([255, 100]).view(2, 1, 1, 1).expand(2, 1, 2, 3) / 255) - 0.5) / 0.25
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [0, 1]
    decoded = processor.images
    data.batch([0], generator=seeded())
    assert processor.images == decoded, "nothing is decoded again"


def test_images_of_a_transformers_processor_equal_its_own():
    transformers = pytest.importorskip("transformers")
    processor = transformers.ViTImageProcessorPil(size={"height": 4, "width": 4})
    examples = [Example(image=image.effect_noise((9, 7), 80).convert("RGB"), label=i) for i in range(3)]
    data = LabelledImageData(examples, processor)
    expected = processor(images=[e.image for e in examples], return_tensors="pt")["pixel_values"]
    assert data._groups[0].dtype == torch.uint8
    torch.testing.assert_close(data.batch([0, 1, 2], generator=seeded())["pixel_values"], torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


def test_images_beyond_one_group_are_found_by_row():
    data = LabelledImageData(shade(*[i % 251 for i in range(600)]), lambda picture: torch.tensor([[[picture.getpixel((0, 0))]]]), mode="L")
    assert len(data) == 600
    assert data.batch([0, 255, 256, 599], generator=seeded())["pixel_values"].flatten().tolist() == [0, 4, 5, 97]


def test_images_are_taken_up_to_max_images():
    examples = iter(shade(*range(10)))
    assert len(LabelledImageData(examples, Processor(), mode="L", max_images=4)) == 4
    assert len(list(examples)) == 6, "the rest is never read"


def test_flip_mirrors_every_other_image_by_the_generator():
    data = LabelledImageData([gradient()], stack, mode="L", augment=AugmentConfig(flip=True))
    seen = data.batch([0] * 200, generator=seeded())["pixel_values"]
    straight = torch.arange(12).view(1, 3, 4)
    flipped = (seen == straight.flip(-1)).all((1, 2, 3))
    assert torch.equal(~flipped, (seen == straight).all((1, 2, 3)))
    assert 70 < flipped.sum() < 130
    assert torch.equal(seen, data.batch([0] * 200, generator=seeded())["pixel_values"])


def test_crop_shifts_images_and_repeats_their_edge():
    data = LabelledImageData([gradient()], stack, mode="L", augment=AugmentConfig(crop=1))
    seen = {tuple(x.flatten().tolist()) for x in data.batch([0] * 300, generator=seeded())["pixel_values"]}
    grid = [[4 * y + x for x in range(4)] for y in range(3)]
    rows, columns = ([0, 0, 1], [0, 1, 2], [1, 2, 2]), ([0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 3])
    assert seen == {tuple(grid[y][x] for y in ys for x in xs) for ys in rows for xs in columns}


def test_crop_keeps_the_channels():
    picture = image.new("RGB", (2, 2), (1, 2, 3))
    data = LabelledImageData([Example(image=picture, label=0)], stack, augment=AugmentConfig(crop=1, flip=True))
    assert data.batch([0], generator=seeded())["pixel_values"].tolist() == [[[[1, 1], [1, 1]], [[2, 2], [2, 2]], [[3, 3], [3, 3]]]]


@pytest.mark.parametrize(
    ("examples", "message"),
    [([], "no labelled example"), (texts(("a", 0)), "the data holds text, and the model reads images")],
    ids=["nothing", "texts"],
)
def test_labelled_images_refuse_what_is_no_image(examples, message):
    with pytest.raises(DataError, match=message):
        LabelledImageData(examples, Processor())


def test_augment_config_refuses_a_negative_crop():
    with pytest.raises(ConfigError, match="crop must be at least 0"):
        AugmentConfig(crop=-1)
