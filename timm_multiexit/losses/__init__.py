"""Multi-exit losses, who teaches, and distances between outputs."""

from timm_multiexit.losses.distances import OUTPUT_WEIGHTS as OUTPUT_WEIGHTS
from timm_multiexit.losses.multi_exit_loss import LOSSES as LOSSES
from timm_multiexit.losses.multi_exit_loss import LossTerms as LossTerms
from timm_multiexit.losses.multi_exit_loss import MultiExitLoss as MultiExitLoss
from timm_multiexit.losses.multi_exit_loss import create_loss as create_loss
from timm_multiexit.losses.teachers import DepthWeights as DepthWeights
from timm_multiexit.losses.teachers import KDConfig as KDConfig
