"""A model from random weights, dense or by switchable sparse-dense pre-training: prepare, estimate, train, measure, save.

    <out>.work/run.json, train/        what a killed run goes on from (`work`)
    <out>.work/tokenizer/, tokens-*    made once
    <out>.work/log.jsonl               rows of what went on; copied to ``out`` at the end
    <out>.work/fallbacks.json          sparse phases that went wrong

A sparse phase that goes wrong ends an attempt. The next one begins as a killed run would, from the last state, with one more fact on the
disk: so a run with fallbacks resumes as exactly as one without.

Under torchrun every process goes the same way. What reads or writes the folders, tells or decides is the first one's (`Ranks.first`,
`Ranks.same`); the others read what it has written. All train, measure and evaluate, each its part.
"""

import json
import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import _config
from .._dist import Ranks
from .._progress import NO_PROGRESS, Progress
from ..channels import kept
from ..controls import set_mode, with_modes
from ..data import check_source
from ..errors import CheckpointError, ConfigError, DivergedError, MoeifyError, StoppedError
from ..hf.card import pretrained_card
from ..hf.folders import PRETRAINING_FILE, check_output, recover
from ..hf.inputs import example_inputs
from ..hf.random import random_model
from ..hf.save import library_versions, save_pretrained_run
from ..layers import moe_layers
from ..sites import find_ffn_sites
from ..sites.probe import eval_mode
from ..ssd import SSD, Fallback, modes
from ..train.capture import fast_dtype
from ..train.labels import counted_labels
from ..train.loop import StepReport, TrainConfig, TrainingData, TrainRecord, train
from ..train.parallel import blank, distributed, faults, is_sharded, num_started, whole_state
from ..train.state import latest_step
from .names import torch_device
from .pretrain_data import OBJECTIVES, prepare_data, prepare_tokenizer, source_id
from .pretrain_log import JsonLines, RunLog, Sink, TensorBoard, WandB, check_wandb, has_tensorboard
from .pretrain_recipe import PretrainConfig
from .pretrain_result import PretrainResult, topk_calibration
from .stages import write_json
from .stopping import Stop, stopping
from .training_cost import SequenceCost, expected_modes, sequence_cost, sequences_of_steps, training_flops
from .work import RUN_FILE, TRAINING_STATE, finished_training, open_training, remove_work, run_id

LOG_FILE = "log.jsonl"
"""Rows of what went on, in the output folder; while a run lasts in ``<out>.work``."""
_FALLBACKS, _BOARD = "fallbacks.json", "tensorboard"
_FORWARD_TOKENS = 8192  # of an evaluation
_REPEATS_S = 5.0  # torchrun passes a signal on that a terminal or SLURM has told all processes

Say = Callable[[str], None]
_Made = TypeVar("_Made")


def pretrain(
    recipe: PretrainConfig,
    out: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    timeout_s: float = 1800.0,
    progress: Progress = NO_PROGRESS,
    say: Say = lambda _line: None,
) -> PretrainResult:
    """Pre-train a model; under torchrun all its processes together, which call this alike.

    Args:
        recipe: what to do, from `read_pretrain`.
        out: new folder for an ordinary checkpoint with ``pretrain.json`` and ``log.jsonl``; with SSD it is a dense model, and a mixture
            where moeify is imported. A run that was killed or stopped continues from the state in ``<out>.work``.
        device: "cpu", "cuda" or "cuda:1"; under torchrun "cuda" is the GPU of the process' number on its machine.
        overwrite: replace an earlier result at ``out``, and the state of another run in ``<out>.work``.
        timeout_s: how long a process waits for one that does not answer (`moeify.train.distributed`).
        progress: told of preparation and saving, in the first process.
        say: told in a line of the estimate, of training as it goes, of epochs and of fallbacks, in the first process.

    Returns:
        What ``pretrain.json`` holds, in every process.

    Raises:
        MoeifyError: see `errors`. `StoppedError` after SIGTERM or SIGINT, to any process: the step was finished and saved. `DivergedError`:
            a loss that is no number in a dense phase, or one fallback more than ``ssd.max_fallbacks``. `TrainingError`: another process is
            gone. What the first process raises the others do, too, as its echo.
    """
    chosen = torch_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and num_started() == 0:
        raise ConfigError("WORLD_SIZE says several processes, and without RANK they cannot join; start them with torchrun.")
    if num_started() > 1 and chosen.index is not None:
        raise ConfigError(f"--device {device} under torchrun would be one GPU for all processes; --device cuda gives each its own.")
    kind = "cuda" if chosen.type == "cuda" else "cpu"
    with distributed(timeout_s=timeout_s, device=cast(Any, kind)) if num_started() else nullcontext(chosen) as place:
        ranks = Ranks.present()
        if ranks.size > 1 and recipe.train.parallel == "none":
            raise ConfigError("train.parallel = 'none' leaves processes alone, and torchrun has started several; choose 'ddp' or 'fsdp'.")
        if not ranks.is_first:
            progress, say = NO_PROGRESS, lambda _line: None
        with faults(ranks, "outside of a training step"):
            work = out.with_name(out.name + ".work")
            begun = ranks.same(ranks.first(partial(_begin, recipe, out, work, overwrite=overwrite), is_long=True))
            if begun["finished"] is not None:
                return _config.from_dict(PretrainResult, begun["finished"], where=str(out / PRETRAINING_FILE))
            _check_shared(work, ranks)
            run = _Run(recipe, out, work, begun["run"], place=place, ranks=ranks, progress=progress, say=say)
            return run.to_the_end(overwrite=overwrite)


