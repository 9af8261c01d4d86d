"""FLOPs as the authors of the paper count them, beside ours.

Letters: D_out width of a layer's output, G neurons of an expert, E experts, F width, n projections of an FFN (2, of a gated one 3).
"""

from collections.abc import Collection, Mapping, Sequence

from moeify.cost import site_flops_per_token
from moeify.evaluate import CurvePoint
from moeify.sites import FFNSite


def authors_flops_fractions(
    point: CurvePoint,
    cost: Mapping[str, float],
    sites: Sequence[FFNSite],
    experts: Sequence[int],
    *,
    dense_flops: float,
    replaced: Collection[str] = (),
) -> tuple[float, float]:
    """(converted layers, whole model) over the dense model where every executed expert costs D_out multiply-adds more, for adding its
    output to the sum.

        fraction = ours + sum over kinds of e r / dense,    r = 2 E D_out / dense FLOPs of a layer = 1 / (n G) for D_out = D

    e: FLOPs of the executed experts of a kind of layer, FFNs or MLPs in the place of projections, over which r is the same. The second
    product of an FFN adds its experts up as it goes, so ours has no such term; the authors' implementation computes each expert's output
    by itself and combines them by another product.

    Args:
        point: with fractions as `moeify.evaluate` counts them.
        cost: "cost" of the point's ``curve.json``: FLOPs a token by part with every expert on.
        sites: the converted layers.
        experts: number of experts of each.
        dense_flops: of the whole model, a token.
        replaced: names of the sites that stand in the place of projections; each runs once a token.

    Raises:
        ValueError: no site; or sites of one kind differ in r, so that FLOPs of a kind do not say what its experts add.

    Source: methods as released by the authors of arXiv 2310.04361 (their FLOPs counter counts the masked sum over experts).
    """
    if not sites or len(sites) != len(experts):
        raise ValueError(f"{len(sites)} sites and {len(experts)} numbers of experts; one of each, for at least one FFN.")
    in_projections = (point.projection_flops_fraction or 0.0) * cost.get("projections_dense", 0.0)
    in_ffns = point.ffn_flops_fraction * cost["ffn_dense"] - in_projections - cost["ffn_unconverted"]
    mlps = sum(site_flops_per_token(site) for site in sites if site.name in replaced)
    executed = {False: in_ffns - cost["router"], True: in_projections - (cost.get("projections", 0.0) - mlps)}
    added = 0.0
    for is_replaced, flops in executed.items():
        of_kind = [(site, count) for site, count in zip(sites, experts, strict=True) if (site.name in replaced) is is_replaced]
        shares = {2 * count * site.d_out / site_flops_per_token(site) for site, count in of_kind}
        if len(shares) > 1:
            raise ValueError("layers of one kind differ in what their experts add; the FLOPs of all do not say what all add.")
        added += sum(shares) * flops
    return point.ffn_flops_fraction + added / cost["ffn_dense"], point.flops_fraction + added / dense_flops


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
