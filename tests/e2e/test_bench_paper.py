"""Every figure of the paper from tiny models and data that is made up: it runs, it can be killed, nothing is done twice."""

import json
import re

import pytest
import torch

from bench.paper.__main__ import main
from bench.paper.figures import FIGURES
from bench.paper.page import read_figures


@pytest.fixture
def one_thread():
    """Sums of more threads are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_all_figures_run_through_and_run_again_from_what_is_on_disk(tmp_path, capsys, one_thread):
    arguments = ["--all", "--smoke", "--out", str(tmp_path), "--json"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    first = json.loads(printed.out)["figures"]
    assert re.search(rf"^{len(FIGURES)} figures in \d+ s$", printed.err, re.MULTILINE)
    assert [figure["claims"] for figure in read_figures(tmp_path)] == [figure["claims"] for figure in first], "as the page asks them"
    assert [figure["figure"] for figure in first] == list(FIGURES)
    for figure in first:
        assert figure["claims"]
        assert not [claim["claim"] for claim in figure["claims"] if "not measured" in claim["sentence"].lower()]
        for kind in ("png", "svg"):
            assert (tmp_path / f"fig{figure['figure']}.{kind}").stat().st_size > 1000
        for name, curve in figure["data"].get("curves", {}).items():
            assert len(curve["points"]) == 1, name
            assert all(point["all"] > 0 and (name == "ztw" or point["ffn"] > 0) for point in curve["points"][0]), name
            assert all(point["authors_all"] >= point["all"] for point in curve["points"][0]), name
    records = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.svg") if path.stem != "fig5"}
    (tmp_path / "fig5.json").unlink()  # its stages are still there
    assert main(arguments) == 0
    again = {figure["figure"]: figure for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert again["5"]["data"] == next(figure for figure in first if figure["figure"] == "5")["data"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")} == records
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    shared = tmp_path / "shared"  # by two processes: the same numbers, of stages as of figures
    assert main(["--figure", "3", "--smoke", "--out", str(shared), "--json", "--jobs", "2"]) == 0
    (figure,) = json.loads(capsys.readouterr().out)["figures"]
    assert figure["data"] == next(figure for figure in first if figure["figure"] == "3")["data"]
    results = {record["key"]: record["result"] for record in map(read, records)}
    made = [read(path) for path in shared.rglob("record.json")]
    assert len(made) > 5
    assert all(record["result"] == results[record["key"]] for record in made)
    page = tmp_path / "paper.md"
    assert main(["--page", str(page), "--out", str(tmp_path)]) == 0
    assert "Of a smoke run" in page.read_text()
