"""Fail if a public name has no docstring, if the docs show a command, option or file that does not exist, or a block of code that no test
can run and that does not say why. (That a public name stands on a page of the reference is checked by docs/conf.py.)

python scripts/check_docs.py
"""

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
PAGES.append(ROOT / "bench" / "paper" / "README.md")


def undocumented(path: Path) -> list[str]:
    """Public classes, functions, methods and config fields of a module that have no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    where = path.relative_to(ROOT)
    missing = [] if path.name == "__init__.py" or ast.get_docstring(tree) else [f"{where}: module"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                # An override says what it does where it is declared first; `forward`, `extra_repr` are torch's.
                if not ast.get_docstring(node) and node.name not in {"forward", "extra_repr"}:
                    missing.append(f"{where}:{node.lineno}: {prefix}{node.name}")
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            # A ClassVar, such as the name in a table, is no option that a user sets: the class's docstring speaks for it.
            is_field = isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
            if is_field and _is_config(prefix) and not _is_doc(following):
                missing.append(f"{where}:{node.lineno}: field {prefix}{ast.unparse(node.target)}")

    configs.clear()
    configs.update(n.name for n in tree.body if isinstance(n, ast.ClassDef) and any("frozen" in ast.unparse(d) for d in n.decorator_list))
    visit(tree.body, "")
    return missing


configs: set[str] = set()


def _is_config(prefix: str) -> bool:
    return prefix.rstrip(".") in {name for name in configs if name.endswith("Config")}


def _is_doc(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page, and what the page says of running it."""

    page: Path
    line: int
    """Of its first line of code."""
    language: str
    text: str
    reason: str | None
    """Why it is not run, from a comment in front of it: `<!-- not run: REASON -->`."""
    skipped: dict[str, str]
    """Why lines that begin so are not run: `<!-- not run, PREFIX: REASON -->`."""

    @property
    def where(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Its commands, continued lines joined, without comments and those that are not run."""
        lines = re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()
        found = [re.sub(r"(^|\s+)#.*$", "", line).removeprefix("$ ").strip() for line in lines]
        return [line for line in found if line and not any(line.startswith(prefix) for prefix in self.skipped)]


_NOT_RUN = re.compile(r"<!-- not run(?:, ([^:]+))?: (.+?) -->", flags=re.DOTALL)


def blocks_of(page: Path) -> list[Block]:
    """The page's fenced blocks but Sphinx's directives, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        language = match[1].strip()
        if language.startswith("{"):
            continue
        before = re.search(r"(?:<!-- not run[^>]*-->\s*)+\Z", text[: match.start()])
        marks = _NOT_RUN.findall(before[0]) if before else []
        found.append(
            Block(
                page=page,
                line=text[: match.start(2)].count("\n") + 1,
                language=language,
                text=match[2],
                reason=next((" ".join(reason.split()) for prefix, reason in marks if not prefix), None),
                skipped={prefix: " ".join(reason.split()) for prefix, reason in marks if prefix},
            )
        )
    return found


LANGUAGES = {"python", "bash", "toml", "json", "text"}
"""Of fences: the first two are run by tests/e2e/test_docs_blocks.py."""


def wrong_blocks(page: Path) -> list[str]:
    """Blocks that no test can run and that say no reason."""
    wrong = []
    for block in blocks_of(page):
        if block.language not in LANGUAGES:
            wrong.append(f"{block.where}: a fence of language '{block.language}'; use one of {', '.join(sorted(LANGUAGES))}")
        elif block.language == "python":
            try:
                compile(block.text, block.where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            except SyntaxError as error:
                wrong.append(f"{block.where}: {error}")
        elif block.language == "bash" and block.reason is None:
            wrong += [f"{block.where}: no line begins with '{p}'" for p in block.skipped if f"\n{p}" not in f"\n{block.text}"]
            wrong += [
                f"{block.where}: '{command}' is not run; say why: <!-- not run, PREFIX: REASON -->"
                for command in block.commands()
                if not command.startswith("moeify ")
            ]
    text = page.read_text(encoding="utf-8")
    marks = len(re.findall("<!-- not run", text))
    read = sum((block.reason is not None) + len(block.skipped) for block in blocks_of(page))
    if marks != read:
        wrong.append(f"{page.relative_to(ROOT)}: {marks} comments '<!-- not run', but {read} in front of blocks of code")
    indented = re.findall(r"\n\n {4}((?:moeify|pip|python|torchrun|curl|make) [^\n]*)", text)
    return wrong + [f"{page.relative_to(ROOT)}: fence the command '{command}', so that it is run" for command in indented]


def wrong_commands(page: Path) -> list[str]:
    """Commands `moeify X --option` shown in a page that the command line does not have."""
    from typer.main import get_command

    from moeify.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    wrong = []
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    for name, rest in re.findall(r"^\s*(?:\$ )?moeify ([a-z]+)\b([^\n#`]*)", text, flags=re.MULTILINE):
        if name not in commands:
            wrong.append(f"{page.relative_to(ROOT)}: no command 'moeify {name}'")
            continue
        known = {option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        wrong += [
            f"{page.relative_to(ROOT)}: 'moeify {name}' has no {o}" for o in re.findall(r"(?<!\S)(--[a-z-]+)", rest) if o not in known
        ]
    return wrong


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file does not exist."""
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    return [f"{page.relative_to(ROOT)}: link to {link}" for link in links if not (page.parent / link).exists()]


def main() -> int:
    """Print every finding; 1 if there is one."""
    found = [line for path in sorted((ROOT / "src").rglob("*.py")) for line in undocumented(path)]
    for page in PAGES:
        found += wrong_commands(page) + broken_links(page) + wrong_blocks(page)
    print("\n".join(found) or "docs: every public name is documented, every command and link exists")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
