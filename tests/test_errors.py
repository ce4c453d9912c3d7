from __future__ import annotations

import pickle

import pytest

from monteclora import errors

KINDS = [getattr(errors, name) for name in errors.__all__ if name[0].isupper()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_one_line_of_message_and_hint(kind):
    error = kind("row 3 of a.csv\nhas no label.", "Fill it in.")
    assert str(error) == "row 3 of a.csv has no label. Fill it in."
    assert str(kind("no label")) == "no label"
    assert isinstance(error, errors.MonteCLoRAError)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_a_trip_between_processes(kind):
    error = pickle.loads(pickle.dumps(kind("message", "hint")))
    assert (type(error), error.message, error.hint) == (kind, "message", "hint")


def test_exit_codes_tell_wrong_input_from_divergence():
    assert {kind.exit_code for kind in KINDS if kind is not errors.DivergenceError} == {2}
    assert errors.DivergenceError.exit_code == 3


def test_input_errors_are_value_errors_too():
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.DataError, ValueError)


def test_control_characters_of_a_file_do_not_reach_the_terminal():
    assert (
        str(errors.DataError("a\x1b[2J.csv\x00 \ud800 \u202e is empty")) == r"a\x1b[2J.csv\x00 \ud800 \u202e is empty"
    )
