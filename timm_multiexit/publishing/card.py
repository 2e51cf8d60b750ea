"""The model card of a published model, made of its metrics.json alone."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from timm_multiexit.checkpoints.config import FORMAT_VERSION
from timm_multiexit.publishing.card_tables import (
    COSTS,
    describe_environment,
    describe_picture,
    describe_results,
    exit_rows,
    find_default,
    find_main,
    find_metric,
    headline,
    policy_rows,
)
from timm_multiexit.utils.errors import MultiExitError, is_number, one_line
from timm_multiexit.utils.markdown import bullets, code, escape, fence, link, number, table

TAGS = ('image-classification', 'timm', 'timm_multiexit', 'multi-exit', 'early-exit', 'anytime-inference')

REQUIRED = ('model_name', 'architecture', 'num_classes', 'input_size', 'needs_import', 'license', 'rows')

PICTURE = 'assets/accuracy_vs_macs.png'

# Metric of the rows -> how the Hub names it and its type.
_HUB_METRICS = {'top-1': ('Top-1', 'accuracy'), 'mAP': ('mAP', 'mean_average_precision')}

REPO_ID = re.compile(r'[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}', re.ASCII)

_MODEL_NAME = re.compile(rf'hf-hub:{REPO_ID.pattern}|local-dir:\w[\w ./-]*', re.ASCII)

DATASET_ID = re.compile(r'([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}', re.ASCII)

_BUDGET = re.compile(r'budget ([0-9]{1,20}(?:\.[0-9]{1,20})? ?(?:%|[kKMGT]?MACs|ms))')

_IMAGENET = re.compile(r'imagenet|in(1|12|21|22)k')

_LOSSES = {
    'eed': 'Exit-Ensemble Distillation (EED)',
    'beed': 'Exit-Ensemble Distillation by a weighted ensemble (BEED)',
    'byot': 'distillation of outputs and features from main (BYOT)',
    'phuong': 'distillation of outputs from main',
    'ce': 'cross-entropy at every classifier',
}

_ALL_EXITS = """
import timm
import torch
import timm_multiexit as tme

model = tme.create_model('NAME', pretrained=True).eval()
data_config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data_config, is_training=False)
images = torch.randn(4, SIZE)  # in place of yours: transform(pil_image).unsqueeze(0)
with torch.inference_mode():
    outputs = model(images, exits=True)  # outputs.logits: one [4, CLASSES] each, shallow to deep, main last
    early = model(images, exit_idx=0)  # [4, CLASSES] of the first exit; nothing after it is computed
for k, logits in enumerate(outputs.logits):
    print(k, logits.argmax(-1))
"""

_ANYTIME = """
import torch
import timm_multiexit as tme

model = tme.create_model('NAME', pretrained=True).eval()
images = torch.randn(4, SIZE)  # in place of yours
INFERfor k, logits in model.anytime(images):  # each exit as soon as it is known, main last
    print(k, logits.shape)  # leaving the loop stops the work
"""

_INFER = """prediction = model.infer(images, HOW)
print(prediction.logits.argmax(-1), prediction.exit_idx)  # in input order: the answer, and where each image left
"""

_PLAIN = """
import timm
import torch
IMPORT

model = timm.create_model('NAME', pretrained=True).eval()
with torch.inference_mode():
    logits = model(torch.randn(4, SIZE))  # [4, CLASSES], those of main
"""

_LIMITS = """
## Limits

- Thresholds hold for images like those they were chosen on. On others confidence drifts, and with it who leaves where,
  the cost and the accuracy: `model.calibrate` on a sample of your own.
- MACs are not time. What leaving early saves depends on batch, hardware and resolution; measure with your own.
- Networks are too sure of what they have never seen: a confident early answer is no sign of a known class.
"""

_CITATION = """
@article{lee2021students,
  title = {Students are the Best Teacher: Exit-Ensemble Distillation with Multi-Exits},
  author = {Lee, Hojung and Lee, Jong-Seok},
  journal = {arXiv preprint arXiv:2104.00299},
  year = {2021}
}

@misc{rw2019timm,
  title = {PyTorch Image Models},
  author = {Wightman, Ross},
  year = {2019},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}
