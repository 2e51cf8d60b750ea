#!/usr/bin/env python3
"""Write all that follows from numbers in this repository: `hub/tables.py`.

Tables of results as CSV with timm's columns (hub/results), the pages docs/zoo.md, docs/models.md and docs/cascade.md,
and of what hub/checkpoints holds the cards and results for leaderboards. --pictures draws those of cards anew,
--figures those of hub/experiments too, but for figures 1, 2 and 4, which need the runs.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'hub/experiments')]

from evidence.results import read_results  # noqa: E402

from benchmarks.zoo import format_zoo  # noqa: E402
from timm_multiexit.analysis.study import figures_of_all  # noqa: E402
from timm_multiexit.evaluation.cascade import describe_pairs  # noqa: E402
from timm_multiexit.evaluation.pictures import draw_validation  # noqa: E402
from timm_multiexit.hub_client.files import EVAL_RESULTS  # noqa: E402
from timm_multiexit.publishing.card import PICTURE, write_card, write_eval_results  # noqa: E402
from timm_multiexit.publishing.card_tables import table_networks  # noqa: E402
from timm_multiexit.publishing.results import add_row_keys, find_default, find_main, policy_rows  # noqa: E402
from timm_multiexit.utils import markdown  # noqa: E402
from timm_multiexit.utils.figures import encode_png  # noqa: E402
from timm_multiexit.utils.files import write_output, write_text  # noqa: E402

Row = Mapping[str, Any]

# timm's names, where it has one: of results/results-*.csv and results/benchmark-*.csv.
COLUMNS = (
    *('model', 'exit', 'method', 'seed', 'epochs', 'split', 'num_samples'),
    *('top1', 'top1_err', 'top5', 'top5_err', 'ece', 'param_count', 'img_size'),
    *('infer_gmacs', 'infer_gmacs_sequential', 'infer_samples_per_sec', 'infer_batch_size'),
    *('hardware', 'threads', 'versions', 'commit'),
)


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding='utf-8'))
    return content


def describe_accuracy(row: Row) -> dict[str, Any]:
    """Return the columns of accuracy and cost, given a row of results."""
    cells = {}
    for key, name in (('top1', 'top-1'), ('top5', 'top-5')):
        if row.get(name) is not None:
            cells |= {key: round(row[name], 4), f'{key}_err': round(100 - row[name], 4)}
    fixed, sequential = row.get('GMACs fixed'), row.get('GMACs sequential')
    return {
        **cells,
        'ece': None if row.get('ECE') is None else round(row['ECE'], 4),
        'param_count': row['params'] / 1e6,
        'infer_gmacs': fixed,
        'infer_gmacs_sequential': sequential,
    }


def list_experiment(result: Row) -> list[dict[str, Any]]:
    """Return the rows of a run of hub/experiments, one per classifier."""
    same = {name: result[name] for name in ('method', 'seed', 'split', 'num_samples')}
    same |= {'model': result['network'], 'epochs': result['selection']['epochs'], 'img_size': result['input_size'][-1]}
    same |= {name: result[name] for name in ('hardware', 'threads', 'versions', 'commit')}
    return [{**same, 'exit': row['exit'], **describe_accuracy(row)} for row in result['classifiers']]


def list_checkpoint(name: str, metrics: Row) -> list[dict[str, Any]]:
    """Return the rows of a network of hub/checkpoints: one per classifier, at a batch of one, and one per policy."""
    training, latency = metrics['training'], metrics.get('latency') or {'ms': {}, 'batch_size': None}
    same = {name: metrics['dataset'][name] for name in ('split', 'num_samples')}
    same |= {'model': name, 'method': training['exit_loss'], 'seed': training['seed'], 'epochs': training['epochs']}
    same |= {'img_size': metrics['input_size'][-1], **metrics['environment']}
    rows = []
    for row in metrics['rows']:
        ms = latency['ms'].get(row['exit'])
        speed = {'infer_samples_per_sec': round(1e3 / ms, 2), 'infer_batch_size': latency['batch_size']} if ms else {}
        rows.append({**same, 'exit': row['exit'], **describe_accuracy(row), **speed})
    for row in policy_rows(metrics):
        cells = {'top1': round(row['top-1'], 4), 'top1_err': round(100 - row['top-1'], 4)}
        cells |= {'infer_gmacs': row['macs'] / 1e9, 'infer_samples_per_sec': round(row['img/s'], 2)}
        rows.append({**same, 'exit': row['policy'], **cells, 'infer_batch_size': metrics['timing']['images']})
    return rows


def format_csv(rows: Iterable[Row]) -> str:
    """Return rows as CSV; a cell without a number is empty."""
    with io.StringIO(newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()


def read_checkpoints(root: Path) -> dict[str, dict[str, Any]]:
    """Return folder name -> content of metrics.json, of the networks that are shipped."""
    paths = sorted((root / 'hub/checkpoints').glob('*/metrics.json'))
    return {path.parent.name: add_row_keys(read_json(path)) for path in paths}


def format_models(checkpoints: Mapping[str, Row], sizes: Mapping[str, int]) -> str:
    """Return the page on the networks that are shipped, whose weights have so many bytes."""
    rows = []
    for name, metrics in checkpoints.items():
        main, default = find_main(metrics['rows']), find_default(metrics)
        row = {
            'network': markdown.code(name),
            'backbone': markdown.code(metrics['architecture']),
            'data': f'{markdown.escape(metrics["dataset"]["name"])}, {metrics["input_size"][-1]} px',
            'exits': str(len(metrics['rows']) - 2),
            'params of main, M': markdown.number(main['params'] / 1e6),
            'MMACs of main': markdown.number(main['GMACs fixed'] * 1e3),
            'top-1 of main': markdown.number(main['top-1'], 2),
        }
        if default:
            row |= {
                'default policy': markdown.code(default['policy']),
                'its top-1': markdown.number(default['top-1'], 2),
                'its MACs, %': markdown.number(default['macs_percent'], 1),
                'its images/s, main = 1': markdown.number(1 / default['time_ratio'], 2),
            }
        row |= {
            'weights, MB': markdown.number(sizes[name] / 1e6, 1),
            'license': markdown.code(metrics['license']['id']),
        }
        rows.append(row)
    hardware = {markdown.escape(row['environment']['hardware']) for row in checkpoints.values()}
    example = next(iter(checkpoints))
    return f"""# Models

