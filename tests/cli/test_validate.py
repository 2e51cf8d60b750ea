import csv
import hashlib
import json

import pytest
import torch
from helpers.validation import parse
from PIL import Image
from timm.data import create_loader

import timm_multiexit as tme
from timm_multiexit.cli import train, validate
from timm_multiexit.cli.validate import hash_own_weights, save_chosen_policy
from timm_multiexit.data.datasets import create_checked_dataset
from timm_multiexit.data.digits import DIGITS
from timm_multiexit.evaluation.validator import Validation
from timm_multiexit.policies.budgets import BudgetTable, PolicyResult
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import StateError


@pytest.fixture
def run_folder(run_script, image_folder):
    flags = ('--model', 'test_resnet', '--img-size', '32', '-b', '8', '-j', '0', '--epochs', '1', '--exits', '1,3')
    code, _, err = run_script(
        train.main, *flags, '--eed', '--data-dir', image_folder, '--output', 'out', '--experiment', 'r'
    )
    assert code == 0, err
    return image_folder.parent / 'out/r'


def run_validate(run_script, *argv):
    code, out, err = run_script(validate.main, '-j', '0', *argv)
    assert code == 0, err
    table, _, result = out.partition('--result\n')
    return table, json.loads(result)  # nothing may follow the JSON


def test_folder_and_checkpoint_give_the_training_runs_table(run_script, run_folder, image_folder):
    expected = json.loads((run_folder / 'results.json').read_text())['rows']
    for source in (('--model', f'local-dir:{run_folder}/best'), ('--checkpoint', run_folder / 'last.pth.tar')):
        table, result = run_validate(run_script, *source, '--data-dir', image_folder)
        assert result['rows'] == expected
        assert [row['tap'] for row in expected] == ['layer1.0', 'layer3.0', 'classifier', '-']
        assert '11 images' in table


def sha256(folder):
    """Return the hashes of a folder's weights."""
    names = ('model.safetensors', 'exits.safetensors')
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_training_results_say_what_they_are_of(run_folder):
    results = json.loads((run_folder / 'results.json').read_text())
    expected = {
        'dataset': 'images',
        'input_size': [3, 32, 32],
        'weights': sha256(run_folder / 'best'),
        'split': 'validation',
        'best_epoch': 0,
        'epochs': 1,
        'epoch_chosen_by': 'top1',
        'epoch_chosen_on': 'validation',
        'is_reported_split': True,
    }
    assert {key: results[key] for key in expected} == expected


def test_model_name_with_fresh_exits(run_script, image_folder):
    flags = (
        '--model',
        'test_resnet',
        '--exits',
        '2',
        '--exit-head',
        'linear',
        '--num-classes',
        '2',
        '--img-size',
        '64',
    )
    _, result = run_validate(run_script, *flags, image_folder)
    assert [row['exit'] for row in result['rows']] == ['0', '1', 'main', 'ens']
    assert [row['exit_idx'] for row in result['rows']] == [0, 1, 'main', 'ens']


def test_plain_model_has_one_row(run_script, image_folder):
    _, result = run_validate(
        run_script, '--model', 'test_resnet', '--num-classes', '2', '--img-size', '64', image_folder
    )
    assert [row['exit'] for row in result['rows']] == ['main']


def test_results_files(run_script, run_folder, image_folder, tmp_path):
    source = ('--model', f'local-dir:{run_folder}/best', '--data-dir', image_folder)
    _, result = run_validate(run_script, *source, '--results-file', tmp_path / 'new/rows.csv')
    with open(tmp_path / 'new/rows.csv') as file:
        rows = list(csv.DictReader(file))
    assert [float(row['top-1']) for row in rows] == [row['top-1'] for row in result['rows']]
    run_validate(run_script, *source, '--results-file', tmp_path / 'rows.json', '--results-format', 'json')
    saved = json.loads((tmp_path / 'rows.json').read_text())
    assert saved['rows'] == result['rows']
    assert {'commit', 'versions', 'hardware', 'threads'} <= set(saved)
    expected = {
        'dataset': 'images',
        'input_size': [3, 32, 32],
        'weights': sha256(run_folder / 'best'),
        'precision': 'float32',
    }
    assert {key: saved[key] for key in expected} == expected
    assert 'calibrated_on' not in saved


