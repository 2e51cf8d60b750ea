"""What can be said of timm's models without their weights: what heads cost, and which models take exits."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from timm_multiexit.checkpoints.source import find_source
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils import markdown
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.files import write_text
from timm_multiexit.utils.untrusted import read_json

POPULAR = tuple(
    """
    resnet18 resnet50 resnet10t mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_b0 efficientnet_lite0
    convnext_tiny regnety_008 densenet121 vgg19_bn ghostnet_100 repvit_m1 fastvit_t8 swin_tiny_patch4_window7_224
    vit_small_patch16_224 vit_tiny_patch16_224 deit_tiny_patch16_224 mobilevit_s hgnetv2_b0
    """.split()
)


_LINE_END = ',\n  '


def create_backbone(name: str) -> nn.Module:
    """Return a timm model, with a classifier if it has none by default."""
    find_source(name)  # says in one line what timm does not know
    backbone: nn.Module = timm.create_model(name)
    return backbone if backbone.num_classes else timm.create_model(name, num_classes=1000)


def create_empty_model(name: str) -> MultiExitModel:
    """Return a model with exits whose tensors hold no data."""
    with torch.device('meta'):
        backbone = create_backbone(name)
    return attach_exits(backbone)


def count_heads(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return for each model what its exits cost, in percent of the backbone's MACs."""
    rows = []
    for name in names:
        *costs, main_cost = create_empty_model(name).cost()
        total = main_cost.fixed.macs
        rows.append(
            {
                'model': name,
                'GMACs': total / 1e9,
                'heads, % of MACs': ' '.join(f'{100 * cost.head.macs / total:.1f}' for cost in costs),
                'fixed, % of MACs': ' '.join(f'{100 * cost.fixed.macs / total:.0f}' for cost in costs),
                'sequential, %': f'{100 * main_cost.sequential.macs / total:.1f}',
            }
        )
    return rows


def look_at_model(name: str) -> dict[str, Any]:
    """Return the row of a model: its family, what its stages give and what exits cost, or why it takes none.

    `heads` and `fixed` are the MACs of each exit's head alone, and of its answer, as shares of the backbone's.
    """
    with torch.device('meta'):
        backbone = create_backbone(name)
    row: dict[str, Any] = {'model': name, 'family': type(backbone).__name__}
    try:
        model = attach_exits(backbone)
    except MultiExitError as error:
        return row | {'reason': str(error)}
    *costs, main = model.cost()
    return row | {
        'px': model.input_size[-1],
        'layout': ' and '.join(sorted({spec.layout for spec in model.exits.specs})),
        'exits': len(costs),
        'heads': [round(cost.head.macs / main.fixed.macs, 5) for cost in costs],
        'fixed': [round(cost.fixed.macs / main.fixed.macs, 4) for cost in costs],
    }


def try_family(family: str) -> dict[str, Any]:
    """Return at which exits of a family's smallest member samples can leave the batch, found by trying."""
    from tests.helpers.families import make_small

    torch.manual_seed(0)
    model = make_small(family)
    return {
        'family': family,
        'model': model.pretrained_cfg['architecture'],
        'px': model.input_size[-1],
        'can_leave': list(model.can_leave),
    }


def measure_coverage(
    names: Sequence[str], families: Sequence[str], path: Path, *, again: bool, show: Callable[[str], None] = print
) -> dict[str, Any]:
    """Look at models and try families, write the rows as JSON to a path now and then, and return what is written.

    Rows that are in the file stay, and are not made anew unless `again`.
    """
    content: dict[str, Any] = {'models': [], 'families': []}
    if path.is_file():
        content = read_json(path)
    models = {row['model']: row for row in content['models']}
    tried = {row['family']: row for row in content['families']}

    # As each row has the commit that it was made at, the file has none.
    stamp = describe_environment() | {'timm': timm.__version__}
    described = {key: value for key, value in stamp.items() if key != 'commit'}

    def write() -> dict[str, Any]:
        rows = {'models': [models[key] for key in sorted(models)], 'families': [tried[key] for key in sorted(tried)]}
        # A row a line.
        parts = [f' {json.dumps(key)}: {json.dumps(value)}' for key, value in described.items()]
        parts += [f' "{key}": [\n  {_LINE_END.join(map(json.dumps, value))}\n ]' for key, value in rows.items()]
        write_text(path, '{\n' + ',\n'.join(parts) + '\n}\n')
        return described | rows

    names = names if again else [name for name in names if name not in models]
    families = families if again else [family for family in families if family not in tried]
    if not names and not families:
        return content
    for count, name in enumerate(names, 1):
        models[name] = look_at_model(name) | {'commit': stamp['commit']}
        if 'reason' in models[name]:
            show(f'{name}: {models[name]["reason"]}')
        if count % 50 == 0:
            write()
            show(f'{count} models')
    for family in families:
        tried[family] = try_family(family) | {'commit': stamp['commit']}
        show(f'{family}: samples can leave at {tried[family]["can_leave"]}')
    return write()