Generated by `hub/tables.py` from the `metrics.json` of each folder; do not edit. The repository ships these
networks in `hub/checkpoints`, each with its card (`README.md`), all numbers (`metrics.json`) and the flags it was
trained with (`args.yaml`); recipes are in `hub/recipes`:

{markdown.table(rows, left=('network', 'backbone', 'data', 'default policy', 'license'))}

*Main* is the last classifier of the network, at its full cost; no plain network trained alone is meant. Images/s are
relative to main in the same rounds, above 1 is faster, on {'; '.join(sorted(hardware))}. One run each; the cards say
what chose epochs and thresholds. A row per exit and policy is in `hub/results/results-checkpoints.csv`.

```python
import timm_multiexit as tme

model = tme.create_model('local-dir:hub/checkpoints/{example}', pretrained=True).eval()
```
"""


def format_cascade(validation: Row) -> str:
    """Return the page on a network with exits beside a cascade of two plain networks and these alone."""
    cascade, timing = validation['rivals']['cascade'], validation['rivals']['timing']
    data = f'{validation["split"]} split of {markdown.escape(validation["dataset"])}'
    pairs = [
        {
            'at most, MMACs': markdown.number(pair['budget_macs'] / 1e6, 1),
            **{
                f'{name}, {label}': markdown.number(each and scale * each[key], 2 if key == 'top-1' else 1)
                for name, each in (('exits', pair['own']), ('cascade', pair['cascade']))
                for key, label, scale in (('macs', 'MMACs', 1e-6), ('top-1', 'top-1', 1))
            },
        }
        for pair in cascade['pairs'][::3]
    ]
    return f"""# Exits or a cascade

Generated by `hub/tables.py` from `hub/results/cascade.json`; do not edit. The alternative to exits is a cascade: a
small network answers first, and a larger one where the small one is unsure. The table compares `tf_efficientnet_lite2`
with exits that have learned with it; `tf_efficientnet_lite0` and `tf_efficientnet_lite2` without exits; and, where one
fits the budget, their best cascade with at most the mean MACs of each policy, on the {data},
{validation['num_samples']:,} images.
Thresholds of all were chosen on {markdown.escape(cascade['chosen_on'])}.

{table_networks(validation)}

