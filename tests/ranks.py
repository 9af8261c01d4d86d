"""Several processes in one test: functions of this module run in each, and what the first one returns comes back.

Processes are forked from a server that has imported what is slow to import.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
import traceback
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from pretraining import PROBE, Counting, sites_of, tiny_gpt
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from training import F32

from moeify._dist import Ranks, whole
from moeify.controls import set_mode
from moeify.errors import MoeifyError
from moeify.kernels import build_plan, moe_ffn
from moeify.layers import moe_layers
from moeify.sites import FFNWeights
from moeify.ssd import SSD, SSDConfig
from moeify.train import TrainConfig, train
from moeify.train.expert_parallel import ExpertGroup, expert_group
from moeify.train.parallel import distributed, whole_state

SSD_CONFIG = SSDConfig(num_experts=8, selected=3, schedule="fixed", switches=(0.25, 0.75), probe_frac=0.1)
STEPS = TrainConfig(steps=12, batch_sequences=6, micro_sequences=2, lr=3e-3, weight_decay=0.1, log_every=1, **F32)
_SLOW = ("transformers.models.gpt2.modeling_gpt2", "moeify.train", "torch.distributed.fsdp", "torch.distributed.checkpoint")


def start(size, jobs, folder, *, wait_s=30):
    """Processes that run ``jobs``, [(name, function, arguments)], one after the other; each writes 'NAME.RANK.json' into ``folder``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_SLOW))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_work, args=(rank, size, port, jobs, str(folder), wait_s), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def results(size, jobs, folder, *, timeout_s=120, wait_s=30):
    """{name: what the first process returned}, once all have ended."""
    folder.mkdir(exist_ok=True)
    processes = start(size, jobs, folder, wait_s=wait_s)
    for process in processes:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
    errors = [found["error"] for path in sorted(folder.glob("*.json")) if "error" in (found := json.loads(path.read_text()))]
    assert not errors, errors[0]
    return {name: read(folder, name) for name, _, _ in jobs}


def read(folder, name, rank=0):
    """What a process returned; its error, if it raised one, is ours."""
    path = folder / f"{name}.{rank}.json"
    assert path.exists(), f"process {rank} ended before '{name}' did"
    found = json.loads(path.read_text())
    assert "error" not in found, found["error"]
    return found["result"]


def _work(rank, size, port, jobs, folder, wait_s):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with distributed(timeout_s=wait_s):
        for name, function, arguments in jobs:
            try:
                found = {"result": function(**arguments), "cpu_s": time.process_time()}
            except Exception:  # noqa: BLE001 - whatever it is, the test shows it
                found = {"error": traceback.format_exc()}
            Path(folder, f"{name}.{rank}.json").write_text(json.dumps(found))
            if "error" in found:
                os._exit(1)


class KillsRank(Counting):
    """Data that ends one process at one of its forwards, as the system does when memory runs out."""

    def __init__(self, rank, at):
        self.rank, self.left = rank, at

    def batch(self, rows, *, generator):
        self.left -= 1
        if self.left < 0 and Ranks.present().rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(rows, generator=generator)


def pretrain(*, kind="auto", state=None, source=None, until=None, data=None, micro=2, **options):
    """An SSD run on as many processes as there are; everything that must not depend on their number, as JSON.

    ``until``: forwards of a process after which all stop; ``source``: a state that is copied, and gone on from.
    """
    if source is not None:
        Ranks.present().first(lambda: shutil.copytree(source, state) and None)
    model = tiny_gpt()
    steps = replace(STEPS, parallel=kind, save_every=None if state is None else 2, micro_sequences=micro, **options)
    with SSD(model, sites_of(model), SSD_CONFIG, total_steps=steps.steps, probe=PROBE) as ssd:
        reasons = set()
        for layer in moe_layers(model).values():
            layer.host.register_forward_pre_hook(partial(_note_why_masked, layer=layer, reasons=reasons))
        data = data or Counting()
        state = None if state is None else Path(state)
        if until is not None:
            data = Stops(at=until)
        shared = []
        with patch.object(ExpertGroup, "ffn", _counted(ExpertGroup.ffn, shared)):
            try:
                record = train(model, data, steps, parts=[ssd], run={"ssd": 1}, state=state, evaluate=evaluate)
            except Stopped:
                return None
        router_steps = [int(ssd._optimizer.state[layer.router.out.weight]["step"]) for layer in moe_layers(model).values()]
        ssd.set_step(steps.steps)
    set_mode(model, "moe")
    after = evaluate(model)
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    found = {
        "losses": record.losses,
        "evals": record.evals,
        "tokens": record.tokens,
        "decisions": [(d.step, d.before, d.after, d.reason) for d in ssd.decisions],
        "similarity": [p.similarity for p in ssd.probes],
        "sparsity": [p.sparsity for p in ssd.probes],
        "captured": [p.captured for p in ssd.probes],
        "inertia": [s.inertia for s in ssd.switches],
        "router_steps": router_steps,
        "masked": sorted(map(str, reasons)),
        "shared": len(shared),
        "after": after,
        "sums": {name: float(w.double().square().sum()) for name, w in weights.items()},
        "identical": _same_everywhere(weights),
        "state_keys": sorted(whole_state(model)),
    }
    return json.loads(json.dumps(found))


