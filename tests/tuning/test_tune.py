"""The tuner on Triton's interpreter, timed by a fake clock: what it excludes, chooses, writes and launches."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from beit_fast.tuning import tune, tune_jobs
from beit_fast.tuning.tune import Job, Trial

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tunes kernels in Triton's interpreter: set TRITON_INTERPRET=1", allow_module_level=True)

from beit_fast.cli.tune import _shown_lines
from beit_fast.kernels.attention import launch
from beit_fast.kernels.attention import tiles as attention_tiles
from beit_fast.kernels.common import tuned_tiles
from beit_fast.kernels.linear_gelu import configs as linear_configs
from beit_fast.kernels.linear_gelu import launch as linear_launch
from beit_fast.kernels.residual_norm import launch as residual_launch

CPU = torch.device("cpu")
SHAPE = tune_jobs.Shape((3, 5), 1, torch.float32, heads=2, head_dim=16, hidden=32, intermediate=48)
SHIPPED, FAST, SLOW = TILES = (64, 32, 4, 1), (16, 16, 4, 1), (32, 16, 4, 1)


class FakeClock:
    """Time that a table of costs advances: one for each tile in force."""

    def __init__(self, kernel: str, costs: Mapping[tuple[int, ...], float]) -> None:
        self.kernel, self.costs, self.now, self.running = kernel, costs, 0.0, False

    def __call__(self) -> float:
        if self.running:
            tile = tuned_tiles.forced_tile(self.kernel)
            assert tile is not None
            self.now += self.costs[tile]
        self.running = not self.running
        return self.now

    def plan(self, step: tune.Any) -> tuple[int, int]:
        return 1, 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the user; nothing is read before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuned_tiles.VARIABLE, raising=False)
    tuned_tiles.forget_read_files()
    yield tmp_path
    tuned_tiles.forget_read_files()


def job(kernel: str = "forward", tiles: tuple[tuple[int, ...], ...] = (SHIPPED, FAST, SLOW)) -> Job:
    jobs = {found.kernel: found for found in tune_jobs.jobs_of([SHAPE], CPU)}
    return replace(jobs[kernel], tiles=tiles, others=())


def run(found: Job, costs: Mapping[tuple[int, ...], float]) -> tune.Outcome:
    (outcome,) = tune.tune([found], CPU, lambda: FakeClock(found.kernel, costs), rounds=1)
    return outcome


def launched_tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Launch the forward once, and return the tiles of the launches."""
    tiles: list[tuple[int, ...]] = []
    original = launch.launch_kernel

    def spy(kernel: object, programs: int, arguments: tune.Any, **options: int) -> None:
        if hasattr(arguments, "tile"):
            tiles.append((*arguments.tile, options["num_warps"], options["num_stages"]))
        original(kernel, programs, arguments, **options)

    monkeypatch.setattr(launch, "launch_kernel", spy)
    tune_jobs.attention_trial("forward", SHAPE, CPU).run()
    monkeypatch.setattr(launch, "launch_kernel", original)
    return tiles


def test_tune_faster_tile_is_written_and_launched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched_tiles(monkeypatch) == [SHIPPED]
    outcome = run(job(), {SHIPPED: 2.0, FAST: 1.0, SLOW: 3.0})
    assert outcome.chosen == FAST
    assert outcome.seconds == {"64x32x4x1": 2.0, "16x16x4x1": 1.0, "32x16x4x1": 3.0}
    (file,) = cache.rglob("*.json")
    identity = tuned_tiles.identity_of(CPU)
    assert file == tuned_tiles.file_of(identity)
    assert file.parent.relative_to(cache) == Path("beit_fast", "tuned", "interpreter-0.0")
    assert all(part in file.name for part in (identity.triton, identity.beit_fast, identity.kernels))
    assert [entry.tile for entry in tuned_tiles.read(file, identity)] == [FAST]
    assert launched_tiles(monkeypatch) == [FAST]
    monkeypatch.setenv(tuned_tiles.VARIABLE, "0")
    tuned_tiles.forget_read_files()
    assert launched_tiles(monkeypatch) == [SHIPPED]


def test_tune_tile_that_gains_little_keeps_the_shipped_tile() -> None:
    outcome = run(job(), {SHIPPED: 2.0, FAST: 1.97, SLOW: 3.0})
    assert outcome.chosen == SHIPPED