def _begin(recipe: PretrainConfig, out: Path, work: Path, *, overwrite: bool) -> dict[str, Any]:
    """Look at what is there and make ``work``: "run", what tells this run from others, and "finished", its result if it has one."""
    recover(out)
    finished = finished_training(out, work, file=PRETRAINING_FILE)
    if finished is None:
        check_output(out, overwrite=overwrite)
    if recipe.log.wandb is not None:
        check_wandb()
    check_source(recipe.data)
    check_source(recipe.validation)
    run = {
        "recipe": recipe.decisive(),
        "data": source_id(recipe.data),
        "validation": source_id(recipe.validation),
        "tokenizer": source_id(recipe.model.tokenizer),
    }
    run = json.loads(json.dumps(run))
    if finished is not None:
        if finished.get("run") == run_id(run):
            remove_work(work)
            return {"run": run, "finished": finished}
        check_output(out, overwrite=overwrite)
    open_training(work, run, overwrite=overwrite)
    return {"run": run, "finished": None}


def _check_shared(work: Path, ranks: Ranks) -> None:
    """Every process must see what the first one has made."""
    if ranks.size == 1:
        return
    sees = ranks.sum(torch.tensor([r == ranks.rank and (work / RUN_FILE).is_file() for r in range(ranks.size)], dtype=torch.int64))
    if blind := [r for r, count in enumerate(sees.tolist()) if not count]:
        raise _alike(
            CheckpointError(f"process {blind[0]} does not see '{work}'; choose an --out on a file system that all machines share."), ranks
        )


_Error = TypeVar("_Error", bound=MoeifyError)


def _alike(error: _Error, ranks: Ranks) -> _Error:
    """An error that all processes raise, and the first one says."""
    error.is_echo = not ranks.is_first
    return error


@dataclass
class _Attempt:
    """A model on its way: built anew for every attempt, so that the second one begins as a new process would."""

    model: Any
    ssd: SSD | None


