"""Fitting one layer at a time from captured inputs, and training whole models: one plain loop, and what stages add to it."""

from .calibration import recalibrate as recalibrate
from .distill import Distillation as Distillation
from .distill import DistillConfig as DistillConfig
from .finetune import FinetuneConfig as FinetuneConfig
from .finetune import Finetuning as Finetuning
from .finetune import RouterTraining as RouterTraining
from .finetune import finetune_converted as finetune_converted
from .finetune import train_routers as train_routers
from .fit import RouterTrainConfig as RouterTrainConfig
from .layerwise import LayerwiseConfig as LayerwiseConfig
from .loop import KeptPart as KeptPart
from .loop import Part as Part
from .loop import TrainConfig as TrainConfig
from .loop import TrainingData as TrainingData
from .loop import TrainRecord as TrainRecord
from .loop import train as train
from .project import ProjectConfig as ProjectConfig
from .project import project_layers as project_layers
from .regress import RegressConfig as RegressConfig
from .regress import regress_layers as regress_layers
from .selection import SelectionConfig as SelectionConfig
from .selection import SelectionTraining as SelectionTraining
from .sparsify import Sparsification as Sparsification
from .sparsify import SparsifyConfig as SparsifyConfig
from .sparsify import sparsify as sparsify
