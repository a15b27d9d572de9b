"""Every baseline computes the same, a wrong one is never timed, and a missing one has a reason."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import bench_cpu_attention, bench_model, bench_patch_embed, conftest
from benchmarks.baselines import attention, exported, hf_docs, models, pretraining, transformers_model
from benchmarks.harness import cases, hf_docs_cases, model_cases, patch_cases, pretraining_cases
from benchmarks.harness.cases import Case, Reference
from benchmarks.harness.processes import Prepared, Unavailable

FLOAT, BYTES = patch_cases.FLOAT, patch_cases.BYTES


class Contract(NamedTuple):
    """One case of a benchmark.

    Attributes:
        names: Baselines that run it here.
        expected: Some of them that must run everywhere.
        reference: Returns the reference of a baseline.
        prepare: Checks a baseline against a file.
        shape: Shape of what its step returns, or of the first of several tensors.
    """

    names: list[str]
    expected: set[str]
    reference: Callable[[str], Reference]
    prepare: Callable[[str, str], Prepared]
    shape: tuple[int, ...]


def attention_contract(mode: str, dtype: str, folder: Path) -> Contract:
    case = Case(mode, 2, (3, 3), model_cases.DTYPES[dtype], "cpu", heads=2, head_dim=8)
    by_name = {one.name: one for one in attention.BASELINES}
    names = [one.name for one in attention.BASELINES if one.missing_reason(case) is None and not one.compiles]
    expected = {"beit_fast triton", "beit_fast eager", "transformers sdpa"}
    fields = bench_cpu_attention._plain(case)
    return Contract(
        names,
        expected,
        lambda name: cases.reference(case, by_name[name].biased),
        lambda name, file: bench_cpu_attention.prepare(name, file, **fields),
        (2, 10, 2, 8),
    )


def patch_contract(mode: str, dtype: str, folder: Path) -> Contract:
    case = patch_cases.PatchCase(mode, 2, dtype, image=24, patch=8, embed=12)
    names = list(bench_patch_embed.BASELINES[mode])
    return Contract(
        names,
        {bench_patch_embed.OURS},
        lambda name: patch_cases.reference(case),
        lambda name, file: bench_patch_embed.prepare(name, file, **vars(case)),
        (2, 10, 12),
    )


def model_contract(mode: str, dtype: str, folder: Path) -> Contract:
    case = tiny(mode, dtype)
    chosen = [one for one in models.MODEL_BASELINES if one.missing_reason(case, True) is None]
    names = [one.name for one in chosen if not one.name.endswith("compiled")]
    onnx = folder / "model.onnx"
    if any(one.exports for one in chosen):
        exported.export(str(onnx), **dataclasses.asdict(case))
    return Contract(
        names,
        {"beit_fast triton", "beit_fast sdpa", "beit_fast eager", "transformers sdpa", "timm"},
        lambda name: model_cases.model_reference(case),
        lambda name, file: bench_model.prepare(name, file, str(onnx), 1, **dataclasses.asdict(case)),
        (2, 10) if mode == "inference" else (),
    )


def hf_docs_contract(mode: str, dtype: str, folder: Path) -> Contract:
    case = hf_docs_cases.HfDocsCase(mode, 2, 70, 48, dtype, 2, model="tiny")
    names = [one.name for one in hf_docs.BASELINES if one.missing_reason(case) is None]
    return Contract(
        names,
        {"transformers eager", "transformers sdpa", "beit_fast triton"},
        lambda name: hf_docs_cases.hf_docs_reference(case),
        lambda name, file: hf_docs.prepare(name, file, **dataclasses.asdict(case)),
        (2, 10),
    )


def pretraining_contract(mode: str, dtype: str, folder: Path) -> Contract:
    case = pretraining_cases.PretrainingCase("tiny", 48, 2, dtype)
    return Contract(
        [one.name for one in pretraining.BASELINES if one.missing_reason() is None],
        {"beit_fast triton", "transformers sdpa", "transformers eager"},
        lambda name: pretraining_cases.pretraining_reference(case),
        lambda name, file: pretraining.prepare(name, file, **dataclasses.asdict(case)),
        (),
    )


@pytest.mark.parametrize(
    ("contract", "mode", "dtype"),
    [
        *((attention_contract, mode, "fp32") for mode in cases.MODES),
        *((attention_contract, mode, "bf16") for mode in ("forward", "training")),
        *((patch_contract, mode, dtype) for mode in (FLOAT, BYTES) for dtype in ("fp32", "bf16")),
        *((model_contract, mode, dtype) for mode, dtype in (("inference", "bf16"), ("training", "fp32"))),
        pytest.param(model_contract, "inference", "fp32"),
        *((pretraining_contract, pretraining_cases.PRETRAINING, dtype) for dtype in ("fp32", "bf16")),
        *((hf_docs_contract, mode, dtype) for mode, dtype in (("inference", "fp16"), ("training", "fp32"))),
    ],
)
def test_baselines_compute_the_same_and_a_wrong_one_is_not_timed(
    contract: Callable[[str, str, Path], Contract], mode: str, dtype: str, tmp_path: Path
) -> None:
    names, expected, reference_of, prepare, shape = contract(mode, dtype, tmp_path)
    assert expected <= set(names)
    file = str(tmp_path / "reference.pt")
    precision = torch.get_float32_matmul_precision()
    for name in names:
        torch.set_float32_matmul_precision(precision)  # a baseline may lower it in its process
        reference = reference_of(name)
        torch.save(vars(reference), file)
        prepared = prepare(name, file)
        assert prepared.facts["kernel"]
        assert prepared.facts["errors"].keys() == reference.results.keys()
        result = prepared.step()
        first = result[0] if isinstance(result, tuple) else result  # of several gradients
        assert first.shape == shape
        assert not first.requires_grad
        assert first.is_contiguous() or isinstance(result, tuple)
    for moved in {next(iter(reference.results)), list(reference.results)[-1]}:  # the output, and a gradient
        results = dict(reference.results)
        results[moved] = results[moved] + 0.05 * results[moved].norm()
        torch.save({"results": results, "budgets": reference.budgets}, file)
        with pytest.raises(ValueError, match=rf"wrong and not timed\. {moved}: relative error"):
            prepare(names[-1], file)


@pytest.fixture(autouse=True)
def restore_precision() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("inference", ["beit_fast triton", "transformers sdpa"]),
        ("training", ["beit_fast triton", "timm"]),
    ],
)
def test_compiled_models_compute_the_same(
    mode: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each baseline is compiled in one mode, ours in both, with one block."""
    monkeypatch.setitem(model_cases.SIZES, "tiny", dataclasses.replace(model_cases.SIZES["tiny"], layers=1))
    case = tiny(mode)
    file = str(tmp_path / "reference.pt")
    torch.save(vars(model_cases.model_reference(case)), file)
    for name in names:
        bench_model.prepare(f"{name} compiled", file, "", 1, **dataclasses.asdict(case)).step()


