"""Loading from folders and files, with every way it can fail; saving whole or not at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors import SafetensorError

from moeify.controls import set_rule
from moeify.errors import CheckpointError, MoeifyError, UnsupportedModelError
from moeify.hf import folders, save
from moeify.hf.folders import check_output
from moeify.hf.load import load_model, model_class, read_calibration, read_manifest
from moeify.hf.save import save_checkpoint, save_dense, save_trained
from moeify.layers import moe_layers
from moeify.select import TopK

CALIBRATION = {"rule": "topk", "knob": "k", "value": 2.0, "active_fraction": 0.33, "router_scores": {"model.layers.0.mlp": 0.9}}


def logits(model):
    with torch.no_grad():
        return model(**tiny.tiny_inputs()).logits


@pytest.fixture
def dense(tmp_path):
    return tiny.save_dense_tiny(tmp_path / "dense")


@pytest.fixture
def saved(tmp_path):
    model = tiny.convert_tiny(tiny.tiny_llama(), rule=TopK(k=2))
    save_checkpoint(model, tiny.byte_tokenizer(), tmp_path / "moe", calibration=CALIBRATION, card="# card\n")
    return tmp_path / "moe"


def files_below(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# -- load ----------------------------------------------------------------------------------------------------------------------------


def test_load_model_of_a_dense_folder_returns_class_of_the_config_and_tokenizer(dense):
    model, tokenizer = load_model(dense)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert tokenizer.decode(tokenizer("ab c").input_ids) == "ab c"
    assert torch.equal(logits(model), logits(tiny.tiny_llama()))


def test_load_model_of_a_converted_folder_is_bit_equal_to_what_was_saved(saved):
    model, _ = load_model(saved)
    assert len(moe_layers(model)) == 2
    assert torch.equal(logits(model), logits(tiny.convert_tiny(tiny.tiny_llama(), rule=TopK(k=2))))


def test_load_model_with_dtype_casts_the_weights(dense):
    assert load_model(dense, dtype=torch.bfloat16)[0].dtype is torch.bfloat16


def test_load_model_without_tokenizer_files_returns_none(dense):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dense / name).unlink()
    assert load_model(dense)[1] is None


def test_load_model_with_auto_class_takes_it(dense):
    from transformers import AutoModel

    assert type(load_model(dense, auto_class=AutoModel)[0]).__name__ == "LlamaModel"


TINY_BERT = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(params=["BertModel", "BertForMaskedLM", "BertForTokenClassification"])
def headless(request, tmp_path):
    import transformers

    config = transformers.BertConfig(**TINY_BERT, num_labels=5)
    getattr(transformers, request.param)(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_load_model_with_a_new_head_draws_it_by_the_seed_and_reads_the_rest(headless):
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    options = {"auto_class": AutoModelForSequenceClassification, "new_head": {"num_labels": 3}}
    before = torch.get_rng_state()
    first, same, other = (load_model(headless, seed=seed, **options)[0] for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert (type(first).__name__, first.classifier.weight.shape) == ("BertForSequenceClassification", (3, 16))
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    stored = load_file(headless / "model.safetensors")
    for name, value in stored.items():
        if "embeddings" in name or "encoder" in name:
            assert torch.equal(first.get_parameter(f"bert.{name.removeprefix('bert.')}"), value)


def test_load_model_with_a_new_head_still_refuses_a_base_that_lacks_a_tensor(headless):
    from transformers import AutoModelForSequenceClassification

    tiny.edit_tensors(headless, lambda tensors: [tensors.pop(name) for name in list(tensors) if "intermediate.dense.weight" in name])
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of BertForSequenceClassification, first 'bert\.encoder"):
        load_model(headless, auto_class=AutoModelForSequenceClassification, new_head={"num_labels": 3})


def test_load_model_without_a_new_head_refuses_one_that_is_missing(headless):
    from transformers import AutoModelForQuestionAnswering

    with pytest.raises(CheckpointError, match="lacks 2 tensors of BertForQuestionAnswering, first 'qa_outputs"):
        load_model(headless, auto_class=AutoModelForQuestionAnswering)


def test_model_class_is_what_load_model_takes_and_reads_no_weights(dense):
    (dense / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    assert model_class(dense).__name__ == "LlamaForCausalLM"
    with pytest.raises(CheckpointError, match="does not exist"):
        model_class(dense / "nothing")


def test_load_model_without_architectures_takes_the_familys_task(dense):
    tiny.edit_config(dense, lambda config: config.pop("architectures"))
    assert type(load_model(dense)[0]).__name__ == "LlamaForCausalLM"


def _truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _foreign(directory):
    (directory / "model.safetensors").write_bytes(b"PK\x03\x04 this is a zip file")


def _other_model(directory):
    tiny.edit_tensors(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if "down_proj" in name])


def _other_shape(directory):
    tiny.edit_tensors(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))


def _nan(directory):
    tiny.edit_tensors(directory, lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].fill_(float("nan")))


def _infinite(directory):
    tiny.edit_tensors(directory, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))


def _pickle_only(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _no_weights(directory):
    (directory / "model.safetensors").unlink()


def _lost_shard(directory):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _broken_index(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text("[]")


def _no_config(directory):
    (directory / "config.json").unlink()


def _config_not_json(directory):
    (directory / "config.json").write_text("{")


def _config_a_list(directory):
    (directory / "config.json").write_text("[]")


def _broken_tokenizer(directory):
    (directory / "tokenizer.json").write_text("{}")


def _unknown_family(directory):
    tiny.edit_config(directory, lambda config: config.update(model_type="lama"))


def _unknown_class(directory):
    tiny.edit_config(directory, lambda config: config.update(architectures=["MyOwnForCausalLM"]))


def _quantized(directory):
    tiny.edit_config(directory, lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}))


def _wrong_type(directory):
    tiny.edit_config(directory, lambda config: config.update(hidden_size="x"))


BROKEN = [
    pytest.param(_truncate, CheckpointError, r"model\.safetensors' is truncated or not a safetensors file", id="truncated"),
    pytest.param(_foreign, CheckpointError, r"model\.safetensors' is truncated or not a safetensors file", id="foreign file"),
    pytest.param(
        _other_model,
        CheckpointError,
        "lacks 2 tensors of LlamaForCausalLM, first 'model.layers.0.mlp.down_proj.weight'",
        id="tensors missing",
    ),
    pytest.param(
        _other_shape, CheckpointError, r"'model.norm.weight' has shape \(7,\), LlamaForCausalLM has \(32,\)", id="tensor of another shape"
    ),
    pytest.param(_nan, CheckpointError, "'model.layers.1.self_attn.q_proj.weight' has NaN", id="NaN"),
    pytest.param(_infinite, CheckpointError, "'model.norm.weight' has NaN or infinite", id="infinity"),
    pytest.param(_pickle_only, CheckpointError, "only pickled weights .*safetensors", id="pickle only"),
    pytest.param(_no_weights, CheckpointError, "has no model.safetensors", id="no weights"),
    pytest.param(_lost_shard, CheckpointError, "lacks the shard model-00002-of-00002.safetensors", id="shard lost"),
    pytest.param(_broken_index, CheckpointError, "is not an index", id="index broken"),
    pytest.param(_no_config, CheckpointError, "has no config.json", id="no config"),
    pytest.param(_config_not_json, CheckpointError, "config.json' is not JSON", id="config not JSON"),
    pytest.param(_config_a_list, CheckpointError, "config.json' is not a JSON object", id="config a list"),
    pytest.param(_wrong_type, CheckpointError, "dense': config.json: .*hidden_size", id="config of another type"),
    pytest.param(_broken_tokenizer, CheckpointError, "tokenizer", id="tokenizer broken"),
    pytest.param(_unknown_family, UnsupportedModelError, "does not know the model family 'lama'.*did you mean", id="unknown family"),
    pytest.param(_unknown_class, UnsupportedModelError, "has no class MyOwnForCausalLM", id="unknown class"),
    pytest.param(_quantized, UnsupportedModelError, "quantised by gptq", id="quantised"),
]


@pytest.mark.parametrize(("damage", "error", "message"), BROKEN)
def test_load_model_of_a_bad_folder_says_so_in_one_line(dense, damage, error, message):
    damage(dense)
    with pytest.raises(error, match=message) as caught:
        load_model(dense)
    assert "\n" not in str(caught.value)
    assert str(dense) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("./no/such/folder", "does not exist", id="path"),
        pytest.param("/no/such/model.gguf", "does not exist", id="gguf"),
        pytest.param("weights.safetensors.of/a/b", "does not exist", id="too many slashes"),
    ],
)
def test_load_model_of_a_missing_path_says_so(source, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(source)


def test_load_model_of_a_file_asks_for_its_folder(dense):
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        load_model(dense / "model.safetensors")


def test_load_model_of_a_file_that_only_ends_in_gguf_says_so(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        load_model(tmp_path / "a.gguf")


def test_load_model_of_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch):
    import transformers

    def unreachable(*_args, **_kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(CheckpointError, match="'org/name' is not a folder here, and the Hugging Face Hub did not give it") as caught:
        load_model("org/name")
    assert "\n" not in str(caught.value)


# -- save ----------------------------------------------------------------------------------------------------------------------------


def test_save_checkpoint_writes_manifest_calibration_card_and_tokenizer(saved):
    record = json.loads((saved / "moeify.json").read_text())
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert {k: v for k, v in record.items() if k != "calibration"} == {k: v for k, v in config.items() if k != "quant_method"}
    assert {k: record["calibration"][k] for k in CALIBRATION} == CALIBRATION
    assert set(record["calibration"]["versions"]) >= {"moeify", "torch", "transformers"}
    assert (saved / "README.md").read_text() == "# card\n"
    assert (saved / "tokenizer.json").is_file()
    assert sorted(p.name for p in saved.parent.iterdir()) == ["moe"], "no partial folder stays"


def test_read_calibration_returns_what_was_saved(saved):
    assert {k: v for k, v in read_calibration(saved).items() if k != "versions"} == CALIBRATION


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(None, "has no moeify.json; is it a folder that `moeify convert` wrote", id="missing"),
        pytest.param("{", "cannot be read", id="not JSON"),
        pytest.param("{}", "no 'calibration' record", id="no record"),
        pytest.param('{"schema": 99, "sites": [], "calibration": {}}', "schema 99 is newer", id="newer schema"),
    ],
)
def test_read_calibration_of_a_bad_file_says_so(saved, text, message):
    path = saved / "moeify.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_calibration(saved)


def test_read_manifest_has_the_rules_that_were_set_since(saved):
    model, _ = load_model(saved)
    set_rule(model, TopK(k=4))
    model.save_pretrained(saved)
    assert {record.rule for record in read_manifest(saved).sites} == {TopK(k=4)}


def test_read_manifest_of_anything_else_says_so(dense, tmp_path):
    with pytest.raises(CheckpointError, match="is of a dense model; convert it first"):
        read_manifest(dense)
    (dense / "config.json").write_text("[")
    for folder in (dense, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"config.json' cannot be read"):
            read_manifest(folder)


def test_save_checkpoint_of_a_dense_model_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="is dense"):
        save_checkpoint(tiny.tiny_llama(), None, tmp_path / "out", calibration={}, card="")
    assert not list(tmp_path.iterdir())


def test_save_checkpoint_into_an_empty_or_new_nested_folder_works(tmp_path):
    (tmp_path / "empty").mkdir()
    model = tiny.convert_tiny(tiny.tiny_llama())
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        save_checkpoint(model, None, out, calibration={}, card="")
        assert (out / "model.safetensors").is_file()


def test_save_checkpoint_with_overwrite_replaces_an_earlier_conversion(saved):
    save_checkpoint(tiny.convert_tiny(tiny.tiny_llama(seed=1)), None, saved, calibration={"new": 1}, card="", overwrite=True)
    assert read_calibration(saved)["new"] == 1
    assert not (saved / "tokenizer.json").exists(), "nothing of the old one stays"
    assert sorted(p.name for p in saved.parent.iterdir()) == ["moe"]


def _other_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")


def _earlier_conversion(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "moeify.json").write_text("{}")


def _file(tmp_path):
    (tmp_path / "out").write_text("a file")


def _parent_a_file(tmp_path):
    (tmp_path / "out").write_text("a file")
    return tmp_path / "out" / "below"


def _foreign_partial(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("not ours")


@pytest.mark.parametrize(
    ("prepare", "overwrite", "message"),
    [
        pytest.param(_other_folder, False, "exists and is not empty; choose another --out", id="other folder"),
        pytest.param(_other_folder, True, "not an earlier conversion and is not replaced", id="other folder, overwrite"),
        pytest.param(_earlier_conversion, False, "--overwrite replaces it", id="earlier conversion"),
        pytest.param(_file, True, "is a file", id="file"),
        pytest.param(_parent_a_file, True, "is not a folder that can be written", id="parent is a file"),
        pytest.param(_foreign_partial, True, "was not written by moeify", id="partial folder of somebody else"),
    ],
)
def test_save_checkpoint_into_what_is_in_the_way_changes_nothing(tmp_path, prepare, overwrite, message):
    out = prepare(tmp_path) or tmp_path / "out"
    before = files_below(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tiny.convert_tiny(tiny.tiny_llama()), None, out, calibration={}, card="", overwrite=overwrite)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), id="from the system"),
        pytest.param(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), id="from safetensors"),
    ],
)
def test_save_checkpoint_on_a_full_disk_keeps_the_old_and_leaves_nothing_behind(saved, monkeypatch, error):
    before = files_below(saved.parent)

    def full(model, processor, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(save, "_save", full)
    with pytest.raises(CheckpointError, match=r"cannot write '.*moe': the disk is full; nothing was changed"):
        save_checkpoint(tiny.convert_tiny(tiny.tiny_llama()), None, saved, calibration={}, card="", overwrite=True)
    assert files_below(saved.parent) == before


def test_save_checkpoint_interrupted_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tiny.convert_tiny(tiny.tiny_llama()), None, tmp_path / "out", calibration={}, card="")
    assert not list(tmp_path.iterdir())


def test_save_checkpoint_when_the_rename_fails_puts_the_old_one_back(saved, monkeypatch):
    before = files_below(saved)
    rename = type(saved).rename

    def fail_for_the_partial_folder(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(saved), "rename", fail_for_the_partial_folder)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_checkpoint(tiny.convert_tiny(tiny.tiny_llama()), None, saved, calibration={}, card="", overwrite=True)
    assert files_below(saved) == before


# Replaces a conversion in one process for each system call that changes the file system, and ends it before that call.
KILL = """
import json, os, pathlib, sys
from pathlib import Path
from moeify.hf import folders, save

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")
root, ended = Path(sys.argv[1]), None
for step in range(1000):
    out = root / str(step) / "moe"
    out.mkdir(parents=True)
    for name in (sys.argv[2], "model.safetensors", "tokenizer.json"):
        (out / name).write_text("old")
    child = os.fork()
    if child == 0:
        left = [step]
        def killed_at(real):
            def call(*args, **kwargs):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return real(*args, **kwargs)
            return call
        early = getattr(pathlib, "_normal_accessor", None)  # Python 3.10: pathlib has bound the functions of os already
        for name in CALLS:
            real = getattr(os, name)
            setattr(os, name, killed_at(real))
            if getattr(early, name, None) is real:
                setattr(early, name, getattr(os, name))
        with folders.whole_folder(out, overwrite=True, marker=sys.argv[2]) as partial:
            for name in (sys.argv[2], "model.safetensors", "README.md"):
                (partial / name).write_text("new")
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(step)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("marker", ["moeify.json", "sparsify.json"])
def test_save_checkpoint_killed_at_any_step_of_a_replacement_loses_neither(tmp_path, marker):
    old = {marker: "old", "model.safetensors": "old", "tokenizer.json": "old"}
    new = {marker: "new", "model.safetensors": "new", "README.md": "new"}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(folders.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path), marker], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = []
    for step in range(int(done.stdout)):
        out = tmp_path / str(step) / "moe"
        lost_its_name = not out.exists()
        check_output(out, overwrite=True)
        files = {path.name: path.read_text() for path in out.iterdir()}
        assert files in (old, new), step
        found.append((lost_its_name, files == new))
        with folders.whole_folder(out, overwrite=True, marker=marker) as partial:
            for name, text in new.items():
                (partial / name).write_text(text)
        assert {path.name: path.read_text() for path in out.iterdir()} == new
        assert [path.name for path in out.parent.iterdir()] == ["moe"], "nothing stays beside it"
    assert set(found) == {(False, False), (True, False), (False, True)}, "before, between and after the two renames"


