"""What the flags of timm's validate.py do here: by slow computations on the logits, and one line for those refused."""

import json

import numpy as np
import pytest
import torch
from helpers.validation import make_validator, parse
from PIL import Image
from timm.data import create_loader

import timm_multiexit as tme
from timm_multiexit.cli import validate
from timm_multiexit.cli.flags.timm_rules import VALIDATE_RULES
from timm_multiexit.cli.flags.validate_args import create_validate_parser, resolve_data
from timm_multiexit.cli.validate import create_evaluated_model, place_evaluated_model, resolve_images
from timm_multiexit.data.datasets import create_checked_dataset
from timm_multiexit.evaluation.labels import read_valid_labels
from timm_multiexit.utils.errors import DataError, MultiExitError, StateError

REFUSED = {
    '--torchscript': '--torchscript is not supported (torch.jit is deprecated). Use --torchcompile.',
    '--aot-autograd': '--aot-autograd is not supported. Use --torchcompile aot_eager',
    '--fuser te': '--fuser te is not supported',
    '--device cuda:1': "--device must be cuda (any accelerator that Accelerate finds) or cpu, got 'cuda:1'.",
    '--amp --model-dtype bfloat16': '--amp needs float32 weights, got --model-dtype bfloat16.',
    '--naflex-loader': "--naflex-loader is not supported. Use timm's own validate.py.",
    '--num-gpu 2': '--num-gpu 2 is not supported (DataParallel). Start a process for each GPU with torchrun',
    '--test-pool': "Use --img-size N alone, or timm's own validate.py.",
    '--tf-preprocessing': '--tf-preprocessing is not supported (it needs TensorFlow). Use --interpolation',
    '--task multilabel': 'timm_multiexit.evaluate(model, loader, multi_label=True)',
    '--target-format multihot': '--task multilabel is not supported here.',
    '--real-labels a.json --valid-labels b.txt': '--real-labels and --valid-labels exclude each other',
    '--torchcompile-mode default': '--torchcompile-mode needs --torchcompile.',
    '--budget -3ms': "got '-3ms'",
    '--budget -5%': "got '-5%'",
}


@pytest.mark.parametrize(('flags', 'message'), REFUSED.items(), ids=REFUSED)
def test_refused_in_one_line_before_a_model_is_made(flags, message, run_script, monkeypatch):
    monkeypatch.setattr('timm_multiexit.cli.validate.create_evaluated_model', None)
    code, out, err = run_script(validate.main, '-m', 'test_resnet', *flags.split())
    line = err.strip().splitlines()[-1]
    assert (code, out) == (2, '')
    assert line.startswith('validate.py: error: ')
    assert message in line
    assert '{' not in line


def test_every_rule_is_tried():
    broken = set()
    for flags in REFUSED:
        args = create_validate_parser().parse_args(flags.split())
        broken |= {line for is_broken, line in VALIDATE_RULES if is_broken(args)}
    assert broken == {line for _, line in VALIDATE_RULES}


# The data


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        ('', ('digits', 'test')),
        ('--split train', ('digits', 'train')),
        ('--split validation', ('digits', 'validation')),
        ('--dataset digits', ('digits', 'validation')),
        ('images', ('', 'validation')),
        ('images --split test', ('', 'test')),
    ],
)
def test_split_that_is_named_is_evaluated(flags, expected):
    args = create_validate_parser().parse_args(flags.split())
    resolve_data(args)
    assert (args.dataset, args.split) == expected


def test_endings_of_image_files_are_those_of_the_input_key(image_folder):
    paths = sorted((image_folder / 'val').rglob('*.jpg'))
    for path in (paths[0], paths[-1]):
        path.rename(path.with_suffix('.picture'))
    args = parse(
        '-m', 'test_resnet', '--num-classes', '2', '--img-size', '32', '--input-key', '.picture', str(image_folder)
    )
    validator = make_validator(args, create_evaluated_model(args).eval())
    assert len(validator.data.dataset) == 2


