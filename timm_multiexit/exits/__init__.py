"""Where a backbone is read, and the classifiers that read it."""

from timm_multiexit.exits.cost import Cost as Cost
from timm_multiexit.exits.cost import ExitCost as ExitCost
from timm_multiexit.exits.heads import HEADS as HEADS
from timm_multiexit.exits.heads import ExitHead as ExitHead
from timm_multiexit.exits.placement import place_exits as place_exits
from timm_multiexit.exits.spec import ExitSpec as ExitSpec
from timm_multiexit.exits.stages import stage_entries as stage_entries
from timm_multiexit.exits.survey import ExitPoint as ExitPoint
from timm_multiexit.exits.survey import survey_backbone as survey_backbone
from timm_multiexit.exits.taps import Taps as Taps
