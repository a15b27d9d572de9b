"""The benchmark of whole models: equal weights, wrong ones without a time, who is missing and why."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ..support.benchmarks import benchmark_house, run_in_a_copy


@pytest.fixture(scope="module")
def house() -> Iterator[ModuleType]:
    with benchmark_house() as module:
        yield module


def tiny(house: ModuleType, mode: str = "inference", dtype: str = "fp32") -> Any:
    return house.harness.model_cases.ModelCase(mode, "tiny", 48, 2, dtype)


def peers_of(house: ModuleType, case: Any, compiled: bool = False) -> list[Any]:
    """Those that are installed here; what compiles is left to one test, and `optimized` to where it exists."""
    return [
        peer
        for peer in house.baselines.models.MODEL_PEERS
        if peer.why_missing(case, True) is None and peer.name.endswith("compiled") == compiled
    ]


def prepare(house: ModuleType, folder: Path, case: Any, peer: str, exported: str = "", **shifted: float) -> Any:
    """A peer's call, against a reference of which the named results are moved."""
    reference = house.harness.model_cases.model_reference(case)
    moved = {name: x + shifted.get(name, 0.0) * x.norm() for name, x in reference.results.items()}
    torch.save({"results": moved, "budgets": reference.budgets}, folder / "reference.pt")
    return house.bench_model.prepare(peer, str(folder / "reference.pt"), exported, 1, **asdict(case))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_names_itself_once(house: ModuleType, device: str) -> None:
    quick, targets, full = (
        house.harness.model_cases.model_cases(device, full, every)
        for full, every in ((False, False), (False, True), (True, True))
    )
    for cases in (quick, targets, full):
        names = [str(case) for case in cases]
        assert len(set(names)) == len(names) > 0
    assert set(quick) <= set(targets) <= set(full)
    asked = {
        (mode, model, image, batch, dtype)
        for mode in ("inference", "training")
        for model in ("base", "large")
        for image in (224, 384, 512, 640)
        for batch in (1, 8, 64)
        for dtype in ("fp32", "bf16", "fp16")
    }
    assert asked <= {(case.mode, case.model, case.image, case.batch, case.dtype) for case in full}


def test_what_takes_too_long_on_a_cpu_says_so(house: ModuleType) -> None:
    cases = house.harness.model_cases.model_cases("cpu", full=True)
    reasons = {str(case): house.harness.model_cases.why_too_long(case) for case in cases}
    assert reasons["inference-large-640-1-fp32"] is None
    assert reasons["inference-base-640-64-fp32"].startswith("time: 23.6 TFLOP a call")
    assert all(
        house.harness.model_cases.why_too_long(case) is None
        for case in house.harness.model_cases.model_cases("cpu", False, True)
    )
    assert not any(
        house.harness.model_cases.why_too_long(case)
        for case in house.harness.model_cases.model_cases("cuda", full=True)
    )


def test_a_case_that_is_too_long_is_left_out_with_its_reason(house: ModuleType) -> None:
    calls: list[Any] = []
    case = house.harness.model_cases.ModelCase("training", "large", 640, 64, "fp32")
    house.bench_model.race_model(case, lambda *given, **rules: calls.append(given), True, 2)
    ((bench, name, threads, entrants, facts, missing),) = calls
    assert (bench, name, threads, entrants) == ("cpu models", str(case), 2, [])
    assert missing["every peer"].startswith("time: ")
    assert facts["image"] == 640


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_every_peer_is_right(house: ModuleType, tmp_path: Path, mode: str, dtype: str) -> None:
    case = tiny(house, mode, dtype)
    peers = peers_of(house, case)
    names = {peer.name for peer in peers}
    assert {"beit_fast triton", "beit_fast sdpa", "beit_fast eager", "transformers sdpa", "timm"} <= names
    exported = tmp_path / "model.onnx"
    if any(peer.exports for peer in peers):
        house.baselines.exported.export(str(exported), **asdict(case))
        assert exported.stat().st_size > 10_000
    for peer in peers:
        prepared = prepare(house, tmp_path, case, peer.name, str(exported))
        assert prepared.facts["kernel"]
        assert prepared.facts["errors"].keys() == house.harness.model_cases.model_reference(case).results.keys()
        result = prepared.step()
        assert result.shape == ((2, 10) if mode == "inference" else ())
        assert not result.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_every_compiled_peer_is_right(house: ModuleType, tmp_path: Path, mode: str) -> None:
    case = tiny(house, mode)
    peers = peers_of(house, case, compiled=True)
    assert len(peers) == 3
    for peer in peers:
        prepare(house, tmp_path, case, peer.name).step()


def test_the_reference_holds_every_gradient(house: ModuleType) -> None:
    results = house.harness.model_cases.model_reference(tiny(house, "training")).results
    weights = house.harness.model_cases.parameters(tiny(house))
    assert results["logits"].shape == (2, 10)
    assert sum(x.numel() for name, x in results.items() if name != "logits") == sum(x.numel() for x in weights.values())
    assert {"relative_position_bias_table", "lambda_1", "query.weight"} <= set(results)
    assert results["lambda_1"].numel() == 2 * 32


