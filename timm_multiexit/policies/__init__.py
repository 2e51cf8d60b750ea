"""When to stop: criteria and thresholds on logits, and budgets."""

from timm_multiexit.policies.budgets import BudgetTable as BudgetTable
from timm_multiexit.policies.budgets import PolicyResult as PolicyResult
from timm_multiexit.policies.budgets import parse_budget as parse_budget
from timm_multiexit.policies.leaving import apply_policy as apply_policy
from timm_multiexit.policies.policy import CRITERIA as CRITERIA
from timm_multiexit.policies.policy import ExitPolicy as ExitPolicy
from timm_multiexit.policies.policy import Prediction as Prediction
