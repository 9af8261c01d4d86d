"""Every figure of the paper from tiny models and data that is made up: it runs, it can be killed, nothing is done twice."""

import json

import pytest

from bench.paper.__main__ import main
from bench.paper.figures import FIGURES


@pytest.mark.slow
def test_all_figures_run_through_and_run_again_from_what_is_on_disk(tmp_path, capsys):
    arguments = ["--all", "--smoke", "--out", str(tmp_path), "--json"]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)["figures"]
    assert [figure["figure"] for figure in first] == list(FIGURES)
    for figure in first:
        assert figure["claims"]
        assert all(claim["line"].startswith(claim["claim"]) for claim in figure["claims"])
        for kind in ("png", "svg"):
            assert (tmp_path / f"fig{figure['figure']}.{kind}").stat().st_size > 1000
        for name, curve in figure["data"].get("curves", {}).items():
            assert len(curve["points"]) == 1, name
            assert all(point["all"] > 0 and (name == "ztw" or point["ffn"] > 0) for point in curve["points"][0]), name
    records = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.svg") if path.stem != "fig5"}
    (tmp_path / "fig5.json").unlink()  # its stages are still there
    assert main(arguments) == 0
    again = {figure["figure"]: figure for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert again["5"]["data"] == next(figure for figure in first if figure["figure"] == "5")["data"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")} == records
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    page = tmp_path / "paper.md"
    assert main(["--page", str(page), "--out", str(tmp_path)]) == 0
    assert "Of a smoke run" in page.read_text()
