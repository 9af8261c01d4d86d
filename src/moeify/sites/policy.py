"""Exceptions by FFN: a mapping from site names, or ``re:`` patterns on them, to options that differ there.

An exact name wins, then the first pattern that matches all of a name.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from .. import _config
from ..errors import ConfigError
from .site import FFNSite

C = TypeVar("C")


def check_patterns(policy: Mapping[str, object]) -> None:
    """Refuse a policy one of whose keys is no regular expression behind its ``re:``."""
    for key in policy:
        if key.startswith("re:"):
            try:
                re.compile(key[3:])
            except re.error as error:
                raise ConfigError(f"policy {key!r} is not a regular expression: {error}.") from error


def check_policy(policy: Mapping[str, object], sites: Sequence[FFNSite]) -> None:
    """Refuse a policy one of whose keys matches no site; names the nearest."""
    for key in policy:
        if not any(matching_key({key: None}, site.name) for site in sites):
            raise ConfigError(f"policy {key!r} matches no FFN{_config.did_you_mean(key, [s.name for s in sites])}")


def matching_key(policy: Mapping[str, object], name: str) -> str | None:
    """The key of a policy that holds for a site; None where the policy says nothing of it."""
    return name if name in policy else next((k for k in policy if k.startswith("re:") and re.fullmatch(k[3:], name)), None)


def options_for(config: C, policy: Mapping[str, dict[str, Any] | None], name: str) -> C | None:
    """A config with its ``policy`` applied to one site; None where the policy has null for it.

    Raises:
        ConfigError: the policy's entry has an unknown option.
    """
    key = matching_key(policy, name)
    if key is None:
        return config
    change = policy[key]
    if change is None:
        return None
    base = {k: v for k, v in _config.to_dict(config).items() if k != "policy"}
    return _config.from_dict(type(config), base | change, where=f"policy[{key!r}]")
