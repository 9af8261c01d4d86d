"""Which neurons form an expert: `split_neurons` and the methods in `SPLITS`.

Letters: F FFN width, K features, E experts.
"""

from typing import TypeAlias

from torch import Tensor

from .balanced_kmeans import BalancedKMeans as BalancedKMeans
from .balanced_kmeans import Clustering as Clustering
from .balanced_kmeans import balanced_kmeans as balanced_kmeans
from .balanced_kmeans import parameter_features as parameter_features
from .baseline import ContiguousSplit as ContiguousSplit
from .baseline import RandomSplit as RandomSplit
from .coactivation import Coactivation as Coactivation
from .coactivation import coactivation_features as coactivation_features
from .coactivation import graph_features as graph_features
from .coactivation import log_energy_features as log_energy_features
from .record import ExpertSplit as ExpertSplit
from .record import check_features

SplitConfig: TypeAlias = BalancedKMeans | Coactivation | RandomSplit | ContiguousSplit
"""A split method with its options; callable as ``method(features_FK, num_experts=E, warm_start=None)``."""

SPLITS: dict[str, type[BalancedKMeans] | type[Coactivation] | type[RandomSplit] | type[ContiguousSplit]] = {
    "kmeans": BalancedKMeans,
    "coactivation": Coactivation,
    "random": RandomSplit,
    "contiguous": ContiguousSplit,
}
"""Split methods by the name that configs and manifests store."""


def split_neurons(features_FK: Tensor, *, num_experts: int, method: SplitConfig, warm_start: ExpertSplit | None = None) -> ExpertSplit:
    """Partition F neurons into E experts whose sizes differ by at most one.

    Args:
        features_FK: one row a neuron, finite: `parameter_features` for "kmeans", `coactivation_features` or `graph_features` for
            "coactivation";
            the other methods take any finite tensor of F rows.
        num_experts: E, in [1, F].
        method: one of `SPLITS`.
        warm_start: where clustering begins; the result's inertia is never above that of this partition.

    Returns:
        The split; ``order_F`` is on the CPU and is what `moeify.sites.site.permute_neurons` takes.

    Raises:
        DataError: features not 2-D, empty or not finite.
        ConfigError: E out of range; a warm start of another F or E.
    """
    check_features(features_FK)
    return method(features_FK, num_experts=num_experts, warm_start=warm_start)
