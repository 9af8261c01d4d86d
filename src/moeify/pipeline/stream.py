"""From a dense checkpoint to a converted one in the memory of one block: nothing else of the model is ever loaded.

    check     every tensor once: is it a number; a checksum
    look      one forward, block by block: is it a chain, where are the FFNs, what can be converted
    capture   block by block, all batches; each layer is split and fitted while its block is there
    write     block by block: neurons permuted, router attached, into the new files
    measure   a few windows, block by block

Under torchrun the first process captures, and all fit: layer i is process i modulo their number's. They meet in the work folder, each layer
a file, and wait for files, not for each other's messages: fitting takes longer than any timeout.
"""

import ctypes
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _config
from .._dist import Ranks
from .._files import write_whole
from .._progress import NO_PROGRESS, Progress
from ..convert import ConvertConfig, apply_site, plan_conversion
from ..data import DataConfig, check_source
from ..errors import CheckpointError, ConfigError, TrainingError, UnsupportedModelError
from ..hf.folders import MANIFEST_FILE, check_apart, check_output, recover, whole_folder
from ..hf.inputs import example_inputs
from ..hf.load import take_generation_config
from ..hf.save import library_versions
from ..hf.shards import TensorFiles, TensorWriter
from ..hf.streamed import StreamedModel, checkpoint_numbers, open_streamed
from ..layers import MoEFFN
from ..manifest import Manifest, SiteRecord, record_of_site
from ..sites import Discovery, discover, proven_sites, site_weights
from ..train.blockwise import BlockChain, Call, capture_by_block, check_chain, copied, watch_blocks
from ..train.calibration import calibrate_rules, spread
from ..train.capture import FFNInputs, autocast_as, fast_dtype
from ..train.fit import FittedSite, fit_site
from ..train.parallel import distributed, faults, num_started
from .convert import CalibrationConfig, card_of, is_of
from .heldout import measure_converted
from .inputs import calibration_batches, hold_out
from .names import torch_device, torch_dtype
from .work import fingerprint, finished_record, open_work, read_fitted, remove_work, run_id, write_fitted

_Plan = Sequence[tuple[SiteRecord, ConvertConfig]]
_Batches = Sequence[dict[str, Tensor]]

MEASURED_WINDOWS = 8
"""Pieces of 256 tokens that the result is measured on: each is two forwards, and each forward reads all of the weights."""

_FAILED, _TOKENS = "failed", "tokens.json"
_POLL_S = 0.2
_MMAP_THRESHOLD, _MMAP_BYTES = -3, 1 << 20  # of glibc's mallopt
_SHARE = 0.7  # of the free memory that weights may take before a conversion is streamed: fitting and its inputs need the rest


def is_too_large(source: str, *, dtype: str) -> bool:
    """Whether a local checkpoint's weights take more of the memory that is free now than a conversion in memory can have.

    False for Hub ids and .gguf files, and where the system does not say what is free.
    """
    numbers, free = checkpoint_numbers(source), _free_bytes()
    return numbers is not None and free is not None and numbers * torch_dtype(dtype).itemsize > _SHARE * free


