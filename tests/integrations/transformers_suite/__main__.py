"""Run Transformers' tests of BEiT with this package's classes, and compare the outcome with `expected.py`."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from . import expected

# What the sdist of Transformers lacks. Tests of exporters and of generation are not tests of BEiT.
MISSING_FILES = {
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/tiny_model_summary.json": "{}\n",
    "packages/datasets.py": "def load_dataset(*args, **kwargs):\n    raise OSError('slow tests are not run')\n",
}
# Arguments of any configuration, with class numbers as strings, as in Transformers' own list.
COMMON_ARGUMENTS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


def main() -> int:
    """Return 0 if the outcome is as expected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="extracted sdist of Transformers; packages/ has `parameterized`")
    parser.add_argument("model_tests", type=Path, help="tests/models/beit/test_modeling_beit.py of the same release")
    parser.add_argument("--baseline", action="store_true", help="test Transformers' own classes")
    options = parser.parse_args()
    import transformers

    if transformers.__version__ != expected.TRANSFORMERS:
        print(
            f"the list in expected.py is that of {expected.TRANSFORMERS}, and {transformers.__version__} is installed"
        )
        return 1
    folder = options.folder.resolve()
    add_missing_files(folder, options.model_tests)
    outcomes = run_tests(folder, options.baseline)
    passed = expected.count_passed(outcomes)
    print(f"{passed} tests pass (with Transformers' own classes {expected.BASELINE})")
    if options.baseline:
        return int(passed != expected.BASELINE or "failed" in outcomes.values())
    found = expected.differences(outcomes)
    print(*found, sep="\n")
    return int(bool(found))


def add_missing_files(folder: Path, model_tests: Path) -> None:
    """Complete the sdist's tests for the model tests of BEiT."""
    files = MISSING_FILES | {
        "tests/models/beit/test_modeling_beit.py": model_tests.read_text(),
        "tests/utils/test_configuration_utils.py": f"config_common_kwargs = {COMMON_ARGUMENTS!r}\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for module in (folder / "tests").rglob("*.py"):
        (module.parent / "__init__.py").touch()
    (folder / "tests/models/__init__.py").touch()


def run_tests(folder: Path, baseline: bool) -> dict[str, str]:
    """Run the tests in a process of their own, and return the outcome of each."""
    file = folder / "outcomes.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder), "-W", "ignore"]
    command += ["-p", "no:cacheprovider", "-p", "own_classes", f"--outcomes={file}", "--tb=short"]
    command += ["--baseline"] if baseline else []
    search = [str(Path(__file__).parent), str(folder / "packages"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search)), "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, "tests/models/beit"], cwd=folder, env=environment, check=False)
    if not file.exists():
        raise SystemExit("the tests did not run to their end")
    outcomes: dict[str, str] = json.loads(file.read_text())
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