@pytest.mark.parametrize("kernel", ["backward_dkv", "backward_dq", "backward_dbias"])
def test_tune_each_backward_kernel_is_launched_with_its_tile(kernel: str) -> None:
    outcome = run(job(kernel, (SHIPPED, FAST)), {SHIPPED: 2.0, FAST: 1.0})
    assert outcome.chosen == FAST
    assert outcome.excluded == {}


ROWS_AND_LINEAR = {
    "residual_norm": ((1,), (2,)),
    "residual_norm_backward": ((1, 4), (2, 2)),
    "linear_gelu": ((32, 64, 32, 4, 1), (16, 16, 16, 4, 1)),
}
"""The shipped and a faster tile of each kernel."""


@pytest.mark.parametrize("kernel", ROWS_AND_LINEAR)
def test_tune_rows_and_linear_layers_are_launched_with_their_tiles(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, fast = ROWS_AND_LINEAR[kernel]
    found = job(kernel, (shipped, fast))
    outcome = run(found, {shipped: 2.0, fast: 1.0})
    assert (outcome.chosen, outcome.excluded) == (fast, {})
    identity = tuned_tiles.identity_of(CPU)
    assert [entry.kernel for entry in tuned_tiles.read(tuned_tiles.file_of(identity), identity)] == [kernel]
    module = linear_launch if kernel == "linear_gelu" else residual_launch
    original, launched = module.launch_kernel, []

    def spy(function: object, programs: int, arguments: tune.Any, **options: int) -> None:
        sides = [getattr(arguments, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if hasattr(arguments, name)]
        launched.append((*sides, options.get("num_warps", 0)))
        original(function, programs, arguments, **options)

    trial = found.trial()
    monkeypatch.setattr(module, "launch_kernel", spy)
    trial.run()
    assert launched[0] == (fast[:4] if kernel == "linear_gelu" else fast[:1])


def wrong_with(tile: tuple[int, ...], found: Job) -> Trial:
    """The trial of a job, whose results are off by a tenth with one tile."""
    trial = found.trial()

    def run() -> dict[str, Tensor]:
        factor = 1.1 if tuned_tiles.forced_tile(found.kernel) == tile else 1.0
        return {name: factor * value for name, value in trial.run().items()}

    return replace(trial, run=run)


def test_tune_wrong_tile_is_excluded_before_it_is_timed() -> None:
    found = job()
    outcome = run(replace(found, trial=lambda: wrong_with(FAST, found)), {SHIPPED: 2.0, SLOW: 1.0})
    assert outcome.chosen == SLOW
    assert "over the budget" in outcome.excluded["16x16x4x1"]
    assert "16x16x4x1" not in outcome.seconds


def test_tune_tile_that_fails_another_trial_leaves_the_next_fastest() -> None:
    found = job()
    others = (lambda: wrong_with(FAST, found),)
    outcome = run(replace(found, others=others), {SHIPPED: 3.0, FAST: 1.0, SLOW: 2.0})
    assert outcome.chosen == SLOW
    assert "over the budget" in outcome.excluded["16x16x4x1"]


def test_tune_tile_that_does_not_launch_is_excluded() -> None:
    outcome = run(job(tiles=(SHIPPED, (48, 16, 4, 1))), {SHIPPED: 2.0})
    assert outcome.chosen == SHIPPED
    assert outcome.excluded["48x16x4x1"].startswith("does not run: ")


def test_tune_tile_that_spills_is_excluded_unless_it_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        n_spills = 24

    found = job(tiles=(SHIPPED, FAST))
    original = launch.launch_kernel

    def compiled(*arguments: tune.Any, **options: int) -> None:
        from beit_fast.kernels.common import launch as common

        original(*arguments, **options)
        for launched in common._observed:
            launched.append(Compiled())

    monkeypatch.setattr(launch, "launch_kernel", compiled)
    outcome = run(found, {SHIPPED: 2.0})
    assert outcome.chosen == SHIPPED
    assert outcome.excluded == {"16x16x4x1": "spills 24 bytes of registers"}


def test_tune_wrong_shipped_tile_writes_nothing(cache: Path) -> None:
    found = job()
    outcome = run(replace(found, trial=lambda: wrong_with(SHIPPED, found)), {FAST: 1.0, SLOW: 2.0})
    assert outcome.chosen is None
    assert "over the budget" in outcome.excluded["64x32x4x1"]
    assert list(cache.rglob("*.json")) == []


@pytest.mark.parametrize("blocked", ["", "beit_fast", "beit_fast/tuned/interpreter-0.0"])
def test_tune_unwritable_cache_is_an_error_before_anything_runs(
    blocked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / blocked).parent.mkdir(parents=True, exist_ok=True)
    (home / blocked).write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    never = replace(job(), trial=lambda: pytest.fail("a kernel was measured"))
    with pytest.raises(
        OSError, match=r"tuned tiles \(XDG_CACHE_HOME sets their folder\) cannot be written to"
    ) as caught:
        run(never, {})
    assert str(tuned_tiles.file_of(tuned_tiles.identity_of(CPU)).parent) in str(caught.value)


def test_tune_jobs_of_equal_shapes_are_listed_once() -> None:
    jobs = tune_jobs.jobs_of([SHAPE, SHAPE, replace(SHAPE, batch=2)], CPU)
    assert len(jobs) == 2 * len(tune_jobs.jobs_of([SHAPE], CPU))
    assert {found.kernel for found in jobs} == set(tuned_tiles.TILE_FIELDS)


def test_tune_second_job_keeps_the_first_and_replaces_its_own(cache: Path) -> None:
    run(job(), {SHIPPED: 2.0, FAST: 1.0, SLOW: 3.0})
    run(job("backward_dq", (SHIPPED, FAST)), {SHIPPED: 2.0, FAST: 1.0})
    run(job(), {SHIPPED: 2.0, FAST: 3.0, SLOW: 1.0})
    identity = tuned_tiles.identity_of(CPU)
    entries = tuned_tiles.read(tuned_tiles.file_of(identity), identity)
    assert [(entry.kernel, entry.tile) for entry in entries] == [("backward_dq", FAST), ("forward", SLOW)]


def test_forget_deletes_the_tiles_of_all_versions(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_tile(FAST)
    (file.parent / "triton-1.json").write_text("{}")
    assert len(tune.forget(CPU)) == 2
    assert list(cache.rglob("*.json")) == []
    assert launched_tiles(monkeypatch) == [SHIPPED]


def write_tile(tile: tuple[int, ...]) -> Path:
    """Write a file with one tile of the forward, and return its path."""
    found = job()
    return tune.save(
        CPU, found, tune.Outcome("forward", "", SHIPPED, tile, dict.fromkeys(map(tune.tile_name, TILES), 1.0))
    )


def damage(content: dict[str, tune.Any], field: str, value: object) -> str:
    """Return the file with a field of its first measurement replaced, or else its own; "tile 1" is one number."""
    name, _, index = field.partition(" ")
    first = content["tiles"][0]
    if index:
        first[name][int(index)] = value
    else:
        (first if name in first else content)[name] = value
    return json.dumps(content)


DAMAGES = {
    "foreign": ("identity", {"gpu": "another"}),
    "identity of another type": ("identity", [[]]),
    "format": ("format", 0),
    "no list": ("tiles", {}),
    "no measurement": ("tiles", [[]]),
    "no field": ("tiles", [{"kernel": "forward"}]),
    "side too long": ("tile 1", 256),
    "odd side": ("tile 0", 48),
    "fraction": ("tile 0", 64.0),
    "short tile": ("tile", [64, 32, 4]),
    "text for a tile": ("tile", "6432"),
    "too many warps": ("tile 2", 64),
    "too many stages": ("tile 3", 10**9),
    "true for a stage": ("tile 3", True),
    "list in a tile": ("tile 3", [1]),
    "unknown kernel": ("kernel", "other"),
    "list for a kernel": ("kernel", []),
    "list for a variant": ("variant", [1]),
    "null for a variant": ("variant", None),
    "text for an amount": ("amount", "1"),
    "huge amount": ("amount", 10**400),
    "text for seconds": ("seconds", "x"),
    "null for seconds": ("shipped_seconds", None),
    "no number of seconds": ("seconds", float("nan")),
    "endless seconds": ("seconds", float("inf")),
    "huge seconds": ("seconds", 10**400),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_read_damaged_field_is_one_error_and_show_names_the_file(kind: str) -> None:
    file = write_tile(FAST)
    file.write_text(damage(json.loads(file.read_text()), *DAMAGES[kind]))
    with pytest.raises(tuned_tiles.UnusableFileError) as caught:
        tuned_tiles.read(file, tuned_tiles.identity_of(CPU))
    assert len(str(caught.value)) < 700
    found = tune.describe(CPU)
    assert found["reason"] == f"the tuned tiles in {file} are ignored: {caught.value}"
    assert _shown_lines(found)[0] == f"no tuned tiles are in use: {found['reason']}"


@pytest.mark.parametrize("programs", [0, 33, 10**9])
def test_read_programs_per_sm_beyond_a_gpu_are_refused(programs: int) -> None:
    entry = {"kernel": "residual_norm_backward", "variant": "", "amount": 1, "seconds": 1.0, "shipped_seconds": 1.0}
    with pytest.raises(tuned_tiles.UnusableFileError, match="is not a tile of residual_norm_backward"):
        tuned_tiles._checked({**entry, "tile": [4, programs]})
    assert tuned_tiles._checked({**entry, "tile": [4, 8]}).tile == (4, 8)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "\xff", '{"format": 1'])
def test_read_file_that_is_not_json_is_unusable(text: str) -> None:
    file = write_tile(FAST)
    file.write_text(text, encoding="latin-1")
    with pytest.raises(tuned_tiles.UnusableFileError, match="cannot be read as JSON"):
        tuned_tiles.read(file, tuned_tiles.identity_of(CPU))


def test_read_every_candidate_tile_is_accepted() -> None:
    """The limits leave room for what `beit-fast tune` can write."""
    for found in tune_jobs.jobs_of([SHAPE], CPU):
        names = tuned_tiles.TILE_FIELDS[found.kernel]
        assert all(all(map(tuned_tiles._fits, names, tile)) for tile in found.tiles)
    for tiles in (*attention_tiles.TILES.values(), *linear_configs.TILES.values()):
        assert all(tile[-1] in range(1, tuned_tiles.MOST["num_stages"] + 1) for tile in tiles)


@pytest.mark.parametrize("kind", ["foreign", "side too long", "list for a kernel", "list for a variant"])
def test_launch_unusable_file_warns_once_and_takes_the_shipped_tile(
    kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_tile(FAST)
    assert launched_tiles(monkeypatch) == [FAST]
    file.write_text(damage(json.loads(file.read_text()), *DAMAGES[kind]))
    tuned_tiles.forget_read_files()
    with pytest.warns(RuntimeWarning, match="are ignored") as caught:
        assert launched_tiles(monkeypatch) == [SHIPPED]
    assert len([entry for entry in caught if "are ignored" in str(entry.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert launched_tiles(monkeypatch) == [SHIPPED]


def test_find_takes_the_nearest_amount_of_an_equal_variant() -> None:
    identity = tuned_tiles.identity_of(CPU)
    entries = [
        tuned_tiles.Measured("linear_gelu", "float32", amount, (16, 16, 16, warps, 1), 1.0, 2.0)
        for amount, warps in ((100, 1), (1000, 2), (10_000, 4))
    ]
    file = tuned_tiles.file_of(identity)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(tuned_tiles.content_of(identity, entries)))
    found = [tuned_tiles.find("linear_gelu", "float32", rows, torch.empty(0)) for rows in (1, 250, 400, 99_999)]
    assert [tile and tile[3] for tile in found] == [1, 1, 2, 4]
    assert tuned_tiles.find("linear_gelu", "float16", 100, torch.empty(0)) is None
    assert tuned_tiles.find("forward", "float32", 100, torch.empty(0)) is None


def test_launch_unknown_value_of_the_variable_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned_tiles.VARIABLE, "maybe")
    with pytest.raises(ValueError, match=r"BEIT_FAST_TUNED='maybe' is not supported"):
        launched_tiles(monkeypatch)


def test_find_in_a_capture_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        is_cuda, device = True, torch.device("cuda", 0)

    reads: list[torch.device] = []
    monkeypatch.setattr(tuned_tiles, "_load", lambda device: reads.append(device) or {})
    for capturing in (True, False, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert tuned_tiles.find("forward", "any", 1, OnCuda()) is None  # type: ignore[arg-type]
        assert len(reads) == (0 if capturing else 1)


def test_operator_traced_by_torch_compile_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    import beit_fast

    monkeypatch.setattr(tuned_tiles, "_load", lambda device: pytest.fail("a file is read while tracing"))
    with FakeTensorMode():
        query, table = torch.empty(1, 10, 2, 16), torch.empty(5 * 5 + 3, 2)
        assert beit_fast.rel_pos_attention(query, query, query, table, (3, 3)).shape == query.shape