def _counted(method, calls):
    def counting(*args, **options):
        calls.append(len(args[1]))
        return method(*args, **options)

    return counting


def _note_why_masked(_module, _args, *, layer, reasons):
    if layer.mode == "moe" and layer.host.training:
        reasons.add(layer.masked_reason())


def evaluate(model):
    with torch.no_grad():
        return float(model(**PROBE[0]).loss)


def _same_everywhere(weights):
    ranks = Ranks.present()
    return all(torch.equal(ranks.broadcast(w, source=0), w) for w in weights.values())


class Stopped(Exception):  # noqa: N818 - stands for a kill
    pass


class Stops(Counting):
    """Data that cannot be read from some forward on, in all processes."""

    def __init__(self, at):
        self.left = at

    def batch(self, rows, *, generator):
        self.left -= 1
        if self.left < 0:
            raise Stopped
        return super().batch(rows, generator=generator)


class HalfLabelled(Counting):
    """Every third sequence has no label, so that some forwards have none."""

    def batch(self, rows, *, generator):
        batch = super().batch(rows, generator=generator)
        without = torch.tensor(rows) % 3 == 0
        return batch | {"labels": batch["labels"].masked_fill(without[:, None], -100)}


def share_experts(*, size, num_experts=7, loads="ragged", dtype="float64", autocast=False):
    """One FFN by a group of processes and by each alone: the largest differences, and what of the weights each has computed."""
    ranks, group = Ranks.present(), expert_group(size)
    generator = torch.Generator().manual_seed(ranks.rank)
    tokens, d, f = [5, 0, 17, 3][ranks.rank] if loads == "ragged" else 6, 6, 17
    same = torch.Generator().manual_seed(99)
    shapes = {"up_FD": (f, d), "down_FD": (f, d), "gate_FD": (f, d), "up_bias_F": (f,), "gate_bias_F": (f,), "down_bias_D": (d,)}
    kind = getattr(torch, dtype)
    found = []
    whole = {name: torch.randn(shape, generator=same, dtype=kind) for name, shape in shapes.items()}
    x = torch.randn(tokens, d, generator=generator, dtype=kind)
    scores = torch.rand(tokens, num_experts, generator=generator)
    if loads == "none for the last":  # whose experts nobody selects
        scores[:, group.bounds(num_experts)[-2] :] -= 2
    mask = torch.zeros(tokens, num_experts, dtype=torch.bool).scatter(1, scores.topk(3, dim=1).indices, True)
    mask[::4] = False  # tokens without experts
    probs = (scores * mask).to(torch.float32 if dtype == "float32" else kind)
    weigh = torch.randn(tokens, d, generator=generator, dtype=kind)
    for compute in (partial(group.ffn, impl="auto"), partial(moe_ffn, impl="reference")):
        inputs = {name: tensor.clone().requires_grad_() for name, tensor in {"x": x, "probs": probs, **whole}.items()}
        weights = FFNWeights(**{name: inputs[name] for name in whole})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = compute(inputs["x"], weights, build_plan(mask, inputs["probs"]), activation="relu")
        (y * weigh).sum().backward()
        found.append((y.detach(), {name: tensor.grad for name, tensor in inputs.items()}))
    (mine, gradients), (alone, expected) = found
    computed = (gradients["up_FD"] != 0).any(1).nonzero().flatten().tolist()
    differences = {"y": mine - alone, "x": gradients["x"] - expected["x"], "probs": gradients["probs"] - expected["probs"]}
    differences |= {name: ranks.sum(gradients[name]) - ranks.sum(expected[name]) for name in whole}
    return {
        "largest": {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in differences.items()},
        "computed": computed,
        "sizes": {name: float(ranks.sum(expected[name]).abs().max()) for name in whole},
    }


def share_among_three():
    """What is said where the processes are no multiple of a group."""
    try:
        pretrain(expert_parallel=3)
    except MoeifyError as error:
        return [type(error).__name__, str(error)]
    return None


def train_half_labelled(*, kind, micro=1):
    """Losses where processes have different numbers of labels, some none."""
    return train(tiny_gpt(), HalfLabelled(), replace(STEPS, steps=8, parallel=kind, micro_sequences=micro)).losses


def diverge(*, kind):
    """What is said of a loss that is no number."""
    try:
        train(tiny_gpt(), Counting(), replace(STEPS, parallel=kind, lr=1e20, clip=0.0))
    except MoeifyError as error:
        return [type(error).__name__, str(error)]
    return None


def lose_a_process(*, state):
    """A run whose second process is killed in the sparse phase; what the first one then says."""
    try:
        pretrain(kind="fsdp", state=state, data=KillsRank(1, at=14))
    except MoeifyError as error:
        return [type(error).__name__, str(error)]
    return None


def fill_a_disk(*, state, source):
    """A run whose second process cannot write; what each says, and what is left."""

    def full(self, plan, planner):
        raise OSError(28, "No space left on device")

    whole = HuggingFaceStorageWriter.write_data
    if Ranks.present().rank == 1:
        HuggingFaceStorageWriter.write_data = full
    try:
        pretrain(kind="fsdp", state=state, source=source)
    except MoeifyError as error:
        return [type(error).__name__, str(error), sorted(path.name for path in Path(state).iterdir())]
    finally:
        HuggingFaceStorageWriter.write_data = whole
    return None
