"""Latency, peak memory and the environment that every number is published with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from beit_fast.testing import timing as measure

MIB = 1 << 20
TOLERANCE = 2.5 * MIB  # one transparent huge page that the call happened to touch, and counters kept by CPU
needs_counter = pytest.mark.skipif(
    measure.why_no_peak_memory("cpu") is not None, reason=str(measure.why_no_peak_memory("cpu"))
)


def test_latency_calls_warmup_and_repeats_and_orders_its_numbers() -> None:
    calls: list[int] = []
    timing = measure.latency(lambda: calls.append(1), repeats=9, warmup=4)
    assert len(calls) == 13
    assert len(timing.times) == 9
    first, third = timing.quartiles
    assert min(timing.times) <= first <= timing.median <= third <= max(timing.times)


def test_latency_of_one_repeat_is_that_time() -> None:
    timing = measure.latency(lambda: None, repeats=1, warmup=0)
    assert timing.quartiles == (timing.median, timing.median)
    assert timing.times == (timing.median,)


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}])
def test_latency_refuses_what_it_cannot_measure(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"repeats >= 1 and warmup >= 0, got repeats=.*, warmup="):
        measure.latency(lambda: None, **wrong)


@needs_counter
@pytest.mark.parametrize("size", [8, 32, 128])
def test_peak_memory_of_a_known_allocation(size: int) -> None:
    def allocate() -> None:
        torch.ones(size * MIB // 4)

    allocate()
    peak = measure.peak_memory(allocate)
    assert peak is not None
    assert abs(peak - size * MIB) < TOLERANCE


@needs_counter
def test_peak_memory_is_of_what_lives_at_the_same_time() -> None:
    def one_after_another() -> None:
        for _ in range(4):
            torch.ones(16 * MIB // 4)

    def together() -> list[torch.Tensor]:
        return [torch.ones(16 * MIB // 4) for _ in range(4)]

    one_after_another()
    assert abs((measure.peak_memory(one_after_another) or 0) - 16 * MIB) < TOLERANCE
    assert abs((measure.peak_memory(together) or 0) - 64 * MIB) < TOLERANCE


@needs_counter
def test_peak_memory_does_not_depend_on_what_was_freed_before() -> None:
    """Blocks freed into the heap would be reused without touching new pages, and hide what a call needs."""
    blocks = [torch.ones(size * MIB // 4) for size in (6, 3, 20, 2, 9, 20, 1, 12) * 4]
    keep = blocks[1::2]
    del blocks
    peak = measure.peak_memory(lambda: torch.ones(8 * MIB // 4) + 1)
    assert peak is not None
    assert abs(peak - 16 * MIB) < TOLERANCE
    assert len(keep) == 16


@needs_counter
def test_peak_memory_calls_once_and_lets_errors_through() -> None:
    calls: list[int] = []
    measure.peak_memory(lambda: calls.append(1))
    assert calls == [1]
    with pytest.raises(ZeroDivisionError):
        measure.peak_memory(lambda: 1 // 0)


@needs_counter
def test_loaded_memory_counts_what_is_held_and_not_what_was_freed() -> None:
    before = measure.loaded_memory()
    held = torch.ones(64 * MIB // 4)
    torch.ones(32 * MIB // 4)
    during = measure.loaded_memory()
    assert before is not None
    assert during is not None
    assert abs(during - before - 64 * MIB) < 2 * TOLERANCE
    del held
    assert abs((measure.loaded_memory() or 0) - before) < 2 * TOLERANCE
    assert measure.loaded_memory("meta") is None


def test_peak_memory_is_none_with_a_reason_where_there_is_no_counter() -> None:
    calls: list[int] = []
    assert measure.peak_memory(lambda: calls.append(1), "meta") is None
    assert calls == []
    assert "'meta'" in (measure.why_no_peak_memory("meta") or "")


def test_unreadable_counters_are_a_reason_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("beit_fast.testing.memory._reset_peak", refuse)
    monkeypatch.setattr("sys.platform", "linux")
    assert "Permission denied" in (measure.why_no_peak_memory("cpu") or "")
    assert measure.peak_memory(lambda: None) is None


def test_environment_is_json_and_names_no_place() -> None:
    environment = measure.environment("cpu")
    text = json.dumps(environment)
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["device_name"] == environment["cpu"] != ""
    for private in (str(Path.home()), os.getcwd(), str(Path(measure.__file__).parent)):
        assert private == "/" or private not in text


def test_environment_of_a_package_outside_a_checkout_has_no_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "beit_fast" / "measure.py"))
    assert measure.environment("cpu")["commit"] is None


def test_version_of_a_distribution_that_is_not_installed_is_none() -> None:
    assert measure.installed_version("beit-fast-is-not-called-this") is None
    assert measure.installed_version("torch") == torch.__version__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_cuda_latency_and_peak_memory() -> None:
    def allocate() -> torch.Tensor:
        return torch.ones(64 * MIB // 4, device="cuda")

    timing = measure.latency(allocate, "cuda", repeats=5)
    assert 0 < timing.median < 1
    assert measure.peak_memory(allocate, "cuda") == 64 * MIB
