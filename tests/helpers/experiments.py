"""Plans and scripts of hub/experiments."""

import importlib.util
from pathlib import Path

from evidence.plan import METHODS_FILE, read_plan, read_yaml

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / 'hub/experiments'
PLANS = sorted((EXPERIMENTS / 'plans').glob('*.yaml'))
METHODS = read_yaml(EXPERIMENTS / METHODS_FILE)
SMALL = read_plan(EXPERIMENTS / 'plans/small.yaml')


def load_script(name):
    spec = importlib.util.spec_from_file_location(f'experiments_{name}', EXPERIMENTS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_result(method, seed, extra=(), **top1):
    """A result as hub/experiments/run.py writes it, of plan small."""
    run = next(run for run in SMALL.runs if (run.method, run.seed) == (method, seed))
    return {
        'format': 1,
        **{key: getattr(run, key) for key in ('name', 'protocol', 'data', 'network', 'method', 'seed', 'flags')},
        'split': 'val',
        'num_samples': 10000,
        'classifiers': [{'exit': name.strip('_'), 'top-1': value, 'ECE': 0.05} for name, value in top1.items()],
        'selection': {'by': 'top1', 'on': '5000 images held out of train', 'is_reported_split': False},
        'seconds': 600.0,
        'commit': 'abc',
        'hardware': '2 x cpu',
        'threads': '1 torch thread',
        'versions': 'torch 2',
        'extra': list(extra),
    }
