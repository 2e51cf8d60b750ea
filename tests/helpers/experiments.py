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
