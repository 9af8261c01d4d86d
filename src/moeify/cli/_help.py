"""What ``--help`` looks like: commands under headings, and lines that break between words only."""

import textwrap
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

HEADINGS: dict[str, Sequence[str]] = {
    "Look": ("doctor", "info", "profile"),
    "Make": ("thin", "sparsify", "convert", "quantize", "pretrain", "pipeline"),
    "Tune": ("sweep", "preset", "budget"),
    "Use": ("generate", "serve", "eval", "report", "export"),
    "Try": ("demo",),
}
"""Commands in the order in which somebody meets them."""

# Typer brought its own click in with 0.2x and depended on it before: its classes are reached through typer's, in both.
_BaseContext: Any = TyperCommand.context_class
_BaseFormatter: Any = _BaseContext.formatter_class


class _Formatter(_BaseFormatter):  # type: ignore[misc]
    """Click's own breaks ``--data-split`` at its hyphens."""

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 26, col_spacing: int = 2) -> None:
        rows = list(rows)
        margin = " " * self.current_indent
        first = min(max(len(term) for term, _ in rows), col_max) + col_spacing
        for term, text in rows:
            lines = _wrapped(text, self.width - self.current_indent - first)
            if len(term) + col_spacing > first:
                for i, line in enumerate(_wrapped_term(term, self.width - self.current_indent)):
                    self.write(f"{margin}{'  ' * (i > 0)}{line}\n")
            else:
                self.write(f"{margin}{term.ljust(first)}{lines.pop(0) if lines else ''}".rstrip() + "\n")
            for line in lines:
                self.write(f"{margin}{' ' * first}{line}\n")

    def write_text(self, text: str) -> None:
        margin = " " * self.current_indent
        for paragraph in text.split("\n\n"):
            self.write("".join(f"{margin}{line}\n" for line in _wrapped(paragraph, self.width - self.current_indent)))


class _Context(_BaseContext):  # type: ignore[misc]
    formatter_class = _Formatter


class Command(TyperCommand):
    """A command with such help."""

    context_class = _Context


class Group(TyperGroup):
    """The application: its commands in the order and under the headings of `HEADINGS`."""

    context_class = _Context

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands; one without a heading is the last."""
        order = [name for names in HEADINGS.values() for name in names]
        return sorted(self.commands, key=lambda name: order.index(name) if name in order else len(order))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Sections of names, each with the first sentence of what it does."""
        width = max(len(name) for name in self.commands)
        known = {name for names in HEADINGS.values() for name in names}
        for heading, names in {**HEADINGS, "Other": [name for name in self.commands if name not in known]}.items():
            if rows := [(name.ljust(width), _first_sentence(self.commands[name].help or "")) for name in names if name in self.commands]:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), max(width, 20), break_long_words=False, break_on_hyphens=False)


def _wrapped_term(term: str, width: int) -> list[str]:
    """An option and its values; where they are wider than a line, broken after a bar."""
    if len(term) <= width:
        return [term]
    lines = [""]
    for piece in term.replace("|", "|\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(piece) > width - 2:
            lines.append("")
        lines[-1] += piece
    return lines