def test_without_data_the_digits_are_measured(run_script, tmp_path):
    model = tme.create_model('test_resnet', num_classes=10, input_size=(3, 32, 32))
    tme.save_pretrained(model, tmp_path / 'net', data_config={'input_size': (3, 32, 32)})
    flags = ('--amp', '--amp-dtype', 'bfloat16', '--results-file', tmp_path / 'r.json', '--results-format', 'json')
    table, _ = run_validate(run_script, '--model', f'local-dir:{tmp_path}/net', *flags)
    assert 'test split, 360 images' in table
    saved = json.loads((tmp_path / 'r.json').read_text())
    assert (saved['dataset'], saved['precision']) == ('digits', 'amp bfloat16')


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ((), 'No model: give --model'),
        (('--model', 'resnet51'), "no model 'resnet51'"),
        (('--model', 'local-dir:nowhere'), 'is not a model folder'),
        (('--checkpoint', 'nowhere.pth.tar'), 'does not exist'),
        (('--model', 'test_resnet', '--exits', '9'), 'The number of exits must be in [1, 4]'),
        (('--model', 'test_resnet', '--num-classes', '1'), 'The data has 2 classes, the model 1'),
        (('--model', 'test_resnet', '--split', 'test'), "must be one of train, val, got 'test'"),
        (('--model', 'test_resnet', '--amp'), '--amp in float16 needs a GPU'),
    ],
    ids=['none', 'name', 'folder', 'checkpoint', 'exits', 'classes', 'split', 'fp16'],
)
def test_bad_input_is_one_clear_line(flags, message, run_script, image_folder):
    if '--amp' in flags and torch.accelerator.is_available():
        pytest.skip('float16 runs on this GPU')
    code, _, err = run_script(validate.main, *flags, '-j', '0', '--data-dir', image_folder)
    assert code == 2
    assert message in err.strip().splitlines()[-1]
    assert 'Traceback' not in err


def test_checkpoint_of_split_norms_is_evaluated_by_its_main_ones(run_script, image_folder):
    flags = (
        '--model',
        'test_resnet',
        '--img-size',
        '32',
        '-b',
        '8',
        '-j',
        '0',
        '--epochs',
        '1',
        '--eed',
        '--aug-splits',
        '2',
    )
    flags += ('--split-bn', '--aa', 'augmix-m3', '--data-dir', image_folder, '--experiment', 'run')
    code, out, err = run_script(train.main, *flags)
    assert code == 0, err
    checkpoint = image_folder.parent / 'output/train/run/last.pth.tar'
    code, again, err = run_script(validate.main, '--checkpoint', checkpoint, '--data-dir', image_folder, '-j', '0')
    assert code == 0, err
    table = [line for line in out.splitlines() if line[:4] in ('0   ', '1   ', '2   ', 'main', 'ens ')]
    assert len(table) == 5
    assert set(table) <= set(again.splitlines())


# Dynamic inference


@pytest.fixture
def digits_net(make_model, tmp_path):
    """A folder with a network of the digits, not trained but lively."""
    model = make_model(exits=[1, 3], input_size=(3, 32, 32))
    with torch.no_grad():
        for classifier in (*(head.fc for head in model.exits), model.get_classifier()):
            classifier.weight *= 10
    tme.save_pretrained(model, tmp_path / 'net', data_config={'input_size': (3, 32, 32), 'crop_pct': 1.0})
    return tmp_path / 'net'


def read_logits(folder, split):
    """Return the logits of all classifiers and the targets of a split of the digits, by timm's own loader."""
    model = tme.create_model(f'local-dir:{folder}', pretrained=True).eval()
    config = {key: model.pretrained_cfg[key] for key in ('mean', 'std', 'interpolation', 'crop_pct')}
    loader = create_loader(
        create_checked_dataset(DIGITS, root=None, split=split),
        (3, 32, 32),
        64,
        num_workers=0,
        use_prefetcher=False,
        **config,
    )
    with torch.no_grad():
        batches = [(model(images, exits=True).logits, target) for images, target in loader]
    logits = [torch.cat([parts[idx] for parts, _ in batches]) for idx in range(3)]
    return model, logits, torch.cat([target for _, target in batches])


