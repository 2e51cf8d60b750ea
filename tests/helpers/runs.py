"""Small runs of train.py and validate.py."""

import json
import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import yaml
from accelerate.state import AcceleratorState

from helpers import write_images
from timm_multiexit.cli import train, validate

REPO = 'org/net'


ROOT = Path(__file__).parents[2]


FLAGS = '--model test_resnet --eed --exits 1,3 --img-size 32 -b 8 -j 0 --epochs 1 --opt adamw --lr 0.002'


PREPARATION = '--mean 0.4 0.5 0.6 --std 0.2 0.3 0.4 --crop-pct 0.9 --interpolation bicubic'


MEASURE = '-b 8 -j 0 --split validation --calib-split train --budget 90% --save-policy --time-rounds 2'


@contextmanager
def script_state(folder):
    """Gives a script the folder that it runs in, and takes back what it does to the process."""
    before, argv, handlers = os.getcwd(), sys.argv, logging.root.handlers[:]
    AcceleratorState._reset_state(reset_partial_state=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.argv = argv
        logging.disable(logging.NOTSET)
        logging.root.handlers[:] = handlers


def run_script(module, folder, *argv):
    """Run a script as a shell does, with its command line in sys.argv."""
    with script_state(folder):
        sys.argv = [str(ROOT / f'{module.__name__.rpartition(".")[2]}.py'), *map(str, argv)]
        assert module.main(sys.argv[1:]) == 0


def make_run(folder, *flags, name='run'):
    """Train on a folder of images with absolute paths on the command line, and return the run's folder."""
    images = folder / 'images' if (folder / 'images').exists() else write_images(folder / 'images')
    paths = ('--data-dir', images, '--output', folder / 'out', '--experiment', name)
    run_script(train, folder, *FLAGS.split(), *flags, *paths)
    return folder / 'out' / name


def measure_run(run, *flags):
    """Choose thresholds, save the policy and write validation.json and the picture."""
    outputs = ('--results-file', run / 'validation.json', '--results-format', 'json')
    images = run.parents[1] / 'images'
    run_script(
        validate, run, '--model', f'local-dir:{run}/best', '--data-dir', images, *MEASURE.split(), *flags, *outputs
    )
    return run


def edit(path, **values):
    """Change what a JSON or YAML file says."""
    load, dump = (json.loads, json.dumps) if path.suffix == '.json' else (yaml.safe_load, yaml.safe_dump)
    path.write_text(dump(load(path.read_text()) | values))