def format_zoo(coverage: dict[str, Any], parity: dict[str, Any]) -> str:
    """Return the page on timm's families, of what `coverage` and `export` of benchmark.py wrote."""
    models = {row['model']: row for row in coverage['models']}
    exported = {row['network']: row for row in parity['rows']}
    rows = []
    for tried in coverage['families']:
        row = models.get(tried['model'], {})
        rows.append(
            {
                'family': markdown.escape(tried['family']),
                'smallest model': markdown.code(tried['model']),
                'exits': str(row.get('exits', '-')),
                'stages give': row.get('layout', '-'),
                'samples can leave': _describe_leaving(tried['can_leave']),
                'exports': _describe_export(exported.get(tried['family'])),
                'heads, % of MACs': ' / '.join(f'{100 * share:.1f}' for share in row.get('heads', ())) or '-',
                'exit costs, % of MACs': ' / '.join(f'{100 * share:.0f}' for share in row.get('fixed', ())) or '-',
            }
        )
    attached = [row for row in rows if row['exits'] != '-']
    leaving = [row for row in rows if row['samples can leave'] == 'at all']
    equal = [row for row in rows if row['exports'] == 'yes']
    checked = [row for row in rows if row['exports'] != 'not tried']
    table = markdown.table(rows, left=('family', 'smallest model', 'stages give', 'samples can leave', 'exports'))
    counts = (
        f'Of {len(rows)} families {len(attached)} take exits, samples can leave the batch at all exits of'
        f' {len(leaving)}, and of {len(checked)} whose exported programs were compared {len(equal)} agree with the'
        ' model.'
    )
    commits = sorted({row['commit'] for row in (*coverage['models'], *coverage['families'])})
    refused = [row for row in coverage['models'] if 'reason' in row]
    without = ', '.join(markdown.code(row['model']) for row in refused) or 'none'
    return f"""# Families of timm

Generated by `hub/tables.py` from what `benchmark.py coverage` and `benchmark.py export` measured; do not edit.

A family is a class of timm's models, here by its smallest member, with the exits that it gets by default
(`exits='auto'`, `head='conv'`). {counts}

- *Samples can leave*: where they cannot, the backbone carries more than the tapped tensor past the exit. Answers are
  the same, and the forward stops once the whole batch has decided: a batch of one loses nothing. Tried on images of 64
  pixels, or as few as the family takes.
- *Exports*: fixed, staged and conditional ONNX programs agree with the model to {parity['limit']:g} of the largest
  logit (numbers: `hub/export/parity.md`).
- *Heads* is what the head of each exit costs, *exit costs* what its answer costs by `exit_idx`, both as shares of the
  MACs of the backbone at the image size of its weights.

Without exits, as these encoders have no classifier of which an exit could be an early answer: {without}.

timm {coverage['timm']}, torch {_find_version(coverage['versions'], 'torch')}, timm_multiexit at {', '.join(commits)}.

{table}
"""


def _find_version(versions: str, library: str) -> str:
    """Return the version of a library.

    >>> _find_version('python 3.11, torch 2.15.0', 'torch')
    '2.15.0'
    """
    return dict(part.split(' ', 1) for part in versions.split(', '))[library]


def _describe_leaving(can_leave: Sequence[bool]) -> str:
    """Return at which exits samples can leave.

    >>> _describe_leaving([True, True]), _describe_leaving([True, False]), _describe_leaving([False])
    ('at all', 'at 0', 'at none')
    """
    if all(can_leave):
        return 'at all'
    return f'at {", ".join(str(idx) for idx, can in enumerate(can_leave) if can) or "none"}'


def _describe_export(row: dict[str, Any] | None) -> str:
    if row is None:
        return 'not tried'
    return 'yes' if row['result'] == 'equal' else markdown.escape(row['result'].partition(':')[0])