@pytest.mark.parametrize(
    ("mode", "moved"),
    [
        ("inference", "logits"),
        ("training", "logits"),
        ("training", "relative_position_bias_table"),
        ("training", "lambda_1"),
    ],
)
def test_a_peer_that_is_wrong_is_refused(house: ModuleType, tmp_path: Path, mode: str, moved: str) -> None:
    case = tiny(house, mode)
    for peer in ("beit_fast triton", "transformers sdpa", "timm"):
        with pytest.raises(ValueError, match=rf"wrong and not timed\. {moved}: relative error"):
            prepare(house, tmp_path, case, peer, **{moved: 1e-4})


def test_a_parameter_without_gradient_is_wrong(house: ModuleType) -> None:
    case = tiny(house, "training")
    model = house.harness.model_cases.our_model(case, "eager", torch.float32)
    model.beit.embeddings.cls_token.requires_grad_(False)
    network = house.baselines.models._network(case, model, "probe")
    with pytest.raises(ValueError, match=r"cls_token got no gradient"):
        house.baselines.models.logits_and_gradients(case, network)


def test_a_model_with_other_parameters_is_not_filled(house: ModuleType) -> None:
    case = tiny(house)
    weights = house.harness.model_cases.parameters(case)
    model = house.harness.model_cases.our_model(case, "eager", torch.float32)
    for changed in ({**weights, "extra": torch.zeros(1)}, {k: x for k, x in weights.items() if k != "classifier.bias"}):
        with pytest.raises(ValueError, match=r"differ in \['(extra|classifier\.bias)'\]"):
            house.baselines.models.fill(model, changed)