def mean_macs(model, policy, exit_idx):
    """Return the mean MACs of an image, image by image."""
    costs = model.cost()
    total = 0
    for left in exit_idx.tolist():
        total += costs[left].fixed.macs - costs[left].head.macs
        total += sum(costs[idx].head.macs for idx in policy.used if idx <= left)
    return total / len(exit_idx)


def test_dynamic_report_is_that_of_a_simulation(run_script, digits_net, tmp_path):
    model, logits, targets = read_logits(digits_net, 'test')
    levels = [single.softmax(-1).amax(-1).quantile(0.7).item() for single in logits[:2]]
    given = ','.join(f'{level:.4g}' for level in levels)
    flags = ('--threshold', given, '--calib-split', 'validation', '--budget', '85%', '90%', '--max-drop', '0.3')
    flags += ('--time-rounds', '1', '--compare', f'local-dir:{digits_net}', '--plot', tmp_path / 'new/picture.png')
    flags += ('--results-file', tmp_path / 'r.json', '--results-format', 'json')
    text, result = run_validate(run_script, '--model', f'local-dir:{digits_net}', *flags)
    saved = json.loads((tmp_path / 'r.json').read_text())
    assert saved['dynamic'] == result['dynamic']
    rows = {row['policy']: row for row in saved['dynamic']}
    assert list(rows) == ['main', 'all exits', f'threshold {given}', 'budget 85%', 'budget 90%', 'max drop 0.3']
    kinds = ['reference', 'reference', 'threshold', 'budget', 'budget', 'max_drop']
    assert [row['kind'] for row in saved['dynamic']] == kinds
    assert [row['budget'] for row in saved['dynamic']] == [None, None, None, '85%', '90%', None]
    for row in saved['dynamic'][2:]:
        policy = ExitPolicy.from_dict(row)
        simulated = apply_policy(policy, logits)
        accuracy = 100 * (simulated.logits.argmax(-1) == targets).float().mean().item()
        assert row['top-1'] == pytest.approx(accuracy, abs=0.3)  # one image: sums differ in their last bits
        assert row['shares'] == pytest.approx((simulated.exit_idx.bincount(minlength=3) / 360).tolist(), abs=0.003)
        assert row['macs'] == pytest.approx(mean_macs(model, policy, simulated.exit_idx), rel=2e-3)
    shares = rows[f'threshold {given}']['shares']
    assert shares[0] == pytest.approx(0.3, abs=0.02)
    assert min(shares) > 0.1
    assert rows['main']['top-1'] == saved['rows'][2]['top-1']
    assert all(row['img/s'] > 0 and row['time_ratio'] > 0 for row in saved['dynamic'])
    assert 'max drop 0.3 are chosen on the validation split, 180 images.' in text
    assert saved['calibrated_on'] == 'the validation split, 180 images'
    assert {**saved['latency'], 'ms': 0} == {'batch_size': 1, 'rounds': 1, 'device': 'cpu', 'ms': 0}
    assert list(saved['latency']['ms']) == ['main in timm', '0', '1', 'main']
    assert f'exit_idx=1 {saved["latency"]["ms"]["1"]:.3f}, main' in text
    assert saved['compare'][0]['top-1'] == saved['rows'][2]['top-1']
    with Image.open(tmp_path / 'new/picture.png') as picture:
        assert picture.size[0] == 1200


def test_curve_is_chosen_on_the_calibration_split_and_measured_on_the_other(run_script, digits_net, tmp_path):
    flags = ('--calib-split', 'validation', '--results-file', tmp_path / 'r.json', '--results-format', 'json')
    text, _ = run_validate(run_script, '--model', f'local-dir:{digits_net}', *flags)
    curve = json.loads((tmp_path / 'r.json').read_text())['curve']
    assert curve['chosen_on'] == 'the validation split, 180 images'
    assert 'thresholds are chosen on the validation split, 180 images' in text
    assert len(curve['points']) == 39
    model, chosen, chosen_targets = read_logits(digits_net, 'validation')
    _, logits, targets = read_logits(digits_net, 'test')
    for point in curve['points'][::6]:
        policy = ExitPolicy.from_dict(point['solver'])
        # The budget is what the policy costs where it was chosen, its cost and accuracy are of the reported split.
        on_chosen, on_reported = apply_policy(policy, chosen), apply_policy(policy, logits)
        assert point['budget_macs'] == pytest.approx(mean_macs(model, policy, on_chosen.exit_idx), rel=5e-3)
        assert point['solver']['macs'] == pytest.approx(mean_macs(model, policy, on_reported.exit_idx), rel=5e-3)
        accuracy = 100 * (on_reported.logits.argmax(-1) == targets).float().mean().item()
        assert point['solver']['top-1'] == pytest.approx(accuracy, abs=0.6)
        found = ExitPolicy.from_dict(point['search'])
        found_cost = mean_macs(model, found, apply_policy(found, chosen).exit_idx)
        assert found_cost <= point['budget_macs'] * 1.005
    assert (tmp_path / 'accuracy_vs_macs.png').exists()  # beside the results, without being asked


