"""hub/experiments/run.py: it does what is planned and not yet done, and survives being stopped at any moment."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from evidence.plan import read_plan
from evidence.runner import Runner, RunnerConfig
from helpers.experiments import ROOT, load_script

from timm_multiexit.utils.errors import MultiExitError

METHODS = {'plain': {}, 'ce': {'exits': '1', 'exit-loss': 'ce'}, 'eed-kl': {'exits': '1', 'exit-loss': 'eed'}}
PLAN = {
    'title': 'A test.',
    'protocol': 'tiny',
    'data': ['pets'],
    'networks': ['test_resnet'],
    'methods': ['plain', 'ce', 'eed-kl'],
    'seeds': [0, 1],
}
RECIPE = {'img_size': 32, 'batch_size': 8, 'epochs': 2}
RESULTS = {
    'rows': [{'exit': 'main', 'top-1': 50.0, 'ECE': 0.1}],
    'split': 'test',
    'num_samples': 10,
    'dataset': 'pets',
    'input_size': [3, 32, 32],
    'weights': 'abc',
    'commit': 'c',
    'versions': 'v',
    'hardware': 'h',
    'threads': 't',
    'epoch_chosen_by': 'top1',
    'epoch_chosen_on': 'validation',
    'best_epoch': 0,
    'epochs': 2,
    'is_reported_split': False,
}
# Stands for train.py: what it does is said by a file of its name beside the data.
SCRIPT = f"""
import json, os, signal, sys, time
from pathlib import Path

import yaml

def get(flag):
    return sys.argv[sys.argv.index(flag) + 1]

name, data = get('--experiment'), Path(get('--data-dir'))
folder = Path(get('--output'), name)
folder.mkdir(exist_ok=True)
with open(data / 'started', 'a') as file:
    file.write(f'{{name}} {{os.environ["OMP_NUM_THREADS"]}} {{os.getpid()}}\\n')

def stop(number, frame):
    is_second = (folder / 'saved').exists()
    (folder / 'saved').write_text('')
    if is_second or 'stubborn' not in words:
        sys.exit(128 + number)

order = data / name
words = order.read_text().split() if order.exists() else []
signal.signal(signal.SIGTERM, stop)
if 'fail' in words:
    print('a line\\ntrain.py: error: no such thing\\n')
    sys.exit(2)
while 'stubborn' in words:
    time.sleep(0.01)
while 'wait' in words and not (folder / 'saved').exists() and not (data / 'go').exists():
    time.sleep(0.01)
