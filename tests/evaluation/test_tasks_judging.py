import pytest

from beacon.evaluation.tasks.judging import contains, exact, f1, first_mentioned, place, words


@pytest.mark.parametrize(
    "output, answer, is_there, is_all",
    [
        ("48213", "48213", True, True),
        (" The number is 48,213.\n", "48213", True, False),
        ("48213\n# the number of", "48213", True, True),
        ("482134", "48213", False, False),
        ("48 213", "48213", False, False),
        ("148213", "48213", False, False),
        ("48213.5", "48213", False, False),
        ("v48213", "48213", False, False),
        ("", "48213", False, False),
        ("THE Blue-Lantern!", "blue lantern", True, True),
        ("blue old lantern", "blue lantern", False, False),
        ("lantern blue", "blue lantern", False, False),
        ("blue lanterns", "the blue lantern", False, False),
        ("a blue lantern", "the blue lantern", True, True),
        ("A", "a", True, True),
        ("(A) because", "A", True, False),
        ("B", "A", False, False),
        ("Müller ﬁrst", "müller first", True, True),
        ("in 3.5 days", "3.5 days", True, False),
        ("in 3.6 days", "3.5 days", False, False),
        ("答案是北京。", "北京", True, False),
        ("北京", "北 京", True, True),
        ("北海", "北京", False, False),
        ("?!", "?!", True, True),
        ("one\ntwo", "one\ntwo", True, True),
        ("one\n\nthree", "one\ntwo", False, False),
    ],
)
def test_right_wrong_and_nearly(output, answer, is_there, is_all):
    assert (contains(output, answer), exact(output, answer)) == (is_there, is_all)


def test_share_of_words():
    assert f1("The blue lantern", "a blue lantern") == 1.0
    assert f1("blue", "blue lantern") == pytest.approx(2 / 3)
    assert f1("blue blue blue lantern", "blue lantern") == pytest.approx(2 * 2 / 6)
    assert f1("green\nblue lantern", "blue lantern") == 0.0  # the answer has one line
    assert f1("", "blue") == 0.0


def test_what_is_named_first():
    among = ["tea", "green tea houses", "old maps"]
    assert first_mentioned("We spoke of old maps, then tea.", "old maps", among)
    assert not first_mentioned("We spoke of old maps, then tea.", "tea", among)
    assert not first_mentioned("mapping", "old maps", among)
    assert not first_mentioned("", "tea", among)
    assert place("we spoke of tea", "tea") == 3


def test_words():
    assert words("It's 1,234,567.25 km²_x") == ["it", "s", "1234567.25", "km2", "x"]
    with pytest.raises(ValueError, match="at least one word, got ' '"):
        contains("x", " ")
