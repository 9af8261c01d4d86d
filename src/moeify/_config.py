"""Strict frozen dataclasses <-> plain JSON values.

Every configuration of the library is a frozen, keyword-only dataclass whose fields are followed by a docstring. This module turns them into
JSON and back: an unknown key is a `ConfigError` that names the nearest known one, a wrong type names the field, nothing is guessed.

A class that stands in a table (rules, routers, split methods) has a class attribute ``name``; it is written as ``{"name": ..., fields}``
and read
with `from_tagged`.
"""

import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from .errors import ConfigError

T = TypeVar("T")

LATER: Mapping[str, Any] = {"later": True}
"""``metadata`` of a field that its class got after its JSON had become a part of names on disk: left out where it has its default, so that
what was named before is still found."""


def to_dict(config: object) -> dict[str, Any]:
    """Plain JSON value of a config dataclass; tagged with ``name`` where its class has one.

    Args:
        config: a dataclass instance whose values are JSON scalars, tuples, dicts or configs.

    Returns:
        A dict that `json.dumps` takes and `from_dict` (or `from_tagged`) turns back into an equal object.
    """
    assert dataclasses.is_dataclass(config)
    assert not isinstance(config, type)
    tag = {"name": _tag_of(type(config))} if _is_tagged(type(config)) else {}
    return tag | {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if not _is_left_out(config, f)}


def from_dict(cls: type[T], data: Mapping[str, Any], *, where: str = "") -> T:
    """Build ``cls`` from a JSON object, refusing what it does not know.

    Args:
        cls: a config dataclass.
        data: JSON object; a ``name`` key is accepted where ``cls`` is tagged and must then match.
        where: what is being read ("moeify.json: sites[3]"), put in front of an error.

    Returns:
        The config; fields that ``data`` lacks take their default.

    Raises:
        ConfigError: unknown key (names the nearest), missing field, wrong type, or a value that the class refuses.
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{prefix}{cls.__name__} must be a JSON object, got {type(data).__name__}.")
    data = dict(data)
    if _is_tagged(cls) and data.pop("name", _tag_of(cls)) != _tag_of(cls):
        raise ConfigError(f"{prefix}name must be {_tag_of(cls)!r} for {cls.__name__}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(f"{prefix}unknown option {key!r} of {cls.__name__}{did_you_mean(key, fields)}")
    hints = typing.get_type_hints(cls)
    values = {key: _typed(hints[key], value, f"{prefix}{cls.__name__}.{key}") for key, value in data.items()}
    missing = [
        n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{prefix}{cls.__name__} lacks {', '.join(map(repr, missing))}.")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise ConfigError(f"{prefix}{error}") from error


def from_tagged(table: Mapping[str, type[T]], data: Mapping[str, Any], *, where: str = "") -> T:
    """Build the class that ``data["name"]`` names in ``table``; errors as in `from_dict`."""
    prefix = f"{where}: " if where else ""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{prefix}expected a JSON object with a 'name', got {type(data).__name__}.")
    return from_dict(lookup(table, data.get("name"), where=where), data, where=where)


def lookup(table: Mapping[str, T], name: object, *, where: str = "") -> T:
    """``table[name]``, or a `ConfigError` naming the nearest key."""
    if not isinstance(name, str) or name not in table:
        prefix = f"{where}: " if where else ""
        raise ConfigError(f"{prefix}unknown name {name!r}{did_you_mean(str(name), table)}")
    return table[name]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the nearest known word, else the list of all of them."""
    known = list(known)
    if not known:
        return "; there are none."
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}."


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a config dataclass, its bases included; the command line's help text.

    Source: the attribute-docstring convention (PEP 258); read from the class's own source, once per call.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str):
                docs[field.target.id] = inspect.cleandoc(doc.value.value)
    return docs


def _is_left_out(config: Any, field: dataclasses.Field[Any]) -> bool:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "later" in field.metadata and getattr(config, field.name) == default


def _tag_of(cls: Any) -> str:
    return str(cls.name)


def _is_tagged(cls: type) -> bool:
    return isinstance(getattr(cls, "name", None), str) and "name" not in {f.name for f in dataclasses.fields(cls)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"{type(value).__name__} is not a JSON value.")


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` as ``hint`` says; scalars are checked, never converted, but for int -> float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        tagged = {_tag_of(a): a for a in options if isinstance(a, type) and dataclasses.is_dataclass(a) and _is_tagged(a)}
        if tagged and isinstance(value, Mapping):
            return from_tagged(tagged, value, where=where)
        errors = []
        for option in options:
            try:
                return _typed(option, value, where)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[0])
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}.")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}.")
        item = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        if item is None and len(args) != len(value):
            raise ConfigError(f"{where} must have {len(args)} items, got {len(value)}.")
        return tuple(_typed(item or args[i], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be an object, got {value!r}.")
        return {str(k): _typed(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where=where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where} is beyond every float.") from None
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}.")
    return value
