"""Multi-exit image classifiers from any timm backbone, trained with Exit-Ensemble Distillation."""

from timm_multiexit import backbones as backbones  # registers the CIFAR networks with timm
from timm_multiexit.attach import attach_exits as attach_exits
from timm_multiexit.attach import exit_points as exit_points
from timm_multiexit.budgets import BudgetTable as BudgetTable
from timm_multiexit.budgets import StageCosts as StageCosts
from timm_multiexit.calibration import calibrate as calibrate
from timm_multiexit.checkpoint import save_pretrained as save_pretrained
from timm_multiexit.config import ExitSpec as ExitSpec
from timm_multiexit.config import MultiExitError as MultiExitError
from timm_multiexit.factory import ExitTable as ExitTable
from timm_multiexit.factory import create_model as create_model
from timm_multiexit.factory import evaluate as evaluate
from timm_multiexit.losses import LOSSES as LOSSES
from timm_multiexit.losses import MultiExitLoss as MultiExitLoss
from timm_multiexit.losses import create_loss as create_loss
from timm_multiexit.model import ExitOutputs as ExitOutputs
from timm_multiexit.model import MultiExitModel as MultiExitModel
from timm_multiexit.policy import ExitPolicy as ExitPolicy
from timm_multiexit.policy import Prediction as Prediction
from timm_multiexit.policy import apply_policy as apply_policy
from timm_multiexit.publishing import push_to_hub as push_to_hub
from timm_multiexit.survey import ExitPoint as ExitPoint
from timm_multiexit.task import MultiExitTask as MultiExitTask
from timm_multiexit.training_checkpoint import load_checkpoint as load_checkpoint
from timm_multiexit.truncation import TruncatedModel as TruncatedModel
from timm_multiexit.truncation import truncate as truncate
