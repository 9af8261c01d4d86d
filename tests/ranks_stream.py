"""A streamed conversion on several processes: functions that `ranks.results` runs in each."""

import os
import signal
from pathlib import Path

import torch

from moeify._dist import Ranks
from moeify.convert import ConvertConfig
from moeify.data import DataConfig
from moeify.errors import MoeifyError
from moeify.hf.shards import TensorWriter
from moeify.pipeline import CalibrationConfig, convert_checkpoint, stream
from moeify.routers import NormRouterConfig
from moeify.train.fit import RouterTrainConfig


def convert(*, folder, out, **options):
    """The conversion of ``folder/dense``, calibrated on ``folder/words.txt``."""
    return convert_checkpoint(
        str(Path(folder) / "dense"),
        Path(folder) / out,
        data=DataConfig(data=str(Path(folder) / "words.txt")),
        config=ConvertConfig(expert_size=8, router=NormRouterConfig(width=4)),
        calibration=CalibrationConfig(max_tokens=2048, window=32, router=RouterTrainConfig(epochs=1)),
        **options,
    )


def fitted_by(*, folder, out):
    """Which layers each process fitted, where the kind of conversion is left to moeify."""
    fitted, fit = [], stream.fit_site

    def counting(weights, x_TD, record, *rest):
        fitted.append(record.site.name)
        return fit(weights, x_TD, record, *rest)

    stream.fit_site = counting
    try:
        record = convert(folder=folder, out=out, stream=None)
    finally:
        stream.fit_site = fit
    return {"fitted": fitted, "record": record}


def failing(*, folder, out, rank):
    """What each process says when fitting fails in one."""

    def fail(*_):
        raise MoeifyError("nothing can be fitted here.")

    fit = stream.fit_site
    if Ranks.present().rank == rank:
        stream.fit_site = fail
    try:
        convert(folder=folder, out=out, stream=True)
    except MoeifyError as error:
        return {"kind": type(error).__name__, "text": str(error), "is_echo": error.is_echo}
    finally:
        stream.fit_site = fit
    return None


def killed(*, folder, out, at):
    """A conversion in a process that SIGKILL ends: at "tokens.json", when that file or what becomes it has been opened and has nothing in
    it yet; at "tensors", when the first of the result is written."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    write_text = Path.write_text

    def opened(path, *args, **options):
        if at in path.name:
            path.open("w").close()
            die()
        return write_text(path, *args, **options)

    Path.write_text = opened
    if at == "tensors":
        TensorWriter.write = lambda *_: die()
    torch.set_num_threads(1)
    convert(folder=folder, out=out, stream=True)