Images/s: in turns, medians of {timing['rounds']} rounds on {markdown.escape(validation['hardware'])},
{validation['threads']}, with the [variables](infer.md#on-a-cpu-first-the-allocator) of the allocator. One run; commit
{validation['commit'][:12]}, with the recipes as they were there. {describe_pairs(cascade['pairs'])}

Every third of these budgets, which are mean MACs on the images that chose the thresholds:

{markdown.table(pairs)}

A cascade costs the small network for every image and keeps two networks in memory. The commands:

```text
for size in 0 2; do
  hub/recipes/imagenette_classifier.py tf_efficientnet_lite$size output/lite$size
  train.py --config hub/recipes/imagenette_plain.yaml --model local-dir:output/lite$size \\
    --data-dir imagenette160 --experiment lite${{size}}_plain
done
train.py --config hub/recipes/imagenette_lite0_frozen.yaml --model local-dir:output/lite2 \\
  --data-dir imagenette160 --experiment lite2_frozen
train.py --config hub/recipes/imagenette_lite0_eed.yaml --model local-dir:output/train/lite2_frozen/best \\
  --data-dir imagenette160 --experiment lite2_eed
validate.py --model local-dir:output/train/lite2_eed/best --data-dir imagenette160 --split val \\
  --calib-from-train 1000 --budget 80% 70% 60% 50% --channels-last --batch-size 64 -j 0 \\
  --compare-cascade local-dir:output/train/lite0_plain/best,local-dir:output/train/lite2_plain/best \\
  --time-batch-sizes 1 64 --time-rounds 15 --results-file hub/results/cascade.json --results-format json
```
"""


def make_tables(root: Path = ROOT) -> dict[str, str]:
    """Return path -> text of all that this writes, pictures apart."""
    checkpoints = read_checkpoints(root)
    by_data: dict[str, list[dict[str, Any]]] = {}
    for result in read_results(root / 'hub/experiments/results'):
        by_data.setdefault(result['data'], []).extend(list_experiment(result))
    by_data['checkpoints'] = [row for name, metrics in checkpoints.items() for row in list_checkpoint(name, metrics)]
    files = {f'hub/results/results-{name}.csv': format_csv(rows) for name, rows in by_data.items()}
    folders = {name: root / 'hub/checkpoints' / name for name in checkpoints}
    sizes = {
        name: sum(path.stat().st_size for path in folder.glob('*.safetensors')) for name, folder in folders.items()
    }
    files['docs/models.md'] = format_models(checkpoints, sizes)
    coverage, parity = read_json(root / 'hub/results/coverage.json'), read_json(root / 'hub/export/parity.json')
    files['docs/zoo.md'] = format_zoo(coverage, parity)
    files['docs/cascade.md'] = format_cascade(read_json(root / 'hub/results/cascade.json'))
    for name, metrics in checkpoints.items():
        files[f'hub/checkpoints/{name}/README.md'] = write_card(metrics)
        if results := write_eval_results(metrics):
            files[f'hub/checkpoints/{name}/{EVAL_RESULTS}'] = results
    return files


def draw_pictures(root: Path, *, figures: bool) -> dict[str, bytes]:
    """Return path -> PNG of the pictures of cards, and of the figures that analysis.json is enough for."""
    pictures = {}
    for name, metrics in read_checkpoints(root).items():
        dataset = metrics['dataset']
        title = f'{name}, {dataset["split"]} split, {dataset["num_samples"]} images'
        picture = draw_validation(metrics['rows'], metrics, title)
        if picture:
            pictures[f'hub/checkpoints/{name}/{PICTURE}'] = picture
    if figures:
        content = read_json(root / 'hub/experiments/figures/analysis.json')
        for name, draw in figures_of_all(content).items():
            pictures[f'hub/experiments/figures/{name}.png'] = encode_png(draw())
    return pictures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pictures', action='store_true', help='pictures of cards too')
    parser.add_argument('--figures', action='store_true', help='pictures of cards and figures of hub/experiments too')
    args = parser.parse_args(argv)
    for name, text in make_tables().items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(ROOT / name, text)
        print(name)
    if args.pictures or args.figures:
        for name, content in draw_pictures(ROOT, figures=args.figures).items():
            write_output(ROOT / name, content)
            print(name)
    return 0


if __name__ == '__main__':
    sys.exit(main())