def test_compiled_baselines_are_all_tested() -> None:
    names = {one.name for one in models.MODEL_BASELINES if one.name.endswith("compiled")}
    assert names == {"beit_fast triton compiled", "transformers sdpa compiled", "timm compiled"}


def tiny(mode: str = "inference", dtype: str = "fp32", device: str = "cpu") -> model_cases.ModelCase:
    return model_cases.ModelCase(mode, "tiny", 48, 2, dtype, device)


def small(mode: str, device: str = "cpu") -> Case:
    return Case(mode, 2, (3, 3), torch.float32, device, heads=2, head_dim=8)


@pytest.mark.parametrize("tolerance", [None, 1e-3])
@pytest.mark.parametrize("value", [0.0, 1.1, math.nan])
def test_checked_errors_wrong_value_raises(value: float, tolerance: float | None) -> None:
    reference = Reference({"out": torch.ones(3, dtype=torch.float64)}, {"out": 1e-2})
    assert cases.checked_errors({"out": torch.ones(3)}, reference, tolerance) == {"out": 0.0}
    with pytest.raises(ValueError, match=r"wrong and not timed\. out: relative error"):
        cases.checked_errors({"out": torch.tensor([1.0, 1.0, value])}, reference, tolerance)


def test_missing_baselines_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {one.name: one for one in attention.BASELINES}
    of_model = {one.name: one for one in models.MODEL_BASELINES}
    of_docs = {one.name: one for one in hf_docs.BASELINES}
    docs = hf_docs_cases.HfDocsCase("training", 2, 64, 48, "fp32", 2, model="tiny")
    for baseline, arguments, reason in (
        (by_name["flex_attention"], [small("training")], "does not support training"),
        (by_name["sdpa prebuilt bias"], [small("training")], "gradient"),
        (by_name["sdpa prebuilt bias cudnn"], [small("training")], "CUDA backend"),
        (by_name["sdpa without bias"], [small("training", "cuda")], "own name"),
        (by_name["sdpa prebuilt bias cudnn"], [small("training", "cuda")], "gradient"),
        (by_name["flex_attention"], [small("training", "cuda")], None),
        (of_model["beit_fast optimized"], [tiny("training"), True], "inference only"),
        (of_model["onnxruntime"], [tiny(dtype="bf16"), True], "fp32"),
        (of_model["timm compiled"], [tiny(dtype="bf16"), False], "--require-baselines or --full"),
        (of_model["openvino"], [tiny(device="cuda"), True], "on a CPU only"),
        (of_model["transformers sdpa compiled"], [tiny(device="cuda"), False], None),
        (of_docs["beit_fast optimized"], [docs], "inference only"),
    ):
        found = baseline.missing_reason(*arguments)
        assert found is None if reason is None else reason in (found or ""), baseline.name
    for module in (models, hf_docs):
        monkeypatch.setattr(module, "not_installed", list)
    for baseline, arguments in ((of_model["timm"], [tiny(), True]), (of_docs["transformers sdpa"], [docs])):
        assert baseline.missing_reason(*arguments).startswith("not installed: ")