class _Run:
    def __init__(
        self,
        recipe: PretrainConfig,
        out: Path,
        work: Path,
        run: Mapping[str, Any],
        *,
        place: torch.device,
        ranks: Ranks,
        progress: Progress,
        say: Say,
    ) -> None:
        self.recipe, self.out, self.work, self.run = recipe, out, work, run
        self.place, self.ranks, self.progress, self.say = place, ranks, progress, say
        train_config = recipe.train
        self.train = _config.from_dict(
            TrainConfig, {**_config.to_dict(train_config), "save_every": train_config.save_every or max(1, train_config.steps // 20)}
        )
        dtype = fast_dtype(self.place) if self.train.compute == "auto" else getattr(torch, self.train.compute)
        self.compute: torch.dtype | None = None if dtype is torch.float32 else dtype
        self.tokenizer = self.once(lambda: prepare_tokenizer(recipe, work, run=run, progress=progress))
        trial = self.build()  # what cannot be trained is found before the data is read
        OBJECTIVES[recipe.task].check(trial.model, self.tokenizer, recipe)
        del trial
        self.data = self.once(lambda: prepare_data(recipe, self.tokenizer, work, run=run, progress=progress))
        self.sequences = sequences_of_steps(len(self.data.training), self.train)
        self.batches = _fixed_batches(self.data.validation, size=max(1, _FORWARD_TOKENS // self.data.text_length))
        probed = range(min(recipe.probe_size, len(self.data.validation)))
        self.probe = _cut(self.data.validation.batch(probed, generator=torch.Generator().manual_seed(0)), parts=ranks.size)

    def once(self, make: Callable[[], _Made]) -> _Made:
        """What the first process makes in the folder of the run, and the others find there."""
        made = self.ranks.first(make, is_long=True)
        return cast(_Made, made) if self.ranks.is_first else make()

    def latest_step(self) -> int:
        """Of the last state."""
        return int(self.ranks.same(latest_step(self.work / TRAINING_STATE)))

    # -- the model

    def build(
        self, *, probe: Sequence[Mapping[str, Tensor]] = (), fallbacks: Sequence[Fallback] = (), place: torch.device | None = None
    ) -> _Attempt:
        objective = OBJECTIVES[self.recipe.task]
        architecture = {**objective.token_fields(self.tokenizer), **self.recipe.model.architecture}
        model = random_model(architecture, auto_class=objective.auto_class, seed=self.train.seed).to(place or self.place)
        ssd = None
        if self.recipe.ssd is not None:
            example = example_inputs(model)
            ssd = SSD(
                model,
                find_ffn_sites(model, example),
                self.recipe.ssd,
                total_steps=self.train.steps,
                probe=probe or [example],
                compute=self.compute,
                fallbacks=fallbacks,
            )
        return _Attempt(model, ssd)

    # -- training

    def to_the_end(self, *, overwrite: bool) -> PretrainResult:
        fallbacks = self._read_fallbacks()
        with stopping(repeats_s=_REPEATS_S if self.ranks.size > 1 else 0.0) as stop:
            while True:
                attempt = self.build(probe=self.probe, fallbacks=fallbacks)
                cost = sequence_cost(attempt.model, self.batches[0], self.recipe.ssd)
                estimate = self._estimate(attempt.model, cost)
                start = self.latest_step()
                if not fallbacks or start:
                    self._say_start(attempt.model, estimate, start)
                log = self.ranks.first(partial(self._open_log, attempt.ssd, start=start))
                try:
                    record = train(
                        attempt.model,
                        self.data.training,
                        self.train,
                        parts=[attempt.ssd] if attempt.ssd is not None else [],
                        state=self.work / TRAINING_STATE,
                        run=self.run,
                        evaluate=lambda model: self.mean_loss(model, "dense"),
                        watch=partial(self._watch, log),
                        stop=stop,
                    )
                    break
                except StoppedError as error:
                    raise self._stopped(self._signal(stop), error.step) from None
                except DivergedError as error:
                    fallbacks = self._fall_back(error, attempt.ssd, fallbacks)
                finally:
                    if log is not None:
                        log.close()
                del attempt, log  # the log knows the model, too: both go before there is another one
        if signum := self._signal(stop):  # within the last step
            raise self._stopped(signum, self.train.steps)
        return self._finish(attempt, record, cost, estimate, fallbacks, overwrite=overwrite)

    def _watch(self, log: RunLog | None, report: StepReport) -> None:
        """In the first process; so a jump of the loss, or a row that cannot be written, ends the attempt in all."""
        self.ranks.first(lambda: cast(RunLog, log).watch(report))

    def _signal(self, stop: Stop) -> int:
        """That any of the processes was sent."""
        sent = torch.tensor([stop.signum if rank == self.ranks.rank else 0 for rank in range(self.ranks.size)])
        return int(self.ranks.sum(sent).max())

    def _stopped(self, signum: int, step: int) -> StoppedError:
        where = f"stopped after step {step} of {self.train.steps}, which is saved; the same command goes on there."
        return _alike(StoppedError(f"{signal.Signals(signum).name}: {where}", step=step, signum=signum), self.ranks)

    def _open_log(self, ssd: SSD | None, *, start: int) -> RunLog:
        recipe, sinks = self.recipe, list[Sink]()
        if recipe.log.tensorboard and has_tensorboard():
            sinks.append(TensorBoard(self.work / _BOARD, start=start))
        if recipe.log.wandb is not None:
            sinks.append(WandB(recipe.log.wandb, name=self.out.name, folder=self.work, config=_config.to_dict(recipe)))
        lines = JsonLines(self.work / LOG_FILE, start=start)
        return RunLog(
            self.train,
            ssd,
            lines,
            sinks,
            start=start,
            tokens=[n * self.data.text_length for n in self.sequences],
            per_epoch=math.ceil(len(self.data.training) / self.train.batch_sequences),
            say=self.say,
        )

    def _fall_back(self, error: DivergedError, ssd: SSD | None, before: Sequence[Fallback]) -> list[Fallback]:
        """One more fallback, on the disk."""
        config = self.recipe.ssd
        if ssd is None or config is None or ssd.controller.mode == "dense":
            raise _alike(error, self.ranks)
        what = ", ".join(f"{name} {value:.4g}" for name, value in error.numbers.items())
        if len(before) >= config.max_fallbacks:
            failed = DivergedError(
                f"the sparse phase failed at step {error.step} ({what}), after {len(before)} fallbacks, which is ssd.max_fallbacks; a "
                "lower train.lr, or more ssd.selected, is another run: another --out, or --overwrite.",
                step=error.step,
                numbers=error.numbers,
            )
            raise _alike(failed, self.ranks) from None
        start = self.latest_step()
        lost = modes(ssd.decisions, error.step)[start:]
        held = max(1, round(config.fallback_frac * self.train.steps))
        fallback = Fallback(
            step=start,
            failed=error.step,
            until=min(self.train.steps, error.step + held),
            reason=f"{what} in a sparse phase, step {error.step}",
            numbers={name: value for name, value in error.numbers.items() if math.isfinite(value)},
            dense_steps=lost.count("dense"),
            sparse_steps=lost.count("sparse"),
        )
        found = [*before, _config.from_dict(Fallback, self.ranks.same(_config.to_dict(fallback)), where=_FALLBACKS)]
        self.ranks.first(partial(self._write_fallbacks, found))
        self.say(f"step {error.step}: {what} in a sparse phase; back to step {start}, dense until step {fallback.until}.")
        return found

    def _write_fallbacks(self, fallbacks: Sequence[Fallback]) -> None:
        try:
            write_json(self.work / _FALLBACKS, [_config.to_dict(f) for f in fallbacks])
        except OSError as failure:
            raise CheckpointError(f"cannot write '{self.work / _FALLBACKS}': {failure.strerror}; free space and run again.") from failure

    def _read_fallbacks(self) -> list[Fallback]:
        path = self.work / _FALLBACKS

        def read() -> list[Any]:
            try:
                found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
                return [_config.to_dict(_config.from_dict(Fallback, entry, where=str(path))) for entry in found]
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"'{path}' is damaged: {error}; delete '{self.work}' to train from the start.") from error

        return [_config.from_dict(Fallback, entry, where=str(path)) for entry in self.ranks.same(self.ranks.first(read))]

    # -- numbers

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, mode: str) -> float:
        """On validation, in nats, each process every n-th batch; the model's mode is as before afterwards."""
        ranks, total, count = self.ranks, 0.0, 0
        with eval_mode(model), kept(with_modes(model), "mode"):
            if moe_layers(model):
                set_mode(model, "moe" if mode == "moe" else "dense")
            for i in range(ranks.rank, -(-len(self.batches) // ranks.size) * ranks.size, ranks.size):
                counts = i < len(self.batches)  # else only because the others run one
                batch = self.batches[i] if counts else blank(self.batches[0])
                with torch.autocast(self.place.type, dtype=self.compute, enabled=self.compute is not None):
                    loss = model(**{key: value.to(self.place) for key, value in batch.items()}).loss
                labels = counted_labels(batch, shifted=self.recipe.task == "causal-lm") if counts else 0
                total, count = total + float(loss) * labels, count + labels
        sums = ranks.sum(torch.tensor([total, count], dtype=torch.float64))
        return float(sums[0] / sums[1])

    def epochs(self) -> float:
        return sum(self.sequences) / len(self.data.training)

    def _estimate(self, model: nn.Module, cost: SequenceCost) -> dict[str, float]:
        expected = expected_modes(self.recipe.ssd, self.train.steps)
        flops = training_flops(cost, modes=expected, sequences=self.sequences)
        return {
            **flops.to_dict(),
            "tokens_per_step": float(self.train.batch_sequences * self.data.text_length),
            "tokens": float(sum(self.sequences) * self.data.text_length),
            "epochs": self.epochs(),
        }

    def _say_start(self, model: nn.Module, estimate: Mapping[str, float], start: int) -> None:
        if start:
            self.say(f"goes on after step {start} of {self.train.steps}.")
            return
        total, each = sum(p.numel() for p in model.parameters()), estimate["tokens_per_step"]
        self.say(
            f"{type(model).__name__}: {total / 1e6:.3g} M parameters; {self.train.steps} steps of {each:,.0f} tokens, "
            f"{estimate['tokens'] / 1e6:.3g} M in all; "
            f"{len(self.data.training)} sequences of data, {estimate['epochs']:.2f} epochs."
        )
        if estimate["epochs"] > 1:
            held = f"{self.data.tokens / 1e6:.3g} M tokens"
            self.say(f"the data ({held}) is less than the run reads: it is passed over {estimate['epochs']:.1f} times.")
        line = f"training FLOPs: {estimate['all_dense_flops']:.3g} dense"
        if self.recipe.ssd is not None:
            share = estimate["sparse_steps"] / self.train.steps
            assumed = "" if self.recipe.ssd.schedule == "fixed" else ", assumed"
            line += f"; {estimate['total_flops']:.3g} with {share:.0%} of the steps sparse{assumed}, {estimate['gain']:.2f} times fewer"
        self.say(line + ".")

    # -- the end

    def _finish(
        self,
        attempt: _Attempt,
        record: TrainRecord,
        cost: SequenceCost,
        estimate: Mapping[str, float],
        fallbacks: Sequence[Fallback],
        *,
        overwrite: bool,
    ) -> PretrainResult:
        model, ssd = attempt.model, attempt.ssd
        if ssd is not None:
            ssd.set_step(self.train.steps)
            ssd.remove()
        flops = training_flops(
            cost,
            modes=modes(ssd.decisions if ssd is not None else [], self.train.steps),
            sequences=self.sequences,
            probe_steps=[probe.signals.step for probe in ssd.probes] if ssd is not None else [],
            probe_sequences=sum(len(batch["input_ids"]) for batch in self.probe),
            fallbacks=fallbacks,
        )
        evaluation = {}
        with self.progress.task("evaluate", total=1 + (ssd is not None)) as task:
            for mode in ("dense", "moe") if ssd is not None else ("dense",):
                loss = self.mean_loss(model, mode)
                evaluation[mode] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
                task.advance(1)
        if self.recipe.ssd is not None:
            evaluation["moe"]["active_fraction"] = self.recipe.ssd.selected / self.recipe.ssd.num_experts
            set_mode(model, "moe")
        result = PretrainResult(
            name=self.recipe.name,
            task=self.recipe.task,
            parameters=sum(p.numel() for p in model.parameters()),
            tokens=sum(self.sequences) * self.data.text_length,
            epochs=self.epochs(),
            seconds=float(self.ranks.same(record.seconds)),
            losses=record.losses,
            evals=record.evals,
            evaluation=evaluation,
            flops=flops.to_dict(),
            estimate=dict(estimate),
            decisions=tuple(ssd.decisions) if ssd is not None else (),
            probes=tuple(ssd.probes) if ssd is not None else (),
            switches=tuple(ssd.switches) if ssd is not None else (),
            fallbacks=tuple(fallbacks),
            data=self.recipe.data.data,
            device=self.place.type,
            processes=self.ranks.size,
            config=_config.to_dict(self.recipe),
            versions=library_versions(),
            run=run_id(self.run),
        )
        model = self._whole(model)
        self.ranks.first(partial(self._save, model, result, overwrite=overwrite), is_long=True)
        return result

    def _whole(self, model: Any) -> Any:
        """The model itself; where processes hold parts of it, in the first one another with all of its weights, on the CPU."""
        if not is_sharded(model):
            return model
        weights = whole_state(model)
        if not self.ranks.is_first:
            return model
        built = self.build(place=torch.device("cpu"))
        built.model.load_state_dict(weights)
        if built.ssd is not None:
            built.ssd.remove()
            set_mode(built.model, "moe")
        return built.model

    def _save(self, model: Any, result: PretrainResult, *, overwrite: bool) -> None:
        log = JsonLines(self.work / LOG_FILE, start=self.train.steps)
        log.write("final", self.train.steps, {"evaluation": result.evaluation, "flops": result.flops, "seconds": result.seconds})
        log.close()
        plain = _config.to_dict(result)
        save_pretrained_run(
            model,
            self.tokenizer,
            self.out,
            record=plain,
            card=pretrained_card(model, name=self.out.name, record=plain),
            calibration=None
            if self.recipe.ssd is None
            else topk_calibration(model, source=result.name, data=result.data, tokens=result.tokens),
            beside=[path for path in (self.work / LOG_FILE, self.work / _BOARD) if path.exists()],
            overwrite=overwrite,
            progress=self.progress,
        )
        remove_work(self.work)


def _cut(batch: Mapping[str, Tensor], *, parts: int) -> list[dict[str, Tensor]]:
    """A batch in as many equal parts as there may be, at most ``parts``: what processes measure on."""
    size = len(batch["input_ids"])
    parts = max(n for n in range(1, min(parts, size) + 1) if size % n == 0)
    step = size // parts
    return [{key: value[i : i + step] for key, value in batch.items()} for i in range(0, size, step)]


def _fixed_batches(data: TrainingData, *, size: int) -> list[dict[str, Tensor]]:
    """All sequences, always masked and corrupted the same way."""
    generator, rows = torch.Generator().manual_seed(0), range(len(data))
    return [data.batch(rows[i : i + size], generator=generator) for i in range(0, len(rows), size)]
