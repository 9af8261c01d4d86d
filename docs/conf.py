"""The documentation site: ``make docs`` builds it, every warning is an error."""

import ast
import importlib
import inspect
import os
import posixpath
import re
import sys
from importlib import metadata
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

os.environ["MPLBACKEND"] = "Agg"

project = "moeify"
author = "the moeify developers"
copyright = author
release = metadata.version("moeify")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["paper/*.json"]
html_math_renderer = "mathml"
html_static_path = ["static"]
html_theme = "furo"
html_title = f"moeify {release}"
html_theme_options = {"navigation_with_keys": True}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # torch's own are not in its markup alone
napoleon_google_docstring = True
napoleon_use_rtype = False

ROOT = Path(__file__).resolve().parent.parent
INCLUDED = {
    "DESIGN.md": "design",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "README.md": "index",
    "bench/paper/README.md": "paper-suite",
}
"""Pages of the repository that the site shows, too, by its own names of them."""


class LinksOutside(SphinxTransform):
    """Links from a page to files of the repository: to the page that shows one, else its name alone. That each exists is checked by
    scripts/check_docs.py."""

    default_priority = 5

    def apply(self, **_: object) -> None:
        """Replace them."""
        source = next((path for path, page in INCLUDED.items() if page == self.env.docname), f"docs/{self.env.docname}")
        for node in list(self.document.findall(addnodes.pending_xref)):
            target, _, anchor = str(node["reftarget"]).partition("#")
            if node.get("refdomain") == "doc":  # a page: by its name, or by its path where it lies outside
                place = f"{target.removeprefix(f'{ROOT}/')}.md" if target.startswith(f"{ROOT}/") else f"docs/{target}.md"
            elif node.get("reftype") in ("myst", "download"):
                place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            else:
                continue
            page = INCLUDED.get(place, place.removeprefix("docs/").removesuffix(".md"))
            if page in self.env.found_docs:
                node["refdomain"], node["reftarget"] = "doc", page
                node["reftargetid"] = node.get("reftargetid") or anchor or None
            elif (ROOT / place).exists():
                node.replace_self(list(node.children))


def plain(_app: Sphinx, what: str, name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Docstrings are prose: code between backticks, lists and Google's sections are markup; what is indented by itself is a formula."""
    found: list[str] = []
    is_formula, last = False, ""
    for line in lines:
        is_indented = line.startswith("    ")
        if is_indented and found and not found[-1] and last and not last.startswith(" ") and not _SECTION.fullmatch(last):
            is_formula = True
            found += ["::", ""]
        is_formula = is_formula and (is_indented or not line)
        found.append(line if is_formula else _escaped(line))
        last = line or last
    lines[:] = found
    if what in ("attribute", "data", "property"):
        _fields[name] = found


_fields: dict[str, list[str]] = {}


def whole(_app: Sphinx, _what: str, name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Docstrings of fields as they are: napoleon takes what stands before a colon for a type."""
    if name in _fields:
        lines[:] = _fields.pop(name)


_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):")


def _escaped(line: str) -> str:
    parts = re.split(r"(``.+?``|`[^`]+`)", line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = part if part.startswith("``") else f"`{part}`"
        else:
            parts[i] = re.sub(r"(?<=\S)_(?=\W|$)", r"\\_", re.sub(r"(?<!^)([*|])", r"\\\1", part))
    return "".join(parts)


def home(obj: object) -> str | None:
    """The page of the reference on which a class or function stands: that of its package, or, where ``import moeify`` gives what the
    package does not export, that of ``moeify``; None of what is not ours."""
    module, name = getattr(obj, "__module__", None), getattr(obj, "__name__", None)
    if not (inspect.isclass(obj) or inspect.isfunction(obj)) or not isinstance(module, str) or not module.startswith("moeify."):
        return None
    package = module.split(".")[1]
    if package.startswith("_"):  # no page of its own: where it is exported
        return None
    exported = sys.modules[f"moeify.{package}"]
    is_package_s = hasattr(exported, "__path__") and getattr(exported, name or "", None) is obj
    is_top = getattr(importlib.import_module("moeify"), name or "", None) is obj and not is_package_s
    return "moeify" if is_top or not (ROOT / "docs" / "api" / f"{package}.md").exists() else package


def is_elsewhere(app: Sphinx, _what: str, _name: str, obj: object, skip: bool, _options: object) -> bool | None:
    """Every object on one page."""
    page = home(obj)
    return None if skip or page is None else app.env.docname != f"api/{page}"


def public(source: Path) -> dict[str, object]:
    """Classes and functions that a module, or a package by ``X as X``, offers, by their full names."""
    path = source.parent if source.name == "__init__.py" else source.with_suffix("")
    module = importlib.import_module(".".join(path.relative_to(ROOT / "src").parts))
    names = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname for alias in node.names if alias.asname is not None and alias.asname == alias.name}
    return {f"{module.__name__}.{name}": getattr(module, name) for name in names if not name.startswith("_")}


def missing(app: Sphinx, env: object) -> None:
    """A warning for every public name that stands on no page of the reference."""
    del env
    documented = app.env.get_domain("py").objects  # type: ignore[attr-defined]
    shown = set()
    for name, entry in documented.items():
        module, _, attribute = name.rpartition(".")
        if entry.objtype in ("class", "function", "exception") and entry.docname.startswith("api/"):
            shown.add(id(getattr(importlib.import_module(module), attribute)))
    folder = ROOT / "src" / "moeify"
    sources = [path for path in (*folder.glob("*.py"), *folder.glob("*/__init__.py")) if path.name == "__init__.py" or path.name[0] != "_"]
    for source in sorted(sources):
        if source.parent.name != "cli":  # commands, which docs/cli.md and --help describe
            for name, obj in sorted(public(source).items()):
                if (inspect.isclass(obj) or inspect.isfunction(obj)) and id(obj) not in shown:
                    logging.getLogger(__name__).warning("%s stands on no page of docs/api", name)


def show_inline(writer: object, node: nodes.math) -> None:
    """A formula as MathML, which browsers draw themselves: no script, nothing that is fetched."""
    writer.body.append(tex2mathml(node.astext(), as_block=False))  # type: ignore[attr-defined]
    raise nodes.SkipNode


def show_block(writer: object, node: nodes.math_block) -> None:
    """The same on lines of its own, wider ones to be moved on a phone."""
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')  # type: ignore[attr-defined]
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.add_transform(LinksOutside)
    app.add_html_math_renderer("mathml", (show_inline, None), (show_block, None))
    app.add_css_file("site.css")
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", whole, priority=600)  # and after
    app.connect("autodoc-skip-member", is_elsewhere)
    app.connect("env-check-consistency", missing)
