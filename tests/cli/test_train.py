import csv
import gc
import json
import multiprocessing
from copy import deepcopy

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from helpers import cases

import timm_multiexit as tme
from timm_multiexit.checkpoints import source
from timm_multiexit.cli import train, validate
from timm_multiexit.cli.flags.train_args import parse_train_args

QUICK = ('--model', 'test_resnet', '--img-size', '32', '-b', '8', '-j', '0', '--opt', 'adamw', '--lr', '0.002')
QUICK += ('--warmup-epochs', '0', '--epochs', '2')


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def load_state(path):
    return timm.models.load_state_dict(str(path), use_ema=False)


@pytest.fixture
def train_on_images(run_script, image_folder):
    """Return a function that trains on the two-class folder into out/NAME and returns that folder."""

    def run(name, *argv, code=0):
        result = run_script(
            train.main, *QUICK, *argv, '--data-dir', image_folder, '--output', 'out', '--experiment', name
        )
        assert result[0] == code, result
        return image_folder.parent / 'out' / name, result

    return run


@pytest.mark.slow
def test_run_without_data_trains_on_the_digits(run_script, tmp_path):
    code, out, err = run_script(
        train.main, '--eed', '--model', 'test_resnet', '--epochs', '2', '--experiment', 'digits'
    )
    assert code == 0, err
    run = tmp_path / 'output/train/digits'
    assert {path.name for path in run.iterdir()} >= {
        'args.yaml',
        'summary.csv',
        'results.json',
        'best',
        'last.pth.tar',
        'model_best.pth.tar',
        'checkpoint-1.pth.tar',
    }
    rows = read_csv(run / 'summary.csv')
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert {'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr', 'eval_exit0_top1', 'eval_ens_top1'} <= set(
        rows[0]
    )
    assert yaml.safe_load((run / 'args.yaml').read_text())['exit_loss'] == 'eed'

    results = json.loads((run / 'results.json').read_text())
    assert (results['split'], results['num_samples'], results['epoch_chosen_on']) == ('test', 360, 'validation')
    assert [row['exit'] for row in results['rows']] == ['0', '1', '2', 'main', 'ens']
    assert max(row['top-1'] for row in results['rows']) > 60  # chance is 10
    assert 'exit  tap' in out
    assert f'{results["rows"][3]["top-1"]:.2f}' in out

    model = tme.create_model(f'local-dir:{run}/best', pretrained=True).eval()
    plain = timm.create_model(f'local-dir:{run}/best', pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), plain(images))
    assert model.input_size == (3, 32, 32)


@pytest.mark.parametrize(('warmup', 'warns'), [('2', True), ('1', False), ('0', False)])
def test_warm_up_of_the_heads_that_is_the_whole_run_is_warned_of(train_on_images, warmup, warns):
    _, (code, _, err) = train_on_images('run', '--eed', '--head-warmup-epochs', warmup)
    assert code == 0
    assert ('The heads train alone until epoch 2 of 2: the backbone never trains with them' in err) == warns, err


@pytest.mark.parametrize(('warmup', 'warns'), [('2', True), ('0', False)])
def test_best_epoch_of_the_warm_up_is_told(train_on_images, warmup, warns):
    run, (_, _, err) = train_on_images('run', '--eed', '--head-warmup-epochs', warmup)
    best = json.loads((run / 'results.json').read_text())['best_epoch']
    told = f'best is epoch {best + 1}, and backbone and heads learned together only after 2. --eval-metric mean_top1'
    assert (told in err, 'learned together' in err) == (warns, warns)


def test_best_folder_holds_the_epoch_of_the_best_metric(train_on_images):
    run, _ = train_on_images('run', '--eed', '--epochs', '3', '--eval-metric', 'exit0_top1')
    rows = read_csv(run / 'summary.csv')
    best = max(range(3), key=lambda epoch: (float(rows[epoch]['eval_exit0_top1']), -epoch))
    state = load_state(run / f'checkpoint-{best}.pth.tar')
    model = tme.create_model(f'local-dir:{run}/best', pretrained=True)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_network_learns_two_classes_that_differ_in_colour(train_on_images):
    run, _ = train_on_images('run', '--eed', '--epochs', '8', '--no-aug')
    assert float(read_csv(run / 'summary.csv')[-1]['train_main_top1']) > 90
    assert json.loads((run / 'results.json').read_text())['num_samples'] == 11


