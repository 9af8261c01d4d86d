"""Where the dense FFNs of a model are, and what they compute."""

from .discover import Discovery as Discovery
from .discover import Refusal as Refusal
from .discover import discover as discover
from .discover import find_ffn_sites as find_ffn_sites
from .formula import ACTIVATIONS as ACTIVATIONS
from .formula import ShiftedReLU as ShiftedReLU
from .formula import ffn_dense as ffn_dense
from .formula import ffn_hidden as ffn_hidden
from .policy import check_patterns as check_patterns
from .policy import check_policy as check_policy
from .policy import matching_key as matching_key
from .policy import options_for as options_for
from .site import FFNSite as FFNSite
from .site import FFNWeights as FFNWeights
from .site import dequantize_site as dequantize_site
from .site import expert_bounds as expert_bounds
from .site import has_int8 as has_int8
from .site import in_decoder as in_decoder
from .site import mask_name as mask_name
from .site import not_plain_reason as not_plain_reason
from .site import permute_neurons as permute_neurons
from .site import quantize_site as quantize_site
from .site import site_weights as site_weights
from .site import store_by_neuron as store_by_neuron
from .site import token_mask_of as token_mask_of
