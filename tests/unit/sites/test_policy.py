"""Exceptions by site name: which key holds, what it changes, what is refused."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from moeify.errors import ConfigError
from moeify.sites import check_patterns, check_policy, matching_key, options_for


@dataclass(frozen=True, kw_only=True)
class Options:
    size: int = 8
    policy: dict[str, dict[str, Any] | None] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("name", "key"), [("layers.1.mlp", "layers.1.mlp"), ("layers.2.mlp", r"re:layers\.\d\.mlp"), ("layers.22.mlp", None), ("a", None)]
)
def test_exact_name_wins_then_the_first_pattern_that_matches_all_of_it(name, key):
    policy = {r"re:layers\.\d\.mlp": {}, r"re:layers\.[12]\.mlp": None, "layers.1.mlp": None}
    assert matching_key(policy, name) == key


def test_options_change_what_the_entry_says_or_leave_the_site_out():
    options = Options(size=4, policy={"a": {"size": 2}, "b": None, "c": {"sise": 1}})
    assert options_for(options, options.policy, "other") is options
    assert options_for(options, options.policy, "a") == Options(size=2)
    assert options_for(options, options.policy, "b") is None
    with pytest.raises(ConfigError, match=r"policy\['c'\].*'sise'.*did you mean 'size'"):
        options_for(options, options.policy, "c")


def test_policy_that_matches_nothing_or_is_no_pattern_is_refused():
    sites = [SimpleNamespace(name="layers.0.mlp")]
    check_policy({"layers.0.mlp": None, "re:.*": None}, sites)
    with pytest.raises(ConfigError, match=r"'layers\.0\.mpl' matches no FFN; did you mean 'layers\.0\.mlp'"):
        check_policy({"layers.0.mpl": None}, sites)
    check_patterns({"(": None, "re:a|b": None})
    with pytest.raises(ConfigError, match="is not a regular expression"):
        check_patterns({"re:(": None})
