"""The training step: all classifiers in one forward, one loss, as a timm task."""

from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_multiexit.losses import MultiExitLoss
from timm_multiexit.metrics import ExitEvaluator
from timm_multiexit.model import MultiExitModel


class MultiExitTask(TrainingTask):
    """Train a `MultiExitModel` with a `MultiExitLoss`.

    EMA, checkpoints and resume are timm's. Under `DistributedDataParallel`, and Accelerate, wrap `trainable_module`,
    not the task: its EMA copy gets no gradients.

    Args:
        model: The model to train.
        loss: What to minimise, e.g. `create_loss('eed')`.
        device: Where the loss and the evaluator live.
        dtype: Kept for timm's signature.
        verbose: Log what was set up.

    Raises:
        MultiExitError: The loss distils features and the widths of the heads do not allow it.

    >>> import torch
    >>> from timm_multiexit.attach import attach_exits
    >>> from timm_multiexit.losses import create_loss
    >>> model = attach_exits(__import__('timm').create_model('test_resnet', num_classes=10))
    >>> result = MultiExitTask(model, create_loss('eed'))(torch.randn(2, 3, 32, 32), torch.tensor([1, 7]))
    >>> result['output'].shape, len(result['logits'])
    (torch.Size([2, 10]), 4)
    """

    def __init__(
        self,
        model: MultiExitModel,
        loss: MultiExitLoss,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if loss.feature_weight > 0:
            loss.check_features(model.feature_widths())
        self.trainable_module = model
        self.loss = loss.to(self.device)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:  # noqa: A002 - timm's name
        """Run all classifiers and the loss.

        Args:
            input: Images [B, in_chans, H, W].
            target: Class indices [B] or soft targets [B, C].

        Returns:
            loss: scalar to call backward on; output: main's logits [B, C]; logits: all, shallow to deep, main last;
            and, detached and one value per classifier [K+1], the parts of the loss: task, output_distance,
            feature_distance.
        """
        outputs = self.trainable_module(input, exits=True)
        terms = self.loss.terms(outputs, target)
        return {
            'loss': terms['loss'],
            'output': outputs.logits[-1],
            'logits': outputs.logits,
            'task': terms['task'],
            'output_distance': terms['output'],
            'feature_distance': terms['feature'],
        }

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'MultiExitTask':
        """Wrap the model for distributed training without Accelerate."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the model in place, so that its keys and its type stay, and return it."""
        self.trainable_module.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the parameters to clip; without every classifier's linear layer if `exclude_head` (for agc)."""
        model = unwrap_model(self.trainable_module)
        excluded = set()
        if exclude_head:
            linears = [model.get_classifier(), *(head.fc for head in model.exits)]
            excluded = {id(param) for linear in linears for param in linear.parameters()}
        return [param for param in model.parameters() if id(param) not in excluded]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the exits, so that a checkpoint can be opened without the flags it was trained with."""
        return {'exits': [spec.to_dict() for spec in unwrap_model(self.trainable_module).exits.specs]}

    def create_evaluator(self, **kwargs: Any) -> ExitEvaluator:
        """Return an evaluator for every exit and the ensemble."""
        return ExitEvaluator(len(unwrap_model(self.trainable_module).exits), device=self.device, **kwargs)
