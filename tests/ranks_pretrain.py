"""`moeify pretrain` on several processes: what `ranks.start` runs in each of them."""

import contextlib
import io
import json
import math
import os
import signal
import time
from pathlib import Path
from unittest.mock import patch

from moeify import cli
from moeify._dist import Ranks
from moeify.errors import DivergedError, MoeifyError
from moeify.layers import moe_layers
from moeify.pipeline import pretrain as run_pretrain
from moeify.pipeline import pretrain_log, read_pretrain
from moeify.ssd import SSD
from moeify.train import loop

MODULE = __import__("moeify.pipeline.pretrain", fromlist=["_FORWARD_TOKENS"])
SAME = tuple(f"model.architecture.{name}_pdrop=0.0" for name in ("resid", "embd", "attn"))
"""Without dropout, whose random numbers are each process' own."""


def pretrain(*, folder, out, settings=(), at=None, does=None, rank=1):
    """A run; where ``at`` is given, ``rank`` does something ("kill", "term") before that step. What came out, as JSON."""
    recipe = read_pretrain(f"{folder}/recipe.toml", settings=[*SAME, *settings])
    said = []
    with patch.object(MODULE, "_FORWARD_TOKENS", 96), _at(at, does, rank):  # of 10 sequences 4 batches
        result = run_pretrain(recipe, Path(out), say=said.append)
    found = {
        "losses": result.losses,
        "evals": result.evals,
        "evaluation": result.evaluation,
        "decisions": [(d.step, d.before, d.after, d.reason) for d in result.decisions],
        "probes": [[p.signals.sparsity, p.signals.similarity, p.signals.captured, p.signals.sparse_loss] for p in result.probes],
        "fallbacks": [[f.step, f.failed, f.until, f.dense_steps, f.sparse_steps] for f in result.fallbacks],
        "flops": result.flops,
        "tokens": result.tokens,
        "parameters": result.parameters,
        "seconds": result.seconds,
        "processes": result.processes,
        "said": said,
    }
    return json.loads(json.dumps(found))


def command(*, folder, out, settings=(), at=None, does=None, rank=1):
    """The command line; its exit code, and the last line that it wrote on stderr."""
    arguments = ["pretrain", f"{folder}/recipe.toml", "--out", out, *(f"--set={text}" for text in (*SAME, *settings))]
    written, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(written), contextlib.redirect_stdout(printed), _at(at, does, rank):
        code = cli.run(arguments)
    return [code, (written.getvalue().splitlines() or [""])[-1], bool(printed.getvalue())]


@contextlib.contextmanager
def _at(at, does, rank):
    with contextlib.ExitStack() as patches:
        set_step, loss, mode = SSD.set_step, loop._loss, []

        def patched(self, done):
            set_step(self, done)
            mode[:] = [done, self.controller.mode]
            if done == at and Ranks.present().rank == rank and does in ("kill", "term"):
                os.kill(os.getpid(), signal.SIGKILL if does == "kill" else signal.SIGTERM)

        def broken(model, batch):
            found = loss(model, batch)
            return found * math.nan if mode == [at, "sparse"] and Ranks.present().rank == rank and model.training else found

        patches.enter_context(patch.object(SSD, "set_step", patched))
        if does == "nan":  # in the sparse mode of one process alone
            patches.enter_context(patch.object(loop, "_loss", broken))
        if does == "full":
            patches.enter_context(patch.object(pretrain_log.JsonLines, "write", _full))
        yield


def _full(self, kind, step, values):
    raise self._error(OSError(28, "No space left on device"))


def lose(**options):
    """What a process says whose peer is killed."""
    return command(**options, does="kill")


def apart(*, folder, out):
    """Processes that do not see the same folder."""
    try:
        pretrain(folder=folder, out=f"{out}-{Ranks.present().rank}")
    except MoeifyError as error:
        return [type(error).__name__, str(error), error.is_echo]
    return None


def errors_of_the_first():
    """An error with fields, and one that is not ours, as the others get them."""
    found = []
    for error in (DivergedError("the loss jumped", step=7, numbers={"loss": math.inf}), KeyError("x")):

        def fail(error=error):
            raise error

        try:
            Ranks.present().first(fail)
        except (MoeifyError, KeyError) as raised:
            found.append([type(raised).__name__, str(raised), {k: str(v) for k, v in vars(raised).items()}])
    return found


def long_work(*, seconds):
    """Work of the first process that takes longer than the others' patience."""
    with patch("moeify._dist.BEAT_S", seconds / 8):
        done = Ranks.present().first(lambda: time.sleep(seconds) or "done", is_long=True)
        return [done, Ranks.present().same("after")]


def layers_of(folder):
    """Layers with experts of a checkpoint, as transformers loads it."""
    from transformers import GPT2LMHeadModel

    return len(moe_layers(GPT2LMHeadModel.from_pretrained(folder)))