def test_order_of_the_exits_is_always_reported(run_script, digits_net, tmp_path):
    flags = ('--results-file', tmp_path / 'r.json', '--results-format', 'json')
    text, result = run_validate(run_script, '--model', f'local-dir:{digits_net}', *flags)
    saved = json.loads((tmp_path / 'r.json').read_text())
    _, logits, targets = read_logits(digits_net, 'test')
    right = [single.argmax(-1) == targets for single in logits]
    lost = sum(int((a or b) and not c) for a, b, c in zip(*right)) / 3.6
    assert saved['overthinking']['lost'] == pytest.approx(lost, abs=0.6)
    assert set(saved['failure_auroc']) == {'exit0', 'exit1', 'main'}
    assert list(saved['monotonicity']) == ['0.01', '0.05', '0.1', '0.2', '0.5']
    assert 'No budgets: give --calib-split NAME or --calib-from-train N' in text
    assert not {'curve', 'dynamic', 'timing', 'latency', 'compare'} & (set(saved) | set(result))


@pytest.mark.parametrize(
    ('flags', 'saved'),
    [(('--max-drop', '0.3', '--budget', '85%', '95%'), 'budget 85%'), (('--max-drop', '0.3'), 'max drop 0.3')],
)
def test_saved_policy_is_the_one_that_was_measured(flags, saved, run_script, digits_net, tmp_path):
    before, config = sha256(digits_net), json.loads((digits_net / 'config.json').read_text())
    flags = ('--calib-split', 'validation', *flags, '--time-rounds', '0', '--save-policy')
    text, result = run_validate(run_script, '--model', f'local-dir:{digits_net}', *flags)
    model = tme.create_model(f'local-dir:{digits_net}', pretrained=True).eval()
    rows = {row['policy']: row for row in result['dynamic']}
    assert model.policy == ExitPolicy.from_dict(rows[saved])
    if '--budget' in flags:
        assert model.policy.used  # the lively network answers early
        for budget in ('85%', '95%'):
            assert model.budgets.select(budget).policy == ExitPolicy.from_dict(rows[f'budget {budget}'])
    line = next(line for line in text.splitlines() if line.startswith(f'{digits_net}/config.json has the policy of'))
    assert f'has the policy of {saved} and a table of {len(model.budgets.points)} budgets, chosen on the val' in line
    assert sha256(digits_net) == before
    now = json.loads((digits_net / 'config.json').read_text())
    del now['multiexit']['policy'], now['multiexit']['budgets']
    assert now == config
    # From then on it is what the folder is measured with.
    _, again = run_validate(run_script, '--model', f'local-dir:{digits_net}', '--time-rounds', '0')
    own = {'policy': "the model's own", 'kind': 'own', 'budget': None, 'chosen_on': None}
    assert again['dynamic'][2] == {**rows[saved], **own}


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('--calib-split', 'test'), 'and --split test are the same images'),
        (('--calib-split', 'train[:3]'), "test, validation, train, got 'train[:3]'"),
        (('--threshold', '0.5', '--criterion', 'hope'), '--criterion must be one of'),
        (('--threshold', 'high'), '--threshold must be numbers, or none for an exit that is not used, such as'),
        (('--budget', '3%', '--calib-split', 'validation'), 'got 3%, which is below the cheapest policy'),
        (('--budget', '50%'), '--budget 50% needs data'),
        (('--calib-from-train', '5000'), 'Number of held-out images must be in [1, 1247], got 5000'),
        (('--compare', 'resnet51'), "no model 'resnet51'"),
    ],
)
def test_bad_flags_of_dynamic_inference_are_one_clear_line(flags, message, run_script, digits_net):
    code, _, err = run_script(validate.main, '--model', f'local-dir:{digits_net}', '-j', '0', *flags)
    assert code == 2
    assert message in err.strip().splitlines()[-1]
    assert 'Traceback' not in err


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('--plot', '.'), '. must be the path of a file'),
        (('--results-file', 'net/config.json/rows.csv'), 'Cannot write net/config.json/rows.csv'),
        (('--budget', '1%', '--calib-split', 'validation'), 'got 1%, which is below'),
        (('--budget', '90%', '0.00001ms', '--calib-split', 'validation'), 'got 0.00001ms, which is below the cheapest'),
        (('--budget', '9000ms', '--calib-split', 'validation'), 'got 9000ms, which is more than any policy can spend'),
        (('--save-policy', '--budget', '90%'), '--save-policy needs data'),
        (('--save-policy', '--budget', '90%', '--calib-split', 'validation'), 'net/config.json: Is a directory'),
    ],
)
def test_what_cannot_be_is_known_before_evaluation(flags, message, run_script, digits_net, monkeypatch):
    monkeypatch.setattr('timm_multiexit.evaluation.validator.collect_logits', None)
    (digits_net / '.config.json.tmp').mkdir()  # nothing can be written under that name
    code, _, err = run_script(validate.main, '--model', f'local-dir:{digits_net}', '-j', '0', *flags)
    assert code == 2
    assert message in err.strip().splitlines()[-1]