"""


def write_card(metrics: Mapping[str, Any]) -> str:
    """Return the model card (README.md) that says what metrics.json has, and no more.

    Names in it are data: none of them can end a table, a block of code or the metadata.

    Args:
        metrics: Contents of metrics.json. What is missing or None is left out, but for `REQUIRED`.

    Raises:
        MultiExitError: Something required is missing or of another kind, or the format is a newer one.
    """
    _check(metrics)
    parts = [
        f'---\n{_write_metadata(metrics)}\n---',
        f'# Model card for {code(_short_name(metrics))}',
        f'{_introduce(metrics)} {headline(metrics)}',
        f'![{describe_picture(metrics)}]({PICTURE})' if metrics.get('has_picture') else '',
        *describe_results(metrics),
        *_describe_use(metrics),
        *_describe_training(metrics),
        _LIMITS.strip(),
        *_describe_license(metrics),
        '## Citation',
        fence(_CITATION, 'bibtex'),
        *_describe_files(metrics),
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def _check(metrics: Mapping[str, Any]) -> None:
    missing = [name for name in REQUIRED if metrics.get(name) is None]
    if missing:
        raise MultiExitError(f'metrics.json lacks {", ".join(missing)}: publish the model again.')
    version = metrics.get('format_version', FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise MultiExitError(
            f'metrics.json has the format {version!r}, this version reads {FORMAT_VERSION}: update timm_multiexit.'
        )
    if not isinstance(metrics['model_name'], str) or not _MODEL_NAME.fullmatch(metrics['model_name']):
        raise MultiExitError(
            f'The model is called {metrics["model_name"]!r}, allowed are names such as hf-hub:org/model and'
            ' local-dir:folder/model.'
        )
    sizes = [metrics['num_classes'], *metrics['input_size']]
    if len(sizes) != 4 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise MultiExitError(
            f'num_classes and input_size are {sizes} in metrics.json, allowed are integers from 1, three for the size.'
        )
    rows = metrics['rows']
    is_whole = all(name in row for row in rows for name in COSTS) and exit_rows(rows) and find_main(rows)
    costs = [row['GMACs fixed'] for row in (*exit_rows(rows), find_main(rows))] if is_whole else [None]
    if not all(is_number(cost) and cost > 0 for cost in costs):
        raise MultiExitError(
            f'The rows of metrics.json must be of one exit or more and of main, each with {", ".join(COSTS)}, and their'
            ' GMACs fixed above 0.'
        )
    defaults = [row['policy'] for row in metrics.get('dynamic') or () if row.get('is_default') is True]
    if len(defaults) > 1:
        raise MultiExitError(f'metrics.json has the default policies {defaults}, allowed is one: measure it again.')


def _short_name(metrics: Mapping[str, Any]) -> str:
    parts = re.split('[:/]', metrics['model_name'])
    return parts[-1] if parts[-1] != 'publication' else parts[-2]  # of a run that has the name


def _write_metadata(metrics: Mapping[str, Any]) -> str:
    """Return the YAML block, without its dashes."""
    terms, dataset = metrics['license'], metrics.get('dataset') or {}
    results = _list_results(metrics)
    base = REPO_ID.fullmatch(str(metrics.get('base_model') or ''))
    hub_id = DATASET_ID.fullmatch(str(dataset.get('hub_id') or ''))
    return ModelCardData(
        license=one_line(terms['id']),
        license_name=one_line(terms['name']) if terms.get('name') else None,
        license_link=one_line(terms['link']) if terms.get('link') else None,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=list(TAGS),
        datasets=[hub_id[0]] if hub_id else None,
        base_model=base[0] if base else None,
        base_model_relation='finetune' if base else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=_short_name(metrics) if results else None,
        eval_results=results or None,
    ).to_yaml()


def _list_results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """Return one result per classifier and per policy; none where it is not known what they are of."""
    dataset, metric = metrics.get('dataset') or {}, find_metric(metrics['rows'])
    if not dataset.get('name') or metric is None:
        return []
    name, kind = _HUB_METRICS[metric]
    titles = {'main': 'main', 'ens': 'ensemble of all exits'}
    found = []
    for row in metrics['rows']:
        exit_name = one_line(row['exit'])
        gmacs = row['GMACs sequential' if exit_name == 'ens' else 'GMACs fixed']
        title = titles.get(exit_name, f'exit {exit_name}')
        exit_idx = int(exit_name) if exit_name.isdecimal() else exit_name
        found.append((title, row.get(metric), {'exit': exit_idx, 'gmacs': gmacs}))
    for row in policy_rows(metrics) if metric == 'top-1' else ():
        policy = one_line(row['policy'])
        found.append((policy, row['top-1'], {'policy': policy, 'gmacs': row['macs'] / 1e9}))
    return [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=one_line(dataset.get('hub_id') or dataset['name']),
            dataset_name=one_line(dataset['name']),
            dataset_split=one_line(dataset['split']) if dataset.get('split') else None,
            metric_type=kind,
            metric_name=f'{name} @ {title}',
            metric_value=value,
            metric_args=args,
        )
        for title, value, args in found
        if is_number(value)
    ]


def _introduce(metrics: Mapping[str, Any]) -> str:
    """Return the sentence that says what this is."""
    count = len(exit_rows(metrics['rows']))
    dataset, training = metrics.get('dataset') or {}, metrics.get('training') or {}
    data = f' ({code(dataset["name"])})' if dataset.get('name') else ''
    text = f'An image classifier of {number(metrics["num_classes"])} classes{data}'
    text += f' with {count} early exit{"s" if count > 1 else ""} in {code(metrics["architecture"])}'
    if training.get('exit_loss'):
        text += f', trained by {_LOSSES.get(training["exit_loss"]) or code(training["exit_loss"])}'
    return f'{text}: one checkpoint that answers at {count + 1} costs with `timm_multiexit`, and a plain timm model.'


def _describe_use(metrics: Mapping[str, Any]) -> list[str]:
    """Return the section of snippets; each runs as it is printed."""
    values = {
        'NAME': metrics['model_name'],
        'SIZE': ', '.join(map(str, metrics['input_size'])),
        'CLASSES': str(metrics['num_classes']),
    }

    def fill(snippet: str) -> str:
        return fence(re.sub('|'.join(values), lambda match: values[match[0]], snippet), 'python')

    parts = ['## Use', 'All exits, and one of them:', fill(_ALL_EXITS)]
    if metrics['num_classes'] > 1:  # what the library's dynamic inference needs
        how, infer = _choose_infer(metrics)
        parts += [f'{how}ach exit as soon as it is known:', fill(_ANYTIME.replace('INFER', infer))]
    if metrics['needs_import']:
        note = (
            f'Plain timm knows {code(metrics["architecture"])} only after `import timm_multiexit`, which the snippet'
            ' that the Hub shows leaves out:'
        )
        return [*parts, note, fill(_PLAIN.replace('IMPORT', 'import timm_multiexit  # registers the architecture'))]
    return [*parts, 'The main network with timm alone:', fill(_PLAIN.replace('IMPORT\n', ''))]


def _choose_infer(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """Return the words before and the lines of `infer` that suit: by budget, by threshold, none for several labels."""
    if any('mAP' in row for row in metrics['rows']):
        return 'E', ''
    budgets = (_BUDGET.fullmatch(one_line(row['policy'])) for row in policy_rows(metrics))
    budget = next((match[1] for match in budgets if match), None)
    if budget:
        return 'By a budget, the mean cost of an image; and e', _INFER.replace('HOW', f"budget='{budget}'")
    if find_default(metrics):
        return 'By the default policy; and e', _INFER.replace(', HOW', '')
    return 'By the least confidence to leave with; and e', _INFER.replace('HOW', 'threshold=0.9')


def _describe_training(metrics: Mapping[str, Any]) -> list[str]:
    training, base = metrics.get('training') or {}, metrics.get('base_model')
    lines = [f'Started from {code(base)}.'] if base else []
    names = {'recipe': 'recipe', 'exit_loss': 'exit loss', 'epochs': 'epochs', 'seed': 'seed'}
    known = ', '.join(
        f'{title} {code(training[name])}' for name, title in names.items() if training.get(name) is not None
    )
    if training:
        lines.append(f'All arguments are in `args.yaml`{": " if known else ""}{known}.')
    environment = describe_environment(training.get('environment') or {})
    if environment:
        lines.append(f'Trained on {environment}.')
    command = fence(one_line(training['command'], limit=10_000), 'shell') if training.get('command') else ''
    return ['## Training', bullets(lines), command] if lines or command else []


def _describe_license(metrics: Mapping[str, Any]) -> list[str]:
    terms = metrics['license']
    name = link(code(terms.get('name') or terms['id']), one_line(terms.get('link') or ''))
    lines = [f'{name}. {escape(terms["note"])}' if terms.get('note') else f'{name}.']
    dataset = metrics.get('dataset') or {}
    if dataset:
        data = f' ({code(dataset["name"])})' if dataset.get('name') else ''
        lines.append(f'The data{data} have terms of their own, which this license does not replace.')
    if _IMAGENET.search(f'{metrics.get("base_model")} {dataset.get("name")} {dataset.get("hub_id")}'.lower()):
        lines.append('ImageNet is for non-commercial research; what follows for weights trained on it is not settled.')
    return ['## License', ' '.join(lines)]


def _describe_files(metrics: Mapping[str, Any]) -> list[str]:
    rows = [{'file': code(name), 'SHA-256': code(value)} for name, value in (metrics.get('weights') or {}).items()]
    return ['## Weights', table(rows, left=('file', 'SHA-256'))] if rows else []
