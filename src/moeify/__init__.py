"""Execute only the neurons a token needs: dense Transformers as dynamic-k mixtures of experts.

Importing the package registers its checkpoint format with transformers, so that ``from_pretrained`` of a converted model works; nothing
else happens.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from .channels import record_channels as record_channels
from .controls import record_active as record_active
from .controls import set_impl as set_impl
from .controls import set_mode as set_mode
from .controls import set_rule as set_rule
from .controls import store_by_shape as store_by_shape
from .controls import token_mask as token_mask
from .convert import ConvertConfig as ConvertConfig
from .convert import convert as convert
from .convert import rebuild as rebuild
from .convert import replace_projections as replace_projections
from .convert import to_dense as to_dense
from .cost import roofline_s as roofline_s
from .data import DataConfig as DataConfig
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DataError as DataError
from .errors import KernelError as KernelError
from .errors import MoeifyError as MoeifyError
from .errors import TrainingError as TrainingError
from .errors import UnsupportedModelError as UnsupportedModelError
from .evaluate import Curve as Curve
from .evaluate import accuracy as accuracy
from .evaluate import agreement as agreement
from .evaluate import measure_ms as measure_ms
from .evaluate import model_cost as model_cost
from .evaluate import model_weights as model_weights
from .evaluate import perplexity as perplexity
from .evaluate import sweep as sweep
from .hf import register as _register
from .hf.draft import self_draft as self_draft
from .hf.inputs import example_inputs as example_inputs
from .hf.load import load_model as load_model
from .hf.offload import load_offloaded as load_offloaded
from .hf.save import save_checkpoint as save_checkpoint
from .hf.speculate import Speculation as Speculation
from .hf.speculate import SpeculationCounts as SpeculationCounts
from .kernels import moe_ffn as moe_ffn
from .layers import MoEFFN as MoEFFN
from .layers import MoEProjection as MoEProjection
from .layers import moe_layers as moe_layers
from .manifest import Manifest as Manifest
from .manifest import manifest_of as manifest_of
from .manifest import set_presets as set_presets
from .manifest import stamp as stamp
from .pipeline import CalibrationConfig as CalibrationConfig
from .pipeline import ProjectionsConfig as ProjectionsConfig
from .pipeline import convert_checkpoint as convert_checkpoint
from .pipeline import convert_model as convert_model
from .pipeline import export_checkpoint as export_checkpoint
from .pipeline import generate_text as generate_text
from .pipeline import profile_checkpoint as profile_checkpoint
from .pipeline import quantize_checkpoint as quantize_checkpoint
from .pipeline import report_checkpoint as report_checkpoint
from .pipeline import speculate_text as speculate_text
from .pipeline import sweep_checkpoint as sweep_checkpoint
from .pipeline import thin_checkpoint as thin_checkpoint
from .presets import Preset as Preset
from .presets import presets as presets
from .quantize import quantize as quantize
from .select import DynKMass as DynKMass
from .select import DynKMax as DynKMax
from .select import NormBudget as NormBudget
from .select import Threshold as Threshold
from .select import TopK as TopK
from .sites import FFNSite as FFNSite
from .sites import LinearSite as LinearSite
from .sites import ProjectionMLP as ProjectionMLP
from .sites import ProjectionRecord as ProjectionRecord
from .sites import find_ffn_sites as find_ffn_sites
from .sites import find_linear_sites as find_linear_sites
from .sites import find_projections as find_projections
from .sparsity import ActivationConfig as ActivationConfig
from .sparsity import ActivationProfile as ActivationProfile
from .sparsity import EnforcementConfig as EnforcementConfig
from .sparsity import enforce_sparsity as enforce_sparsity
from .sparsity import profile_activations as profile_activations
from .sparsity import set_activation as set_activation
from .sparsity import set_mix as set_mix
from .sparsity import sparsity_loss as sparsity_loss
from .split import ExpertSplit as ExpertSplit
from .split import split_neurons as split_neurons
from .thin import ThinConfig as ThinConfig
from .thin import thin as thin
from .train import Distillation as Distillation
from .train import DistillConfig as DistillConfig
from .train import ProjectConfig as ProjectConfig
from .train import SparsifyConfig as SparsifyConfig
from .train import TrainConfig as TrainConfig
from .train import TrainRecord as TrainRecord
from .train import project_layers as project_layers
from .train import sparsify as sparsify

try:
    __version__ = _version("moeify")
except _PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"

_register()
