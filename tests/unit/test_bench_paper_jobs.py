"""--jobs: what a figure's stages are cut into, who does which, and what is said of a process that fails."""

import multiprocessing
from dataclasses import replace

import pytest

from bench.paper import jobs
from bench.paper.__main__ import main
from bench.paper.figures import FIGURES
from bench.paper.jobs import Piece, WorkerError, _reports, _Worker, pieces_of, work
from bench.paper.measure import Run, run_experiment
from moeify.pipeline.stages import StageTakenError


@pytest.mark.parametrize("number", FIGURES)
def test_pieces_have_every_curve_of_every_seed_in_the_order_of_the_stages(number, tmp_path):
    figure, run = FIGURES[number], Run(inputs={}, out=tmp_path, seeds=(0, 3))
    pieces = pieces_of(figure, run)
    if figure.model is None:
        assert pieces == []
        return
    assert pieces[:2] == [Piece(model=figure.model, seed=0), Piece(model=figure.model, seed=3)]
    order = ["pretraining", "dense", "sparsify", "convert", "ztw", "sweep"]
    assert [order.index(piece.last) for piece in pieces] == sorted(order.index(piece.last) for piece in pieces)
    for seed in (0, 3):
        last = [piece for piece in pieces if (piece.seed, piece.last) == (seed, figure.last_stage)]
        assert [piece.curves for piece in last] == [(curve,) for curve in figure.curves(False)]
        assert [piece.ztw for piece in last] == [figure.ztw and i == 0 for i in range(len(last))]
    assert len({str(piece) for piece in pieces}) == len(pieces), "each has a name"


def test_pieces_make_the_stages_of_the_whole_figure_and_no_others(tmp_path, monkeypatch):
    """Names of stages, without running one."""

    def names(call):
        found = set()

        def remember(recipe, _out, *, stage, **_options):
            steps = {variant.name: (recipe.train_of(variant), recipe.convert_of(variant), variant.sparsify) for variant in recipe.variant}
            found.update((recipe.name, recipe.seeds, name, repr(step)) for name, step in steps.items())
            found.add((recipe.name, recipe.ztw is not None and recipe.main.name, stage))
            return [{"dense": made_before}]

        monkeypatch.setattr("bench.paper.measure.run_stages", remember)
        call()
        return found

    made_before = type("Made", (), {"folder": tmp_path})()
    for number in ("6", "8"):
        figure, run = FIGURES[number], Run(inputs={}, out=tmp_path, seeds=(0, 1))
        whole = names(lambda figure=figure, run=run: run_experiment("bert", figure.curves(False), run, stage="sweep", ztw=figure.ztw))
        cut = names(lambda figure=figure, run=run: [jobs.carry_out(piece, run) for piece in pieces_of(figure, run)])
        of_stages = {entry for entry in whole if len(entry) == 4}
        assert of_stages == {entry for entry in cut if len(entry) == 4}
        if figure.ztw:
            main_curve = next(entry[1] for entry in whole if len(entry) == 3 and entry[1])
            assert {entry[1] for entry in cut if len(entry) == 3 and entry[1]} == {main_curve}, "the same recipe decides its steps"


def test_a_process_leaves_what_is_taken_and_comes_back_to_it(tmp_path, monkeypatch):
    pieces = [Piece(model="gpt", seed=seed) for seed in range(3)]
    tried, waited = [], []

    def carry_out(piece, run):
        assert not run.wait
        tried.append(piece.seed)
        if piece.seed == 0 and len(waited) < 2:
            raise StageTakenError("taken")

    monkeypatch.setattr(jobs, "carry_out", carry_out)
    monkeypatch.setattr(jobs.time, "sleep", waited.append)
    assert [i for i, _ in work(pieces, Run(inputs={}, out=tmp_path))] == [1, 2, 0]
    assert tried == [0, 1, 2, 0, 0]
    assert len(waited) == 2, "only with nothing else to do"


def test_what_comes_first_is_looked_at_again_after_work(tmp_path, monkeypatch):
    pieces, now, tried = [Piece(model="gpt", seed=seed) for seed in range(3)], [0.0], []

    def carry_out(piece, _run):
        tried.append(piece.seed)
        if tried == [0]:
            raise StageTakenError("taken")
        now[0] += 60

    monkeypatch.setattr(jobs, "carry_out", carry_out)
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(jobs.time, "sleep", lambda _s: pytest.fail("there is work"))
    assert [i for i, _ in work(pieces, Run(inputs={}, out=tmp_path))] == [1, 0, 2]
    assert tried == [0, 1, 0, 2]


class Ended:
    def __init__(self, exitcode):
        self.exitcode = exitcode

    def join(self):
        pass


@pytest.mark.parametrize(
    ("told", "exitcode", "message"),
    [
        ("no space; choose another --out.", 2, r"^no space; choose another --out\.$"),
        (None, -9, r"process 2 of --jobs was killed by SIGKILL; the same command goes on where it was"),
        (None, 1, r"process 2 of --jobs ended with exit code 1"),
    ],
)
def test_a_process_that_fails_is_said(told, exitcode, message):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    workers = [_Worker(number=2, process=Ended(exitcode), reports=receiver)]
    if told is not None:
        sender.send(told)
    sender.close()
    with pytest.raises(WorkerError, match=message):
        list(_reports(workers))


def test_a_process_that_has_finished_is_not_asked_again():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    workers = [_Worker(number=1, process=Ended(0), reports=receiver)]
    sender.send((4, 1.5))
    assert list(_reports(workers)) == [(1, (4, 1.5))]
    sender.close()
    assert list(_reports(workers)) == []
    assert workers == []


def test_a_figure_whose_numbers_are_there_starts_no_process(tmp_path, monkeypatch, capsys):
    def draw(_data, paths, *, title):
        for path in paths:
            path.touch()

    changes = {"measure": lambda *_: {"stage_seconds": [], "data": {}}, "draw": draw, "claim": lambda _data: []}
    monkeypatch.setitem(FIGURES, "5", replace(FIGURES["5"], **changes))
    monkeypatch.setattr("bench.paper.__main__.check_stages", lambda _folder, *, keep: ("code",))  # reads all of the library
    arguments = ["--figure", "5", "--smoke", "--out", str(tmp_path)]
    assert main(arguments) == 0
    monkeypatch.setattr(jobs.multiprocessing, "get_context", lambda _how: NoProcess())
    assert main([*arguments, "--jobs", "2"]) == 0
    assert "figure 5:" in capsys.readouterr().out
    (tmp_path / "fig5.json").unlink()
    with pytest.raises(AssertionError, match="a process is started"):
        main([*arguments, "--jobs", "2"])


class NoProcess:
    def Pipe(self, **_options):
        raise AssertionError("a process is started")


@pytest.mark.parametrize("jobs_asked", ["0", "x"])
def test_a_bad_number_of_jobs_is_one_line(jobs_asked, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--figure", "14", "--jobs", jobs_asked])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument --jobs")


def test_a_system_without_locks_has_one_job(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "CAN_LOCK", False)
    assert main(["--figure", "14", "--jobs", "2", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --jobs needs file locks, which this system does not have; leave it out.\n"


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def stopped(*_args):
        raise KeyboardInterrupt

    monkeypatch.setitem(FIGURES, "14", replace(FIGURES["14"], measure=stopped))
    assert main(["--figure", "14", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on where it was.\n"
