"""The page of a text: escaped, coloured in order of cost, readable."""

import math
import re

import pytest
import torch

from moeify.errors import DataError
from moeify.evaluate import TokenCosts
from moeify.report import token_costs_html

ATTACK = '<script>alert("x")</script>'


def _costs(*shares):
    flops_LBS = torch.tensor([[shares]], dtype=torch.float64) * 10
    return TokenCosts(layers=("a",), flops_LBS=flops_LBS, dense_flops=(10.0,), router_flops=(1.0,))


def _tokens(page):
    return re.findall(r'<span style="background:(#[0-9a-f]{6})" title="(.*?)">(.*?)</span>', page, flags=re.DOTALL)


def test_tokens_are_escaped_coloured_by_cost_and_in_order(tmp_path):
    token_costs_html([ATTACK, "a&b\n", "pad", " c"], _costs(0.2, 0.6, math.nan, 0.4), tmp_path / "a.html", title=ATTACK)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 4, "title, heading, token, its row of the table"
    assert "default-src 'none'" in page, "no script runs, and nothing is fetched"
    rows = re.findall(r'<th scope="row">(\d)</th><td>(.*?)</td><td>(.*?)</td>', page)
    assert [(i, share) for i, _, share in rows] == [("0", "0.200"), ("1", "0.600"), ("2", "0.400")], "the numbers without a mouse"
    spans = _tokens(page)
    assert [title for _, title, _ in spans] == ["0: 0.200", "1: 0.600", "2: 0.400"], "padding is left out"
    assert spans[1][2] == "a&amp;b&#8629;\n"
    brightness = [sum(bytes.fromhex(color[1:])) for color, _, _ in spans]
    assert brightness[0] > brightness[2] > brightness[1], "the costliest is the darkest"
    assert all(_contrast_with_black(color) > 7 for color, _, _ in spans)


def _contrast_with_black(color):
    """WCAG 2 contrast ratio."""
    channels = [c / 255 for c in bytes.fromhex(color[1:])]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05) / 0.05


def test_equal_costs_are_one_colour(tmp_path):
    token_costs_html(["a", "b"], _costs(0.5, 0.5), tmp_path / "a.html")
    assert len({color for color, _, _ in _tokens((tmp_path / "a.html").read_text())}) == 1


def test_what_does_not_fit_or_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(DataError, match="1 tokens"):
        token_costs_html(["a"], _costs(0.5, 0.5), tmp_path / "a.html")
    with pytest.raises(DataError, match="no token to show"):
        token_costs_html(["a"], _costs(math.nan), tmp_path / "a.html")
    with pytest.raises(DataError, match="cannot write"):
        token_costs_html(["a"], _costs(0.5), tmp_path / "missing" / "a.html")
