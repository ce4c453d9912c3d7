import pytest
from datasets import Dataset

from monteclora.data.corruption import CORRUPTIONS, STRENGTHS, corrupt, corrupted_rows
from monteclora.errors import ConfigError

TEXT = " ".join(f"word{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10]} is" for i in range(100))


def changed(name, strength):
    """The share of letters or words that is not as it was."""
    found = corrupt(TEXT, name, strength)
    if name == "typos":  # by the words that are still there, of six letters each on average four
        return 1 - sum(word in TEXT.split() for word in found.split()) / len(TEXT.split())
    if name == "upper_case":
        return sum(word.isupper() for word in found.split()) / 200
    return 1 - len(found.split()) / 200


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_has_the_share_of_its_strength_and_the_same_result_every_time(name):
    shares = [changed(name, strength) for strength in STRENGTHS]
    assert shares == sorted(shares)
    assert shares[0] < shares[2]
    if name != "typos":
        assert shares == pytest.approx(CORRUPTIONS[name][1], abs=0.1)
    else:
        assert 0.05 < shares[0] < 0.25 < shares[2] < 0.75
    assert [corrupt(TEXT, name, s) for s in STRENGTHS] == [corrupt(TEXT, name, s) for s in STRENGTHS]
    if name != "cut":
        assert corrupt(TEXT, name, 2, seed=0) != corrupt(TEXT, name, 2, seed=1)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("text", ["a", "", "  ", "?!", "one two", "ÄÖ ß"])
def test_of_a_text_with_a_word_something_is_left(name, text):
    for strength in STRENGTHS:
        assert bool(corrupt(text, name, strength).strip()) == bool(text.strip())


def test_a_stronger_one_drops_what_a_weaker_one_does():
    weak, strong = (corrupt(TEXT, "words_dropped", strength).split() for strength in (1, 3))
    assert len(set(strong) - set(weak)) == 0


def test_rows_keep_their_labels_and_other_columns():
    rows = Dataset.from_dict({"text": [TEXT, "b c"], "text_pair": ["d e f g", "h"], "label": [1, 0]})
    found = corrupted_rows(rows, "upper_case", 3)
    assert found["text"][:] == [TEXT.upper(), "B C"]
    assert found["text_pair"][:] == ["D E F G", "H"]
    assert found["label"][:] == [1, 0]


def test_wrong_names_are_refused():
    with pytest.raises(ConfigError, match="there is no corruption 'smudged'"):
        corrupt("a", "smudged", 1)
    with pytest.raises(ConfigError, match="strength is 4"):
        corrupt("a", "typos", 4)