def test_class_count_comes_from_the_data(train_on_images):
    run, _ = train_on_images('run', '--eed', '--epochs', '1')
    assert json.loads((run / 'best/config.json').read_text())['num_classes'] == 2


def test_without_exits_the_checkpoint_is_plain_timm(train_on_images):
    run, (_, out, _) = train_on_images('run', '--epochs', '1')
    keys = timm.create_model('test_resnet', num_classes=2).state_dict().keys()
    assert load_state(run / 'last.pth.tar').keys() == keys
    assert 'exit0_top1' not in read_csv(run / 'summary.csv')[0]
    assert timm.create_model(f'local-dir:{run}/best', pretrained=True).state_dict().keys() == keys
    assert 'main  classifier' in out


@pytest.mark.parametrize(
    ('flags', 'taps'),
    [
        (('--exits', '1'), ['layer1.0']),
        (('--exits', '[1]'), ['layer1.0']),
        (('--exits', '1,3'), ['layer1.0', 'layer3.0']),
        (('--exits', 'layer2'), ['layer2.0']),
        (('--exits', '0.5', '.75'), ['act1', 'layer1.0']),
        (('--exit-loss', 'phuong'), ['layer1.0', 'layer2.0', 'layer3.0']),
    ],
    ids=['count', 'index', 'indices', 'name', 'shares', 'auto'],
)
def test_exits_flag(flags, taps, train_on_images):
    run, _ = train_on_images('run', '--epochs', '1', *flags)
    model = tme.create_model(f'local-dir:{run}/best', pretrained=True)
    assert [spec.module for spec in model.exits.specs] == taps


def test_exits_without_a_loss_train_with_ce(train_on_images):
    run, _ = train_on_images('run', '--epochs', '1', '--exits', 'auto')
    row = read_csv(run / 'summary.csv')[0]
    assert float(row['train_output_distance']) == 0
    assert float(row['train_loss']) == pytest.approx(
        sum(float(row[f'train_{name}_loss']) for name in ('exit0', 'exit1', 'exit2', 'main')), rel=1e-4
    )


@pytest.mark.parametrize('exits', [('1,2',), ('0.5', '0.75')], ids=['indices', 'shares'])
def test_exits_flag_does_not_swallow_the_data_folder(run_script, image_folder, exits):
    code, _, err = run_script(
        train.main, *QUICK, '--epochs', '1', '--exits', *exits, image_folder, '--output', 'out', '--experiment', 'run'
    )
    assert code == 0, err


@pytest.mark.parametrize(
    'flags',
    [
        ('--exit-loss', 'byot', '--exit-head', 'paper'),
        ('--eed', '--exit-output-loss', 'mse', '--exit-feature-weight', '1', '--exit-head', 'paper'),
        ('--eed', '--mixup', '0.2', '--cutmix', '1', '--mixup-off-epoch', '1', '--smoothing', '0.1'),
        ('--eed', '--mixup', '0.2', '--no-prefetcher', '--grad-accum-steps', '2', '--clip-grad', '1'),
        ('--eed', '--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--model-ema', '--model-ema-warmup'),
        pytest.param(('--eed', '--torchcompile', 'aot_eager'), marks=pytest.mark.slow),
        ('--eed', '--grad-checkpointing', '--clip-grad', '0.1', '--clip-mode', 'agc', '--layer-decay', '0.7'),
        ('--eed', '--exit-widths', '16-32-48-64,32-48-64,48-64', '--drop', '0.1'),
        ('--mixup', '0.2', '--model-ema', '--sched', 'step', '--decay-epochs', '1', '--sched-on-updates'),
    ],
    ids=['byot', 'features', 'mixup', 'mixup-host', 'bf16-ema', 'compile', 'checkpointing', 'widths', 'plain'],
)
def test_flags_train_and_validate(flags, train_on_images):
    run, _ = train_on_images('run', *flags)
    rows = read_csv(run / 'summary.csv')
    assert len(rows) == 2
    assert all(torch.isfinite(torch.tensor(float(row['train_loss']))) for row in rows)


