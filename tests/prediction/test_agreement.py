import pytest

from monteclora.prediction.agreement import agreement, normalised


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  The  Answer is: 42!", "the answer is 42"),
        ("\uff13.5 \u2018x\u2019", "3.5 x"),
        ("-7,", "-7"),
        ("STRASSE", "strasse"),
        ("stra\u00dfe.", "strasse"),
        ("?!", ""),
    ],
)
def test_normalised(text, form):
    assert normalised(text) == form


def test_agreement_is_the_largest_group_and_the_first_of_equals():
    found = agreement(["Paris.", "London", "paris", "Rome"])
    assert (found.answer, found.share) == ("Paris.", 0.5)
    found = agreement(["a", "b"])
    assert (found.answer, found.share) == ("a", 0.5)
    assert agreement(["x"]).share == 1.0
