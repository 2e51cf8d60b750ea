"""Data sets and loaders, seeded so that a run can be resumed anywhere."""

from timm_multiexit.data.datasets import create_checked_dataset as create_checked_dataset
from timm_multiexit.data.holdout import hold_out as hold_out
from timm_multiexit.data.loaders import create_eval_loader as create_eval_loader
from timm_multiexit.data.loaders import create_train_loader as create_train_loader
from timm_multiexit.data.seeding import SeededLoader as SeededLoader