def test_who_is_missing_says_why(house: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {peer.name: peer for peer in house.baselines.models.MODEL_PEERS}
    training, bf16 = tiny(house, "training"), tiny(house, "inference", "bf16")
    assert peers["beit_fast optimized"].why_missing(training, True) == "is for inference"
    assert "fp32" in peers["onnxruntime"].why_missing(bf16, True)
    assert "--require-peers or --full" in peers["timm compiled"].why_missing(bf16, False)
    on_cuda = house.harness.model_cases.ModelCase("inference", "base", 224, 64, "bf16", "cuda")
    assert peers["openvino"].why_missing(on_cuda, True) == "is for inference on a CPU"
    assert peers["transformers sdpa compiled"].why_missing(on_cuda, False) is None
    monkeypatch.setattr(house.baselines.models, "not_installed", lambda packages: [x for x in packages if x == "timm"])
    assert peers["timm"].why_missing(training, True).startswith("not installed: timm (pip install")
    assert peers["transformers sdpa"].why_missing(training, True) is None


def test_packages_are_those_that_peers_need(house: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for device, packages in house.baselines.attention.PACKAGES.items():
        needed = {
            name for peer in house.baselines.models.MODEL_PEERS if device in peer.devices for name in peer.packages
        }
        assert needed == set(packages)
    assert house.baselines.attention.not_installed(("torch", "no_such_package")) == ["no_such_package"]
    conftest = importlib.import_module(f"{house.__name__}.conftest")
    monkeypatch.setitem(house.baselines.attention.PACKAGES, "cpu", ("torch", "no_such_package", "nor_this_one"))
    with pytest.raises(pytest.UsageError, match="not installed: no_such_package, nor_this_one"):
        conftest._require_peers("cpu")
    monkeypatch.setitem(house.baselines.attention.PACKAGES, "cpu", ("torch",))
    conftest._require_peers("cpu")


def test_a_race_of_a_case(house: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours first, so that every heat has it; files are there while it lasts; a failed export costs two peers."""
    seen: dict[str, Any] = {}

    def race_apart(bench: str, case: str, threads: int, entrants: Any, facts: Any, missing: Any, **rules: Any) -> None:
        seen.update(names=[one.name for one in entrants], missing=missing, rules=rules, facts=facts)
        seen["expected"] = Path(entrants[0].arguments["expected"])
        assert seen["expected"].exists()
        assert all(one.bytes_needed > 0 for one in entrants)

    monkeypatch.setattr(house.baselines.models, "not_installed", lambda packages: [])
    monkeypatch.setattr(
        house.bench_model, "apart", lambda *_: house.harness.processes.Result("export", failure="no room")
    )
    house.bench_model.race_model(tiny(house), race_apart, False, 1)
    assert seen["names"] == [
        "beit_fast optimized",
        "beit_fast optimized high",
        "beit_fast triton",
        "transformers accelerated",
        "transformers sdpa",
        "timm",
    ]
    assert seen["missing"]["openvino"] == seen["missing"]["onnxruntime"] == "the export failed: no room"
    assert seen["rules"]["rounds"] >= 5
    assert seen["rules"]["per_call"] == {"images_per_second": 2}
    assert (seen["facts"]["model"], seen["facts"]["tokens"]) == ("tiny", 10)
    assert not seen["expected"].parent.exists()


def test_a_race_in_processes(house: ModuleType, tmp_path: Path) -> None:
    case = tiny(house, "training")
    reference = house.harness.model_cases.model_reference(case)
    wrong = {**reference.results, "logits": reference.results["logits"] * 1.001}
    entrants = []
    for name, results in (("right", reference.results), ("wrong", wrong)):
        torch.save({"results": results, "budgets": reference.budgets}, tmp_path / f"{name}.pt")
        files = {"expected": str(tmp_path / f"{name}.pt"), "exported": "", "threads": 1}
        arguments = {"peer": "beit_fast triton", **files, **asdict(case)}
        entrants.append(house.harness.processes.Entrant(name, house.bench_model.prepare, arguments))
    right, refused = house.harness.processes.race(entrants, rounds=5, round_seconds=0.01, memory=True)
    assert (right.failure, right.absent, len(right.times)) == (None, None, 5)
    assert refused.failure.startswith("ValueError: wrong and not timed. logits: relative error")
    assert refused.times == ()
    row = house.harness.results.row_of_result(right, {"images_per_second": 2}, case.flops)
    assert row["images_per_second"] == pytest.approx(2 / row["median"])
    assert row["range"][0] <= row["median"] <= row["range"][1]
    assert row["loaded_memory"] is None or row["loaded_memory"] > row["peak_memory"]


class FakeRuntime(types.ModuleType):
    """An OpenVINO on a machine that gives fp32 whatever is asked for."""

    __version__ = "0.0-fake"

    class Core:
        def read_model(self, path: str) -> Any:
            return types.SimpleNamespace(get_parameters=lambda: [None])

        def compile_model(self, model: Any, device: str, options: dict[str, Any]) -> Any:
            precision = types.SimpleNamespace(to_string=lambda: "f32")
            request = types.SimpleNamespace(infer=lambda inputs: {0: inputs[0]})
            assert options["INFERENCE_NUM_THREADS"] == 3
            return types.SimpleNamespace(
                get_property=lambda name: precision, create_infer_request=lambda: request, output=lambda place: place
            )


def test_openvino_in_another_precision_is_absent(house: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", FakeRuntime("openvino"))
    monkeypatch.setattr(house.baselines.exported, "dense_biases", lambda case: [])
    with pytest.raises(house.harness.processes.Absent, match="runs in f32 here where bf16 is asked for"):
        house.baselines.exported.open_openvino(tiny(house, dtype="bf16"), 3, "file")
    forward, kernel = house.baselines.exported.open_openvino(tiny(house), 3, "file")
    assert kernel == "openvino 0.0, f32"
    assert forward().shape == (2, 3, 48, 48)


def test_heats_fit_into_memory_and_all_have_the_first(house: ModuleType) -> None:
    entrants = [
        house.harness.processes.Entrant(name, print, bytes_needed=size)
        for name, size in (("ours", 2), ("a", 3), ("b", 4), ("huge", 9), ("c", 1))
    ]

    def names(room: int | None) -> tuple[list[list[str]], list[str]]:
        groups, too_large = house.harness.processes.heats(entrants, room)
        assert all(reason.startswith("memory: about ") for reason in too_large.values())
        return [[one.name for one in group] for group in groups], list(too_large)

    assert names(None) == ([["ours", "a", "b", "huge", "c"]], [])
    assert names(19) == names(None)
    assert names(11) == ([["ours", "a", "b"], ["ours", "huge"], ["ours", "c"]], [])
    assert names(7) == ([["ours", "a"], ["ours", "b", "c"]], ["huge"])
    assert names(1) == ([], ["ours", "a", "b", "huge", "c"])
    assert house.harness.processes.heats([], 1) == ([], {})


HEATS = """
from .harness.processes import Entrant, Prepared, free_memory

def prepare(name):
    return Prepared(lambda: sum(range(1000)), {"kernel": name, "errors": {"out": 0.0}})

def test_heats(race_apart):
    room = free_memory("cpu")
    shares = {"ours": 0.2, "first": 0.5, "second": 0.5, "third": 5.0}
    entrants = [
        Entrant(name, prepare, {"name": name}, bytes_needed=int(room * share)) for name, share in shares.items()
    ]
    race_apart(
        "probing", "case", 1, entrants, {"dtype": "fp32", "batch": 3}, rounds=2, per_call={"images_per_second": 3}
    )
"""


def test_rows_say_in_which_heat(house: ModuleType, tmp_path: Path) -> None:
    if house.harness.processes.free_memory("cpu") is None:
        pytest.skip("the system does not say how much memory is free")
    done = run_in_a_copy(tmp_path, HEATS, "--rows=rows.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    results = house.harness.results.read_results(tmp_path / "rows.jsonl")
    assert [(row["heat"], row["peer"]) for row in results["rows"]] == [
        *((1, "first"), (1, "ours"), (2, "ours"), (2, "second")),
    ]
    ((name, reason),) = [(entry["peer"], entry["reason"]) for entry in results["left_out"]]
    assert (name, reason.partition(" ")[0]) == ("third", "memory:")
    for one in results["rows"]:
        assert one["images_per_second"] == pytest.approx(3 / one["median"], rel=1e-2)
        assert one["range"][0] <= one["median"] <= one["range"][1]
