"""Fitting one layer at a time from captured inputs, and training whole models: one plain loop, and what stages add to it."""

from .distill import Distillation as Distillation
from .distill import DistillConfig as DistillConfig
from .loop import Part as Part
from .loop import TrainConfig as TrainConfig
from .loop import TrainingData as TrainingData
from .loop import TrainRecord as TrainRecord
from .loop import train as train
from .sparsify import Sparsification as Sparsification
from .sparsify import SparsifyConfig as SparsifyConfig
from .sparsify import sparsify as sparsify
