"""Peak memory of a call and memory held between calls."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import memory

MIB = 1 << 20
TOLERANCE = 2.5 * MIB  # one transparent huge page that the call may touch, and counters for each CPU
needs_counter = pytest.mark.skipif(
    memory.memory_unsupported_reason("cpu") is not None, reason=str(memory.memory_unsupported_reason("cpu"))
)


@needs_counter
@pytest.mark.parametrize("size", [8, 32, 128])
def test_peak_memory_known_allocation_is_exact(size: int) -> None:
    def allocate() -> None:
        torch.ones(size * MIB // 4)

    allocate()
    peak = memory.peak_memory(allocate)
    assert peak is not None
    assert abs(peak - size * MIB) < TOLERANCE


@needs_counter
def test_peak_memory_counts_tensors_alive_together() -> None:
    def one_after_another() -> None:
        for _ in range(4):
            torch.ones(16 * MIB // 4)

    def together() -> list[torch.Tensor]:
        return [torch.ones(16 * MIB // 4) for _ in range(4)]

    one_after_another()
    assert abs((memory.peak_memory(one_after_another) or 0) - 16 * MIB) < TOLERANCE
    assert abs((memory.peak_memory(together) or 0) - 64 * MIB) < TOLERANCE


@needs_counter
def test_peak_memory_after_freed_blocks_is_exact() -> None:
    """Blocks freed into the heap could be reused without touching new pages, and hide the peak."""
    blocks = [torch.ones(size * MIB // 4) for size in (6, 3, 20, 2, 9, 20, 1, 12) * 4]
    keep = blocks[1::2]
    del blocks
    peak = memory.peak_memory(lambda: torch.ones(8 * MIB // 4) + 1)
    assert peak is not None
    assert abs(peak - 16 * MIB) < TOLERANCE
    assert len(keep) == 16


@needs_counter
def test_peak_memory_calls_once_and_propagates_errors() -> None:
    calls: list[int] = []
    memory.peak_memory(lambda: calls.append(1))
    assert calls == [1]
    with pytest.raises(ZeroDivisionError):
        memory.peak_memory(lambda: 1 // 0)


@needs_counter
def test_loaded_memory_counts_held_tensors_only() -> None:
    before = memory.loaded_memory()
    held = torch.ones(64 * MIB // 4)
    torch.ones(32 * MIB // 4)
    during = memory.loaded_memory()
    assert before is not None
    assert during is not None
    assert abs(during - before - 64 * MIB) < 2 * TOLERANCE
    del held
    assert abs((memory.loaded_memory() or 0) - before) < 2 * TOLERANCE
    assert memory.loaded_memory("meta") is None


def test_peak_memory_without_a_counter_is_none() -> None:
    calls: list[int] = []
    assert memory.peak_memory(lambda: calls.append(1), "meta") is None
    assert calls == []
    assert "'meta'" in (memory.memory_unsupported_reason("meta") or "")


def test_peak_memory_unreadable_counter_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_permission_error() -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("benchmarks.harness.memory._reset_peak", raise_permission_error)
    monkeypatch.setattr("sys.platform", "linux")
    assert "Permission denied" in (memory.memory_unsupported_reason("cpu") or "")
    assert memory.peak_memory(lambda: None) is None
