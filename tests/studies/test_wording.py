"""Keys and conditions in words."""

from monteclora.studies.wording import condition_in_words, values_in_words


def test_values_are_named_by_the_last_part_of_their_keys() -> None:
    values = {"data.label_noise": 0.2, "seed": 1}
    assert values_in_words(values) == condition_in_words(values) == "label noise 0.2, seed 1"
    assert (values_in_words({}), condition_in_words({})) == ("", "all")
