"""Training: the step, the loop, and what a run keeps; `training.run` is imported apart, since it needs the trackers."""

from timm_multiexit.training.regimes import Regime as Regime
from timm_multiexit.training.task import MultiExitTask as MultiExitTask
from timm_multiexit.training.trainer import Trainer as Trainer
from timm_multiexit.training.trainer import TrainerConfig as TrainerConfig
