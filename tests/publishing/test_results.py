"""Keys of rows: read where they are, derived from names in files of earlier versions."""

import pytest

from timm_multiexit.publishing.results import add_row_keys, exit_rows, find_default, find_main, policy_rows

OLD = {
    'plain timm': ('reference', None),
    'main': ('reference', None),
    'all exits': ('reference', None),
    'budget 60%': ('budget', '60%'),
    'budget 2.5ms': ('budget', '2.5ms'),
    'max drop 1': ('max_drop', None),
    "the model's own": ('own', None),
    'threshold 0.5,none': ('threshold', None),
}


@pytest.mark.parametrize(('name', 'expected'), OLD.items(), ids=OLD)
def test_rows_without_keys_get_them_from_their_names(name, expected):
    (row,) = add_row_keys({'dynamic': [{'policy': name}]})['dynamic']
    assert (row['kind'], row['budget']) == expected


def test_keys_that_are_there_are_kept():
    rows = {'rows': [{'exit': '0', 'exit_idx': 3}], 'dynamic': [{'policy': 'a', 'kind': 'budget', 'budget': '9%'}]}
    assert add_row_keys(rows) == rows


def test_what_was_not_measured_stays_missing_and_nothing_is_changed_in_place():
    results = {'rows': [{'exit': '1'}, {'exit': 'main'}, {'exit': 'ens'}], 'dynamic': None}
    added = add_row_keys(results)
    assert [row['exit_idx'] for row in added['rows']] == [1, 'main', 'ens']
    assert added['dynamic'] is None
    assert 'exit_idx' not in results['rows'][0]
    assert add_row_keys({}) == {}


def test_rows_are_found_by_their_keys():
    measured = {'top-1': 80.0, 'macs': 1e6, 'macs_percent': 50.0}
    results = add_row_keys(
        {
            'rows': [{'exit': name} for name in ('0', '1', 'main', 'ens')],
            'dynamic': [
                {'policy': 'all exits', **measured},
                {'policy': 'budget 50%', **measured, 'is_default': True},
                {'policy': 'budget 60%', **measured, 'macs': None},
            ],
        }
    )
    assert [row['exit'] for row in exit_rows(results['rows'])] == ['0', '1']
    assert find_main(results['rows'])['exit'] == 'main'
    assert [row['policy'] for row in policy_rows(results)] == ['budget 50%']
    assert find_default(results)['budget'] == '50%'


def test_files_that_call_main_plain_timm_are_read():
    ms = {'plain timm': 3.0, '0': 1.0, 'main': 3.1}
    results = {'dynamic': [{'policy': 'plain timm', 'kind': 'reference'}], 'latency': {'rounds': 3, 'ms': ms}}
    found = add_row_keys(results)
    assert found['dynamic'] == [{'policy': 'main', 'kind': 'reference'}]
    assert found['latency'] == {'rounds': 3, 'ms': {'main in timm': 3.0, '0': 1.0, 'main': 3.1}}
    assert list(results['latency']['ms']) == list(ms)