def test_full_disk_loses_no_table(run_script, digits_net, monkeypatch):
    def refuse(self, content):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('pathlib.Path.write_bytes', refuse)
    flags = ('--model', f'local-dir:{digits_net}', '-j', '0', '--results-file', 'rows.csv')
    code, out, err = run_script(validate.main, *flags)
    assert code == 2
    assert 'could not be written: No space left on device' in err.strip().splitlines()[-1]
    assert 'test split, 360 images' in out


def test_split_under_its_other_name_is_the_same_data(run_script, image_folder):
    flags = ('--model', 'test_resnet', '--exits', '2', '--num-classes', '2', '--img-size', '32', '-j', '0')
    code, _, err = run_script(validate.main, *flags, '--calib-split', 'val', image_folder)
    assert code == 2
    assert '--calib-split val and --split validation are the same images' in err.strip().splitlines()[-1]


def test_classes_of_other_names_are_warned_of(run_script, make_model, image_folder, tmp_path):
    names = sorted(folder.name for folder in (image_folder / 'val').iterdir())
    model = make_model(num_classes=len(names)).eval()
    for number, saved in enumerate((names, names[::-1], None)):
        tme.save_pretrained(model, tmp_path / f'net{number}', label_names=saved)
        flags = ('--model', f'local-dir:{tmp_path}/net{number}', '--data-dir', image_folder, '-j', '0', '-b', '8')
        code, _, err = run_script(validate.main, *flags)
        assert code == 0
        warned = f"Class 0 is '{names[0]}' in the data and '{names[-1]}' in the model: accuracy means something only"
        assert (warned in err) == (number == 1), err


def test_plain_model_has_nothing_to_decide(run_script):
    flags = ('--model', 'test_resnet', '--num-classes', '10', '--threshold', '0.5')
    code, _, err = run_script(validate.main, *flags)
    assert code == 2
    assert '--threshold needs a model with exits, test_resnet has none' in err.strip().splitlines()[-1]


# Policies and weights of the folder


@pytest.fixture
def net_folder(make_model, tmp_path):
    """A folder with a network of the digits, as good as untrained."""
    model = make_model(exits=[1, 3], input_size=(3, 32, 32))
    tme.save_pretrained(model, tmp_path / 'net', data_config={'input_size': (3, 32, 32)})
    return tmp_path / 'net'