def test_check_output_leaves_a_folder_of_somebody_else_where_the_old_one_would_be_kept(saved):
    foreign = saved.with_name("moe.replaced-by-moeify")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is in the way and was not written by moeify"):
        check_output(saved, overwrite=True)
    assert (foreign / "thesis.tex").read_text() == "years of work"


class _Steps:
    """Listens to progress."""

    def __init__(self):
        self.done = {}

    @contextmanager
    def task(self, label, *, total):
        self.done[label] = [0, total]

        def advance(steps):
            self.done[label][0] += steps

        yield SimpleNamespace(advance=advance)


def test_loading_and_saving_tell_how_far_they_are(dense, tmp_path):
    steps = _Steps()
    model, tokenizer = load_model(dense, progress=steps)
    save_checkpoint(tiny.convert_tiny(model), tokenizer, tmp_path / "out", calibration={}, card="", progress=steps)
    count = len(list(tiny.tiny_llama().parameters()))
    reading = {f"read the tokenizer of {dense}": [1, 1], f"load {dense}": [1, 1], f"check {dense}": [count, count]}
    assert steps.done == {**reading, f"save {tmp_path / 'out'}": [1, 1]}


def test_save_checkpoint_after_a_killed_save_replaces_its_partial_folder(saved):
    out = saved.parent / "again"
    shutil.copytree(saved, out.with_name("again.partial"))
    save_checkpoint(tiny.convert_tiny(tiny.tiny_llama()), None, out, calibration={}, card="")
    assert sorted(p.name for p in saved.parent.iterdir()) == ["again", "moe"]


