"""Numbers of a model: accuracy and cost of every exit, what policies do, and the report on both."""

from timm_multiexit.evaluation.diagnostics import failure_auroc as failure_auroc
from timm_multiexit.evaluation.diagnostics import measure_overthinking as measure_overthinking
from timm_multiexit.evaluation.exit_table import ExitTable as ExitTable
from timm_multiexit.evaluation.exit_table import evaluate as evaluate
from timm_multiexit.evaluation.metrics import ExitEvaluator as ExitEvaluator
from timm_multiexit.evaluation.validator import Validator as Validator
