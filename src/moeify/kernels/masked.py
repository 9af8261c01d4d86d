"""Every expert for every token, unselected neurons set to zero: dense GEMMs, so it wins when most experts run.

Letters: T tokens, D model width, F FFN width, E experts.
"""

from torch import Tensor
from torch.nn import functional as F

from ..sites.formula import ffn_hidden
from ..sites.site import FFNWeights
from .plan import DispatchPlan, neuron_mask, straight_through


def moe_ffn(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str) -> Tensor:
    """Dense FFN whose hidden activations are zeroed outside the selected experts.

    y = (hidden(x) where the neuron's expert is selected, else 0) @ down + down_bias

    Arguments and result as in `reference.moe_ffn`. Zeroed by selection, not by product: an overflow in an unselected neuron stays unseen.

    Cost: the dense FFN plus one pass over T*F; int8 weights are dequantised at every call. No host sync; no dependence on the mask;
    captured by torch.compile.
    """
    weights = weights.dequantized(x_TD.dtype)
    hidden_TF = ffn_hidden(x_TD, weights, activation=activation)
    if not plan.is_full and (not plan.is_countable or plan.num_pairs < plan.num_tokens * plan.num_experts):
        hidden_TF = hidden_TF.masked_fill(~neuron_mask(plan.mask_TE, weights.num_neurons), 0)
    if plan.probs_TE is not None:
        hidden_TF = hidden_TF * neuron_mask(straight_through(plan.probs_TE).to(hidden_TF.dtype), weights.num_neurons)
    return F.linear(hidden_TF, weights.down_FD.t(), weights.down_bias_D)
