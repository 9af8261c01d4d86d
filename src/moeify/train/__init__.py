"""Fitting and training: capture what FFNs read, fit one layer at a time, one plain loop, and what stages add to it."""

from .calibration import recalibrate as recalibrate
from .finetune import FinetuneConfig as FinetuneConfig
from .finetune import Finetuning as Finetuning
from .finetune import RouterTraining as RouterTraining
from .finetune import finetune_converted as finetune_converted
from .finetune import train_routers as train_routers
from .fit import RouterTrainConfig as RouterTrainConfig
from .regress import RegressConfig as RegressConfig
from .regress import regress_layers as regress_layers
from .selection import SelectionConfig as SelectionConfig
from .selection import SelectionTraining as SelectionTraining
