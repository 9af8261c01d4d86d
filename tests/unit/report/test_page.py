"""The report's page: whole, escaped, offline, readable; in a browser where there is one."""

import html
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from browser import BROWSER, WIDTH, Browser

from moeify.errors import DataError
from moeify.evaluate import BINS, Curve, CurvePoint, DenseQuality, Distribution, ExecutedExperts, TokenCosts, ablation
from moeify.presets import Preset
from moeify.report import Report, report_html, token_costs_html
from moeify.report.chart import Line, Mark, chart, pareto
from moeify.select import TopK

HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><script>alert(2)</script>"
VOID = {"meta", "input", "img", "br"}


class Reader(HTMLParser):
    """Checks that elements close, and keeps them with their texts."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def point(value, active, ratio, *, rule="topk"):
    return CurvePoint(
        rule=rule, value=value, active_fraction=active, ffn_flops_fraction=active + 0.05, flops_fraction=0.3 + 0.7 * active,
        quality=8 * ratio, quality_ratio=ratio, kl=0.01, bytes_fraction=0.4 + 0.6 * active, latency_fraction=0.5 + 0.5 * active,
        machine="a machine",
    )  # fmt: skip


def curve(model="moe"):
    return Curve(
        model=model,
        metric="perplexity",
        dense=DenseQuality(quality=8.0, flops_per_token=7e6),
        points=(point(8, 0.2, 1.4), point(16, 0.5, 1.02), point(20, 0.7, 1.05), point(32, 1.0, 1.0)),
        extra={"calibrated": {"rule": "topk", "value": 16}},
    )


def spread(share):
    histogram = [0] * BINS
    histogram[int(share * BINS)] = 10
    quantiles = dict.fromkeys(("p5", "p25", "p50", "p75", "p95"), share)
    return Distribution(tokens=10, num_neurons=100, num_values=25, histogram=tuple(histogram), mean=share, deviation=0.0, **quantiles)


def report(**fields):
    one, rules = curve(), {"layers.0.mlp": TopK(k=8)}
    preset = Preset(
        name="fast", rules=rules, active_fraction=0.2, metric="perplexity", quality=11.0, flops_fraction=0.44, latency_fraction=0.5
    )
    costs = TokenCosts(layers=("a",), flops_LBS=torch.tensor([[[1.0, 2.0, 4.0]]]).double(), dense_flops=(4.0,), router_flops=(0.5,))
    whole = {
        "title": HOSTILE,
        "subtitle": HOSTILE,
        "curve": one,
        "others": {HOSTILE: curve("other")},
        "table": ablation({HOSTILE: one.points}, metric="perplexity", dense=8.0, within=0.5),
        "presets": (preset,),
        "experts": ExecutedExperts(settings={HOSTILE: {HOSTILE: spread(0.25)}}),
        "tokens": (HOSTILE, "\n", "</p>"),
        "text_costs": costs,
        "layers": {"Routers": {HOSTILE: {"r2": 0.5}}},
        "facts": {HOSTILE: HOSTILE},
        "commands": (f"moeify report '{HOSTILE}'",),
    }
    return Report(**{**whole, **fields})


def test_everything_from_outside_is_text_and_nothing_is_fetched():
    text = report_html(report())
    page = read(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "".join(page.text).count(HOSTILE) >= 8
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")


def test_numbers_of_every_part_are_on_the_page():
    page = read(report_html(report(title="moe")))
    text = " ".join(" ".join(page.text).split())
    for wanted in (
        "50.0 %",
        "8.16",
        "dense 8",
        "2.00\u00d7",
        "Filled:",
        "setting",
        "at most 8.5",
        "0.5000",
        "25.0 %",
    ):
        assert wanted.lower() in text.lower(), wanted
    own = [attributes for tag, attributes in page.elements if tag == "tr" and attributes.get("class") == "own"]
    assert len(own) == 1


def test_what_is_not_there_is_left_out_and_columns_of_nothing_too():
    text = report_html(Report(title="moe", curve=curve()))
    ids = [a["id"] for tag, a in read(text).elements if tag == "h2"]
    assert ids == ["curve", "points"]
    assert "measured on" not in report_html(report())


def test_page_can_be_used_by_keyboard_and_read_aloud():
    page = read(report_html(report()))
    ids = {a["id"] for _, a in page.elements if "id" in a}
    assert len(ids) == sum("id" in a for _, a in page.elements)
    for tag, attributes in page.elements:
        assert set(attributes.get("aria-labelledby", "").split()) <= ids
        if tag == "label":
            assert attributes["for"] in ids
        if tag == "fieldset":
            assert page.elements[page.elements.index((tag, attributes)) + 1][0] == "legend"
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0" and attributes["aria-label"]
    assert sum(tag == "table" for tag, _ in page.elements) == sum(tag == "caption" for tag, _ in page.elements)
    assert ("html", {"lang": "en"}) in page.elements


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_have_contrast_in_light_and_dark():
    text = report_html(Report(title="moe"))
    schemes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{([^}]*)\}", text)]
    assert len(schemes) == 2
    for colours in schemes:
        for name in ("ink", "soft", "link"):
            assert contrast(colours[name], colours["paper"]) >= 4.5
            assert contrast(colours[name], colours["panel"]) >= 4.5
        for i in range(6):
            assert contrast(colours[f"c{i}"], colours["paper"]) >= 3  # WCAG 2.1, 1.4.11: parts of pictures


def test_axes_are_those_that_points_have():
    text = report_html(Report(title="moe", curve=curve()))
    for name in ("FLOPs", "FLOPs of the FFNs", "bytes a token", "time", "active fraction"):
        assert f">{name}</label>" in text
    assert "Timed on a machine." in text
    bare = tuple(replace(one, bytes_fraction=None, latency_fraction=None, machine=None) for one in curve().points)
    text = report_html(Report(title="moe", curve=replace(curve(), points=bare)))
    assert text.count("</label>") == 3
    assert "bytes a token" not in text and ">time<" not in text


def test_presets_stand_as_far_from_dense_as_they_were_measured():
    def height(preset):
        page = report_html(Report(title="moe", curve=curve(), presets=(preset,)))
        return float(re.search(r'<path class="mark c1 d1" d="M[\d.]+ ([\d.]+)l7', page).group(1))

    def preset(quality, dense):
        fields = {"rules": {"a": TopK(k=8)}, "active_fraction": 0.5, "metric": "perplexity", "flops_fraction": 0.65}
        return Preset(name="p", quality=quality, dense_quality=dense, **fields)

    assert height(preset(16.32, 16.0)) == height(preset(8.16, 8.0)) == height(preset(8.16, None))
    assert height(preset(17.0, 16.0)) < height(preset(16.32, 16.0)), "worse is higher"
    assert "measured where dense has 16" in report_html(Report(title="moe", curve=curve(), presets=(preset(17.0, 16.0),)))


def test_points_near_presets_are_marked_where_there_are_none():
    own = curve()
    text = report_html(Report(title="moe", curve=own, suggested={"balanced": own.points[1]}))
    assert "near what moeify preset makes" in text and ">balanced</text>" in text


def test_pareto_front_by_hand():
    points = [(0.2, 9.0), (0.3, 8.5), (0.4, 8.6), (0.5, 8.5), (0.6, 8.0), (0.6, 8.0)]
    assert pareto(points, lower=True) == [True, True, False, False, True, True]
    assert pareto([(0.2, 0.9), (0.3, 0.8), (0.3, 0.95)], lower=False) == [True, False, True]


def test_far_points_are_cut_off_with_an_arrow():
    marks = tuple(Mark(x=0.1 * i, y=8 + 0.01 * i, text=f"p{i}") for i in range(1, 9))
    line = Line(name="a", marks=(*marks, Mark(x=0.05, y=1000.0, text="far")))
    svg = chart([line], x_label="x", y_label="y", level=8, level_name="dense", title="t", lower=True)
    assert svg.count("<circle") == 8
    assert "l-5 9h10z" in svg
    assert ">1000<" not in svg
    falls = Line(name="a", marks=(*marks, Mark(x=0.05, y=-1000.0, text="far")))
    svg = chart([falls], x_label="x", y_label="y", level=8, level_name="dense", title="t", lower=False)
    assert "l-5 -9h10z" in svg, "beyond the lower end it points down"


def test_without_jinja_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DataError, match=r"the page needs Jinja2; pip install 'moeify\[report\]'"):
        report_html(Report(title="moe"))


def test_pages_beyond_two_megabytes_are_refused(tmp_path):
    (tmp_path / "patches.png").write_bytes(bytes(2 << 20))
    with pytest.raises(DataError, match="more than 2; give a shorter --text or a smaller --image"):
        report_html(report(patches=tmp_path / "patches.png"))


def test_every_token_is_in_a_table_that_opens_without_a_mouse():
    tokens, shares = ("Once", " upon\n", HOSTILE), (1.0, 4.0, 2.0)
    costs = TokenCosts(layers=("a",), flops_LBS=torch.tensor([[shares]]).double(), dense_flops=(4.0,), router_flops=(0.5,))
    text = report_html(Report(title="moe", tokens=tokens, text_costs=costs))
    folded = re.search(r"<details><summary>All 3 tokens with their costs</summary>(.*?)</details>", text, flags=re.DOTALL).group(1)
    rows = re.findall(r'<th scope="row">(\d)</th><td class="text">(.*?)</td><td>([\d.]+)</td>', folded)
    assert [(int(i), json.loads(html.unescape(token)), float(share)) for i, token, share in rows] == [
        (i, token, share / 4) for i, (token, share) in enumerate(zip(tokens, shares, strict=True))
    ]
    assert folded.count("<button") == 3, "it can be sorted"


def test_legend_has_each_lines_dash():
    others = {name: curve(name) for name in "bcd"}
    text = report_html(Report(title="a", curve=curve(), others=others))
    legend = re.search(r"<figcaption>(.*?)</figcaption>", text, flags=re.DOTALL).group(1)
    assert re.findall(r'<path class="line c(\d) d(\d)"', legend) == [(str(i), str(i)) for i in range(4)]
    dashes = dict(re.findall(r"\.line\.d(\d) \{ stroke-dasharray: ([\d ]+) \}", text))
    assert len(set(dashes.values())) == 5, "and line 0 is whole: six lines differ without colour"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no Chromium on this machine; CONTRIBUTING.md says how to get one")
    with Browser(tmp_path_factory.mktemp("browser")) as one:
        yield one


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_a_browser_runs_the_page_with_contrast_and_names_within_a_phone(browser, tmp_path, is_dark):
    hostile = "<script>hacked=1</script>"
    (tmp_path / "page.html").write_text(report_html(report(title=hostile, tokens=(hostile, "b", "c"))), encoding="utf-8")
    page = browser.open(tmp_path / "page.html", is_dark=is_dark)
    found = page.probe()
    assert found["problems"] == []
    assert (found["up"], found["down"], found["hacked"]) == (8, 32, "undefined")
    assert found["width"] == WIDTH
    assert found["switches"] == [True] * 5
    assert found["dark"] == is_dark
    assert found["texts"] > 100
    assert page.requests() == []
    assert page.complaints() == []


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser, tmp_path):
    (tmp_path / "page.html").write_text(report_html(report()), encoding="utf-8")
    page = browser.open(tmp_path / "page.html", is_dark=False)
    focused = [page.press_tab() for _ in range(45)]
    assert (focused[0]["tag"], focused[0]["kind"]) == ("a", "skip")
    reached = [one for one in focused if one["tag"] != "body"]
    assert [one for one in reached if not one["shows"]] == []
    kinds = {(one["tag"], one["kind"]) for one in reached}
    assert kinds >= {("a", "skip"), ("input", "radio"), ("div", "scroll"), ("button", "button"), ("summary", "")}
    assert len(reached) > 30


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_the_page_of_tokens_is_as_readable_as_the_report(browser, tmp_path, is_dark):
    costs = TokenCosts(layers=("a",), flops_LBS=torch.tensor([[[1.0, 2.0, 4.0]]]).double(), dense_flops=(4.0,), router_flops=(0.5,))
    token_costs_html(["<script>hacked=1</script>", "b" * 200, "c"], costs, tmp_path / "tokens.html", title=HOSTILE * 5)
    page = browser.open(tmp_path / "tokens.html", is_dark=is_dark)
    found = page.probe()
    assert found["problems"] == []
    assert (found["width"], found["hacked"], found["dark"]) == (WIDTH, "undefined", is_dark)
    assert page.requests() == []
    assert page.press_tab()["tag"] == "summary"
