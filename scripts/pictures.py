"""Draw the pictures of docs/concepts.md and docs/ssd.md, as SVG on a ground of its own that follows the reader's light or dark.

python scripts/pictures.py          # writes docs/pictures
python scripts/pictures.py --check  # fails where a file is not what this gives
"""

import random
import sys
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
WIDTH = 480  # narrow, so that letters stay readable on a phone

STYLE = """
svg{--ground:#fff;--ink:#1f2328;--faint:#59636e;--line:#b6bec7;--rest:#e6e9ed;--on:#1f6feb;--warm:#bc4c00;--on-ink:#fff}
@media(prefers-color-scheme:dark){
svg{--ground:#16191d;--ink:#e6e8eb;--faint:#a3acb7;--line:#4a525c;--rest:#2c3239;--on:#58a6ff;--warm:#f0883e;--on-ink:#0b1016}}
text{font:14px system-ui,sans-serif;fill:var(--ink)}.s{font-size:12px;fill:var(--faint)}.m{text-anchor:middle}.e{text-anchor:end}
.b{font-weight:600}.i{fill:var(--on-ink)}.box{fill:none;stroke:var(--line);stroke-width:1.5}.rest{fill:var(--rest)}.on{fill:var(--on)}
.warm{fill:var(--warm)}.l{fill:none;stroke:var(--faint);stroke-width:1.5}.lo{fill:none;stroke:var(--on);stroke-width:2}
.lw{fill:none;stroke:var(--warm);stroke-width:2}.sel{fill:none;stroke:var(--warm);stroke-width:2}
"""


