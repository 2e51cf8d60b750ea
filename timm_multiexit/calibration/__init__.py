"""Thresholds and temperatures from held-out logits, for a budget or a bound on the loss of accuracy."""

from timm_multiexit.calibration.logits import LogitSet as LogitSet
from timm_multiexit.calibration.logits import collect_logits as collect_logits
from timm_multiexit.calibration.meter import PolicyMeter as PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts as StageCosts
from timm_multiexit.calibration.temperature import fit_temperatures as fit_temperatures
from timm_multiexit.calibration.thresholds import calibrate as calibrate
from timm_multiexit.calibration.thresholds import search_budgets as search_budgets
from timm_multiexit.calibration.thresholds import solve_budgeted_batch as solve_budgeted_batch