def test_save_dense_writes_a_checkpoint_without_a_manifest(tmp_path):
    save_dense(tiny.tiny_llama(), tiny.byte_tokenizer(), tmp_path / "dense")
    assert not (tmp_path / "dense" / "moeify.json").exists()
    model, tokenizer = load_model(tmp_path / "dense")
    assert torch.equal(logits(model), logits(tiny.tiny_llama()))
    assert tokenizer is not None
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        save_dense(tiny.tiny_llama(), None, tmp_path / "dense")


def test_save_trained_writes_a_dense_checkpoint_with_its_record_that_overwrite_replaces(tmp_path):
    out, model = tmp_path / "trained", tiny.tiny_llama()
    save_trained(model, tiny.byte_tokenizer(), out, record={"seconds": 3}, card="# card")
    assert json.loads((out / "sparsify.json").read_text()) == {"seconds": 3}
    assert (out / "README.md").read_text() == "# card"
    assert not (out / "moeify.json").exists()
    loaded, tokenizer = load_model(out)
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer is not None
    with pytest.raises(CheckpointError, match="exists and is not empty; --overwrite replaces it"):
        save_trained(model, None, out, record={}, card="")
    save_trained(model, None, out, record={"seconds": 4}, card="", overwrite=True)
    assert json.loads((out / "sparsify.json").read_text()) == {"seconds": 4}
    assert [p.name for p in tmp_path.iterdir()] == ["trained"]


def test_check_output_of_a_folder_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # chmod would not stop root
    with pytest.raises(MoeifyError, match=r"is not a folder that can be written \(Read-only file system\)"):
        check_output(tmp_path / "out", overwrite=False)