@pytest.fixture
def net(make_model, tmp_path):
    """A folder with a lively network of ten classes."""
    model = make_model(exits=[1, 3], input_size=(3, 32, 32))
    with torch.no_grad():
        for classifier in (*(head.fc for head in model.exits), model.get_classifier()):
            classifier.weight *= 10
    tme.save_pretrained(model, tmp_path / 'net', data_config={'input_size': (3, 32, 32), 'crop_pct': 1.0})
    return f'local-dir:{tmp_path}/net'


def read_logits(net, folder=None, dtype=torch.float32):
    """Return the logits of all classifiers and their mean, and the targets, by timm's own loader."""
    model = tme.create_model(net, pretrained=True).eval().to(dtype)
    config = {key: model.pretrained_cfg[key] for key in ('mean', 'std', 'interpolation', 'crop_pct')}
    name, split = ('', 'validation') if folder else ('digits', 'test')
    dataset = create_checked_dataset(name, root=folder and str(folder), split=split)
    loader = create_loader(dataset, (3, 32, 32), 64, num_workers=0, use_prefetcher=False, **config)
    with torch.no_grad():
        batches = [(model(images.to(dtype), exits=True).logits, target) for images, target in loader]
    logits = [torch.cat([parts[idx] for parts, _ in batches]).float() for idx in range(3)]
    return [*logits, sum(logits) / 3], torch.cat([target for _, target in batches])


def run_rows(run_script, *argv):
    code, out, err = run_script(validate.main, '-j', '0', '--time-rounds', '0', *argv)
    assert code == 0, err
    return json.loads(out.partition('--result\n')[2])['rows'], err


# Labels


def test_valid_labels_are_the_only_answers(net, image_folder, run_script, tmp_path):
    (tmp_path / 'valid.txt').write_text('7\n2\n')
    rows, _ = run_rows(run_script, '-m', net, '--valid-labels', tmp_path / 'valid.txt', image_folder)
    logits, targets = read_logits(net, image_folder)
    expected = [100 * (single[:, [7, 2]].argmax(-1) == targets).float().mean().item() for single in logits]
    assert [row['top-1'] for row in rows] == pytest.approx(expected)
    every, _ = run_rows(run_script, '-m', net, image_folder)
    assert [row['top-1'] for row in every] != [row['top-1'] for row in rows]


def test_valid_labels_take_their_names_along(net, tmp_path):
    (tmp_path / 'valid.txt').write_text('7\n2\n')
    args = parse('-m', net, '--valid-labels', str(tmp_path / 'valid.txt'))
    names = create_evaluated_model(parse('-m', net)).pretrained_cfg.get('label_names')
    found = create_evaluated_model(args).pretrained_cfg.get('label_names')
    assert found == (names and [names[7], names[2]])


@pytest.mark.parametrize('text', ['', '3\n3\n', '10\n', '-1\n', 'cat\n'])
def test_valid_labels_that_are_no_classes_are_refused(text, tmp_path):
    (tmp_path / 'valid.txt').write_text(text)
    with pytest.raises(DataError, match='--valid-labels .*valid.txt'):
        read_valid_labels(str(tmp_path / 'valid.txt'), 10)


@pytest.fixture
def validation_images(image_folder):
    """The validation images under the names of ImageNet's, and the JSON of labels."""
    for idx, path in enumerate(sorted((image_folder / 'val').rglob('*.jpg')), 1):
        path.rename(path.with_name(f'ILSVRC2012_val_{idx:08d}.JPEG'))
    labels = [[], [0, 3], [5], [1, 2, 9], [7], [], [4, 8], [0], [6, 7], [2], [3, 5, 9]]
    (image_folder / 'real.json').write_text(json.dumps(labels))
    return image_folder, labels


def test_accuracy_by_real_labels_is_that_of_any_of_them(net, validation_images, run_script):
    folder, labels = validation_images
    rows, _ = run_rows(run_script, '-m', net, '--real-labels', folder / 'real.json', folder)
    logits, _ = read_logits(net, folder)
    for row, single in zip(rows, logits, strict=True):
        for count in (1, 5):
            best = single.argsort(-1, descending=True)[:, :count].tolist()
            right = [bool({*answers} & {*allowed}) for answers, allowed in zip(best, labels, strict=True) if allowed]
            assert len(right) == 9
            assert row[f'real_top{count}'] == pytest.approx(100 * sum(right) / 9)


