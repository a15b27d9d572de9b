"""The folder `benchmarks/` as a package, for tests, whatever else is called so."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PACKAGE = "beit_fast_benchmarks"
_MODULES = (
    *("bench_cpu_attention", "bench_model", "bench_patch_embed"),
    *(f"harness.{name}" for name in ("cases", "clocks", "hf_docs_cases", "model_cases", "processes", "results")),
    *(f"baselines.{name}" for name in ("attention", "exported", "hf_docs", "models")),
    *(f"report.{name}" for name in ("hf_docs_tables", "plot", "plot_models", "plot_patches", "targets")),
)


@contextlib.contextmanager
def benchmark_house() -> Iterator[ModuleType]:
    """The package with all its modules imported, and forgotten at the end."""
    spec = importlib.util.spec_from_file_location(PACKAGE, BENCHMARKS / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    for name in _MODULES:
        importlib.import_module(f"{PACKAGE}.{name}")
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def benchmark_module(name: str) -> ModuleType:
    """One module of that folder that needs no other of them."""
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_in_a_copy(tmp_path: Path, bench: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A run of one file of benchmarks, `bench`, with the house around it, in `tmp_path`."""
    folder = tmp_path / "benchmarks"
    shutil.copytree(BENCHMARKS, folder, ignore=shutil.ignore_patterns("bench_*.py", "results", "__pycache__"))
    (folder / "bench_probe.py").write_text(bench)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\naddopts = --import-mode=importlib -ra\n")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--device=cpu", *options]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone, timeout=120, check=False)
