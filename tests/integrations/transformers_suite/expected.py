"""What Transformers' tests of BEiT find: with its own classes, and with this package's in their place."""

TRANSFORMERS = "5.24.0"

BASELINE = 115
"""Tests that pass with Transformers' own classes, as pytest counts them."""

PASSED = 108
"""The same tests with this package's classes."""

FAILED = {
    "BeitModelTest::test_can_load_ignoring_mismatched_shapes": (
        "it expects a RuntimeError, then a text in Transformers' log; ours are a ValueError and a Python warning"
    ),
    "BeitModelTest::test_can_set_attention_dynamically": (
        "it keeps `model.config` from before `set_attn_implementation`; we replace it by a copy, because other models "
        "may share it, and our error has other words"
    ),
    "BeitModelTest::test_cannot_load_with_meta_device_context_manager": (
        "it expects a RuntimeError in Transformers' words; ours is a ValueError, as for every device without values"
    ),
    "BeitModelTest::test_config": (
        "it builds a configuration that no model can have (32 channels in 12 heads), which is an error here, and one "
        "with class numbers that are strings, which become ints"
    ),
    "BeitModelTest::test_gradient_checkpointing_enable_disable": (
        "it looks for layers of Transformers' class GradientCheckpointingLayer; ours are recomputed without it"
    ),
    "BeitModelTest::test_model_weights_reload_no_missing_tied_weights": (
        "it loads a file without one name of BEiT and expects a random model; this is an error here"
    ),
    "BeitModelTest::test_sdpa_can_dispatch_non_composite_models": (
        'it expects "sdpa" in the configuration if nothing was requested; here None chooses at each call'
    ),
}
"""Tests that Transformers' classes pass and ours fail, with the reason."""

SUBTESTS_SKIPPED = {
    "BeitModelTest::test_bc_cache_name_forward": "no argument of forward is a cache; Transformers' classes skip it too",
    "BeitModelTest::test_can_capture_specific_layers_hidden_states": "only for subclasses of PreTrainedModel",
    "BeitModelTest::test_can_load_from_already_mapped_keys": "no renaming on loading: names in memory and files agree",
    "BeitModelTest::test_capture_outputs_decorator": "only for models that use this decorator of Transformers",
    "BeitModelTest::test_keep_in_fp32_modules": "no module has to stay in float32; Transformers' classes skip it too",
    "BeitModelTest::test_keep_in_fp32_modules_exist": "no module has to stay in float32; Transformers' skip it too",
    "BeitModelTest::test_keep_in_fp32_modules_strict_also_hardcode_fp32": (
        "no module has to stay in float32; Transformers' skip it too"
    ),
    "BeitModelTest::test_reverse_loading_mapping": "no renaming on loading: names in memory and files agree",
}
"""Tests that pytest counts as passed, but whose subtests all skip, with the reason."""


def differences(outcomes: dict[str, str]) -> list[str]:
    """What differs from this file; empty if nothing does."""
    failed = {name for name, outcome in outcomes.items() if outcome == "failed"}
    skipped = {name for name, outcome in outcomes.items() if outcome == "subtests skipped"}
    passed = count_passed(outcomes)
    found = [f"{name} fails, which is not expected" for name in sorted(failed - FAILED.keys())]
    found += [f"{name} does not fail, which was expected" for name in sorted(FAILED.keys() - failed)]
    found += [
        f"all subtests of {name} skip, which is not expected" for name in sorted(skipped - SUBTESTS_SKIPPED.keys())
    ]
    found += [f"{name} does not skip all subtests any more" for name in sorted(SUBTESTS_SKIPPED.keys() - skipped)]
    if passed != PASSED:
        found.append(f"{passed} tests pass (expected {PASSED})")
    return found


def count_passed(outcomes: dict[str, str]) -> int:
    """The number of tests that pytest counts as passed, without those with a failed subtest."""
    return sum(outcome in ("passed", "subtests skipped") for outcome in outcomes.values())