def test_transformer_trains_at_the_image_size_it_is_told(train_on_images, run_script, image_folder):
    run, (_, out, _) = train_on_images('run', '--eed', '--model', 'test_vit', '--epochs', '1')
    model = tme.create_model(f'local-dir:{run}/best', pretrained=True)
    assert model.input_size == (3, 32, 32)
    assert [spec.layout for spec in model.exits.specs] == ['NLC'] * 3
    result = run_script(validate.main, '-j', '0', '--checkpoint', run / 'last.pth.tar', '--data-dir', image_folder)
    assert result[0] == 0, result[2]
    assert (
        result[1].split('images:')[1].split('\n\n')[1].split()
        == out.split('images')[1].split(':', 1)[1].split('out/run')[0].split()
    )


def test_recipe_of_timm_runs_with_and_without_exits_by_changing_nothing_else(train_on_images, tmp_path):
    (tmp_path / 'recipe.yaml').write_text(
        'opt: adamw\nweight_decay: 0.05\nlr: 2.0e-3\nsched: cosine\nmin_lr: 1e-5\n'
        'aa: rand-m9-mstd0.5-inc1\nreprob: 0.25\nmixup: 0.8\ncutmix: 1.0\nsmoothing: 0.1\ndrop_path: 0.1\n'
        'model_ema: true\nmodel_ema_decay: 0.9\nclip_grad: 1.0\namp: true\namp_dtype: bfloat16\n'
    )
    runs = {
        name: train_on_images(name, '--config', tmp_path / 'recipe.yaml', *flags)[0]
        for name, flags in (('plain', ()), ('eed', ('--eed',)))
    }
    args = {name: yaml.safe_load((run / 'args.yaml').read_text()) for name, run in runs.items()}
    differing = {key for key in args['plain'] if args['plain'][key] != args['eed'][key]}
    assert differing == {'eed', 'exit_loss', 'exits', 'experiment', 'origin'}
    rows = {name: read_csv(run / 'summary.csv') for name, run in runs.items()}
    assert [len(table) for table in rows.values()] == [2, 2]
    # timm's columns come first in both, and a plain run has the same of them.
    first = ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    assert list(rows['plain'][0])[:6] == list(rows['eed'][0])[:6] == first
    assert [row['lr'] for row in rows['plain']] == [row['lr'] for row in rows['eed']]


def test_loading_processes_end_with_the_run(train_on_images):
    gc.disable()  # which would end them too, but takes five seconds for each
    try:
        train_on_images('run', '--eed', '--epochs', '1', '-j', '2')
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_moving_average_is_what_is_evaluated_and_kept(train_on_images):
    run, _ = train_on_images('run', '--eed', '--epochs', '1', '--model-ema', '--model-ema-decay', '0.5')
    average = timm.models.load_state_dict(str(run / 'last.pth.tar'), use_ema=True)
    raw = load_state(run / 'last.pth.tar')
    best = tme.create_model(f'local-dir:{run}/best', pretrained=True).state_dict()
    assert all(torch.equal(tensor, average[key]) for key, tensor in best.items())
    assert not torch.equal(raw['backbone.fc.weight'], average['backbone.fc.weight'])


