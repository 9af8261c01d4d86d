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


TABLES = ("moeify.select.RULES", "moeify.split.SPLITS", "moeify.routers.ROUTERS", "moeify.kernels.IMPLS", "moeify.evaluate.METRICS")
"""What people are told to extend."""
_OF_PACKAGES = {
    "baselines": "features places",
    "budget": "curves price scale search",
    "data": "batches config packed sources tokens",
    "evaluate": "analysis quality sweep",
    "export": "native_moe onnx_ffn",
    "hf": "card quantizer random registration shards skeleton streamed",
    "kernels": "cpu cpu_linear cpu_neurons cpu_op cpu_train gather gpu_ffn gpu_linear gpu_routed gradients grouped linear plan "
    "reference routed_op tiles",
    "pipeline": "builtin content convert decode harness heldout info inputs measure names panels pretrain_data pretrain_log "
    "pretrain_recipe pretrain_result project recipe reports results seed_run sparsify stages start stopping stream tasks thin timing "
    "training_cost work",
    "report": "chart html text",
    "select": "calibrate rule",
    "serving": "app rules sampling",
    "sites": "attention formula int8 linear probe projection site",
    "sparsity": "activation allocation blocks channel channel_profile inflight rotation transform",
    "split": "balanced_kmeans record",
    "ssd": "controller monitor switch",
    "train": "blockwise calibration capture distill expert_parallel fit labels layerwise loop parallel project selection shards state work",
}
INTERNAL = frozenset(f"{package}.{name}" for package, names in _OF_PACKAGES.items() for name in names.split())
"""Modules with classes or functions for other modules of moeify alone: what their package does not export stands on no page. Whoever adds a
module exports what is in it, or adds a line here."""


def told(page: Path) -> set[tuple[str, str]]:
    """Module and name of what the Python on a page imports from moeify."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    imports = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    return {(str(node.module), alias.name) for node in imports if str(node.module).startswith("moeify") for alias in node.names}


def missing(app: Sphinx, env: object) -> None:
    """A warning for every public name on no page of the reference: of a package, of a module that is not `INTERNAL`, of `TABLES`,
    or imported by the code on a page; and for a line of `INTERNAL` that is not needed."""
    del env
    documented = app.env.get_domain("py").objects  # type: ignore[attr-defined]
    shown, warn = set(), logging.getLogger(__name__).warning
    for name, entry in documented.items():
        if entry.docname.startswith("api/") and entry.objtype in ("class", "function", "exception", "data"):
            module, _, attribute = name.rpartition(".")
            shown.add(id(getattr(importlib.import_module(module), attribute)))
    folder, needed = ROOT / "src" / "moeify", set()
    for source in sorted(folder.rglob("*.py")):
        parts = source.relative_to(folder).with_suffix("").parts
        hidden = [part for part in parts if part.startswith(("_", "triton_")) and part != "__init__"]
        if parts[0] == "cli" or hidden:  # commands stand in docs/cli.md, programs of GPUs are nobody's to call
            continue
        callables = {name: obj for name, obj in public(source).items() if inspect.isclass(obj) or inspect.isfunction(obj)}
        absent = {name for name, obj in callables.items() if id(obj) not in shown}
        if (module := ".".join(parts)) in INTERNAL:
            needed |= {module} if absent else set()
            continue
        for name in sorted(absent):
            warn("%s stands on no page of docs/api", name)
    for module in sorted(INTERNAL - needed):
        warn("docs/conf.py: INTERNAL has %s, of which every name stands on a page, or which is gone", module)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for module, name in sorted(told(page)):
            obj = getattr(importlib.import_module(module), name)
            if not inspect.ismodule(obj) and id(obj) not in shown:
                warn("%s imports %s.%s, which stands on no page of docs/api", page.name, module, name)
    for table in TABLES:
        module, _, name = table.rpartition(".")
        if id(getattr(importlib.import_module(module), name)) not in shown:
            warn("%s stands on no page of docs/api", table)


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
