"""Small data files, as the tests of `moeify.data` write and read them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from moeify.data import DataConfig, read_texts


def read(path, **options):
    return list(read_texts(DataConfig(data=str(path), **options)))


def write_words(path, lines, *, rng):
    """Lines of twelve words, out of fifty that ``rng`` makes up."""
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 7))) for _ in range(50)]
    path.write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(lines)))
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def write_png(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), shade).save(path)
    return path
