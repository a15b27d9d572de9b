"""Result files, pictures, tables and targets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_patch_embed
from benchmarks.baselines import models
from benchmarks.harness import hf_docs_cases, model_cases, results
from benchmarks.harness.hf_docs_cases import EAGER, OPTIMIZED, SDPA, TRITON
from benchmarks.report import hf_docs_tables, plot, plot_models, plot_patches, targets, terminal

from ..support.benchmarks import BENCHMARKS

COMMITTED = sorted((BENCHMARKS / "results").glob("*.json"))


def results_on(device: str, rows: list[dict[str, Any]], left_out: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    conditions = {
        **{"device": device, "device_name": "AMD EPYC 9B14 96-Core Processor", "threads": 2, "commit": "0123abc"},
        **{"torch": "2.13.0", "triton": None, "transformers": "5.23.0", "beit_fast": "0.1.0"},
        "gpu": {"driver_version": "580.1"} if device == "cuda" else None,
    }
    return {"conditions": conditions, "date": "2026-02-03", "rows": rows, "left_out": left_out or []}


def row(bench: str, mode: str, batch: int, tokens: int, baseline: str, median: float, **more: Any) -> dict[str, Any]:
    side = int((tokens - 1) ** 0.5)
    named = {} if bench == results.ATTENTION else {"bench": bench, "threads": 1}
    return {
        **{**named, "case": f"{mode}-{batch}x{tokens}", "mode": mode, "batch": batch, "tokens": tokens},
        **{"window": [side, side], "heads": 12, "head_dim": 64, "dtype": "bf16", "baseline": baseline},
        **{"kernel": "a kernel", "biased": "without" not in baseline, "errors": {"out": 1e-7}, "clock": "device time"},
        **{"learnable": not ("without" in baseline or "prebuilt" in baseline), "queued_ahead": True},
        **{"median": median, "iqr": 0.0, "range": [0.9 * median, 1.1 * median], "rounds": 7, "iterations": 4},
        **{"single_call": None, "sm_clock_mhz": None, "flops": 10, "least_bytes": 20, "tflops": 1e-11 / median},
        **{"peak_memory": (1 if "beit_fast" in baseline else 5) << 20, "loaded_memory": 2**30},
        **more,
    }


SIZES = ((64, 197), (32, 577), (8, 1025), (8, 1601), (1, 577), (1, 1025), (1, 1601))
SPEEDS = {  # median in units of ours
    "beit_fast triton": 1.0,
    "flex_attention": 2.0,
    "sdpa gathered bias efficient": 3.5,
    "sdpa prebuilt bias efficient": 1.6,
    "sdpa prebuilt bias cudnn": 0.8,
    "sdpa without bias flash": 1.1,
}


def attention_on_gpu() -> dict[str, Any]:
    rows = [
        row(results.ATTENTION, mode, batch, tokens, baseline, speed * batch * tokens**2 * 1e-11)
        for mode in ("backward", "forward", "training", "training, frozen table")
        for batch, tokens in SIZES
        for baseline, speed in SPEEDS.items()
        if not ("prebuilt" in baseline and mode in ("backward", "training"))
        and not (baseline == "sdpa prebuilt bias cudnn" and tokens == 577)
    ]
    left_out = [{"baseline": "sdpa prebuilt bias cudnn", "reason": "No plan.", "cases": ["forward-32x577-bf16"]}]
    return results_on("cuda", rows, left_out)


def models_on(device: str) -> dict[str, Any]:
    speeds = {"beit_fast optimized": 3.0, "beit_fast optimized high": 3.7, "beit_fast triton": 1.6, "openvino": 2.9}
    speeds |= {"transformers accelerated": 1.8, "transformers sdpa": 1.0, "transformers sdpa compiled": 1.2}
    bench = "cpu models" if device == "cpu" else "models"
    rows = [
        row(bench, case.mode, case.batch, case.tokens, name, case.flops * 1e-11 / speed)
        | {**dataclasses.asdict(case), "case": str(case), "images_per_second": 1.0}
        for case in model_cases.model_cases(device, all_baselines=True)
        for name, speed in speeds.items()
        if any(
            one.name == name and case.mode in one.modes and case.dtype in one.dtypes for one in models.MODEL_BASELINES
        )
    ]
    return results_on(device, rows, [{"baseline": "timm", "reason": "absent", "cases": ["a", "b"], "bench": bench}])


def judged(content: dict[str, Any]) -> dict[str, list[Any]]:
    """Verdicts by target."""
    by_target: dict[str, list[Any]] = {}
    for verdict in targets.judge(content):
        by_target.setdefault(verdict.target.text, []).append(verdict)
    return by_target


def test_log_survives_a_killed_run_and_is_condensed(tmp_path: Path) -> None:
    log = results.RowLog(tmp_path / "run" / "rows.jsonl", {"device": "cpu"})
    one = {"mode": "forward", "dtype": "fp32", "tokens": 197, "batch": 1, "baseline": "one", "median": 0.5}
    log.measured(one)
    log.left_out("training-1x197-fp32", "one", "no gradient")
    log.left_out("training-8x197-fp32", "one", "no gradient")
    with log.path.open("a") as file:
        file.write('{"row": {"mode": "forw')
    read = results.read_results(log.path)
    assert read["rows"] == [one]
    cases = ["training-1x197-fp32", "training-8x197-fp32"]
    assert read["left_out"] == [{"baseline": "one", "reason": "no gradient", "cases": cases}]
    assert results.read_results(results.write_results(read, tmp_path / "kept.json")) == read


def test_json_of_pytest_benchmark_is_condensed(tmp_path: Path) -> None:
    facts = row(results.ATTENTION, "forward", 1, 197, "beit_fast triton", 0.0123456789, what="not kept")
    machine = {"beit_fast": results_on("cpu", [])["conditions"], "node": "a-private-host-name"}
    benchmarks = [{"extra_info": facts, "stats": facts | {"data": [1, 2, 3]}}]
    run = {"machine_info": machine, "datetime": "2026-02-03T04:05:06", "benchmarks": benchmarks}
    (tmp_path / "run.json").write_text(json.dumps(run))
    read = results.read_results(tmp_path / "run.json")
    text = results.write_results(read, tmp_path / "kept.json").read_text()
    assert "a-private-host-name" not in text
    assert (read["date"], read["conditions"]["commit"]) == ("2026-02-03", "0123abc")
    assert tuple(read["rows"][0]) == results.ROW_FIELDS
    assert read["rows"][0]["median"] == 0.01235
    assert results.read_results(tmp_path / "kept.json") == read


@pytest.mark.parametrize("content", ["", "{}", '{"rows": []}', '{"machine_info": {"beit_fast": {}}, "benchmarks": []}'])
def test_reports_of_a_file_without_measurements_raise(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.json"
    run.write_text(content)
    assert plot.main([str(run), "--out", str(tmp_path)]) == targets.main([str(run)]) == 2
    assert capsys.readouterr().err.count("run.json") == 2
    assert plot.main([str(tmp_path / "missing.json")]) == 2
    assert list(tmp_path.glob("*.png")) == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_read_and_judged(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = results.read_results(path)
    again = json.loads(results.write_results(read, tmp_path / "again.json").read_text())
    assert again == {"left_out": [], **json.loads(path.read_text())}
    ((bench, of_bench),) = results.by_bench(read).items()
    assert results.file_name(read["conditions"], bench) == path.stem
    assert of_bench == read
    assert targets.main([str(path)]) == 0
    assert ("ratio" in capsys.readouterr().out) == (bench not in (results.ATTENTION, "cpu hf docs"))  # have no targets
    kernels = {row["baseline"]: row for row in read["rows"]}
    lines = terminal.tables([{"case": "one", **row} for row in kernels.values()])
    assert all(len(table) >= 2 for table in lines.values())


def test_plot_writes_a_file_and_a_picture_for_each_benchmark(tmp_path: Path) -> None:
    """The committed results of all benchmarks in one file, with fewer rows."""
    merged: dict[str, Any] = {"rows": [], "left_out": []}
    for path in COMMITTED:
        read = results.read_results(path)
        sizes = sorted({one["tokens"] for one in read["rows"]})[:2]
        merged["rows"] += [one for one in read["rows"] if one["tokens"] in sizes and one["batch"] == 1]
        merged["left_out"] += read["left_out"]
        merged |= {"conditions": read["conditions"], "date": read["date"]}
    results.write_results(merged, tmp_path / "run.json")
    assert plot.main([str(tmp_path / "run.json"), "--results", str(tmp_path / "out")]) == 0
    for path in COMMITTED:
        written = results.read_results(tmp_path / "out" / path.name)
        assert 0 < len(written["rows"]) <= len(results.read_results(path)["rows"])
        picture = (tmp_path / "out" / path.name).with_suffix(".md" if "hf-docs" in path.name else ".png")
        assert picture.stat().st_size > (500 if "hf-docs" in path.name else 20_000)
        if path.stem.endswith("models"):
            assert (tmp_path / "out" / f"{path.stem}-image-size.png").stat().st_size > 20_000


def test_pictures_are_drawn_without_memory(tmp_path: Path) -> None:
    rows = [one for one in attention_on_gpu()["rows"] if one["mode"] == "forward"]
    content = results_on("cuda", [{**one, "peak_memory": None, "loaded_memory": None} for one in rows])
    assert plot.draw(content, tmp_path / "picture.png").exists()
    content["rows"] = [{**one, "peak_memory": None} for one in models_on("cpu")["rows"][:7]]
    assert plot_models.draw_models(content, tmp_path / "models.png").exists()


def test_panels_separate_modes_single_images_and_threads() -> None:
    lines = plot.panels_of(attention_on_gpu()["rows"])
    assert [panels[0][0]["mode"] for panels in lines] == ["forward", "backward", "training", "training, frozen table"]
    for batches, single in lines:
        assert {(one["batch"], one["tokens"]) for one in batches} == set(SIZES[:4])
        assert {(one["batch"], one["tokens"]) for one in single} == set(SIZES[4:])
    on_cpu = results.read_results(next(path for path in COMMITTED if path.stem.endswith("attention")))["rows"]
    threads = [
        [(panel[0]["mode"], panel[0]["dtype"], panel[0]["threads"]) for panel in line]
        for line in plot.panels_of(on_cpu)
    ]
    assert threads[0] == [("forward", "bf16", 1), ("forward", "bf16", 2)]
    patches = results.read_results(next(path for path in COMMITTED if "patch" in path.stem))["rows"]
    modes = [[(panel[0]["mode"], panel[0]["dtype"]) for panel in line] for line in plot_patches.patch_panels(patches)]
    assert modes[0][0] == ("float pixels", "bf16")


def test_captions_name_the_conditions() -> None:
    gpu, whole = attention_on_gpu(), models_on("cpu")
    patches = results.read_results(next(path for path in COMMITTED if "patch" in path.stem))
    patches["conditions"] = gpu["conditions"]
    captions = (
        (plot.caption(gpu, [gpu["rows"]]), ("driver 580.1", "H=12, D=64", "Time is device time")),
        (plot_models.model_caption(whole, 200), ("threads 1", "7 rounds", "timm: absent (a, b)")),
        (plot_patches.patch_caption(patches, 200), ("3x224x224 pixels", "patches of 16", "E=768")),
    )
    for caption, words in captions:
        for word in (*words, "AMD EPYC 9B14", "torch 2.13.0", "0123abc"):
            assert word in " ".join(caption.split())


def test_targets_of_attention_are_judged_at_every_size() -> None:
    flash, learned, prebuilt, cudnn, training, memory = judged(attention_on_gpu()).values()
    assert [verdict.met for verdict in flash] == [True] * 7
    assert [(verdict.met, verdict.baseline) for verdict in learned] == [(True, "flex_attention")] * 7
    assert [verdict.ratio for verdict in prebuilt] == pytest.approx([1.6] * 7)
    assert [verdict.met for verdict in cudnn] == [None if "577" in verdict.case else False for verdict in cudnn]
    assert [verdict.met for verdict in training] == [False] * 7
    assert [(verdict.case, verdict.met, verdict.ratio) for verdict in memory] == [("8x1601 bf16", True, 5.0)]


@pytest.mark.parametrize(
    ("device", "missed"),
    [
        (
            "cpu",
            ["base 640 B=1 fp32 3.6x", "base 640 B=1 bf16 3.2x", "accelerated Transformers 2.0x", "goal"],
        ),
        (
            "cuda",
            ["base 224 B=1 bf16 4.0x", "training step of large 640 bf16 2x"],
        ),
    ],
)
def test_targets_of_models(device: str, missed: list[str]) -> None:
    verdicts = judged(models_on(device))
    found = [text for text, group in verdicts.items() if False in [verdict.met for verdict in group]]
    found = [text for text in found if "float32_matmul_precision" not in text]
    assert len(found) == len(missed)
    assert all(text.startswith(start) for text, start in zip(found, missed, strict=True))
    assert not any(verdict.missing for group in verdicts.values() for verdict in group)


def test_targets_of_patches() -> None:
    speeds = {"beit_fast fused": 1.2, "unfold + linear": 1.25, "conv": 1.0, "conv channels_last": 0.8}
    speeds["normalize + conv"] = 0.8
    rows = [
        row("cpu patch embedding", case.mode, case.batch, 197, name, case.flops / speeds[name]) | {"dtype": case.dtype}
        for case, threads in bench_patch_embed.runs(full=False)
        for name in bench_patch_embed.BASELINES[case.mode]
    ]
    close, faster, from_bytes = judged(results_on("cpu", rows)).values()
    assert [(v.ratio, v.met, v.baseline) for v in close] == [(pytest.approx(0.96), False, "unfold + linear")] * 2
    assert [v.met for v in faster] == [False] * 2
    assert [(v.ratio, v.met) for v in from_bytes] == [(pytest.approx(1.5), True)] * 2


def test_ratios_are_taken_within_one_group() -> None:
    ours, theirs, runtime = "beit_fast optimized", "transformers sdpa", "openvino"
    model = {"model": "base", "image": 224, "dtype": "fp32", "images_per_second": 1.0}
    content = results_on(
        "cpu",
        [
            row("cpu models", "inference", 1, 197, name, median, group=group, **model)
            for group, name, median in ((1, ours, 1.0), (1, theirs, 4.0), (2, ours, 2.0), (2, runtime, 2.2))
        ],
    )
    verdicts = judged(content)
    (over_theirs,) = verdicts["base 224 B=1 fp32 2.8x transformers sdpa"]
    (over_runtime,) = verdicts["base 224 B=1 fp32 level with OpenVINO"]
    assert (over_theirs.ratio, over_runtime.ratio) == pytest.approx((4.0, 1.1))
    assert over_runtime.case == "base 1x197 fp32, threads 1, group 2"
    (panel,) = plot_models.model_panels(content["rows"])
    assert [(one["baseline"], one["median"]) for one in panel] == [(ours, 1.5), (runtime, 2.2), (theirs, 4.0)]
    assert panel[0]["range"] == pytest.approx([0.9, 2.2])
    content["rows"] = [one for one in content["rows"] if one["baseline"] == ours]
    assert [verdict.met for verdict in judged(content)["base 224 B=1 fp32 level with OpenVINO"]] == [None]


def test_targets_are_printed_with_reasons_and_distances() -> None:
    content = attention_on_gpu()
    for one in content["rows"]:
        one["queued_ahead"] = one["baseline"] != "sdpa without bias flash"
    text = targets.table(targets.judge(content))
    assert "forward no slower than SDPA flash without bias: met at 7 of 7 (ratio needed 1.00)" in text
    assert "forward + backward with the table 3x the best baseline: met at 0 of 7 (ratio needed 3.00)" in text
    assert "ratio  2.00  MISSED, 33.3 % less is needed  (flex_attention)" in text
    assert "32x577 bf16   not compared: sdpa prebuilt bias cudnn: No plan." in text
    assert text.count("(sdpa without bias flash, the device waited for the host)") == 7
    assert text.count("waited") == 7
    content["rows"] = [one for one in content["rows"] if one["baseline"] != "beit_fast triton"]
    verdicts = targets.judge(content)
    assert len(verdicts) == 6
    assert all(verdict.met is None and "was not measured" in verdict.missing for verdict in verdicts)


@pytest.mark.parametrize(
    ("device", "name", "slug"),
    [
        ("cuda", "NVIDIA H200", "nvidia-h200"),
        ("cpu", "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "intel-xeon-gold-6338-cpu-2-threads"),
    ],
)
def test_device_slug_of_a_device_is_its_name_in_lower_case(device: str, name: str, slug: str) -> None:
    assert results.device_slug({"device": device, "device_name": name, "threads": 2}) == slug


def hf_docs_results(device: str) -> dict[str, Any]:
    """Rows in which sdpa takes 3/4 of the time of eager and 2/3 of its memory, ours a half and a quarter."""
    shares = {EAGER: (1.0, 1.0), SDPA: (0.75, 2 / 3), TRITON: (0.5, 0.25), OPTIMIZED: (0.25, 0.5)}
    rows = [
        row(hf_docs_cases.BENCHES[device], case.mode, case.batch, case.tokens, name, 0.1 * case.batch * time)
        | {**dataclasses.asdict(case), "iqr": 0.002 * case.batch * time, "rounds": case.steps}
        | {"peak_memory": int(3e8 * held), "loaded_memory": int(3e8 * held) + 1000, "memory_before": 1000}
        for case in hf_docs_cases.hf_docs_cases(device)
        for name, (time, held) in shares.items()
        if not (case.trains and name == OPTIMIZED)
    ]
    return results_on(device, rows, [{"baseline": OPTIMIZED, "reason": "supports inference only", "cases": ["one"]}])


def cells_of(table: str) -> list[dict[str, str]]:
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(set(head)) == len(head)
    return [dict(zip(head, line, strict=True)) for line in body]


def test_hf_docs_tables(tmp_path: Path) -> None:
    content = hf_docs_results("cuda")
    (line,) = cells_of(hf_docs_tables.training_table([one for one in content["rows"] if one["mode"] == "training"]))
    assert line == {
        **{"num_training_steps": "50", "batch_size": "2", "image_size": "(1048, 640)", "dtype": "fp16"},
        **{"is_cuda": "True", "Time per batch (eager - s)": "0.2000", "Time per batch (sdpa - s)": "0.1500"},
        **{"Time per batch (triton - s)": "0.1000", "SDPA speedup (%)": "33.3", "triton speedup (%)": "100.0"},
        **{"Eager peak mem (MB)": "600.0", "SDPA peak mem (MB)": "400.0", "triton peak mem (MB)": "150.0"},
        **{"SDPA mem saving (%)": "50.0", "triton mem saving (%)": "300.0"},
    }
    content = hf_docs_results("cpu")
    inference = [one for one in content["rows"] if one["mode"] == "inference"]
    lines = cells_of(hf_docs_tables.inference_table(inference))
    assert [line["Image batch size"] for line in lines] == ["1", "4"]
    expected = {
        "Eager (s/iter)": "0.1000",
        "Eager ±IQR/2, %": "±1.0%",
        "SDPA speedup": "1.33",
        "triton speedup": "2.00",
    }
    expected |= {"optimized speedup": "4.00", "SDPA memory saved (%)": "50.0", "optimized memory (MB)": "300.0"}
    assert lines[0] == lines[0] | expected
    rows = [{**one, "peak_memory": None} for one in inference if one["baseline"] != EAGER]
    line = cells_of(hf_docs_tables.inference_table(rows))[0]
    absent = {name for name, value in line.items() if value == "-"}
    assert absent == {name for name in line if name.startswith("Eager") or "memory" in name or "speedup" in name}
    text = hf_docs_tables.tables(content)
    for word in (
        "AMD EPYC 9B14",
        "1 thread",
        "0123abc",
        "`--full`",
        "- beit_fast optimized, one: supports inference only",
    ):
        assert word in text
