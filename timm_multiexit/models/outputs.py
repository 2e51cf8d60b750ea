"""What all classifiers of a model say, and the heads that say it."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from timm_multiexit.exits.layouts import is_distilled, main_logits
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.utils.text import format_table


class ExitOutputs(NamedTuple):
    """What all classifiers say, in one forward.

    Attributes:
        logits: One [B, C] tensor per classifier, shallow to deep, main last.
        features: One [B, D_k] tensor per classifier: what enters its linear layer.
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor, ...]


# torch.export.save writes a NamedTuple only under a registered name, for which it has no public call (torch 2.15).
_register_namedtuple(ExitOutputs, serialized_type_name='timm_multiexit.ExitOutputs')


class DistilledOutputs(NamedTuple):
    """What all classifiers say in training with `set_distilled_training(True)`.

    Attributes:
        logits: As in `ExitOutputs`; main's are the mean of its two classifiers, as timm answers outside of training.
        features: As in `ExitOutputs`.
        tokens: Two [B, C] tensors: what main's own classifier says, which learns the labels, and its second one, which
            learns from an outside teacher.
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]


def pack_outputs(
    backbone: nn.Module, output: Any, logits: Iterable[Tensor] = (), features: Iterable[Tensor] = ()
) -> ExitOutputs | DistilledOutputs:
    """Return what the classifiers say: the exits' logits, the features, and what the backbone gave for main."""
    packed = ExitOutputs((*logits, main_logits(backbone, output)), tuple(features))
    if isinstance(output, (tuple, list)) and is_distilled(backbone):
        return DistilledOutputs(*packed, tokens=tuple(output))
    return packed


class Exits(nn.ModuleList):
    """The heads of a model, shallow to deep; `str()` gives them as a table.

    Attributes:
        specs: Where each head is attached and how it was built.
    """

    def __init__(self, heads: Iterable[nn.Module] = (), specs: Sequence[ExitSpec] = ()):
        super().__init__(heads)
        self.specs = tuple(specs)

    def __str__(self) -> str:
        rows = []
        for idx, (spec, head) in enumerate(zip(self.specs, self)):
            row = {'exit': idx, 'tap': spec.module, 'channels': spec.channels, 'reduction': spec.reduction}
            row |= {'head': spec.head, 'widths': '-'.join(map(str, spec.widths))}
            rows.append(row | {'params': sum(param.numel() for param in head.parameters())})
        return format_table(rows)
