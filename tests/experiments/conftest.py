"""Results of three methods."""

import pytest
from helpers.experiments import make_result

# Main and ensemble of three seeds.
NUMBERS = {
    'plain': [(80.0,), (81.0,), (80.5,)],
    'ce': [(60.0, 80.2, 80.0), (61.0, 81.1, 80.9), (62.0, 80.7, 80.4)],
    'eed-kl': [(61.0, 80.7, 80.9), (62.0, 81.7, 81.7), (63.0, 81.15, 81.3)],
}


@pytest.fixture
def results():
    names = {1: ('main',), 3: ('_0', 'main', 'ens')}
    return [
        make_result(method, seed, **dict(zip(names[len(values)], values)))
        for method, runs in NUMBERS.items()
        for seed, values in enumerate(runs)
    ]
