"""FLOPs as the authors of the paper count them, beside ours.

Letters: D model width, G neurons of an expert, E experts, F FFN width, a active fraction.
"""

from collections.abc import Sequence

from moeify.evaluate import CurvePoint
from moeify.sites import FFNSite


def authors_ffn_flops_fraction(point: CurvePoint, sites: Sequence[FFNSite], experts: Sequence[int]) -> float:
    """(experts + routers) / dense FFNs where every executed expert costs D multiply-adds more, for adding its output to the sum.

        fraction = ours + a E D / (n D F) = ours + a / (n G),    n = 2 projections (3 of a gated FFN)

    The second product of an FFN adds its experts up as it goes, so ours has no such term; the authors' implementation computes each
    expert's output by itself and combines them by another product.

    Args:
        point: with fractions as `moeify.evaluate` counts them.
        sites: the converted FFNs.
        experts: number of experts of each.

    Raises:
        ValueError: no site; or they differ in shape or experts, so that the mean active fraction does not say how many experts ran.

    Source: methods as released by the authors of arXiv 2310.04361 (their FLOPs counter counts the masked sum over experts).
    """
    if not sites or len(sites) != len(experts):
        raise ValueError(f"{len(sites)} sites and {len(experts)} numbers of experts; one of each, for at least one FFN.")
    shapes = {
        (site.d_out, site.d_ff, 3 * site.d_model if site.is_gated else 2 * site.d_model, count)
        for site, count in zip(sites, experts, strict=True)
    }
    if len(shapes) > 1:
        raise ValueError("the FFNs differ in shape or in experts; the mean active fraction does not say how many experts ran.")
    ((d_out, d_ff, weights_per_neuron, count),) = shapes
    return point.ffn_flops_fraction + point.active_fraction * count * d_out / (weights_per_neuron * d_ff)


def authors_flops_fraction(point: CurvePoint, sites: Sequence[FFNSite], experts: Sequence[int], *, ffn_share: float) -> float:
    """The same of the whole model.

    Args:
        point, sites, experts: as `authors_ffn_flops_fraction`.
        ffn_share: dense FFN FLOPs / dense FLOPs of the whole model, in (0, 1].

    Raises:
        ValueError: as there, or a share out of range.
    """
    if not 0 < ffn_share <= 1:
        raise ValueError(f"ffn_share must be in (0, 1], got {ffn_share}.")
    return point.flops_fraction + ffn_share * (authors_ffn_flops_fraction(point, sites, experts) - point.ffn_flops_fraction)


def cost_ratio(fraction: float, *, width: int, d_model: int, expansion: int = 4, expert_size: int = 1) -> float:
    """Cost of an FFN with dynamic k over the dense FFN's: k / E + W (D + E) / (2 m D^2), with E = m D / G.

    Args:
        fraction: k / E, mean executed share of the experts, in [0, 1].
        width: W of the router.
        d_model: D.
        expansion: m = F / D.
        expert_size: G.

    Source: arXiv 2310.04361, appendix B; biases are not counted.
    """
    num_experts = expansion * d_model / expert_size
    return fraction + width * (d_model + num_experts) / (2 * expansion * d_model**2)
