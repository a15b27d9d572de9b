"""One error that lists every reason."""

import pytest

from beit_fast.utils.messages import FieldError, count_of, join_choices, join_some, raise_errors


@pytest.mark.parametrize(
    ("wrong_types", "kind", "count"), [([True], TypeError, "an error"), ([True, False], ValueError, "2 errors")]
)
def test_raise_errors_lists_all_errors_in_one(wrong_types, kind, count):
    errors = [FieldError(f"field{index}=x", wrong_type) for index, wrong_type in enumerate(wrong_types)]
    with pytest.raises(kind, match=f"^Owner has {count}:\n- field0=x") as raised:
        raise_errors("Owner", errors)
    assert str(raised.value).count("\n- ") == len(errors)


def test_raise_errors_without_errors_returns():
    raise_errors("Owner", [])


@pytest.mark.parametrize(
    ("choices", "text"), [(["a"], "'a'"), (["a", None], "'a' or None"), ("abc", "'a', 'b' or 'c'")]
)
def test_join_choices_separates_the_last_one_by_or(choices, text):
    assert join_choices(choices) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 images"), (1, "1 image"), (2, "2 images")])
def test_count_of_one_thing_is_singular(number, text):
    assert count_of(number, "image") == text


def test_join_some_counts_the_items_over_the_limit():
    assert join_some(map(str, range(3)), 3) == "0, 1, 2"
    assert join_some(map(str, range(9)), 3) == "0, 1, 2 and 6 more"