def test_policy_is_not_saved_for_weights_that_came_later(net_folder):
    model = tme.create_model(f'local-dir:{net_folder}', pretrained=True).eval()
    args = parse(
        '--model', f'local-dir:{net_folder}', '--save-policy', '--calib-split', 'validation', '--budget', '90%'
    )
    weights = hash_own_weights(args, model)
    before = (net_folder / 'config.json').read_bytes()
    policy = ExitPolicy('confidence', (0.5, 0.5))
    budgets = BudgetTable((PolicyResult(policy, 50.0, (0.0, 0.0, 1.0), macs=10),), total_macs=10, max_macs=20)
    found = Validation(None, {'calibrated_on': 'some images'}, policy, budgets)
    with open(net_folder / 'exits.safetensors', 'ab') as file:
        file.write(b'more')
    with pytest.raises(StateError, match='other weights in the meantime'):
        save_chosen_policy(args, found, weights)
    assert (net_folder / 'config.json').read_bytes() == before


def test_policy_stays_saved_if_the_comparison_fails(run_script, digits_net, monkeypatch):
    def fail(*args, **kwargs):
        raise StateError('no memory left')

    monkeypatch.setattr('timm_multiexit.evaluation.validator.evaluate_static', fail)
    flags = ('--calib-split', 'validation', '--budget', '95%', '--time-rounds', '0', '--save-policy')
    static = ('--compare', f'local-dir:{digits_net}')
    code, _, err = run_script(validate.main, '--model', f'local-dir:{digits_net}', *flags, *static, '-j', '0')
    assert (code, err.splitlines()[-1]) == (2, 'validate.py: error: no memory left')
    assert tme.create_model(f'local-dir:{digits_net}', pretrained=True).policy is not None


def test_weights_are_named_where_they_are_the_folders(make_model, net_folder, monkeypatch):
    """Fresh exits or classes are not in its files."""
    results = ('--results-file', 'new.json', '--results-format', 'json')
    monkeypatch.chdir(net_folder.parent)
    model = tme.create_model(f'local-dir:{net_folder}', pretrained=True).eval()
    folder = ('--model', f'local-dir:{net_folder}', '--img-size', '32')
    for flags, evaluated, is_named in (
        ((*folder, *results), model, True),
        (folder, model, False),  # nothing is written
        ((*folder, *results, '--exits', '2'), model, False),
        ((*folder, *results, '--checkpoint', 'last.pth.tar'), model, False),
        ((*folder, *results), make_model(exits=[1, 3], num_classes=12), False),
        (('--model', 'test_resnet', *results, '--img-size', '32'), model, False),
    ):
        weights = hash_own_weights(parse(*flags), evaluated)
        assert (set(weights) if is_named else weights) == (
            {'model.safetensors', 'exits.safetensors'} if is_named else None
        )


@pytest.mark.parametrize('flags', [('--model', 'local-dir:{run}'), ('--compare', 'local-dir:{run}')], ids=' '.join)
def test_folder_of_a_run_is_told_from_that_of_its_model(flags, run_script, net_folder, tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    net_folder.rename(run / 'best')
    flags = [flag.format(run=run) for flag in flags]
    model = () if '--model' in flags else ('--model', f'local-dir:{run}/best')
    code, _, err = run_script(validate.main, *model, *flags, '-j', '0')
    assert code == 2
    assert err.strip().splitlines()[-1].endswith(f'{run} is the folder of a run, not of a model: give {run}/best.')


def test_model_of_one_class_is_refused_before_the_evaluation(run_script, image_folder, monkeypatch):
    monkeypatch.setattr('timm_multiexit.evaluation.validator.Validator.run', None)
    (image_folder / 'classes.txt').write_text('cat')
    flags = ('--model', 'test_resnet', '--exits', '1,3', '--num-classes', '1', '--img-size', '32', '-j', '0')
    code, _, err = run_script(validate.main, *flags, '--class-map', image_folder / 'classes.txt', image_folder)
    assert code == 2
    assert 'test_resnet has one class, so that every answer is right' in err.strip().splitlines()[-1]


def test_training_on_one_class_is_refused(run_script, image_folder):
    (image_folder / 'classes.txt').write_text('dog')
    flags = ('--model', 'test_resnet', '--img-size', '32', '-j', '0', '--class-map', image_folder / 'classes.txt')
    code, _, err = run_script(train.main, *flags, image_folder)
    assert code == 2
    assert err.strip().splitlines()[-1].endswith("The data has one class, 'dog': there is nothing to tell apart.")
