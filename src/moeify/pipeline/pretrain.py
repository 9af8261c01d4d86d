"""A model from random weights, dense or by switchable sparse-dense pre-training: prepare, estimate, train, measure, save.

    <out>.work/run.json, train/        what a killed run goes on from (`work`)
    <out>.work/tokenizer/, tokens-*    made once
    <out>.work/log.jsonl               rows of what went on; copied to ``out`` at the end
    <out>.work/fallbacks.json          sparse phases that went wrong

A sparse phase that goes wrong ends an attempt. The next one begins as a killed run would, from the last state, with one more fact on the
disk: so a run with fallbacks resumes as exactly as one without.
"""

import json
import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..channels import kept
from ..data import check_source
from ..errors import CheckpointError, ConfigError, DivergedError, StoppedError
from ..hf.card import pretrained_card
from ..hf.checkpoint import PRETRAINING_FILE, check_output, library_versions, recover, save_pretrained_run
from ..hf.inputs import example_inputs
from ..hf.random import random_model
from ..layers import moe_layers, set_mode, with_modes
from ..sites import find_ffn_sites
from ..sites.probe import eval_mode
from ..ssd import SSD, Fallback, modes
from ..train.capture import fast_dtype
from ..train.labels import counted_labels
from ..train.loop import TrainConfig, TrainingData, TrainRecord, train
from ..train.state import latest_step
from .names import torch_device
from .pretrain_data import OBJECTIVES, prepare_data, prepare_tokenizer, source_id
from .pretrain_log import JsonLines, RunLog, Sink, TensorBoard, WandB, check_wandb, has_tensorboard
from .pretrain_recipe import PretrainConfig
from .pretrain_result import PretrainResult, topk_calibration
from .stages import write_json
from .stopping import Stop, stopping
from .training_cost import SequenceCost, expected_modes, sequence_cost, sequences_of_steps, training_flops
from .work import TRAINING_STATE, finished_training, open_training, remove_work, run_id

LOG_FILE = "log.jsonl"
"""Rows of what went on, in the output folder; while a run lasts in ``<out>.work``."""
_FALLBACKS, _BOARD = "fallbacks.json", "tensorboard"
_FORWARD_TOKENS = 8192  # of an evaluation

Say = Callable[[str], None]


