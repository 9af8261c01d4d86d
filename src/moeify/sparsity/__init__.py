"""What the neurons of a dense FFN do: activation statistics."""

from .profile import ActivationProfile as ActivationProfile
from .profile import down_norms as down_norms
from .profile import profile_activations as profile_activations
