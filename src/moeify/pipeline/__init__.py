"""The command line's verbs as functions: source checkpoint in, converted checkpoint or measurement out.

`sparsify` trains a dense checkpoint, `convert` makes a converted one, `quantize` one with int8 weights of it, `thin` one that skips
channels or neurons, `export` what runs without moeify; `project` replaces projections before either of the first two; `stream` converts
what does not fit into memory, `work` keeps what an interrupted run has done, `heldout` measures the result, `preset` makes named
operating points, `harness` runs lm-eval, `measure` holds the other verbs, `reports` writes a report, `panels` runs a checkpoint for it,
`inputs` reads batches of each kind of model, `tasks` knows what a model is trained for, `names` knows types and devices by name, `decode`
has a checkpoint draft for itself. `recipe`, `stages`, `run_recipe` and `results` carry out whole experiments, from the model that `start`
loads or builds. `pretrain` trains a model from random weights: `pretrain_recipe` is what its file may say, `pretrain_data` what it reads,
`pretrain_log` what it tells, `pretrain_result` what it leaves, `training_cost` what it costs, `stopping` how a signal ends it.
`info` says what a checkpoint is.
"""

from ..train.calibration import TARGETS as TARGETS
from ..train.calibration import knob_table as knob_table
from .convert import CalibrationConfig as CalibrationConfig
from .convert import convert_checkpoint as convert_checkpoint
from .convert import convert_model as convert_model
from .decode import DraftedText as DraftedText
from .decode import TimedText as TimedText
from .decode import generate_text as generate_text
from .decode import speculate_text as speculate_text
from .decode import timed_text as timed_text
from .export import export_checkpoint as export_checkpoint
from .info import checkpoint_info as checkpoint_info
from .inputs import calibration_batches as calibration_batches
from .inputs import evaluation_batches as evaluation_batches
from .measure import profile_checkpoint as profile_checkpoint
from .measure import sweep_checkpoint as sweep_checkpoint
from .panels import PanelRequest as PanelRequest
from .preset import FRACTIONS as FRACTIONS
from .preset import budget_checkpoint as budget_checkpoint
from .preset import preset_checkpoint as preset_checkpoint
from .pretrain import pretrain as pretrain
from .pretrain_recipe import PretrainConfig as PretrainConfig
from .pretrain_recipe import read_pretrain as read_pretrain
from .pretrain_result import PretrainResult as PretrainResult
from .project import ProjectionsConfig as ProjectionsConfig
from .quantize import quantize_checkpoint as quantize_checkpoint
from .recipe import RecipeConfig as RecipeConfig
from .recipe import read_recipe as read_recipe
from .reports import report_checkpoint as report_checkpoint
from .run_recipe import STAGES as STAGES
from .run_recipe import run_recipe as run_recipe
from .run_recipe import run_stages as run_stages
from .sparsify import sparsify_checkpoint as sparsify_checkpoint
from .tasks import TASKS as TASKS
from .tasks import Loaded as Loaded
from .tasks import load_for_task as load_for_task
from .tasks import task_batches as task_batches
from .tasks import training_data as training_data
from .thin import METHODS as METHODS
from .thin import ChannelMethod as ChannelMethod
from .thin import NeuronConfig as NeuronConfig
from .thin import NeuronMethod as NeuronMethod
from .thin import thin_checkpoint as thin_checkpoint
from .thin import thin_model as thin_model
