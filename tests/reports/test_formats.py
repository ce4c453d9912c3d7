import math

import pytest

from monteclora.reports.formats import count, decimals, duration, signed, size


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (decimals(3)(0.12345), "0.123"),
        (decimals(1)(-2.0), "-2.0"),
        (decimals(3)(math.nan), "not finite"),
        (decimals(3)(math.inf), "not finite"),
        (signed(0.05), "+0.050"),
        (signed(-0.05), "-0.050"),
        (signed(-1e-17), "+0.000"),
        (count(1234567), "1 234 567"),
        (count(12), "12"),
        (duration(0.04), "0.0 s"),
        (duration(8.44), "8.4 s"),
        (duration(9.97), "10 s"),
        (duration(59.6), "1 min 00 s"),
        (duration(200), "3 min 20 s"),
        (duration(3599.7), "1 h 00 min"),
        (duration(3900), "1 h 05 min"),
        (size(1.5e4), "15 kB"),
        (size(8.44e8), "844 MB"),
        (size(1.2345e9), "1.23 GB"),
    ],
)
def test_numbers_read_as_people_write_them(shown, expected):
    assert plain(shown) == expected


def test_a_number_does_not_break_from_its_unit():
    for shown in (duration(5), duration(200), size(1e9), count(12345)):
        assert " " not in shown.replace("min 20", "")
