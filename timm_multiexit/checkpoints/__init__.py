"""Models on disk: timm folders with exits, training checkpoints, and the files of a run."""

from timm_multiexit.checkpoints.config import read_model_config as read_model_config
from timm_multiexit.checkpoints.load import load_pretrained as load_pretrained
from timm_multiexit.checkpoints.module_folder import load_exits as load_exits
from timm_multiexit.checkpoints.run_folder import RunFolder as RunFolder
from timm_multiexit.checkpoints.save import save_policy as save_policy
from timm_multiexit.checkpoints.save import save_pretrained as save_pretrained
from timm_multiexit.checkpoints.source import find_source as find_source
from timm_multiexit.checkpoints.timm_checkpoint import load_checkpoint as load_checkpoint
