"""The documentation site: ``make docs`` builds it, every warning is an error."""

import inspect
import os
import posixpath
import re
from importlib import metadata
from pathlib import Path

from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

os.environ["MPLBACKEND"] = "Agg"

project = "moeify"
author = "the moeify developers"
copyright = author
release = metadata.version("moeify")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["paper/*.json"]
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


def plain(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
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


_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):")


def _escaped(line: str) -> str:
    parts = re.split(r"(``.+?``|`[^`]+`)", line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = part if part.startswith("``") else f"`{part}`"
        else:
            parts[i] = re.sub(r"(?<=\S)_(?=\W|$)", r"\\_", re.sub(r"(?<!^)([*|])", r"\\\1", part))
    return "".join(parts)


def is_elsewhere(app: Sphinx, _what: str, _name: str, obj: object, skip: bool, _options: object) -> bool | None:
    """Every object on one page: that of its package, or, where it has none, that of ``moeify``."""
    page = app.env.docname.removeprefix("api/")
    module = getattr(obj, "__module__", None)
    if skip or not (inspect.isclass(obj) or inspect.isfunction(obj)) or not isinstance(module, str):
        return None
    package = module.split(".")[1] if module.startswith("moeify.") else None
    return package is None or page != (package if (ROOT / "docs" / "api" / f"{package}.md").exists() else "moeify")


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.add_transform(LinksOutside)
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", is_elsewhere)