@pytest.mark.slow
def test_resumed_run_goes_on_where_it_was(train_on_images, run_script, image_folder):
    whole, _ = train_on_images('whole', '--eed', '--epochs', '4', '--sched', 'constant', '--no-aug')
    half, _ = train_on_images('half', '--eed', '--epochs', '2', '--sched', 'constant', '--no-aug')
    code, _, err = run_script(
        train.main,
        *QUICK,
        '--eed',
        '--epochs',
        '4',
        '--sched',
        'constant',
        '--no-aug',
        '--data-dir',
        image_folder,
        '--resume',
        half / 'last.pth.tar',
    )
    assert code == 0, err
    rows = read_csv(half / 'summary.csv')
    assert [row['epoch'] for row in rows] == ['0', '1', '2', '3']
    checkpoint = torch.load(half / 'last.pth.tar', weights_only=False)
    assert checkpoint['epoch'] == 3
    # The optimizer went on too: as many steps as the run that was never stopped.
    other = torch.load(whole / 'last.pth.tar', weights_only=False)
    steps = [{float(state['step']) for state in saved['optimizer']['state'].values()} for saved in (checkpoint, other)]
    assert steps[0] == steps[1] == {12.0}


def test_resuming_into_the_folder_of_another_run_is_refused(train_on_images):
    one, _ = train_on_images('one', '--eed', '--epochs', '1')
    other, _ = train_on_images('other', '--eed', '--epochs', '1')
    before = {path: path.stat().st_mtime_ns for path in other.rglob('*')}
    _, (_, _, err) = train_on_images('other', '--eed', '--resume', one / 'last.pth.tar', code=2)
    assert 'holds a run' in err
    assert {path: path.stat().st_mtime_ns for path in other.rglob('*')} == before


@pytest.mark.parametrize('damage', ['gone', pytest.param('cut', marks=pytest.mark.slow)])
def test_run_whose_last_checkpoint_is_lost_goes_on_from_the_one_before(damage, train_on_images):
    run, _ = train_on_images('run', '--eed', '--epochs', '3', '--stop-epoch', '2')
    last = run / 'last.pth.tar'
    content = last.read_bytes()
    last.unlink()  # not written in place: checkpoint-1 is the same file
    if damage == 'cut':
        last.write_bytes(content[:1000])
    _, (_, _, err) = train_on_images('run', '--eed', '--epochs', '3', '--resume', 'auto')
    assert [row['epoch'] for row in read_csv(run / 'summary.csv')] == ['0', '1', '2']
    assert torch.load(last, weights_only=False)['epoch'] == 2


@pytest.mark.slow
def test_schedule_begins_anew_where_the_epoch_does(train_on_images):
    run, _ = train_on_images('run', '--eed')
    again, _ = train_on_images('again', '--eed', '--resume', run / 'last.pth.tar', '--start-epoch', '0')
    assert [row['lr'] for row in read_csv(again / 'summary.csv')] == [
        row['lr'] for row in read_csv(run / 'summary.csv')
    ]


@pytest.mark.slow
def test_plateau_keeps_its_rate_without_the_optimizer(train_on_images):
    flags = ('--eed', '--sched', 'plateau', '--warmup-epochs', '1', '--epochs', '4')
    run, _ = train_on_images('run', *flags, '--stop-epoch', '2')
    train_on_images('run', *flags, '--resume', 'auto', '--no-resume-opt')
    assert [float(row['lr']) for row in read_csv(run / 'summary.csv')] == pytest.approx([1e-5] + [0.002] * 3)


@pytest.mark.slow
def test_table_of_timms_own_script_is_gone_on_with(train_on_images):
    run, _ = train_on_images('run', '--eed')
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    del checkpoint['saver']['run']
    torch.save(checkpoint, run / 'last.pth.tar')
    before = read_csv(run / 'summary.csv')
    train_on_images('run', '--eed', '--epochs', '3', '--resume', run / 'last.pth.tar')
    rows = read_csv(run / 'summary.csv')
    assert [row['epoch'] for row in rows] == ['0', '1', '2']
    assert [row['eval_top1'] for row in rows[:2]] == [row['eval_top1'] for row in before]


