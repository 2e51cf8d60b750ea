"""Names and tables."""

from timm_multiexit.utils.text import exit_names, format_table


def test_exit_names_end_with_main():
    assert exit_names(3) == ('exit0', 'exit1', 'exit2', 'main')
    assert exit_names(0) == ('main',)


def test_table_puts_numbers_right_and_text_left():
    rows = [
        {'exit': 0, 'tap': 'layer1.1', 'top-1': 7.125, 'MACs': 1234567, 'ECE': 0.03125},
        {'exit': 'main', 'tap': 'fc', 'top-1': 98.6111, 'MACs': 999, 'ECE': None},
    ]
    assert format_table(rows).splitlines() == [
        'exit  tap       top-1       MACs     ECE',
        '0     layer1.1   7.12  1,234,567  0.0312',
        'main  fc        98.61        999       -',
    ]


def test_table_of_nothing_says_so():
    assert format_table([]) == '(none)'
