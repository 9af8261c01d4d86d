"""The plainest MoE FFN: a loop over experts. The oracle of every other kernel, in fp64; also the baseline of the benchmarks.

Letters: T tokens, D model width, F FFN width, E experts, N routed pairs.
"""

from torch import Tensor

from ..sites.formula import ffn_hidden
from ..sites.site import FFNWeights, expert_bounds
from .plan import DispatchPlan, straight_through


def moe_ffn(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str) -> Tensor:
    """Sum of the selected experts' outputs, one expert after another.

    y[t] = down_bias + sum over experts e selected for t of (hidden of e's neurons at x[t]) @ (e's rows of down)

    Args:
        x_TD: any floating dtype.
        weights: canonical weights; expert e owns neurons ``expert_bounds(F, E)[e : e + 2]``. Int8 ones are what they stand for,
            ``scale * q`` in fp32, rounded to x's dtype.
        plan: routed pairs.
        activation: key of `moeify.sites.formula.ACTIVATIONS`.

    Returns:
        y_TD; a token without experts gets the output bias alone.

    Source: D2DMoE, the algorithm of Szatkowski et al. 2024 (arXiv:2310.04361, section 3.3). Differentiable in every floating input.
    Cost: one host sync for the counts; about ten small operations per expert; autograd keeps N*D inputs.
    """
    weights = weights.dequantized(x_TD.dtype)
    bounds = expert_bounds(weights.num_neurons, plan.num_experts)
    offsets = plan.offsets_E1.tolist()
    d_out = weights.down_FD.shape[1]
    y_TD = x_TD.new_zeros(x_TD.shape[0], d_out)
    if weights.down_bias_D is not None:
        y_TD += weights.down_bias_D
    for e in range(plan.num_experts):
        token_n = plan.token_N[offsets[e] : offsets[e + 1]]
        expert = expert_slice(weights, slice(bounds[e], bounds[e + 1]))
        out_nD = ffn_hidden(x_TD.index_select(0, token_n), expert, activation=activation) @ expert.down_FD
        if plan.probs_TE is not None:
            out_nD = out_nD * straight_through(plan.probs_TE[token_n, e]).to(out_nD.dtype)[:, None]
        # in place, as a plain loop would: the base is a fresh tensor, and autograd needs no version of it
        y_TD.index_add_(0, token_n, out_nD)
    return y_TD


def expert_slice(weights: FFNWeights, neurons: slice) -> FFNWeights:
    """Views of some neurons' weights, without the output bias."""
    return FFNWeights(
        up_FD=weights.up_FD[neurons],
        down_FD=weights.down_FD[neurons],
        gate_FD=None if weights.gate_FD is None else weights.gate_FD[neurons],
        up_bias_F=None if weights.up_bias_F is None else weights.up_bias_F[neurons],
        gate_bias_F=None if weights.gate_bias_F is None else weights.gate_bias_F[neurons],
    )