class Picture:
    """Shapes on a ground, with a title and a description for readers who do not see them."""

    def __init__(self, *, height: int, title: str, description: str) -> None:
        self.height = height
        self.parts = [f"<title>{escape(title)}</title><desc>{escape(description)}</desc><style>{STYLE.strip()}</style>"]
        self.parts.append('<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">')
        self.parts.append('<path d="M0 0 8 4 0 8z" style="fill:var(--faint)"/></marker></defs>')
        self.parts.append(f'<rect width="{WIDTH}" height="{height}" rx="8" style="fill:var(--ground)"/>')

    def text(self, x: float, y: float, words: str, style: str = "") -> None:
        """Words from x on, or around or up to it by the class in ``style``."""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(words)}</text>')

    def rect(self, x: float, y: float, width: float, height: float, style: str, *, opacity: float = 1.0, radius: float = 0) -> None:
        """A rectangle."""
        more = (f' opacity="{opacity:.2f}"' if opacity < 1 else "") + (f' rx="{radius:g}"' if radius else "")
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{style}"{more}/>')

    def path(self, d: str, style: str = "l", *, arrow: bool = False) -> None:
        """A line, with a head where it is an arrow."""
        self.parts.append(f'<path d="{d}" class="{style}"' + (' marker-end="url(#a)"' if arrow else "") + "/>")

    def svg(self) -> str:
        """The file."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img">'
        return "\n".join([head, *self.parts, "</svg>\n"])


def experts() -> str:
    """The neurons of one FFN for one token, as they are and grouped."""
    title = "A dense FFN and its experts"
    picture = Picture(
        height=262,
        title=title,
        description="Above, 32 neurons of which 9 scattered ones fire. Below, the same neurons in another order, as 8 experts of 4: the "
        "firing ones lie in three experts, and only these run.",
    )
    firing = {1, 4, 9, 12, 17, 21, 22, 27, 30}
    left, step = 24, 13.5
    picture.text(left, 30, "Dense FFN: every neuron is computed", "b")
    for i in range(32):
        picture.rect(left + step * i, 42, 10, 46, "on" if i in firing else "rest", radius=2)
    picture.text(left, 108, "of this token, 9 of 32 are not zero", "s")
    picture.path("M240 118V148", arrow=True)
    picture.text(252, 138, "neurons are permuted, nothing else", "s")
    picture.text(left, 176, "Experts: those that fire together share one", "b")
    grouped = {1: 4, 4: 3, 6: 2}
    for e in range(8):
        x = left + 54 * e
        for j in range(4):
            picture.rect(x + 12.5 * j, 192, 9.5, 38, "on" if j < grouped.get(e, 0) else "rest", radius=2)
        picture.rect(x - 3, 187, 53, 48, "sel" if e in grouped else "box", radius=4)
    picture.text(left, 252, "3 of 8 experts run: y = b + the sum of their outputs", "s")
    return picture.svg()


def dynamic_k() -> str:
    """Scores of some tokens, and which experts run by `dynk_max`."""
    tau = 0.35
    picture = Picture(
        height=262,
        title="Dynamic k",
        description="A table of five tokens by eight experts, coloured by predicted output norm. Of each token the experts above a share "
        "of its largest score run: between one and five.",
    )
    draw = random.Random(5)
    rows = {"The": 1, "heron": 5, "stood": 3, "quite": 2, "still": 4}
    left, top, size = 96, 66, 34
    picture.text(20, 28, "Router's scores: predicted output norm of each expert", "b")
    for e in range(8):
        picture.text(left + size * e + size / 2, top - 8, str(e), "s m")
    picture.text(left - 12, top - 8, "expert", "s e")
    picture.text(left + size * 8 + 14, top - 8, "k", "s")
    for t, (token, k) in enumerate(rows.items()):
        y = top + size * t
        chosen = set(draw.sample(range(8), k))
        scores = [draw.uniform(tau + 0.08, 0.95) if e in chosen else draw.uniform(0.03, tau - 0.08) for e in range(8)]
        scores[draw.choice(sorted(chosen))] = 1.0
        picture.text(left - 12, y + 22, token, "e")
        for e, score in enumerate(scores):
            picture.rect(left + size * e + 2, y + 2, size - 4, size - 4, "rest", radius=4)
            picture.rect(left + size * e + 2, y + 2, size - 4, size - 4, "on", opacity=score, radius=4)
            if score >= tau:
                picture.rect(left + size * e + 2, y + 2, size - 4, size - 4, "sel", radius=4)
        picture.text(left + size * 8 + 14, y + 22, str(k), "b")
    picture.text(20, 252, f"framed: score >= tau * the token's largest, tau = {tau}", "s")
    return picture.svg()


def pipeline() -> str:
    """From dense to sparse, step by step."""
    rows = [
        ("sparsify", "train until most activations are zero", "penalty on activations; optional"),
        ("split", "which neuron goes to which expert", "features of neurons, equal sizes"),
        ("route", "predict each expert's output norm", "a small network per layer"),
        ("select", "which experts run for this token", "rule with one knob, calibrated"),
        ("execute", "compute those experts alone", "one kernel call over a ragged plan"),
    ]
    picture = Picture(
        height=20 + 62 * len(rows),
        title="The pipeline",
        description="; ".join(f"{name}: {what}, {how}" for name, what, how in rows),
    )
    for i, (name, what, how) in enumerate(rows):
        y = 16 + 62 * i
        picture.rect(20, y, 108, 42, "on", radius=6)
        picture.text(74, y + 26, name, "b m i")
        picture.text(146, y + 18, what)
        picture.text(146, y + 36, how, "s")
        if i + 1 < len(rows):
            picture.path(f"M74 {y + 44}V{y + 60}", arrow=True)
    return picture.svg()


def ssd() -> str:
    """Phases of pre-training, with what decides about them."""
    picture = Picture(
        height=282,
        title="Phases of sparse-dense pre-training",
        description="Training begins dense, turns sparse once activation sparsity and the similarity of the pattern are high, goes in "
        "turns, and ends dense. Curves of sparsity and similarity rise above it.",
    )
    left, right, top, bottom = 24, 456, 40, 176
    phases = [(0, 0.36, "dense"), (0.36, 0.52, "sparse"), (0.52, 0.66, "dense"), (0.66, 0.84, "sparse"), (0.84, 1.0, "dense")]

    def x(share: float) -> float:
        return round(left + (right - left) * share, 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * value, 1)

    def curve(values: list[tuple[float, float]], style: str) -> None:
        (first, *rest) = values
        picture.path(f"M{x(first[0])} {y(first[1])}" + "".join(f"L{x(a)} {y(b)}" for a, b in rest), style)

    steps = [i / 40 for i in range(41)]
    curve([(s, 0.5 + 0.44 * (1 - 2.718 ** (-7 * s))) for s in steps], "lo")
    curve([(s, 0.12 + 0.8 * (1 - 2.718 ** (-6 * s))) for s in steps[2:]], "lw")
    picture.path(f"M{left} 24h18", "lo")
    picture.text(left + 24, 28, "activation sparsity", "s")
    picture.path("M182 24h18", "lw")
    picture.text(206, 28, "similarity with the last measurement", "s")
    picture.path(f"M{left} {bottom}H{right}", arrow=True)
    for start, end, mode in phases:
        width = x(end) - x(start) - 2
        picture.rect(x(start), 190, width, 34, "on" if mode == "sparse" else "rest", radius=4)
        if width > 40:
            picture.text(x(start) + width / 2, 212, mode, "m i" if mode == "sparse" else "m")
        if start:
            picture.path(f"M{x(start) - 1} {top}V188", "box")
    picture.text(left, 246, "to sparse: both are high enough; experts are grouped anew", "s")
    picture.text(left, 266, "to dense: after a tenth of all steps, or when the loss gap grows", "s")
    return picture.svg()


PICTURES = {"experts": experts, "dynamic_k": dynamic_k, "pipeline": pipeline, "ssd": ssd}


def main(arguments: list[str]) -> int:
    """Write or check all of them."""
    wrong = []
    for name, draw in PICTURES.items():
        path, text = FOLDER / f"{name}.svg", draw()
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            wrong.append(f"docs/pictures/{name}.svg is not what scripts/pictures.py draws; run it")
    print("\n".join(wrong) or "pictures: as drawn")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
