"""What the neurons of a dense FFN do, and how they are made to do less: statistics, penalties, other activation functions."""

from .activation import ActivationConfig as ActivationConfig
from .activation import restore_activations as restore_activations
from .activation import set_activation as set_activation
from .activation import set_mix as set_mix
from .channel import SCORES as SCORES
from .enforce import Enforcement as Enforcement
from .enforce import EnforcementConfig as EnforcementConfig
from .enforce import enforce_sparsity as enforce_sparsity
from .losses import LOSSES as LOSSES
from .losses import displace as displace
from .losses import scheduled_weight as scheduled_weight
from .losses import sparsity_loss as sparsity_loss
from .profile import ActivationProfile as ActivationProfile
from .profile import down_norms as down_norms
from .profile import profile_activations as profile_activations
from .transform import TRANSFORMS as TRANSFORMS