(folder / 'summary.csv').write_text('epoch,train_loss,eval_top1,lr\\n0,1.5,40.0,0.1\\n1,nan,50.0,0.05\\n')
flags = yaml.safe_load(Path(get('--config')).read_text())
(folder / 'trained.json').write_text(json.dumps(flags))
(folder / 'results.json').write_text(json.dumps({RESULTS!r} | {{'seed': flags['seed']}}))
print('done')
"""


@pytest.fixture(scope='module')
def run_py():
    return load_script('run')


class Bench:
    """A plan, data, and a script that stands for train.py, in a folder."""

    def __init__(self, root):
        self.root = root
        self.plan_file = root / 'hub/experiments/plans/plan.yaml'
        self.data = root / 'pets'
        self.results = root / 'results'
        for path in (self.plan_file.parent, root / 'hub/recipes', self.data):
            path.mkdir(parents=True)
        (root / 'train.py').write_text(SCRIPT)
        self.write()

    def write(self, *, table=METHODS, recipe=RECIPE, **changes):
        (self.root / 'hub/experiments/methods.yaml').write_text(yaml.safe_dump(table))
        (self.root / 'hub/recipes/tiny.yaml').write_text(yaml.safe_dump(recipe))
        self.plan_file.write_text(yaml.safe_dump(PLAN | changes))

    def order(self, method, seed, word):
        (self.data / f'tiny-pets-test_resnet-{method}-s{seed}').write_text(word)

    def runner(self, lines=None, **changes):
        config = dict(data_dir=self.root, output=self.root / 'out', results=self.results, script=self.root / 'train.py')
        say = print if lines is None else lines.append
        return Runner(read_plan(self.plan_file).runs, RunnerConfig(**(config | changes)), say)

    def started(self):
        """Method and seed of every start, in order."""
        path = self.data / 'started'
        names = [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []
        return [name.removeprefix('tiny-pets-test_resnet-').replace('-s', ' ') for name in names]

    def done(self):
        return sorted(path.stem.removeprefix('tiny-pets-test_resnet-') for path in self.results.glob('*.json'))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it never came'
        time.sleep(0.01)


def when(condition, action):
    """Do something in the background as soon as a condition holds."""
    thread = threading.Thread(target=lambda: (wait_for(condition), action()), daemon=True)
    thread.start()
    return thread


ALL = ['plain 0', 'ce 0', 'eed-kl 0', 'plain 1', 'ce 1', 'eed-kl 1']


# Order and what is done


def test_all_methods_of_a_seed_come_before_the_next_seed_one_at_a_time(bench):
    assert bench.runner().work() == 0
    assert bench.started() == ALL
    assert len(bench.done()) == 6
    assert {line.split()[1] for line in (bench.data / 'started').read_text().splitlines()} == {'1'}


def test_what_has_results_is_not_started_again(bench):
    bench.runner().work()
    (bench.results / 'tiny-pets-test_resnet-ce-s1.json').unlink()
    (bench.root / 'out/tiny-pets-test_resnet-ce-s1/results.json').unlink()
    (bench.data / 'started').unlink()
    assert bench.runner(threads=2).work() == 0
    assert bench.started() == ['ce 1']
    assert (bench.data / 'started').read_text().split()[1] == '2'


def test_as_many_run_at_a_time_as_jobs(bench):
    for method in METHODS:
        for seed in (0, 1):
            bench.order(method, seed, 'wait')
    runner = bench.runner(jobs=2)
    seen = []
    when(lambda: len(bench.started()) == 2, lambda: (time.sleep(0.5), seen.append(len(bench.started())), _go(bench)))
    assert runner.work() == 0
    assert seen == [2]
    assert sorted(bench.started()) == sorted(ALL)


def _go(bench):
    (bench.data / 'go').write_text('')


def test_failed_run_is_reported_with_its_last_line_and_the_others_go_on(bench):
    bench.order('ce', 0, 'fail')
    lines = []
    runner = bench.runner(lines)
    assert runner.work() == 1
    assert runner.failed == ['tiny-pets-test_resnet-ce-s0']
    assert [line for line in lines if 'FAILED' in line] == [
        'tiny-pets-test_resnet-ce-s0: FAILED, exit code 2: train.py: error: no such thing'
    ]
    assert len(bench.done()) == 5
    bench.order('ce', 0, '')
    assert bench.runner().work() == 0
    assert bench.started()[6:] == ['ce 0']


# Being stopped


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_the_runs_save_and_the_next_start_goes_on(bench, number):
    bench.order('ce', 0, 'wait')
    lines = []
    before = signal.getsignal(number)
    when(lambda: 'ce 0' in bench.started() and _catches(bench), lambda: os.kill(os.getpid(), number))
    assert bench.runner(lines).work() == 128 + number
    assert signal.getsignal(number) is before
    assert lines[-1] == 'tiny-pets-test_resnet-ce-s0: stopped'
    assert (bench.root / 'out/tiny-pets-test_resnet-ce-s0/saved').exists()
    assert bench.done() == ['plain-s0']
    assert bench.runner().work() == 0
    assert bench.started() == ['plain 0', 'ce 0', *ALL[1:]]
    assert len(bench.done()) == 6


def test_signal_during_a_start_reaches_what_was_started_and_starts_no_more(bench, monkeypatch):
    for method in METHODS:
        bench.order(method, 0, 'wait')
    original = subprocess.Popen

    def start(*args, **kwargs):
        process = original(*args, **kwargs)
        wait_for(lambda: bench.started() and _catches(bench))
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, 'Popen', start)
    assert bench.runner(jobs=3).work() == 128 + signal.SIGTERM
    assert bench.started() == ['plain 0']


def _catches(bench):
    """Whether the last process that was started has got so far that it catches SIGTERM."""
    pid = (bench.data / 'started').read_text().split()[-1]
    caught = next(line for line in Path(f'/proc/{pid}/status').read_text().splitlines() if line.startswith('SigCgt'))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGTERM - 1))


def test_killed_runners_run_goes_on_and_the_next_runner_takes_what_it_leaves(bench):
    bench.order('plain', 0, 'wait')
    process = multiprocessing.get_context('fork').Process(target=bench.runner().work)
    process.start()
    wait_for(lambda: bench.started() == ['plain 0'])
    wait_for(lambda: (bench.root / 'out/tiny-pets-test_resnet-plain-s0.json').exists())
    process.kill()
    process.join()
    bench.write(methods=['ce', 'eed-kl', 'plain'])  # it is the third now
    when(lambda: len(bench.started()) == 5, lambda: (time.sleep(1.5), _go(bench)))
    assert bench.runner().work() == 0
    assert bench.started()[:5] == ['plain 0', 'ce 0', 'eed-kl 0', 'ce 1', 'eed-kl 1'], 'all others meanwhile'
    assert sorted(bench.started()) == sorted(ALL), 'each once'
    assert len(bench.done()) == 6
    result = json.loads((bench.results / 'tiny-pets-test_resnet-plain-s0.json').read_text())
    assert 1.5 < result['seconds'] < 15, 'the time without a runner counts'


def test_second_signal_ends_runs_that_do_not_stop(bench):
    bench.write(methods=['plain'], seeds=[0])
    bench.order('plain', 0, 'stubborn')
    when(lambda: bench.started() and _catches(bench), lambda: os.kill(os.getpid(), signal.SIGTERM))
    saved = bench.root / 'out/tiny-pets-test_resnet-plain-s0/saved'
    when(saved.exists, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert bench.runner().work() == 128 + signal.SIGINT


def test_two_runners_share_a_folder_and_do_every_run_once(bench):
    process = multiprocessing.get_context('fork').Process(target=bench.runner().work)
    process.start()
    assert bench.runner().work() == 0
    process.join()
    assert process.exitcode == 0
    assert sorted(bench.started()) == sorted(ALL)
    assert len(bench.done()) == 6


def test_time_of_all_starts_is_added_up(bench):
    bench.write(methods=['plain'], seeds=[0])
    bench.order('plain', 0, 'wait')
    when(lambda: bench.started() and _catches(bench), lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGTERM)))
    bench.runner().work()
    notes = bench.root / 'out/tiny-pets-test_resnet-plain-s0.json'
    first = json.loads(notes.read_text())['seconds']
    assert 0.5 <= first < 5
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {'seconds': 100.0}))
    bench.runner().work()
    result = json.loads((bench.results / 'tiny-pets-test_resnet-plain-s0.json').read_text())
    assert 100.0 < result['seconds'] < 105


# What is refused


def test_results_of_another_recipe_are_not_taken_for_the_plans(bench):
    bench.runner().work()
    bench.write(recipe=RECIPE | {'epochs': 3})
    with pytest.raises(MultiExitError, match=r'plain-s0.json was made with epochs 2, the plan says 3. Remove it'):
        bench.runner()


def test_a_run_begun_with_other_flags_fails_and_is_not_resumed(bench):
    bench.order('plain', 0, 'wait')
    when(lambda: bench.started() and _catches(bench), lambda: os.kill(os.getpid(), signal.SIGTERM))
    bench.runner().work()
    bench.write(recipe=RECIPE | {'lr': 0.5})
    lines = []
    assert bench.runner(lines).work() == 1
    assert 'was made with lr None, the plan says 0.5' in lines[0]
    assert bench.started() == ['plain 0', *ALL[1:]]


def test_a_run_begun_with_other_extra_flags_fails(bench):
    bench.order('plain', 0, 'wait')
    when(lambda: bench.started() and _catches(bench), lambda: os.kill(os.getpid(), signal.SIGTERM))
    bench.runner().work()
    lines = []
    assert bench.runner(lines, extra=('--amp',)).work() == 1
    assert "was made with the extra flags [], now they are ['--amp']. Remove it" in lines[0]


def test_how_images_are_loaded_may_change(bench):
    bench.order('plain', 0, 'wait')
    when(lambda: bench.started() and _catches(bench), lambda: os.kill(os.getpid(), signal.SIGTERM))
    bench.runner().work()
    assert bench.runner(extra=('--workers', '2')).work() == 0
    assert len(bench.done()) == 6
    assert bench.runner(extra=('-j', '1')).work() == 0
    with pytest.raises(MultiExitError, match='was made with the extra flags'):
        bench.runner(extra=('--lr', '0.7'))


def test_a_result_in_another_precision_is_a_result(bench):
    assert bench.runner(extra=('--amp', '--amp-dtype', 'bfloat16')).work() == 0
    assert len(bench.done()) == 6
    assert bench.runner().pending == []


def test_what_is_trained_is_what_was_planned_although_the_recipe_changes(bench):
    runner = bench.runner()
    bench.write(recipe=RECIPE | {'epochs': 3, 'lr': 0.7})
    assert runner.work() == 0
    trained = [json.loads(path.read_text()) for path in (bench.root / 'out').glob('*/trained.json')]
    assert [(flags['epochs'], 'lr' in flags) for flags in trained] == [(2, False)] * 6


def test_folder_of_a_run_with_other_flags_is_not_published_under_new_ones(bench):
    bench.runner().work()
    folder = bench.root / 'out/tiny-pets-test_resnet-plain-s0'
    bench.write(recipe=RECIPE | {'epochs': 3}, methods=['plain'], seeds=[0])
    (bench.results / f'{folder.name}.json').unlink()
    lines = []
    assert bench.runner(lines).work() == 1
    assert f'{folder} was made with epochs 2, the plan says 3. Remove it' in lines[-1]
    folder.with_name(f'{folder.name}.json').unlink()
    assert bench.runner(lines).work() == 1
    assert lines[-1].endswith(f'does not say which flags {folder} was made with. Remove that folder.')
    shutil.rmtree(folder)
    assert bench.runner().work() == 0
    assert bench.started() == [*ALL, 'plain 0']
    assert json.loads((bench.results / f'{folder.name}.json').read_text())['flags']['epochs'] == 3


def test_disk_that_refuses_ends_no_run(bench, monkeypatch):
    bench.results.write_text('no folder')
    lines = []
    assert bench.runner(lines).work() == 1
    advice = 'name another folder, there is a file where one must be, then run it again.'
    assert sum('FAILED' in line and line.endswith(advice) for line in lines) == 6
    bench.results.unlink()
    assert bench.runner().work() == 0
    assert bench.started() == ALL, 'what was trained is taken'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'methods': ['eed']}, "must be one of ce, eed-kl, plain, got 'eed'"),
        ({'protocol': 'none'}, r'Cannot read .*none.yaml: '),
        ({'sedes': [1]}, r"missing or unknown: \['sedes'\]"),
        ({'data': {'pets': {'scale': 'wide'}}}, 'has a flag that train.py does not take'),
        ({'recipe': {'epochs': 'many'}}, r"epochs must be an integer >= 1, got 'many'"),
        ({'data': ['../pets']}, 'must be of letters, digits'),
        ({'recipe': RECIPE | {'amp': True}, 'data': {'pets': {'amp': False}}}, 'amp is True in tiny.yaml, and no'),
        ({'data': {'pets': {'epochs': None}}}, 'epochs is 2 in tiny.yaml, and no command line sets it to None'),
    ],
)
def test_plan_of_no_use_is_one_line(bench, changes, message):
    bench.write(**changes)
    with pytest.raises(MultiExitError, match=message):
        read_plan(bench.plan_file)


def test_data_folder_of_another_name_is_refused(bench):
    with pytest.raises(MultiExitError, match="must be or contain a folder 'pets'"):
        bench.runner(data_dir=bench.root / 'hub')
    assert bench.runner(data_dir=bench.data).data == {'pets': bench.data}


# The command line


def test_list_says_the_state_of_every_run(bench, run_py, run_script):
    bench.order('ce', 0, 'fail')
    bench.write(seeds=[0])
    flags = (bench.plan_file, '--data-dir', bench.root, '--output', bench.root / 'out', '--results', bench.results)
    names = [f'tiny-pets-test_resnet-{method}-s0' for method in ('plain', 'ce', 'eed-kl')]
    assert run_script(run_py.main, *flags, '--list') == (0, ''.join(f'planned  {name}\n' for name in names), '')
    assert bench.started() == []
    bench.runner([]).work()
    expected = f'Nothing to do: 1 of 1 runs have results in {bench.results}.\n'
    assert run_script(run_py.main, *flags, '--only', 'eed') == (0, expected, '')
    states = [line.split() for line in run_script(run_py.main, *flags, '--list')[1].splitlines()]
    assert states == [['done', names[0]], ['begun', names[1]], ['done', names[2]]]
    assert run_script(run_py.main, *flags, '--list', '--only', 'eed')[1] == f'done     {names[2]}\n'


def test_errors_are_one_line_and_exit_code_2(bench, run_py, run_script):
    code, out, err = run_script(run_py.main, bench.plan_file, '--only', 'nothing')
    assert (code, out) == (2, '')
    assert err.count('\n') == 1
    assert "see --list, got 'nothing'" in err
    assert run_script(run_py.main, bench.plan_file, '--jobs', '0', '--data-dir', bench.root)[0] == 2


@pytest.mark.slow
def test_train_py_is_run_stopped_and_goes_on(bench, image_folder):
    bench.data.rmdir()
    image_folder.rename(bench.data)
    table = {'eed-kl': METHODS['eed-kl'] | {'exit-output-loss': 'kl'}}
    recipe = RECIPE | {'epochs': 12, 'workers': 0, 'val_split': 'val', 'val_from_train': 4, 'num_classes': 2}
    bench.write(table=table, recipe=recipe, methods=['eed-kl'], seeds=[0])
    command = [sys.executable, ROOT / 'hub/experiments/run.py', bench.plan_file, '--data-dir', bench.root]
    command += ['--output', bench.root / 'out', '--results', bench.results]
    folder = bench.root / 'out/tiny-pets-test_resnet-eed-kl-s0'
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        wait_for((folder / 'summary.csv').exists, 120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert bench.done() == []
    subprocess.run(command, check=True, timeout=240)
    result = json.loads((bench.results / f'{folder.name}.json').read_text())
    assert [row['exit'] for row in result['classifiers']] == ['0', 'main', 'ens']
    assert [row['epoch'] for row in result['validation']] == list(range(12))
    assert 'Resuming from' in (bench.root / f'out/{folder.name}.log').read_text()
    assert str(bench.root) not in json.dumps(result)
