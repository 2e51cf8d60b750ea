"""A small network with exits, exported once for all tests of this folder."""

import importlib
from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime
import pytest
import timm
import torch
from helpers import enliven
from torch.export import ExportedProgram

import timm_multiexit as tme
from timm_multiexit.deploy.graph import ExitGraph

export_module = importlib.import_module('timm_multiexit.deploy.export')

POLICY = tme.ExitPolicy('margin', (0.2, None, 0.3), (1.5, 1.0, 0.7, 2.0), 'mean')


class Exported(NamedTuple):
    model: tme.MultiExitModel
    folder: Path
    program: ExportedProgram
    whole: onnx.ModelProto


@pytest.fixture(scope='session')
def small():
    """A network in eval mode whose every layer counts."""
    torch.manual_seed(0)
    backbone = enliven(timm.create_model('test_resnet', num_classes=10))
    model = enliven(tme.attach_exits(backbone, input_size=(3, 64, 64))).eval()
    with torch.no_grad():  # of faint images all say the same class, or patience would never end
        for linear in (*(head.fc for head in model.exits), model.backbone.fc):
            linear.bias[3] += 2
    model.policy = POLICY
    return model


@pytest.fixture(scope='session')
def exported(small, tmp_path_factory):
    """The network, the folder of all its programs in both formats, and the uncut programs of all classifiers."""
    folder = tmp_path_factory.mktemp('exported') / 'net'
    uncut = []

    def keep(function):
        return lambda *args: uncut.append(function(*args)) or uncut[-1]

    small.train()
    with pytest.MonkeyPatch.context() as patch:
        for name in ('trace_program', 'convert_program'):
            patch.setattr(export_module, name, keep(getattr(export_module, name)))
        tme.export(small, folder, formats=('onnx', 'pt2'), class_names=[f'class {idx}' for idx in range(10)])
    assert small.training
    small.eval()
    return Exported(small, folder, *uncut)


@pytest.fixture(scope='session')
def graph(exported):
    """The graph of all classifiers."""
    return ExitGraph(exported.whole)


@pytest.fixture(scope='session')
def open_program():
    """Return a function that makes a session of one thread of a program or the path of one."""

    def open_program(program):
        if isinstance(program, onnx.ModelProto):
            onnx.checker.check_model(program, full_check=True)
            program = program.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(program, options, providers=['CPUExecutionProvider'])

    return open_program
