"""The report's page: whole, escaped, offline, readable; in a browser where there is one."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from moeify.errors import DataError
from moeify.evaluate import BINS, Curve, CurvePoint, DenseQuality, Distribution, ExecutedExperts, TokenCosts, ablation
from moeify.presets import Preset
from moeify.report import Report, report_html
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


BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


PROBE = """
<script>
const found = { problems: [] };
const heads = [...document.querySelectorAll("section[aria-labelledby=points] th button")];
const knob = heads.find(b => b.textContent === "knob");
const first = () => document.querySelector("section[aria-labelledby=points] tbody tr").cells[1].textContent;
knob.click(); found.up = first(); knob.click(); found.down = first();
found.fits = document.documentElement.scrollWidth <= window.innerWidth;
found.hacked = typeof hacked;

// The switch: one chart at a time, by the radio buttons, each of which the keyboard reaches and a label names.
const radios = [...document.querySelectorAll("input[type=radio]")], figures = [...document.querySelectorAll(".charts > figure")];
found.switches = radios.map((radio, i) => {
  radio.labels[0].click();
  return radio.tabIndex === 0 && radio.labels[0].textContent !== "" && figures.every((f, j) => (f.offsetParent !== null) === (i === j));
});

// Names of what can be used or seen, as a screen reader asks for them.
for (const one of document.querySelectorAll("button, a, input, [role], [tabindex]")) {
  const name = one.getAttribute("aria-label") || (one.labels && one.labels[0] && one.labels[0].textContent) || one.textContent;
  if (!name.trim()) found.problems.push("no name: " + one.outerHTML.slice(0, 80));
}
for (const one of document.querySelectorAll("section")) {
  if (!document.getElementById(one.getAttribute("aria-labelledby"))) found.problems.push("a section without a name");
}

// Contrast of every text with what is behind it: 4.5 : 1, WCAG 2.1, 1.4.3.
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = color => rgb(color).slice(0, 3).map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = one => {
  for (; one; one = one.parentElement) { const c = getComputedStyle(one).backgroundColor; if (!(rgb(c)[3] === 0)) return c; }
  return "rgb(255, 255, 255)";
};
let texts = 0;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const one = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || one.closest("script, title")) continue;
  const style = getComputedStyle(one), own = light(one.closest("svg") ? style.fill : style.color);
  const [a, b] = [own, light(behind(one))].sort((x, y) => y - x), contrast = (a + 0.05) / (b + 0.05);
  texts++;
  if (contrast < 4.5) found.problems.push("contrast " + contrast.toFixed(1) + ": " + walk.currentNode.data.slice(0, 40));
}
found.texts = texts;
found.dark = light(getComputedStyle(document.body).backgroundColor) < 0.1;
document.body.insertAdjacentHTML("beforeend", "<pre id=found></pre>");
document.getElementById("found").textContent = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_a_browser_runs_the_page_with_contrast_and_names_within_a_phone(tmp_path, is_dark):
    page = tmp_path / "page.html"
    hostile = "<script>hacked=1</script>"
    text = report_html(report(title=hostile, tokens=(hostile, "b", "c")))
    page.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--virtual-time-budget=2000", "--dump-dom"]
    options += [f"--blink-settings=preferredColorScheme={0 if is_dark else 1}", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL).group(1)))
    assert found["problems"] == []
    assert (found["up"], found["down"], found["fits"], found["hacked"]) == ("8", "32", True, "undefined")
    assert found["switches"] == [True] * 5
    assert found["dark"] == is_dark
    assert found["texts"] > 100
