"""An exported folder of a tiny network, built by hand: what the runner reads, without an export."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = ['ant', 'bee', 'cat', 'dog', 'elk']
SIZE = (3, 8, 10)
_WIDTH = 16


def _value(name, *shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, ['batch', *shape])


def _stage(idx, num_exits, rng):
    """Stage `idx` of the chain: two tensors cross each cut, the features and the means of the image."""
    is_first, is_last = idx == 0, idx == num_exits
    width = SIZE[0] if is_first else _WIDTH
    weights = {
        'trunk': rng.normal(size=(width, _WIDTH)) * (4 if is_first else 1.5 / _WIDTH**0.5),
        'skip': rng.normal(size=(SIZE[0], _WIDTH)),
        'head': rng.normal(size=(_WIDTH, len(CLASSES))) * (1 + idx) / _WIDTH**0.5,
    }
    nodes, inputs = [], [_value('state_0', _WIDTH), _value('state_1', SIZE[0])]
    features, means = 'state_0', 'state_1'
    if is_first:
        inputs, features, means = [_value('image', *SIZE)], 'means', 'means'
        axes = numpy_helper.from_array(np.array([2, 3]), 'axes')
        nodes.append(helper.make_node('ReduceMean', ['image', 'axes'], ['means'], keepdims=0))
    nodes += [
        helper.make_node('MatMul', [features, 'trunk'], ['mixed']),
        helper.make_node('MatMul', [means, 'skip'], ['skipped']),
        helper.make_node('Add', ['mixed', 'skipped'], ['summed']),
        helper.make_node('Tanh', ['summed'], ['features']),
        helper.make_node('MatMul', ['features', 'head'], ['logits']),
    ]
    outputs = [_value('logits', len(CLASSES))]
    if not is_last:
        outputs += [_value('next_0', _WIDTH), _value('next_1', SIZE[0])]
        nodes += [
            helper.make_node('Identity', ['features'], ['next_0']),
            helper.make_node('Identity', [means], ['next_1']),
        ]
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    initializers += [axes] if is_first else []
    return nodes, inputs, outputs, initializers


def _save(path, parts):
    nodes, inputs, outputs, initializers = parts
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def make_exported(folder, num_exits=3, *, classes=CLASSES, policy=None, budgets=()):
    """Write the chain of a network with so many exits and its manifest, and return the folder."""
    folder, rng = Path(folder), np.random.default_rng(0)
    names = [*(f'exit_{idx}' for idx in range(num_exits)), 'main']
    paths = [f'stages/{name}.onnx' for name in names]
    for idx, path in enumerate(paths):
        _save(folder / path, _stage(idx, num_exits, rng))
    macs = [round(1000 * (idx + 1) / (num_exits + 1)) for idx in range(num_exits + 1)]
    manifest = {
        'format': 1,
        'name': 'tiny',
        'versions': {'timm_multiexit': '0.1.0', 'timm': '1', 'torch': '2', 'onnx': '1', 'onnxruntime': None},
        'opset': 20,
        'num_classes': len(CLASSES),
        'classes': classes,
        'preprocessing': {
            'input_size': list(SIZE),
            'interpolation': 'bicubic',
            'crop_pct': 0.875,
            'crop_mode': 'center',
            'mean': [0.4, 0.5, 0.6],
            'std': [0.2, 0.3, 0.4],
        },
        'exits': [
            {'name': name.replace('_', ' '), 'macs': {'fixed': cost, 'sequential': cost + 10 * idx}, 'params': 100}
            for idx, (name, cost) in enumerate(zip(names, macs))
        ],
        'plain_macs': 1000,
        'policy': policy,
        'budgets': list(budgets),
        'programs': {'fp32': {'fixed': [], 'stages': paths, 'conditional': None}},
        'pt2': None,
        'int8': None,
        'files': {},
    }
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder, manifest):
    """Write a manifest with sizes and checksums of the files that are there."""
    manifest['files'] = {
        path.relative_to(folder).as_posix(): {
            'size': path.stat().st_size,
            'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob('*'))
        if path.is_file() and path.name != 'manifest.json'
    }
    (folder / 'manifest.json').write_text(json.dumps(manifest))
