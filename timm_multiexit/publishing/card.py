"""The model card of a published model, made only from its metrics.json."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from timm_multiexit.checkpoints.config import FORMAT_VERSION
from timm_multiexit.publishing import card_tables, results
from timm_multiexit.publishing.results import add_row_keys, exit_rows, find_default, find_main, find_metric, policy_rows
from timm_multiexit.utils import markdown
from timm_multiexit.utils.errors import CheckpointError, is_number, one_line

TAGS = ('image-classification', 'timm', 'timm_multiexit', 'multi-exit', 'early-exit', 'anytime-inference')
REQUIRED = ('model_name', 'architecture', 'num_classes', 'input_size', 'needs_import', 'license', 'rows')
_TEMPLATE = Path(__file__).with_name('card.md.jinja')
PICTURE = 'assets/accuracy_vs_macs.png'

# Metric of the rows -> how the Hub names it and its type.
_HUB_METRICS = {'top-1': ('Top-1', 'accuracy'), 'mAP': ('mAP', 'mean_average_precision')}

REPO_ID = re.compile(r'[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}', re.ASCII)
_MODEL_NAME = re.compile(rf'hf-hub:{REPO_ID.pattern}|local-dir:\w[\w ./-]*', re.ASCII)
DATASET_ID = re.compile(r'([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}', re.ASCII)
_BUDGET = re.compile(r'[0-9]{1,20}(?:\.[0-9]{1,20})? ?(?:%|[kKMGT]?MACs|ms)')
_IMAGENET = re.compile(r'imagenet|in(1|12|21|22)k')


def write_card(metrics: Mapping[str, Any]) -> str:
    """Return the model card (README.md), which says what metrics.json says.

    Names in it are untrusted: none of them can end a table, a block of code or the metadata.

    Args:
        metrics: Contents of metrics.json. Missing or None parts are left out, except `REQUIRED` ones.

    Raises:
        CheckpointError: Something required is missing or malformed, or the format is a newer one.
    """
    metrics = add_row_keys(metrics)
    _check(metrics)
    # The template calls functions of these modules: `from_template` does not let it have filters.
    modules: dict[str, Any] = {'md': markdown, 'tables': card_tables, 'results': results}
    card = ModelCard.from_template(
        _write_metadata(metrics),
        template_path=str(_TEMPLATE),
        **modules,
        one_line=one_line,
        metrics=metrics,
        picture=PICTURE,
        short_name=_short_name(metrics),
        infer=_choose_infer(metrics),
        repo_id=_find_repo_id(metrics),
        is_imagenet=_uses_imagenet(metrics),
    )
    # Where optional parts are missing, several empty lines are left.
    return re.sub(r'\n{3,}', '\n\n', str(card)).rstrip('\n') + '\n'


def _check(metrics: Mapping[str, Any]) -> None:
    missing = [name for name in REQUIRED if metrics.get(name) is None]
    if missing:
        raise CheckpointError(f'metrics.json lacks {", ".join(missing)}: publish the model again.')
    version = metrics.get('format_version', FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f'format_version of metrics.json must be {FORMAT_VERSION}, got {version!r}: update timm_multiexit.'
        )
    if not isinstance(metrics['model_name'], str) or not _MODEL_NAME.fullmatch(metrics['model_name']):
        raise CheckpointError(
            f'Model name must have the form hf-hub:org/model or local-dir:folder/model, got {metrics["model_name"]!r}.'
        )
    sizes = [metrics['num_classes'], *metrics['input_size']]
    if len(sizes) != 4 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(
            'num_classes and input_size of metrics.json must be one and three positive integers, got'
            f' {sizes[0]!r} and {sizes[1:]!r}.'
        )
    rows = metrics['rows']
    is_complete = all(name in row for row in rows for name in card_tables.COSTS) and exit_rows(rows) and find_main(rows)
    costs = [row['GMACs fixed'] for row in (*exit_rows(rows), find_main(rows))] if is_complete else []
    if not costs or not all(is_number(cost) and cost > 0 for cost in costs):
        raise CheckpointError(
            f'rows of metrics.json must contain at least one exit and main, each with {", ".join(card_tables.COSTS)},'
            ' and GMACs fixed > 0.'
        )
    defaults = [row['policy'] for row in metrics.get('dynamic') or () if row.get('is_default') is True]
    if len(defaults) > 1:
        raise CheckpointError(f'metrics.json must have at most one default policy, got {defaults}: measure it again.')


def _short_name(metrics: Mapping[str, Any]) -> str:
    parts = re.split('[:/]', metrics['model_name'])
    return parts[-1] if parts[-1] != 'publication' else parts[-2]  # of a run that has the name


def _write_metadata(metrics: Mapping[str, Any]) -> ModelCardData:
    terms, dataset = metrics['license'], metrics.get('dataset') or {}
    found = _list_results(metrics)
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
        metrics=list(dict.fromkeys(result.metric_type for result in found)) or None,
        model_name=_short_name(metrics) if found else None,
        eval_results=found or None,
    )


def _list_results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """Return one result per classifier and per policy; none if the data set is unknown."""
    dataset, metric = metrics.get('dataset') or {}, find_metric(metrics['rows'])
    if not dataset.get('name') or metric is None:
        return []
    name, kind = _HUB_METRICS[metric]
    titles: dict[int | str, str] = {'main': 'main', 'ens': 'ensemble of all exits'}
    found = []
    for row in metrics['rows']:
        exit_idx = row['exit_idx'] if isinstance(row['exit_idx'], int) else one_line(row['exit_idx'])
        gmacs = row['GMACs sequential' if exit_idx == 'ens' else 'GMACs fixed']
        title = titles.get(exit_idx, f'exit {exit_idx}')
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


def write_eval_results(metrics: Mapping[str, Any]) -> str | None:
    """Return the results in the form of the Hub's `.eval_results/*.yaml`; None without a data set of the Hub.

    Main comes first, whose number leaderboards show; notes tell the others apart.

    Source: https://huggingface.co/docs/hub/eval-results.
    """
    metrics = add_row_keys(metrics)
    hub_id = DATASET_ID.fullmatch(str((metrics.get('dataset') or {}).get('hub_id') or ''))
    if hub_id is None:
        return None
    found = sorted(_list_results(metrics), key=lambda result: (result.metric_args or {}).get('exit') != 'main')
    note = (metrics.get('dataset') or {}).get('note')
    images = f', {one_line(note)}' if note else ''
    entries = []
    for result in found:
        gmacs = (result.metric_args or {}).get('gmacs')
        cost = f', {gmacs:.4g} GMACs' if is_number(gmacs) else ''
        split = f', {result.dataset_split} split' if result.dataset_split else ''
        notes = f'{result.metric_name}{cost}{split}{images}'
        entries.append(EvalResultEntry(hub_id[0], 'default', result.metric_value, notes=notes))
    if not entries:
        return None
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)


def _uses_imagenet(metrics: Mapping[str, Any]) -> bool:
    dataset = metrics.get('dataset') or {}
    names = f'{metrics.get("base_model")} {dataset.get("name")} {dataset.get("hub_id")}'
    return bool(_IMAGENET.search(names.lower()))


def _find_repo_id(metrics: Mapping[str, Any]) -> str | None:
    """Return the repository that the model is in; None for a folder."""
    scheme, _, name = metrics['model_name'].partition(':')
    return name if scheme == 'hf-hub' else None


class _Infer(NamedTuple):
    """How the snippets ask `infer`: a comment on it, its arguments, None without it, and the same as a flag."""

    comment: str
    arguments: str | None
    flag: str = ''


def _choose_infer(metrics: Mapping[str, Any]) -> _Infer:
    if any('mAP' in row for row in metrics['rows']):  # several labels
        return _Infer('', None, ' --all')
    budgets = (one_line(row.get('budget')) for row in policy_rows(metrics) if row['kind'] == 'budget')
    budget = next(filter(_BUDGET.fullmatch, budgets), None)
    if budget:
        return _Infer(
            'of the MACs of main, on average' if budget.endswith('%') else 'on average',
            f", budget='{budget}'",
            f" --budget '{budget}'",
        )
    if find_default(metrics):
        return _Infer('by the default policy', '')
    return _Infer('by a confidence threshold', ', threshold=0.9', ' --threshold 0.9')
