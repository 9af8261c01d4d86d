"""Fail if a public name has no docstring, or if the docs show a command, option or file that does not exist.

python scripts/check_docs.py
"""

import ast
import re
import sys
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
        found += wrong_commands(page) + broken_links(page)
    print("\n".join(found) or "docs: every public name is documented, every command and link exists")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
