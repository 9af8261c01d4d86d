"""Copy the weights of the experts that any token needs, then a small dense FFN: decoding, where reading the weights is the cost.

Letters: T tokens, D model width, F FFN width, E experts, U neurons of the union of all tokens' experts.
"""

from torch import Tensor
from torch.nn import functional as F

from ..sites.formula import ffn_hidden
from ..sites.site import FFNWeights
from .plan import DispatchPlan, neuron_mask


def moe_ffn(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str) -> Tensor:
    """The masked FFN over the union of the tokens' experts.

    Arguments and result as in `reference.moe_ffn`.

    Cost: reads, writes and reads again U of F neurons, where the dense FFN reads F: pays below a union of about a third of the experts. Of
    int8 weights, only those U are dequantised.
    One host sync (U is data).
    """
    experts_u = plan.mask_TE.any(0).nonzero()[:, 0]
    num_neurons, num_experts = weights.num_neurons, plan.num_experts
    if num_neurons % num_experts == 0:
        blocks = (num_experts, num_neurons // num_experts)
        mask_TU = plan.mask_TE.index_select(1, experts_u).repeat_interleave(blocks[1], dim=1)
    else:
        blocks = (num_neurons, 1)
        mask_TF = neuron_mask(plan.mask_TE, num_neurons)
        experts_u = mask_TF.any(0).nonzero()[:, 0]
        mask_TU = mask_TF.index_select(1, experts_u)

    def rows(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if tensor.dim() == 2 and tensor.stride(0) == 1 and tensor.stride(1) > 1:
            # stored (D, F), as every nn.Linear down projection: copy the experts' runs along the contiguous side
            return tensor.t().view(-1, *blocks).index_select(1, experts_u).flatten(1).t()
        return tensor.view(*blocks, *tensor.shape[1:]).index_select(0, experts_u).flatten(0, 1)

    up_UD, down_UD = rows(weights.up_FD), rows(weights.down_FD)
    assert up_UD is not None and down_UD is not None
    union = FFNWeights(
        up_FD=up_UD,
        down_FD=down_UD,
        gate_FD=rows(weights.gate_FD),
        up_bias_F=rows(weights.up_bias_F),
        gate_bias_F=rows(weights.gate_bias_F),
        up_scale_F=rows(weights.up_scale_F),
        gate_scale_F=rows(weights.gate_scale_F),
        down_scale_D=weights.down_scale_D,
    ).dequantized(x_TD.dtype)
    hidden_TU = ffn_hidden(x_TD, union, activation=activation)
    if x_TD.shape[0] > 1:
        hidden_TU = hidden_TU.masked_fill(~mask_TU, 0)
    return F.linear(hidden_TU, union.down_FD.t(), weights.down_bias_D)
