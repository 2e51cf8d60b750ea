"""The multi-exit model: all classifiers at once, one of them, or as many as an image needs."""

from timm_multiexit.models.attach import attach_exits as attach_exits
from timm_multiexit.models.multi_exit import MultiExitModel as MultiExitModel
from timm_multiexit.models.origin import Origin as Origin
from timm_multiexit.models.outputs import ExitOutputs as ExitOutputs
from timm_multiexit.models.truncation import TruncatedModel as TruncatedModel
from timm_multiexit.models.truncation import truncate as truncate