def pretrain(
    recipe: PretrainConfig,
    out: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
    say: Say = lambda _line: None,
) -> PretrainResult:
    """Pre-train a model.

    Args:
        recipe: what to do, from `read_pretrain`.
        out: new folder for an ordinary checkpoint with ``pretrain.json`` and ``log.jsonl``; with SSD it is a dense model, and a mixture
            where moeify is imported. A run that was killed or stopped continues from the state in ``<out>.work``.
        device: "cpu", "cuda" or "cuda:1".
        overwrite: replace an earlier result at ``out``, and the state of another run in ``<out>.work``.
        progress: told of preparation and saving.
        say: told in a line of the estimate, of training as it goes, of epochs and of fallbacks.

    Returns:
        What ``pretrain.json`` holds.

    Raises:
        MoeifyError: see `errors`. `ConfigError` under torchrun with several processes. `StoppedError` after SIGTERM or SIGINT: the step was
            finished and saved. `DivergedError`: a loss that is no number in a dense phase, or one fallback more than ``ssd.max_fallbacks``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("moeify pretrain runs in one process so far, and WORLD_SIZE says several; start it without torchrun.")
    work = out.with_name(out.name + ".work")
    recover(out)
    finished = finished_training(out, work, file=PRETRAINING_FILE)
    if finished is None:
        check_output(out, overwrite=overwrite)
    torch_device(device)
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
            return _config.from_dict(PretrainResult, finished, where=str(out / PRETRAINING_FILE))
        check_output(out, overwrite=overwrite)
    open_training(work, run, overwrite=overwrite)
    return _Run(recipe, out, work, run, device=device, progress=progress, say=say).to_the_end(overwrite=overwrite)


@dataclass
class _Attempt:
    """A model on its way: built anew for every attempt, so that the second one begins as a new process would."""

    model: Any
    ssd: SSD | None


class _Run:
    def __init__(
        self, recipe: PretrainConfig, out: Path, work: Path, run: Mapping[str, Any], *, device: str, progress: Progress, say: Say
    ) -> None:
        self.recipe, self.out, self.work, self.run = recipe, out, work, run
        self.place, self.progress, self.say = torch_device(device), progress, say
        train_config = recipe.train
        self.train = _config.from_dict(
            TrainConfig, {**_config.to_dict(train_config), "save_every": train_config.save_every or max(1, train_config.steps // 20)}
        )
        dtype = fast_dtype(self.place) if self.train.compute == "auto" else getattr(torch, self.train.compute)
        self.compute: torch.dtype | None = None if dtype is torch.float32 else dtype
        self.tokenizer = prepare_tokenizer(recipe, work, progress=progress)
        trial = self.build()  # what cannot be trained is found before the data is read
        OBJECTIVES[recipe.task].check(trial.model, self.tokenizer, recipe)
        del trial
        self.data = prepare_data(recipe, self.tokenizer, work, run=run, progress=progress)
        self.sequences = sequences_of_steps(len(self.data.training), self.train)
        self.batches = _fixed_batches(self.data.validation, size=max(1, _FORWARD_TOKENS // self.data.text_length))
        probed = range(min(recipe.probe_size, len(self.data.validation)))
        self.probe = [self.data.validation.batch(probed, generator=torch.Generator().manual_seed(0))]

    # -- the model

    def build(self, *, probe: Sequence[Mapping[str, Tensor]] = (), fallbacks: Sequence[Fallback] = ()) -> _Attempt:
        objective = OBJECTIVES[self.recipe.task]
        architecture = {**objective.token_fields(self.tokenizer), **self.recipe.model.architecture}
        model = random_model(architecture, auto_class=objective.auto_class, seed=self.train.seed).to(self.place)
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
        with stopping() as stop:
            while True:
                attempt = self.build(probe=self.probe, fallbacks=fallbacks)
                cost = sequence_cost(attempt.model, self.batches[0], self.recipe.ssd)
                estimate = self._estimate(attempt.model, cost)
                start = latest_step(self.work / TRAINING_STATE)
                if not fallbacks or start:
                    self._say_start(attempt.model, estimate, start)
                log = self._open_log(attempt.ssd, start=start)
                try:
                    record = train(
                        attempt.model,
                        self.data.training,
                        self.train,
                        parts=[attempt.ssd] if attempt.ssd is not None else [],
                        state=self.work / TRAINING_STATE,
                        run=self.run,
                        evaluate=lambda model: self.mean_loss(model, "dense"),
                        watch=log.watch,
                        stop=stop,
                    )
                    break
                except StoppedError as error:
                    raise self._stopped(stop, error.step) from None
                except DivergedError as error:
                    fallbacks = self._fall_back(error, attempt.ssd, fallbacks)
                    del attempt  # before there is another one
                finally:
                    log.close()
        if stop():  # within the last step
            raise self._stopped(stop, self.train.steps)
        return self._finish(attempt, record, cost, estimate, fallbacks, overwrite=overwrite)

    def _stopped(self, stop: Stop, step: int) -> StoppedError:
        where = f"stopped after step {step} of {self.train.steps}, which is saved; the same command goes on there."
        return StoppedError(f"{signal.Signals(stop.signum).name}: {where}", step=step, signum=stop.signum)

    def _open_log(self, ssd: SSD | None, *, start: int) -> RunLog:
        recipe, sinks = self.recipe, list[Sink]()
        if recipe.log.tensorboard and has_tensorboard():
            sinks.append(TensorBoard(self.work / _BOARD, start=start))
        if recipe.log.wandb is not None:
            sinks.append(WandB(recipe.log.wandb, name=self.out.name, run=run_id(self.run), config=_config.to_dict(recipe)))
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
            raise error
        what = ", ".join(f"{name} {value:.4g}" for name, value in error.numbers.items())
        if len(before) >= config.max_fallbacks:
            raise DivergedError(
                f"the sparse phase failed at step {error.step} ({what}), after {len(before)} fallbacks, which is ssd.max_fallbacks; a "
                "lower train.lr, or more ssd.selected, is another run: another --out, or --overwrite.",
                step=error.step,
                numbers=error.numbers,
            ) from None
        start = latest_step(self.work / TRAINING_STATE)
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
        found = [*before, fallback]
        try:
            write_json(self.work / _FALLBACKS, [_config.to_dict(f) for f in found])
        except OSError as failure:
            raise CheckpointError(f"cannot write '{self.work / _FALLBACKS}': {failure.strerror}; free space and run again.") from failure
        self.say(f"step {error.step}: {what} in a sparse phase; back to step {start}, dense until step {fallback.until}.")
        return found

    def _read_fallbacks(self) -> list[Fallback]:
        path = self.work / _FALLBACKS
        if not path.exists():
            return []
        try:
            return [_config.from_dict(Fallback, entry, where=str(path)) for entry in json.loads(path.read_text(encoding="utf-8"))]
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"'{path}' is damaged: {error}; delete '{self.work}' to train from the start.") from error

    # -- numbers

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, mode: str) -> float:
        """On validation, in nats; the model's mode is as before afterwards."""
        total, count = 0.0, 0
        with eval_mode(model), kept(with_modes(model), "mode"):
            if moe_layers(model):
                set_mode(model, "moe" if mode == "moe" else "dense")
            for batch in self.batches:
                with torch.autocast(self.place.type, dtype=self.compute, enabled=self.compute is not None):
                    loss = model(**{key: value.to(self.place) for key, value in batch.items()}).loss
                labels = counted_labels(batch, shifted=self.recipe.task == "causal-lm")
                total, count = total + float(loss) * labels, count + labels
        return total / count

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
            probe_sequences=len(self.probe[0]["input_ids"]),
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
            seconds=record.seconds,
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
            config=_config.to_dict(self.recipe),
            versions=library_versions(),
            run=run_id(self.run),
        )
        log = JsonLines(self.work / LOG_FILE, start=self.train.steps)
        log.write("final", self.train.steps, {"evaluation": evaluation, "flops": result.flops, "seconds": record.seconds})
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
        return result


def _fixed_batches(data: TrainingData, *, size: int) -> list[dict[str, Tensor]]:
    """All sequences, always masked and corrupted the same way."""
    generator, rows = torch.Generator().manual_seed(0), range(len(data))
    return [data.batch(rows[i : i + size], generator=generator) for i in range(0, len(rows), size)]