def test_real_labels_of_other_images_are_refused_before_the_evaluation(net, validation_images, run_script, monkeypatch):
    folder, labels = validation_images
    monkeypatch.setattr('timm_multiexit.evaluation.validator.Validator.run', None)
    flags = ('-m', net, '-j', '0', '--real-labels', folder / 'real.json', folder)
    for content, line in (
        (json.dumps(labels[1:]), 'has labels of 10 images, the data set has 11.'),
        ('{', 'Cannot read --real-labels'),
    ):
        (folder / 'real.json').write_text(content)
        code, _, err = run_script(validate.main, *flags)
        assert (code, line in err.strip().splitlines()[-1]) == (2, True)
    (folder / 'real.json').write_text(json.dumps(labels))
    (folder / 'val' / 'cat' / 'ILSVRC2012_val_00000001.JPEG').rename(folder / 'val' / 'cat' / 'a.jpg')
    code, _, err = run_script(validate.main, *flags)
    assert (code, 'ILSVRC2012_val_*.JPEG, got a.jpg.' in err.strip().splitlines()[-1]) == (2, True)


@pytest.mark.parametrize('average', ['micro', 'macro', 'weighted'])
def test_averages_over_classes_are_those_of_the_counts(average, net, run_script):
    rows, _ = run_rows(run_script, '-m', net, '--metrics-avg', average)
    logits, targets = read_logits(net)
    for row, single in zip(rows, logits, strict=True):
        counts = np.zeros((10, 10))
        for target, answer in zip(targets.tolist(), single.argmax(-1).tolist()):
            counts[target, answer] += 1
        if average == 'micro':  # every image has one answer
            expected = [counts.trace() / counts.sum()] * 3
        else:
            precision = counts.diagonal() / np.maximum(counts.sum(0), 1)
            recall = counts.diagonal() / counts.sum(1)
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            weights = counts.sum(1) / counts.sum() if average == 'weighted' else np.full(10, 0.1)
            expected = [(weights * values).sum() for values in (precision, recall, f1)]
        found = [row[f'{average}_{name}'] for name in ('precision', 'recall', 'f1_score')]
        assert found == pytest.approx([100 * value for value in expected], abs=0.4)  # one image: sums differ


# The model


def test_type_of_the_weights_is_the_models(net, run_script, tmp_path):
    flags = ('--model-dtype', 'bfloat16', '--device', 'cpu', '--results-file', tmp_path / 'r.json')
    rows, _ = run_rows(run_script, '-m', net, *flags, '--results-format', 'json')
    logits, targets = read_logits(net, dtype=torch.bfloat16)
    expected = [100 * (single.argmax(-1) == targets).float().mean().item() for single in logits]
    assert [row['top-1'] for row in rows] == pytest.approx(expected, abs=1.5)  # the prefetcher rounds elsewhere
    assert json.loads((tmp_path / 'r.json').read_text())['precision'] == 'bfloat16'


def test_reparameterized_model_is_smaller_and_answers_the_same():
    flags = ('-m', 'repvgg_a0', '--num-classes', '5', '--exits', '2', '--img-size', '32')
    models = []
    for more in ((), ('--reparam',)):
        torch.manual_seed(0)
        models.append(create_evaluated_model(parse(*flags, *more)).eval())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain, fused = (model(images, exits=True).logits for model in models)
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, other)
    num_branches = [sum('conv_1x1' in name for name, _ in model.named_parameters()) for model in models]
    assert (num_branches[0] > 0, num_branches[1]) == (True, 0)


@pytest.mark.slow
def test_compiled_model_has_the_same_table(net, run_script):
    plain, _ = run_rows(run_script, '-m', net)
    compiled, _ = run_rows(run_script, '-m', net, '--torchcompile', 'eager')
    assert compiled == plain


def test_compiled_model_is_compiled(net):
    args = parse('-m', net, '--torchcompile', 'eager')
    model = place_evaluated_model(args, create_evaluated_model(args), torch.device('cpu'))
    assert model._compiled_call_impl is not None


