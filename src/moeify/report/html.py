"""Tokens of a text, coloured by what they cost, as one HTML page."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..evaluate import TokenCosts
from .text import token_shares

_LIGHT, _DARK = (255, 255, 229), (120, 180, 214)  # black text keeps a contrast above 9 : 1 on both
_HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
"""
_STYLE = """
:root { --paper: #ffffff; --ink: #1a1c1f; --soft: #565c64; --rule: #d5d9de; --link: #0b57a4 }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e9ebee; --soft: #a9b1ba; --rule: #3a4149; --link: #8ec2ff } }
body { background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
body { margin: 2em auto; max-width: 60em; padding: 0 1em }
h1 { font-size: 1.6rem; overflow-wrap: anywhere } :focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2; padding: 1rem; border-radius: .5rem }
.tokens { background: #fff; color: #111 }
.tokens span { padding: .15em 0; border-radius: .15em; box-shadow: inset -1px 0 #fff }
.key { color: var(--soft); font-size: 14px; line-height: 2 }
.key span { display: inline-block; color: #111; padding: 0 .6em; margin: 0 .4em .3em 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; font-weight: 400 }
td:nth-child(2) { text-align: left }
caption { color: var(--soft); text-align: left }
"""


class Markup(str):
    """Text that is markup already: templates leave it as it is (they ask for ``__html__``, so nobody needs markupsafe for it)."""

    def __html__(self) -> str:
        return self


def token_costs_html(tokens: Sequence[str], costs: TokenCosts, path: str | Path, *, title: str = "", of: str = "MoE layers") -> None:
    """Write a page with a text whose tokens are coloured by their cost in the sparse layers, and their numbers as a table.

    Args:
        tokens: the text of each position, in order; escaped here.
        costs: of one sequence of as many positions; padding is left out.
        path: .html file.
        title: above the text; escaped here.
        of: which layers the costs are of; escaped here.

    Raises:
        DataError: another number of tokens, nothing but padding, or the file cannot be written.
    """
    spans, key = tokens_html(tokens, costs)
    shown = [(token, share) for token, share in zip(tokens, token_shares(tokens, costs), strict=True) if not math.isnan(share)]
    rows = "\n".join(
        f'<tr><th scope="row">{i}</th><td>{html.escape(json.dumps(token, ensure_ascii=False))}</td><td>{share:.3f}</td></tr>'
        for i, (token, share) in enumerate(shown)
    )
    names = "".join(f'<th scope="col">{name}</th>' for name in ("position", "token", "cost over dense"))
    table = f"<table>\n<caption>Every token.</caption>\n<thead><tr>{names}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    numbers = f'<div class="scroll" tabindex="0" role="region" aria-label="Every token">\n{table}\n</div>'
    head = f"{_HEAD}<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n"
    body = f'<p class="key">FLOPs of {html.escape(of)} / dense: {key}</p>\n<p class="tokens">{spans}</p>\n'
    body += f"<details><summary>The numbers, token by token</summary>\n{numbers}\n</details>\n"
    page = f'<!doctype html>\n<html lang="en">\n{head}<h1>{html.escape(title)}</h1>\n{body}</html>\n'
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write '{path}': {error.strerror}.") from None


def tokens_html(tokens: Sequence[str], costs: TokenCosts) -> tuple[Markup, Markup]:
    """The text with each token coloured by its cost, and the key of the colours; text is escaped.

    Raises:
        DataError: another number of tokens than costs, or nothing but padding.
    """
    shares = [(token, share) for token, share in zip(tokens, token_shares(tokens, costs), strict=True) if not math.isnan(share)]
    if not shares:
        raise DataError("there is no token to show.")
    ordered = sorted(share for _, share in shares)
    # A few tokens, such as the first, cost far more than all others, which should differ in colour, too.
    cut = len(ordered) // 20
    low, high = ordered[cut], ordered[-1 - cut]
    spans = "".join(
        f'<span style="background:{_color(share, low, high)}" title="{i}: {share:.3f}">{_shown(token)}</span>'
        for i, (token, share) in enumerate(shares)
    )
    steps = [low + (high - low) * i / 4 for i in range(5)]
    signs = ["\u2264 " * (low > ordered[0]), "", "", "", "\u2265 " * (high < ordered[-1])]
    key = "".join(
        f'<span style="background:{_color(step, low, high)}">{sign}{step:.3f}</span>' for sign, step in zip(signs, steps, strict=True)
    )
    return Markup(spans), Markup(key)


def _color(share: float, low: float, high: float) -> str:
    part = min(max((share - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(_LIGHT, _DARK, strict=True))


def _shown(token: str) -> str:
    """The token escaped; a line break is seen, and breaks the line."""
    return html.escape(token).replace("\r", "").replace("\n", "&#8629;\n")
