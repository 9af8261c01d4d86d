"""What figures read from outside: where it lies, what is missing and how to get it, and tiny stand-ins for a smoke run."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeify.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Input:
    """One model or data set."""

    folder: str
    """What it is called in the folder of --inputs."""
    content: str
    """What it is."""
    get: str
    """Command that brings it into the folder INPUTS; empty for what figures go without."""


INPUTS: dict[str, Input] = {
    "novels": Input(
        folder="novels",
        content="novels as parquet files with a column 'text', named by split; without them the GPT reads builtin:pydoc",
        get="",
    ),
    "minilm": Input(
        folder="minilm",
        content="all-MiniLM-L6-v2",
        get="hf download sentence-transformers/all-MiniLM-L6-v2 --include '*.json' '*.txt' model.safetensors --local-dir INPUTS/minilm",
    ),
    "emotion": Input(
        folder="emotion",
        content="CARER, parquet files with columns 'text' and 'label', named by split",
        get="hf download dair-ai/emotion --repo-type dataset --include 'split/*' --local-dir INPUTS/emotion",
    ),
    "fashion": Input(
        folder="fashion_mnist",
        content="Fashion-MNIST, parquet files with columns 'image' and 'label', named by split",
        get="hf download zalando-datasets/fashion_mnist --repo-type dataset --local-dir INPUTS/fashion_mnist",
    ),
}
"""By the name of the option that gives its path."""


def find_inputs(folder: Path | None, given: Mapping[str, Path | None]) -> dict[str, Path]:
    """Paths of the inputs that are there.

    Args:
        folder: of --inputs, with the folders of `INPUTS` (those that are there); None where the option was not given.
        given: paths by name, which win over the folder.

    Raises:
        DataError: a path that was given does not exist.
    """
    found = {}
    if folder is not None and not folder.is_dir():
        raise DataError(f"--inputs '{folder}' is no folder.")
    for name, about in INPUTS.items():
        path = given.get(name)
        if path is not None:
            if not path.exists():
                raise DataError(f"--{name} '{path}' does not exist; it is {about.content}.")
            found[name] = path
        elif folder is not None and (folder / about.folder).exists():
            found[name] = folder / about.folder
    return found


def check_needs(figures: Mapping[str, Sequence[str]], found: Mapping[str, Path]) -> None:
    """Refuse figures whose inputs are not there.

    Args:
        figures: needed inputs by number of the figure.
        found: what is there, from `find_inputs`.

    Raises:
        DataError: in one line: which figures need what, and the command that gets it.
    """
    missing = [name for name in INPUTS if name not in found and any(name in needs for needs in figures.values())]
    if missing:
        lacking = [number for number, needs in figures.items() if set(missing) & set(needs)]
        what = " and ".join(f"--{name} ({INPUTS[name].content})" for name in missing)
        how = " && ".join(INPUTS[name].get for name in missing)
        plural = "figure" if len(lacking) == 1 else "figures"
        raise DataError(f"{plural} {', '.join(lacking)}: no {what}; get it by: {how}; then give --inputs INPUTS.")


def write_stand_ins(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Tiny data of the same form, the same every time: a smoke run on them shows that a figure is drawn, not what it shows.

    MiniLM has none: a tiny BERT with random weights takes its place (`recipes`).
    """
    writers = {"emotion": _write_texts, "fashion": _write_images}
    found = {}
    for name in names:
        if name in writers:
            found[name] = folder / INPUTS[name].folder
            if not found[name].exists():
                new = found[name].with_name(found[name].name + ".new")
                new.mkdir(parents=True, exist_ok=True)
                writers[name](new)
                new.replace(found[name])
    return found


def _write_texts(folder: Path) -> None:
    """Texts of six classes, each with words of its own."""
    import pyarrow
    import pyarrow.parquet

    words = ("sad grey", "glad sun", "love dear", "mad red", "fear dark", "oh wow")
    draw = random.Random(0)
    for split, rows in (("train", 96), ("validation", 48)):
        labels = [i % len(words) for i in range(rows)]
        texts = [" ".join(draw.choices([*words[label].split(), "the", "day"], k=6)) for label in labels]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), folder / f"{split}.parquet")


def _write_images(folder: Path) -> None:
    """Grey images of ten classes, a bright square at a place for each."""
    import io

    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    for split, rows in (("train", 80), ("test", 40)):
        images, labels = [], [i % 10 for i in range(rows)]
        for i, label in enumerate(labels):
            image = Image.new("L", (28, 28), 10 + i % 7)
            image.paste(220, (2 * label, 2 * label, 2 * label + 8, 2 * label + 8))
            data = io.BytesIO()
            image.save(data, format="PNG")
            images.append({"bytes": data.getvalue(), "path": None})
        pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), folder / f"{split}.parquet")