# Preparation of images


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        ('', {'crop_mode': 'center'}),
        ('--crop-mode squash', {'crop_mode': 'squash'}),
        ('--crop-border-pixels 4', {'crop_border_pixels': 4}),
    ],
)
def test_crops_are_the_flags(flags, expected, make_model):
    config = resolve_images(parse('-m', 'net', *flags.split()), make_model())
    assert {name: config[name] for name in expected} == expected
    assert ('crop_border_pixels' in config) == ('crop_border_pixels' in expected)


def test_pixels_of_the_border_are_cut_off(tmp_path, net):
    """White but for the inner 24 x 24 pixels."""
    pixels = np.full((32, 32, 3), 255, dtype=np.uint8)
    pixels[4:28, 4:28] = 0
    (tmp_path / 'val' / 'a').mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / 'val' / 'a' / 'x.png')
    for border, share in ((0, 1 - (24 / 32) ** 2), (4, 0.0)):
        flags = ('--crop-border-pixels', str(border)) if border else ()
        args = parse('-m', net, '--mean', '0', '--std', '1', '--interpolation', 'nearest', *flags, str(tmp_path))
        model = create_evaluated_model(args).eval()
        args.split = 'val'
        validator = make_validator(args, model, config=resolve_images(args, model))
        images, _ = next(iter(validator.data.create_loader(validator.data.dataset, validator.data.config)))
        assert (images > 0.5).float().mean().item() == share


def test_size_that_timm_tests_with_is_told(make_model, caplog):
    model = make_model()
    model.backbone.pretrained_cfg.update(test_input_size=(3, 288, 288), test_crop_pct=1.0)
    with caplog.at_level('INFO'):
        config = resolve_images(parse('-m', 'net', 'images'), model)
        assert config['input_size'] == (3, 160, 160)
        assert 'give --img-size 288 --crop-pct 1.' in caplog.messages[-1]
        caplog.clear()
        for flags in (['--use-train-size'], ['--img-size', '288']):
            resolve_images(parse('-m', 'net', *flags, 'images'), model)
        assert caplog.messages == []


# The run


def test_batches_get_smaller_where_memory_runs_out(monkeypatch, run_script):
    """The sizes are timm's: half-way between powers of two."""
    sizes = []

    def run_out(args, accelerator):
        sizes.append(args.batch_size)
        raise RuntimeError('CUDA out of memory.') if args.batch_size > 8 else StateError('enough')

    monkeypatch.setattr('timm_multiexit.cli.validate.validate', run_out)
    code, _, err = run_script(validate.main, '-m', 'test_resnet', '--retry', '-b', '32')
    assert (code, err.strip().splitlines()[-1]) == (2, 'validate.py: error: enough')
    assert sizes == [32, 24, 16, 12, 8]
    assert 'CUDA out of memory. Again with --batch-size 24.' in err


@pytest.mark.parametrize(('flags', 'reason'), [((), 'CUDA out of memory.'), (('--retry',), 'illegal memory access')])
def test_other_errors_are_not_tried_again(flags, reason, monkeypatch, run_script):
    calls = []

    def fail(*args):
        calls.append(args)
        raise RuntimeError(reason)

    monkeypatch.setattr('timm_multiexit.cli.validate.validate', fail)
    with pytest.raises(RuntimeError, match=reason):
        run_script(validate.main, '-m', 'test_resnet', *flags)
    assert len(calls) == 1


def test_progress_is_logged_after_so_many_batches(net, run_script):
    _, err = run_rows(run_script, '-m', net, '-b', '100', '--log-freq', '2')
    lines = [line.split(', ')[:2] for line in err.splitlines() if line.startswith('Test: ')]
    assert lines == [['Test: 2 of 4 batches', '200 images'], ['Test: 4 of 4 batches', '360 images']]
    assert 'Test: ' not in run_rows(run_script, '-m', net, '-b', '100')[1]


def test_averages_need_one_process(make_model):
    from timm_multiexit.cli.flags.validate_args import check_validate_args

    for flags in (('--metrics-avg', 'macro'), ('--real-labels', 'real.json')):
        with pytest.raises(MultiExitError, match=f'{flags[0]} needs all logits in one process'):
            check_validate_args(parse('-m', 'net', *flags), make_model(), num_processes=2)