def test_packages_are_those_that_baselines_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, packages in attention.PACKAGES.items():
        needed = {name for one in models.MODEL_BASELINES if device in one.devices for name in one.packages}
        assert needed == set(packages)
    monkeypatch.setitem(attention.PACKAGES, "cpu", ("torch", "no_such_package"))
    with pytest.raises(pytest.UsageError, match="not installed: no_such_package"):
        conftest.require_baselines("cpu")
    monkeypatch.setitem(attention.PACKAGES, "cpu", ("torch",))
    conftest.require_baselines("cpu")


@pytest.mark.parametrize("of_docs", [False, True])
def test_parameter_without_gradient_is_wrong(of_docs: bool) -> None:
    model = model_cases.our_model(tiny("training"), "eager", torch.float32)
    model.beit.embeddings.cls_token.requires_grad_(False)
    case: Any = tiny("training")
    if of_docs:
        case = hf_docs_cases.HfDocsCase("training", 2, 48, 48, "fp32", 2, model="tiny")
        results_of = functools.partial(hf_docs.results_of, case, model, hf_docs.step_of(case, model))
    else:
        results_of = functools.partial(models.logits_and_gradients, case, models._network(case, model, "probe"))
    with pytest.raises(ValueError, match=r"wrong and not timed\..*cls_token"):
        results_of()


def test_hf_docs_training_step_starts_from_zero_gradients() -> None:
    case = hf_docs_cases.HfDocsCase("training", 2, 48, 48, "fp32", 2, model="tiny")
    model = model_cases.our_model(case.native, "triton", torch.float32)
    step = hf_docs.step_of(case, model)
    step()
    first = [parameter.grad.clone() for parameter in model.parameters()]
    step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), first, strict=True))


def test_reference_of_a_model_holds_every_gradient() -> None:
    results = model_cases.model_reference(tiny("training")).results
    weights = model_cases.parameters(tiny())
    assert sum(x.numel() for name, x in results.items() if name != "logits") == sum(x.numel() for x in weights.values())
    assert results["lambda_1"].numel() == 2 * 32


def test_fill_other_parameters_raises() -> None:
    weights = model_cases.parameters(tiny())
    model = model_cases.our_model(tiny(), "eager", torch.float32)
    for changed in ({**weights, "extra": torch.zeros(1)}, {k: x for k, x in weights.items() if k != "classifier.bias"}):
        with pytest.raises(ValueError, match=r"differ in \['(extra|classifier\.bias)'\]"):
            transformers_model.fill(model, changed)


def test_openvino_in_another_precision_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stub of OpenVINO that runs in fp32 for every hint."""

    class Core:
        def read_model(self, path: str) -> Any:
            return SimpleNamespace(get_parameters=lambda: [None])

        def compile_model(self, model: Any, device: str, options: dict[str, Any]) -> Any:
            assert options["INFERENCE_NUM_THREADS"] == 3
            request = SimpleNamespace(infer=lambda inputs: {0: inputs[0]})
            return SimpleNamespace(
                get_property=lambda name: SimpleNamespace(to_string=lambda: "f32"),
                create_infer_request=lambda: request,
                output=lambda place: place,
            )

    stub = types.ModuleType("openvino")
    stub.__dict__.update(Core=Core, __version__="0.0-stub")
    monkeypatch.setitem(sys.modules, "openvino", stub)
    monkeypatch.setattr(exported, "dense_biases", lambda case: [])
    with pytest.raises(Unavailable, match="runs in f32 on this CPU, not in bf16"):
        exported.open_openvino(tiny(dtype="bf16"), 3, "file")
    forward, kernel = exported.open_openvino(tiny(), 3, "file")
    assert kernel == "openvino 0.0, f32"
    assert forward().shape == (2, 3, 48, 48)