@pytest.mark.slow
def test_epochs_without_evaluation_are_kept_too(train_on_images):
    flags = ('--eed', '--epochs', '4', '--val-interval', '2', '--save-epochs', '1', '3', '4')
    run, _ = train_on_images('run', *flags, '--stop-epoch', '3')
    assert {path.name for path in run.glob('milestone-*')} == {'milestone-1.pth.tar', 'milestone-3.pth.tar'}
    train_on_images('run', *flags, '--resume', 'auto')
    rows = read_csv(run / 'summary.csv')
    # As timm's own: the stop made the third epoch a last one, which is evaluated.
    assert [row['epoch'] for row in rows] == ['1', '2', '3']
    assert all(row['eval_top1'] for row in rows)
    assert (run / 'milestone-4.pth.tar').exists()


def test_config_file_sets_flags_and_the_command_line_wins(train_on_images, tmp_path):
    (tmp_path / 'recipe.yaml').write_text('exit-loss: phuong\nexits: 1,2\nmixup: 0.1\nsmoothing: 0.2\n')
    run, _ = train_on_images('run', '--epochs', '1', '--config', tmp_path / 'recipe.yaml', '--smoothing', '0')
    args = yaml.safe_load((run / 'args.yaml').read_text())
    assert (args['exit_loss'], args['exits'], args['mixup'], args['smoothing']) == ('phuong', [1, 2], 0.1, 0.0)


def test_args_of_a_run_are_a_config_for_the_next(train_on_images):
    run, _ = train_on_images('first', '--eed', '--epochs', '1')
    again, _ = train_on_images('second', '--config', run / 'args.yaml')
    first, second = (yaml.safe_load((path / 'args.yaml').read_text()) for path in (run, again))
    differing = {key for key in first if first[key] != second[key]}
    assert differing == {'experiment', 'config', 'epochs'}


BAD_INPUT = {
    'model': (('--model', 'resnet51'), "no model 'resnet51', nearest are"),
    'exits-name': (('--exits', 'layer9'), "no module 'layer9', nearest are layer"),
    'exits-index': (('--exits', '[9]'), 'no exit 9. Its stages are 0 (act1, 1/2), 1 (layer1.0, 1/4)'),
    'exits-count': (('--exits', '9'), 'The number of exits must be in [1, 4]'),
    'exits-share': (('--exits', '0.5,1.5'), '--exits must be in (0, 1), got 1.5.'),
    'exits-empty': (('--exits', ','), "--exits must be auto, 3, [3], 1,2, 0.25,0.5 or layer1,layer2, got ','."),
    'encoder': (('--model', 'mobilenetv5_300m_enc', '--eed'), 'has no classifier module'),
    'features': (
        ('--eed', '--exit-feature-weight', '1', '--exit-widths', '16-32-48-64,32-48-64,48-64'),
        "head='paper'",
    ),
    'byot': (('--exit-loss', 'byot', '--exit-widths', '16-32-48-64,32-48-64,48-64'), 'exit 0 has 64'),
    'widths': (('--eed', '--exit-widths', '16-32,16-32,16-32'), 'takes 4 widths, got 2'),
    'contradiction': (('--eed', '--exit-loss', 'ce'), '--eed and --exit-loss ce contradict'),
    'no-teacher': (('--exit-loss', 'ce', '--exit-output-weight', '1'), 'the loss has no teacher'),
    'temperature': (('--eed', '--exit-temperature', '0'), '--exit-temperature must be > 0, got 0.'),
    'classes': (('--num-classes', '1'), '--num-classes must be at least 2, the classes of the data, got 1.'),
    'metric': (('--eval-metric', 'exit7_top1', '--eed'), '--eval-metric must be one of loss, top1'),
    'epochs': (('--epochs', '0'), '--epochs must be >= 1, got 0.'),
    'fp16': (('--amp',), '--amp in float16 needs a GPU'),
    'resume': (('--resume', 'nowhere.pth.tar'), 'Checkpoint nowhere.pth.tar does not exist'),
    'initial': (('--initial-checkpoint', 'nowhere.pth'), 'Checkpoint nowhere.pth does not exist'),
    'config': (('--config', 'nowhere.yaml'), '--config nowhere.yaml cannot be read: No such file'),
    'split': (('--val-split', 'test2'), "must be one of train, val, got 'test2'"),
    'dataset': (('--dataset', 'torch/nonsense'), "No data set 'torch/nonsense'"),
    'package': (('--dataset', 'hfds/beans'), 'install the package'),
    'size': (('--model', 'test_vit', '--img-size', '33'), 'does not take images of [3, 33, 33]: Input height (33)'),
    'plateau': (('--val-split', '', '--sched', 'plateau'), '--sched plateau follows top1, which no split measures'),
}


