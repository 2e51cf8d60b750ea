"""The figure of the network, and accuracy over its costs."""

from timm_multiexit.analysis.architecture import accuracy_over_macs, describe_architecture, draw_architecture


def test_architecture_adds_up_to_the_costs_of_the_model(make_model):
    model = make_model(exits=[1, 3], head='conv')
    found = describe_architecture(model, (3, 64, 64))
    costs = model.cost((3, 64, 64))
    stages, exits = found['stages'], found['exits']
    # test_resnet: layer1 has 32 channels at a quarter of the side, layer3 192 at a sixteenth, the end 96 at 1/32.
    assert [(stage['to'], stage['channels'], stage['size'], stage['exit']) for stage in stages] == [
        (model.exits.specs[0].module, 32, [16, 16], 0),
        (model.exits.specs[1].module, 192, [4, 4], 1),
        ('main', 96, [2, 2], None),
    ]
    assert sum(stage['macs'] for stage in stages) == costs[-1].fixed.macs
    assert stages[0]['macs'] + exits[0]['macs'] == costs[0].fixed.macs
    assert stages[0]['macs'] + stages[1]['macs'] + exits[0]['macs'] + exits[1]['macs'] == costs[1].sequential.macs
    assert [head['params'] for head in exits] == [sum(p.numel() for p in head.parameters()) for head in model.exits]


def test_accuracy_over_macs_charges_the_ensemble_with_everything(make_model):
    model = make_model(exits=[1, 3])
    costs = model.cost((3, 64, 64))
    points = accuracy_over_macs(model, {'exit0': 1.0, 'exit1': 2.0, 'main': 3.0, 'ens': 4.0}, (3, 64, 64))
    assert [point['fixed'] for point in points] == [*(cost.fixed.macs for cost in costs), None]
    assert [point['sequential'] for point in points] == [
        *(cost.sequential.macs for cost in costs),
        costs[-1].sequential.macs,
    ]
    assert [(point['classifier'], point['top1']) for point in points][2:] == [('main', 3.0), ('ens', 4.0)]


def test_architecture_is_drawn_with_all_its_boxes(make_model):
    numbers = describe_architecture(make_model(exits=[1, 3]), (3, 64, 64))
    texts = [text.get_text() for text in draw_architecture(numbers, 'net').axes[0].texts]
    written = [text for text in texts if text]
    assert len(written) == 1 + 3 + 2 + 1
    assert written[0] == 'image\n3 x 64 x 64'
    assert written[-1] == 'main\n10 classes'
    assert any(text.startswith('exit1\nconv ') and text.endswith('MACs') for text in written)
