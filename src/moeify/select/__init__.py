"""Selection rules: which experts run for a token, given the router's scores."""

from typing import TypeAlias

from .dynk_mass import DynKMass as DynKMass
from .dynk_max import DynKMax as DynKMax
from .norm_budget import NormBudget as NormBudget
from .per_token import PerToken as PerToken
from .rule import Rule as Rule
from .rule import Selection as Selection
from .threshold import Threshold as Threshold
from .topk import TopK as TopK

RuleConfig: TypeAlias = TopK | DynKMax | DynKMass | NormBudget | Threshold
"""Any rule, as config dataclasses declare the field; JSON is tagged with ``name``."""

RULES: dict[str, type[Rule]] = {
    "topk": TopK,
    "dynk_max": DynKMax,
    "dynk_mass": DynKMass,
    "norm_budget": NormBudget,
    "threshold": Threshold,
}
"""Rules by the name that manifests and the command line use."""