def convert_streamed(
    source: str,
    out: Path,
    *,
    data: DataConfig,
    config: ConvertConfig,
    calibration: CalibrationConfig,
    dtype: str = "float32",
    device: str = "cpu",
    notes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    timeout_s: float = 1800.0,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """`convert_checkpoint` for a model that need not fit into memory; the same tensors, rules and record, up to what was measured.

    Peak memory: the largest block or embedding, the activations of one batch in it, and what fitting one layer takes (its inputs in
    bfloat16, its targets, its weights in fp32). With glibc, freed memory of more than 1 MB goes back to the system at once from this call
    on, in the whole process: kept for later, as glibc does it, it came to twice what was in use. Disk beside the result: twice the hidden
    states of all calibration tokens, the inputs of one layer (under torchrun of all that are not fitted yet), routers and orders.

    Args:
        source: folder of a dense checkpoint in safetensors files.
        out, data, config, calibration, dtype, device, notes, overwrite, progress: as for `convert_checkpoint`.
        timeout_s: under torchrun, how long a process waits for one that does not answer.

    Returns:
        As `convert_checkpoint`; "measured" is of `MEASURED_WINDOWS` windows at most. The same in every process.

    Raises:
        MoeifyError: as `convert_checkpoint`; also a model whose layers do not run one at a time.
    """
    place = torch_device(device)
    if num_started() > 1 and place.index is not None:
        raise ConfigError(f"--device {place} under torchrun would be one GPU for all processes; --device cuda gives each its own.")
    check_apart(out, source)
    _give_memory_back()
    with distributed(timeout_s=timeout_s, device=cast(Any, place.type)) if num_started() else nullcontext(place) as place:
        ranks = Ranks.present()
        if not ranks.is_first:
            progress = NO_PROGRESS
        with faults(ranks, "during the conversion"):
            run = _Conversion(source, out, data, config, calibration, dtype, place, dict(notes or {}), overwrite, ranks, progress)
            return run.to_the_end()


@dataclass
class _Conversion:
    """One conversion, seen from one process."""

    source: str
    out: Path
    data: DataConfig
    config: ConvertConfig
    calibration: CalibrationConfig
    dtype: str
    place: torch.device
    notes: dict[str, Any]
    overwrite: bool
    ranks: Ranks
    progress: Progress

    def to_the_end(self) -> dict[str, Any]:
        """All stages in turn."""
        self.work = self.out.with_name(self.out.name + ".work")
        data = replace(self.data, window=self.calibration.window, max_tokens=self.calibration.max_tokens)
        finished = self.ranks.same(self.ranks.first(self._begin))
        check_source(data)
        self.streamed, self.processor = open_streamed(self.source, dtype=torch_dtype(self.dtype), device=self.place)
        model = self.streamed.model
        batches, held_out = hold_out(model, calibration_batches(model, self.processor, data, progress=self.progress))
        found = self.ranks.same(self.ranks.first(partial(self._look, batches, held_out, finished), is_long=True))
        if "finished" in found:
            return cast(dict[str, Any], found["finished"])
        chain = BlockChain(*(tuple(found["chain"][key]) for key in ("names", "places", "lengths")))
        records = Manifest.from_dict({"sites": found["sites"]}).sites
        plan = [(record, _options(model, self.config, record)) for record in records]
        compute = {"float32": None, "bfloat16": torch.bfloat16}[found["compute"]]
        with self._telling():
            if self.ranks.is_first:
                self._capture(plan, chain, batches, compute)
            self._fit_share(plan)
            self._wait_for(plan)
        record = self.ranks.first(partial(self._finish, plan, held_out, found["run"]), is_long=True)
        return cast(dict[str, Any], self.ranks.same(record))

    def _begin(self) -> dict[str, Any] | None:
        recover(self.out)
        finished = finished_record(self.out, self.work)
        if finished is None:
            check_output(self.out, overwrite=self.overwrite)
        return finished

    # -- what there is to convert

    def _look(self, batches: _Batches, held_out: _Batches, finished: dict[str, Any] | None) -> dict[str, Any]:
        """What all processes must know, as JSON; the first one alone reads the model for it."""
        model = self.streamed.model
        with self.progress.task(f"check {self.source}", total=1) as task:
            checksum = self.streamed.check()
            task.advance(1)
        router = replace(self.calibration.router, seed=self.calibration.seed)
        identity = {
            "source": self.source,
            "dtype": self.dtype,
            "device": self.place.type,
            "held_out": fingerprint(held_out),
            "streamed": True,
            "batches": fingerprint(batches),
            "weights": checksum,
            "config": _config.to_dict(self.config),
            "router": _config.to_dict(router),
        }
        if finished is not None:
            if finished.get("weights", "float") == "float" and is_of(finished, run_id(identity), self.calibration):
                remove_work(self.work)
                return {"finished": finished}
            check_output(self.out, overwrite=self.overwrite)
        _check_room(self.out, self.streamed.num_bytes)
        with self.progress.task("look for FFNs, block by block", total=1) as task:
            sites, chain, compute = self._sites()
            task.advance(1)
        plan = plan_conversion(model, sites, self.config)
        if changed := next((record.site.name for record, _ in plan if record.rule != self.config.rule), None):
            raise ConfigError(f"policy of '{changed}': one rule is calibrated for all layers; set_rule changes a layer's afterwards.")
        open_work(self.work, identity)
        (self.work / _FAILED).unlink(missing_ok=True)
        return {
            "run": run_id(identity),
            "chain": {"names": chain.names, "places": chain.places, "lengths": chain.lengths},
            "sites": Manifest(sites=tuple(record for record, _ in plan)).to_dict()["sites"],
            "compute": "float32" if compute in (None, torch.float32) else "bfloat16",
        }

    def _sites(self) -> tuple[list[Any], BlockChain, torch.dtype | None]:
        """FFNs of all blocks, the chain that these are, and the dtype that their products can be computed in."""
        model, found = self.streamed.model, list[Discovery]()
        compute: torch.dtype | None = fast_dtype(self.place)

        def look(name: str, call: Call) -> None:
            nonlocal compute
            found.append(discover(_alone(model, name, call), {}))
            try:
                with autocast_as(self.place.type, compute):
                    model.get_submodule(name)(*copied(call.args), **copied(call.kwargs))
            except RuntimeError:  # how torch reports mixed dtypes: a family whose code does not run under autocast
                compute = None

        with self.streamed.on_demand():
            inputs = example_inputs(model)
            try:
                chain, calls = watch_blocks(model, self.streamed.blocks, inputs, look)
            except (RuntimeError, NotImplementedError) as error:
                if "meta" not in str(error):
                    raise
                raise UnsupportedModelError(
                    f"{type(model).__name__} reads weights outside of the modules that have them, so they cannot be loaded when they are "
                    "needed; convert without --stream."
                ) from error
        with self.streamed.on_demand(hold=True):
            check_chain(model, chain, calls, inputs)
        whole = Discovery(tuple(site for one in found for site in one.sites), tuple(refusal for one in found for refusal in one.refused))
        return proven_sites(whole, of=type(model).__name__), chain, compute

    # -- fitting

    def _capture(self, plan: _Plan, chain: BlockChain, batches: _Batches, compute: torch.dtype | None) -> None:
        streamed, by_block = self.streamed, dict[str, list[Any]]()
        for record, _ in plan:
            by_block.setdefault(streamed.part_of(record.site.down), []).append(record.site)

        def done(block: str, inputs: FFNInputs) -> None:
            if not (self.work / _TOKENS).exists():
                write_whole(self.work / _TOKENS, json.dumps(max(inputs.num_tokens(site.name) for site in by_block[block])))
            if self.ranks.size == 1:
                for i, (record, options) in enumerate(plan):
                    if record.site in by_block[block]:
                        self._fit(i, record, options)

        capture_by_block(
            streamed.model,
            chain,
            by_block,
            batches,
            self.work / "inputs",
            loaded=streamed.loaded,
            on_demand=partial(streamed.on_demand, hold=True),
            done=done,
            device=self.place,
            compute=compute,
            progress=self.progress,
        )

    def _fit_share(self, plan: _Plan) -> None:
        """This process' layers, as soon as their inputs are there."""
        for i, (record, options) in enumerate(plan):
            if i % self.ranks.size != self.ranks.rank or read_fitted(self._fitted(i)) is not None:
                continue
            self._wait(self._inputs(i).exists)
            with self.streamed.loaded(self.streamed.part_of(record.site.down)):
                self._fit(i, record, options)

    def _fit(self, i: int, record: SiteRecord, options: ConvertConfig) -> None:
        """One layer, whose block is loaded; or nothing, where an earlier run has done it."""
        path = self._fitted(i)
        if read_fitted(path) is None:
            train = replace(self.calibration.router, seed=self.calibration.seed)
            inputs = FFNInputs(self.work / "inputs", {record.site.name: record.site.d_model}, {record.site.name: self._inputs(i).name})
            weights = site_weights(self.streamed.model, record.site)
            site = fit_site(weights, inputs.read(record.site.name), record, options, train)
            write_fitted(path, replace(site, scores_TE=spread(site.scores_TE)))
        self._inputs(i).unlink(missing_ok=True)

    def _fitted(self, i: int) -> Path:
        return self.work / f"site{i:04d}.safetensors"

    def _inputs(self, i: int) -> Path:
        return self.work / "inputs" / f"site{i:04d}.bf16"

    def _wait_for(self, plan: _Plan) -> None:
        self._wait(lambda: all(self._fitted(i).exists() for i in range(len(plan))))

    def _wait(self, is_there: Callable[[], bool]) -> None:
        """Wait for a file that another process makes, or for the news that it will not.

        Raises:
            TrainingError: another process has failed, and says why itself.
        """
        while not is_there():
            if (self.work / _FAILED).exists():
                error = TrainingError(f"another process failed: {(self.work / _FAILED).read_text()}")
                error.is_echo = True
                raise error
            time.sleep(_POLL_S)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Inside, what fails in one process ends the others' waiting."""
        try:
            yield
        except BaseException as error:
            if self.ranks.size > 1 and self.work.is_dir() and not (self.work / _FAILED).exists():
                (self.work / _FAILED).write_text(str(error) or type(error).__name__)
            raise

    # -- the result

    def _finish(self, plan: _Plan, held_out: _Batches, run: str) -> dict[str, Any]:
        fitted = {}
        for i, (record, _) in enumerate(plan):
            site = read_fitted(self._fitted(i))
            if site is None:
                raise CheckpointError(f"'{self._fitted(i)}' is damaged; delete it and run again.")
            fitted[record.site.name] = site
        rules, calibrated = calibrate_rules(
            type(self.config.rule),
            {name: site.scores_TE for name, site in fitted.items()},
            neurons={record.site.name: record.site.d_ff for record, _ in plan},
            always_on={name: site.always_on for name, site in fitted.items()},
            router_scores={name: site.captured for name, site in fitted.items()},
            target_active=self.calibration.target_active,
            scope=self.calibration.scope,
        )
        calibrated |= {"tokens": self._num_tokens(), "seed": self.calibration.seed, "run": run}
        records = [replace(record, rule=rules[record.site.name], always_on=fitted[record.site.name].always_on) for record, _ in plan]
        with whole_folder(self.out, overwrite=self.overwrite) as partial_folder:
            manifest = self._write(records, fitted, partial_folder)
            del fitted
            _write_config(self.streamed.model, manifest, self.processor, partial_folder, source=self.source, dtype=self.dtype)
            result = {
                **self.notes,
                **calibrated,
                "data": self.data.data,
                "source": self.source,
                "versions": library_versions(),
                "streamed": True,
                "measured": self._measure(held_out, partial_folder),
            }
            card = card_of(self.streamed.model, result, name=self.out.name)
            text = json.dumps({**manifest.to_dict(), "calibration": result}, indent=2)
            (partial_folder / "README.md").write_text(card)
            (partial_folder / MANIFEST_FILE).write_text(text + "\n")
        remove_work(self.work)
        return result

    def _num_tokens(self) -> int:
        """Of the calibration data, as the capture counted them."""
        path = self.work / _TOKENS
        try:
            return int(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"'{path}' is damaged; delete '{self.work}' and run again.") from error

    def _write(self, records: Sequence[SiteRecord], fitted: Mapping[str, FittedSite], folder: Path) -> Manifest:
        """Read, permute and write one part after the other; the skeleton is a converted one then."""
        streamed, model = self.streamed, self.streamed.model
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        routers = {
            f"{record.site.name}.moe.router.{key}": tensor
            for record in records
            for key, tensor in fitted[record.site.name].router_state.items()
        }
        own = {part: streamed.own_tensors(part) for part in streamed.parts()}
        for part, members in own.items():
            tensors |= {streamed.saved_name(name): size for name, size in members.items()}
            inside = (name for name in routers if streamed.part_of(name.partition(".moe.router.")[0]) == part)
            tensors |= {streamed.saved_name(name): (tuple(routers[name].shape), torch.float32) for name in inside}
        written: dict[str, SiteRecord] = {}
        with TensorWriter(folder, tensors) as writer, self.progress.task(f"write {self.out}", total=len(own)) as task:
            for part, members in own.items():
                here = [record for record in records if streamed.part_of(record.site.down) == part]
                layers: list[MoEFFN] = []
                with streamed.loaded(part):
                    for record in here:
                        site = fitted[record.site.name]
                        layer = apply_site(model, record, order_F=site.order_F, router_state=site.router_state)
                        layers.append(layer)
                        written[record.site.name] = record_of_site(model, layer)
                        for key, tensor in layer.router.state_dict().items():
                            writer.write(streamed.saved_name(f"{record.site.name}.moe.router.{key}"), tensor)
                    for name in members:
                        writer.write(streamed.saved_name(name), _tensor(model, name))
                for layer in layers:
                    layer.router.to("meta")
                task.advance(1)
        return Manifest(sites=tuple(written[site.name] for site in _in_module_order(model)))

    def _measure(self, held_out: _Batches, folder: Path) -> dict[str, Any] | None:
        """What was written, as it would run."""
        rows = [
            {key: value[i : i + 1] for key, value in batch.items()} for batch in held_out for i in range(len(next(iter(batch.values()))))
        ]
        if rows and set(rows[0]) == {"input_ids"}:  # pieces of the length that they would be cut to
            rows = [{"input_ids": ids} for row in rows for ids in row["input_ids"].split(256, dim=1) if ids.shape[1] > 1]
        few = [rows[i * len(rows) // MEASURED_WINDOWS] for i in range(MEASURED_WINDOWS)] if len(rows) > MEASURED_WINDOWS else rows
        if not few:
            return None
        files = TensorFiles(sorted(folder.glob("*.safetensors")))
        written = StreamedModel(self.streamed.model, files, dtype=None, device=self.place, source=str(self.out))
        with written.on_demand():
            return measure_converted(written.model, few, progress=self.progress)


class _Alone(nn.Module):
    """One block under its path in a model, and the arguments of one call of it."""

    def __init__(self, block: nn.Module, path: str, call: Call) -> None:
        super().__init__()
        *outer, last = path.split(".")
        parent: nn.Module = self
        for name in outer:
            child = nn.Module()
            parent.add_module(name, child)
            parent = child
        parent.add_module(last, block)
        self.__dict__["block"], self.__dict__["call"] = block, call

    def forward(self) -> Any:
        """The call again."""
        call = self.__dict__["call"]
        return self.__dict__["block"](*copied(call.args), **copied(call.kwargs))


def _alone(model: nn.Module, name: str, call: Call) -> nn.Module:
    return _Alone(model.get_submodule(name), name, call).eval()


def _options(model: nn.Module, config: ConvertConfig, record: SiteRecord) -> ConvertConfig:
    options = config.for_site(record.site.name)
    assert options is not None, f"{record.site.name} of {type(model).__name__} was planned"
    return options


def _in_module_order(model: nn.Module) -> list[Any]:
    return [module.site for module in model.modules() if isinstance(module, MoEFFN)]


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    return cast(Tensor, getattr(model.get_submodule(path), last))


def _write_config(model: Any, manifest: Manifest, processor: Any, folder: Path, *, source: str, dtype: str) -> None:
    """All that ``save_pretrained`` writes beside the weights."""
    from ..hf.quantizer import MoeifyConfig

    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.quantization_config = MoeifyConfig(manifest)
    model.config.save_pretrained(folder)
    take_generation_config(model, source)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def _check_room(out: Path, num_bytes: int) -> None:
    """Before hours of work, not after them."""
    parent = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"cannot write '{out}': the disk has {free / 1e9:.1f} GB free, and the weights need {num_bytes / 1e9:.1f}; free space or "
            "choose another --out."
        )


def _give_memory_back() -> None:
    """Tensors in memory of their own: among small objects of the heap, the holes that they leave are too small for the next ones."""
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)


def _free_bytes() -> int | None:
    """Memory that is free or can be freed, by the system and by the limit of this process' group; None where neither says."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        if (limit := (group / "memory.max").read_text().strip()) != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    return min(found, default=None)