@pytest.mark.parametrize(('flags', 'message'), cases(BAD_INPUT, slow=('encoder',)))
def test_bad_input_is_one_clear_line_and_nothing_is_written(flags, message, train_on_images, tmp_path):
    if flags[0] == '--amp' and torch.accelerator.is_available():
        pytest.skip('float16 runs on this GPU')
    run, (_, out, err) = train_on_images('run', *flags, code=2)
    line = err.strip().splitlines()[-1]
    assert message in line
    assert line.startswith('train.py: error: ')
    assert 'Traceback' not in err
    assert not run.exists()


@pytest.mark.parametrize('folder', ['absent', 'empty'])
def test_missing_and_empty_data_folders_are_named(folder, run_script, tmp_path):
    (tmp_path / 'empty').mkdir()
    code, _, err = run_script(train.main, *QUICK, '--eed', '--data-dir', tmp_path / folder)
    assert code == 2
    assert {'absent': 'Data folder', 'empty': 'Found 0 images'}[folder] in err.splitlines()[-1]
    assert not (tmp_path / 'output').exists()


def test_model_is_resolved_once_and_what_a_run_resolves_is_stored_beside_its_flags(
    train_on_images, tmp_path, monkeypatch
):
    start, _ = train_on_images('start', '--eed', '--epochs', '1')
    calls = []
    original = source.read_model_config

    def read(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(source, 'read_model_config', read)
    flags = ['--model', f'local-dir:{start}/best', '--pretrained', '--eed', '--lr-base', '0.1', '--val-split', '']
    flags += ['--data-dir', str(tmp_path / 'images'), '--img-size', '32', '-b', '8', '-j', '0', '--eval-metric', 'loss']
    args = parse_train_args([*flags, '--experiment', 'next'])
    before = deepcopy(vars(args))
    run = train.build_run(args, Accelerator(cpu=True))
    assert len(calls) == 1
    assert vars(args) == before
    record = vars(run.record)
    assert {name for name, value in record.items() if value != before.get(name)} == {
        *('num_classes', 'lr', 'lr_base_scale', 'origin'),
    }
    assert (record['num_classes'], record['lr']) == (2, pytest.approx(0.1 * 8 / 256))
    run.close()


def test_exits_that_are_about_to_be_trained_need_no_advice(train_on_images, tmp_path, caplog):
    plain = timm.create_model('test_resnet', num_classes=2)
    timm.models.save_for_hf(plain, tmp_path / 'plain', safe_serialization=True)
    name = f'local-dir:{tmp_path}/plain'
    train_on_images('run', '--model', name, '--pretrained', '--eed', '--epochs', '1')
    assert 'Loading pretrained weights' in caplog.text
    assert 'train them before use' not in caplog.text


def test_unknown_config_keys_are_named(train_on_images, tmp_path):
    (tmp_path / 'bad.yaml').write_text('batchsize: 8\nlr: 0.1\n')
    _, (_, _, err) = train_on_images('run', '--config', tmp_path / 'bad.yaml', code=2)
    assert 'has unknown keys: batchsize' in err


def test_batch_of_one_is_one_line_where_norms_cannot_take_it(train_on_images):
    _, (_, _, err) = train_on_images('run', '--eed', '-b', '1', code=2)
    assert err.splitlines()[-1] == (
        'train.py: error: A batch of 1 is too small for the batch norms: give a larger --batch-size.'
    )


def test_folder_without_splits_is_not_taken_for_both(run_script, image_folder):
    argv = (*QUICK, '--eed', '--data-dir', image_folder / 'train', '--experiment', 'run')
    code, _, err = run_script(train.main, *argv)
    assert code == 2
    assert "has no folders of splits, so 'validation' would be the training images again" in err
    code, out, _ = run_script(train.main, *argv, '--val-split', '', '--eval-metric', 'loss')
    assert code == 0
    run = image_folder.parent / 'output/train/run'
    losses = [float(row['train_loss']) for row in read_csv(run / 'summary.csv')]
    saved = torch.load(run / 'model_best.pth.tar', weights_only=False)
    assert saved['metric'] == pytest.approx(min(losses), rel=1e-6)  # as timm chooses without an evaluation
    assert 'eval_top1' not in read_csv(run / 'summary.csv')[0]


@pytest.mark.parametrize('where', ['file', 'file/below'])
def test_output_that_is_a_file_is_one_line(where, run_script, image_folder, tmp_path):
    (tmp_path / 'file').write_text('mine')
    argv = (*QUICK, '--eed', '--data-dir', image_folder, '--output', where, '--experiment', 'run')
    code, _, err = run_script(train.main, *argv)
    assert code == 2
    assert err.splitlines()[-1] == (
        f'train.py: error: --output and --experiment must name a folder, got {where}/run: file is a file.'
    )
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize('flags', [(), ('--no-prefetcher',)])
def test_weights_in_half_precision_train_and_are_reported(flags, train_on_images):
    run, _ = train_on_images('run', '--eed', '--epochs', '1', '--model-dtype', 'bfloat16', *flags)
    assert load_state(run / 'last.pth.tar')['backbone.fc.weight'].dtype == torch.bfloat16
    assert len(json.loads((run / 'results.json').read_text())['rows']) == 5


def test_mixing_on_the_host_ends_at_its_epoch(train_on_images, monkeypatch):
    from timm.data import Mixup

    original, seen = Mixup.__call__, []

    def note(self, images, target):
        images, target = original(self, images, target)
        seen.append(float(target.max(-1).values.min()))
        return images, target

    monkeypatch.setattr(Mixup, '__call__', note)
    train_on_images('run', '--mixup', '0.8', '--smoothing', '0', '--mixup-off-epoch', '1', '--no-prefetcher')
    assert len(seen) == 6
    assert min(seen[:3]) < 1
    assert seen[3:] == [1.0] * 3


def test_run_folder_in_use_is_not_overwritten(train_on_images):
    run, _ = train_on_images('run', '--eed', '--epochs', '1')
    before = {path: path.stat().st_mtime_ns for path in run.rglob('*')}
    _, (_, _, err) = train_on_images('run', '--eed', '--epochs', '1', code=2)
    assert 'holds a run' in err
    assert {path: path.stat().st_mtime_ns for path in run.rglob('*')} == before


def test_misfit_resume_changes_nothing(train_on_images):
    run, _ = train_on_images('run', '--eed', '--epochs', '1')
    before = {path: path.stat().st_mtime_ns for path in run.rglob('*')}
    _, (_, _, err) = train_on_images('other', '--exits', '1', '--resume', run / 'last.pth.tar', code=2)
    assert 'does not fit this model' in err
    assert {path: path.stat().st_mtime_ns for path in run.rglob('*')} == before


def test_nan_stops_the_run_and_keeps_what_was_good(train_on_images):
    flags = (
        '--eed',
        '--opt',
        'sgd',
        '--sched',
        'multistep',
        '--decay-milestones',
        '1',
        '--decay-rate',
        '1e30',
        '--lr',
        '0.01',
    )
    run, (_, _, err) = train_on_images('run', *flags, '--epochs', '3', code=2)
    line = err.strip().splitlines()[-1]
    assert 'is NaN or infinite at batch' in line
    assert 'exit0' in line or 'main' in line
    assert [row['epoch'] for row in read_csv(run / 'summary.csv')] == ['0']
    assert all(tensor.isfinite().all() for tensor in load_state(run / 'last.pth.tar').values())
    tme.create_model(f'local-dir:{run}/best', pretrained=True)
