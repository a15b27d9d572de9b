"""The comparison at the end of `make test-transformers-suite`."""

from .transformers_suite import expected

AS_EXPECTED = (
    dict.fromkeys(expected.FAILED, "failed")
    | dict.fromkeys(expected.SUBTESTS_SKIPPED, "subtests skipped")
    | {f"test_{i}": "passed" for i in range(expected.PASSED - len(expected.SUBTESTS_SKIPPED))}
    | {"test_of_a_gpu": "skipped"}
)


def test_differences_of_the_expected_outcomes_are_none():
    assert expected.differences(AS_EXPECTED) == []
    assert len(expected.FAILED) + expected.PASSED == expected.BASELINE


def test_differences_name_each_test_that_changed():
    failing, skipping = next(iter(expected.FAILED)), next(iter(expected.SUBTESTS_SKIPPED))
    changes = {
        "test_0": ("failed", "test_0 fails, which is not expected"),
        failing: ("passed", f"{failing} does not fail, which was expected"),
        skipping: ("passed", f"{skipping} does not skip all subtests any more"),
        "test_1": ("subtests skipped", "all subtests of test_1 skip, which is not expected"),
    }
    for name, (outcome, text) in changes.items():
        assert text in expected.differences(AS_EXPECTED | {name: outcome})
    passes = f"{expected.PASSED - 1} tests pass (expected {expected.PASSED})"
    assert expected.differences(AS_EXPECTED | {"test_2": "skipped"}) == [passes]
    assert expected.differences({name: x for name, x in AS_EXPECTED.items() if name != "test_2"}) == [passes]
