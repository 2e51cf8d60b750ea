"""Multi-exit image classifiers from any timm backbone, trained with Exit-Ensemble Distillation."""

from timm_multiexit import backbones as backbones  # registers the CIFAR networks with timm
from timm_multiexit.calibration.stage_costs import StageCosts as StageCosts
from timm_multiexit.calibration.thresholds import calibrate as calibrate
from timm_multiexit.checkpoints.module_folder import load_exits as load_exits
from timm_multiexit.checkpoints.save import save_pretrained as save_pretrained
from timm_multiexit.checkpoints.timm_checkpoint import load_checkpoint as load_checkpoint
from timm_multiexit.deploy.export import export as export
from timm_multiexit.evaluation.exit_table import ExitTable as ExitTable
from timm_multiexit.evaluation.exit_table import evaluate as evaluate
from timm_multiexit.exits.spec import ExitSpec as ExitSpec
from timm_multiexit.exits.survey import ExitPoint as ExitPoint
from timm_multiexit.factory import create_model as create_model
from timm_multiexit.factory import exit_points as exit_points
from timm_multiexit.losses.multi_exit_loss import LOSSES as LOSSES
from timm_multiexit.losses.multi_exit_loss import MultiExitLoss as MultiExitLoss
from timm_multiexit.losses.multi_exit_loss import create_loss as create_loss
from timm_multiexit.models.attach import attach_exits as attach_exits
from timm_multiexit.models.multi_exit import MultiExitModel as MultiExitModel
from timm_multiexit.models.outputs import ExitOutputs as ExitOutputs
from timm_multiexit.models.truncation import TruncatedModel as TruncatedModel
from timm_multiexit.models.truncation import truncate as truncate
from timm_multiexit.policies.budgets import BudgetTable as BudgetTable
from timm_multiexit.policies.leaving import apply_policy as apply_policy
from timm_multiexit.policies.policy import ExitPolicy as ExitPolicy
from timm_multiexit.policies.policy import Prediction as Prediction
from timm_multiexit.publishing.push import push_to_hub as push_to_hub
from timm_multiexit.training.task import MultiExitTask as MultiExitTask
from timm_multiexit.utils.errors import CheckpointError as CheckpointError
from timm_multiexit.utils.errors import HubError as HubError
from timm_multiexit.utils.errors import MultiExitError as MultiExitError
from timm_multiexit.utils.errors import StateError as StateError
from timm_multiexit.version import __version__ as __version__

__all__ = [
    'LOSSES',
    'BudgetTable',
    'CheckpointError',
    'ExitOutputs',
    'ExitPoint',
    'ExitPolicy',
    'ExitSpec',
    'ExitTable',
    'HubError',
    'MultiExitError',
    'MultiExitLoss',
    'MultiExitModel',
    'MultiExitTask',
    'Prediction',
    'StageCosts',
    'StateError',
    'TruncatedModel',
    '__version__',
    'apply_policy',
    'attach_exits',
    'backbones',
    'calibrate',
    'create_loss',
    'create_model',
    'evaluate',
    'exit_points',
    'export',
    'load_checkpoint',
    'load_exits',
    'push_to_hub',
    'save_pretrained',
    'truncate',
]
