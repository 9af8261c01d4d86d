"""Switchable sparse-dense pre-training (SSD): when to train dense and when sparse, and how to get from one to the other."""

from .controller import Controller as Controller
from .controller import ControllerState as ControllerState
from .controller import Decision as Decision
from .controller import Fallback as Fallback
from .controller import Signals as Signals
from .controller import SSDConfig as SSDConfig
from .controller import decide as decide
from .controller import modes as modes
from .controller import spike as spike
from .monitor import SIMILARITIES as SIMILARITIES
from .monitor import Monitor as Monitor
from .monitor import Probe as Probe
from .monitor import Similarity as Similarity
from .switch import SwitchRecord as SwitchRecord
from .switch import check_optimizer as check_optimizer
from .switch import permute_trained as permute_trained
from .training import SSD as SSD
