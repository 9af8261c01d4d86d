"""Recipes that moeify brings along: in the wheel beside its modules, in a clone in ``recipes``."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Where they are; the clone's folder where the modules are a clone's."""
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parents[1] / "recipes"


def recipe_names() -> tuple[str, ...]:
    """Names of all, such as "gpt_pydoc" and "pretrain/gpt"."""
    folder = recipes_folder()
    return tuple(sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.toml")))


def builtin_recipe(text: str) -> Path | None:
    """The recipe of this name, also as "recipes/gpt_pydoc.toml", the path that it has in a clone, and without "pretrain/" in front; None if
    there is none."""
    name, known = text.removeprefix("recipes/").removesuffix(".toml"), recipe_names()
    return next((recipes_folder() / f"{found}.toml" for found in (name, f"pretrain/{name}") if found in known), None)
