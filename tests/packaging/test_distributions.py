"""Contents of sdist and wheel, installation, and builds without a compiler.

Everything is built in the folder of the unpacked sdist, so that it is compiled at most once.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import beit_fast
from beit_fast import native

from ..support.checkout import FORWARD, ROOT, load_native_build

KERNEL_FILES = {file.name for file in (ROOT / "kernels" / "attention").glob("*.py")}
NATIVE_FILES = {
    str(file.relative_to(ROOT))
    for file in (ROOT / "csrc").rglob("*")
    if file.suffix in (".cpp", ".h", ".cu", ".cuh", ".py")
}
BUILD_VARIABLES = ("BEIT_FAST_NATIVE", "CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "PYTHONPATH", "TRITON_INTERPRET")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES}
HAS_COMPILER = shutil.which("c++") is not None
CPU_LIBRARY = f"beit_fast/{native.file_name('_C')}"
LIBRARIES = {f"beit_fast/{native.file_name(library)}" for library in native.LIBRARIES}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="runs from a checkout"),
    pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler"),
]


def run(*command, cwd="/", check=True, **environment):
    """Run a command in an environment without build variables."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def build(kind, tree, out, **environment):
    """Build a wheel or sdist of `tree`; return its path and stderr."""
    done = run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, tree, **environment)
    (made,) = Path(out).iterdir()
    return made, done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))[0]


@pytest.fixture(scope="module")
def tree(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    # Reuse the objects of the checkout. The build recompiles those older than one of their sources.
    if (objects := ROOT / "build" / "native").exists():
        shutil.copytree(objects, unpacked / "build" / "native")
    return unpacked


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"), BEIT_FAST_NATIVE="1")[0]


@pytest.fixture(scope="module")
def pure_wheel(tree, tmp_path_factory):
    """Build a wheel without a working compiler, over an earlier build.

    Returns the wheel and the stderr of its build.
    """
    return build("wheel", tree, tmp_path_factory.mktemp("pure"), CXX="/bin/false")


def names_in(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def test_sdist_contains_sources_and_nothing_compiled(sdist):
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers()}
    assert all(members[f"beit_fast/kernels/attention/{name}"].isfile() for name in KERNEL_FILES)
    assert not NATIVE_FILES - set(members)
    assert not [name for name in members if name.startswith("beit_fast/kernels/aot")]
    assert not [name for name in members if name.endswith((".so", ".o", native.BUILD_NOTES))]


def test_wheel_contains_kernels_and_libraries_and_no_sources(wheel):
    names = names_in(wheel)
    assert {f"beit_fast/kernels/attention/{name}" for name in KERNEL_FILES} <= names
    assert {
        "beit_fast_command.py",
        "beit_fast/py.typed",
        "beit_fast/kernels/README.md",
        f"beit_fast/{native.BUILD_NOTES}",
        CPU_LIBRARY,
    } <= names
    assert not [name for name in names if name.startswith(("beit_fast/kernels/__init__.py", "beit_fast/kernels/aot"))]
    assert {name for name in names if name.endswith(".so")} <= LIBRARIES
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/", "csrc/", "build/"))]


def test_wheel_tag_is_this_platform_and_any_python(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"beit_fast-{beit_fast.__version__}-py3-none-{platform}.whl"
    metadata = zipfile.ZipFile(wheel).read(f"beit_fast-{beit_fast.__version__}.dist-info/WHEEL").decode()
    assert f"Root-Is-Purelib: false\nTag: py3-none-{platform}\n" in metadata.split("\n\n")[0] + "\n"


def test_wheel_without_compiler_is_for_any_platform(pure_wheel):
    wheel, message = pure_wheel
    assert wheel.name == f"beit_fast-{beit_fast.__version__}-py3-none-any.whl"
    assert not [name for name in names_in(wheel) if name.endswith((".so", ".cpp"))]
    lines = [line for line in message.splitlines() if line.startswith("beit_fast native libraries")]
    assert len(lines) == 1
    assert "_C not built: the C++ compiler /bin/false" in lines[0]


def test_info_without_compiler_reports_missing_library(pure_wheel, tmp_path):
    zipfile.ZipFile(pure_wheel[0]).extractall(tmp_path)
    path = {"PYTHONPATH": str(tmp_path)}
    assert run(sys.executable, "-c", FORWARD, **path).stdout.strip() == "torch"
    facts = json.loads(run(sys.executable, "-m", "beit_fast", "info", "--json", **path).stdout)
    reason = f"{native.file_name('_C')} was not built: the C++ compiler /bin/false does not support C++17"
    assert facts["native_libraries"]["_C"]["reason"] == reason
    assert reason in {row["kernel"]: row["unsupported_reasons"] for row in facts["kernels"]}["cpp"]
    assert reason in run(sys.executable, "-m", "beit_fast", "info", **path).stdout


def test_libraries_link_only_c_functions_of_torch(wheel, tmp_path):
    """One library then works with every Python and with every newer torch."""
    for library in sorted(LIBRARIES & names_in(wheel)):
        file = zipfile.ZipFile(wheel).extract(library, tmp_path)
        undefined = run("nm", "--dynamic", "--undefined-only", file).stdout.split()
        assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
        assert not [name for name in undefined if re.match(r"_Z.*(c10|2at|5torch|9beit_fast)", name)]
        assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)


@pytest.mark.usefixtures("wheel")
def test_isa_objects_have_no_static_initializers(tree, monkeypatch):
    """Static initializers run on every CPU, so ISA objects must have none."""
    monkeypatch.chdir(tree)
    monkeypatch.delenv("CXXFLAGS", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    objects = load_native_build(tree)._plan_cpu(Path("build", "native")).objects
    variants = [file for file in objects if ".isa.cpp." in file.name]
    assert variants
    for file in variants:
        sections = run("readelf", "--section-headers", "--wide", file, cwd=tree).stdout
        assert ".init_array" not in sections, f"{file.name} has a static initializer"
        assert ".ctors" not in sections, f"{file.name} has a static initializer"


@pytest.fixture
def environment(tmp_path):
    """Create an environment; return its interpreter and site-packages.

    It can import the packages that are installed for the tests.
    """
    venv.create(tmp_path / "env", system_site_packages=False, with_pip=False)
    interpreter = tmp_path / "env" / "bin" / "python"
    site = Path(run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return interpreter, site


def install(interpreter, *what, **environment):
    prefix = interpreter.parents[1]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall", "--prefix", prefix]
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", *options, *what, **environment)


def test_wheel_install_imports_from_site_packages(wheel, environment):
    interpreter, site = environment
    install(interpreter, wheel)
    where = run(interpreter, "-c", "import beit_fast; print(beit_fast.__file__)").stdout.strip()
    assert Path(where).is_relative_to(site)
    assert run(interpreter, "-c", FORWARD).stdout.strip() == "cpp"


def test_wheel_install_classifies_digits(wheel, environment, tmp_path):
    """Run in an empty folder, with the torch of the tests."""
    interpreter, _ = environment
    install(interpreter, wheel)
    shutil.copytree(ROOT / "examples" / "digits", tmp_path / "digits")
    images = sorted((tmp_path / "digits" / "images").glob("*.png"))
    command = ["-m", "beit_fast", "classify", *images, "--model", "digits", "--top", "1", "--json"]
    results = json.loads(run(interpreter, *command, cwd=tmp_path).stdout)
    assert count_correct_digits(results) >= 19
    assert len(images) == 20


def count_correct_digits(results):
    """Count images whose top class is the digit in their name."""
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    predictions = {Path(row["image"]).name: row["classes"][0]["label"] for row in results["results"]}
    return sum(label == names[int(name[0])] for name, label in predictions.items())


def test_twine_check_accepts_sdist_and_wheel(sdist, wheel):
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)


def test_sdist_install_with_native_disabled_has_no_libraries(sdist, environment):
    """The wheel, built from the same files, tests the build of libraries."""
    interpreter, site = environment
    install(interpreter, sdist, BEIT_FAST_NATIVE="0")
    code = "import beit_fast; print(beit_fast.__file__)\n"
    code += "from beit_fast import native; print(native.unsupported_reason('_C'))"
    where, reason = run(interpreter, "-c", code).stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert reason == f"{native.file_name('_C')} was not built: BEIT_FAST_NATIVE=0 was set"
    assert run(interpreter, "-c", FORWARD).stdout.strip() == "torch"


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
@pytest.mark.usefixtures("wheel")
def test_editable_install_imports_from_checkout(tree, environment, mode):
    interpreter, _ = environment
    install(interpreter, "--config-settings", f"editable_mode={mode}", "--editable", tree)
    where = run(interpreter, "-c", "import beit_fast; print(beit_fast.__file__)").stdout.strip()
    assert Path(where).is_relative_to(tree)
    assert run(interpreter, "-c", FORWARD).stdout.strip() == "cpp"


def build_in_place(tree, check=True, **environment):
    return run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=tree, check=check, **environment)


@pytest.mark.usefixtures("wheel")
def test_build_in_place_replaces_current_and_removes_stale_library(tree):
    stale = tree / "beit_fast" / f"_C.{native.INTERFACE - 1}.so"
    stale.touch()
    build_in_place(tree)
    library = tree / CPU_LIBRARY
    assert library.exists()
    assert not stale.exists()
    first = library.stat()
    build_in_place(tree)
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    build_in_place(tree, BEIT_FAST_NATIVE="0")
    assert not library.exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BEIT_FAST_NATIVE": "1", "CXX": "/bin/false"}, "BEIT_FAST_NATIVE=1 needs _C"),
        ({"BEIT_FAST_NATIVE": "1", "CXX": "no-such-compiler"}, "the C++ compiler no-such-compiler was not found"),
        ({"BEIT_FAST_NATIVE": "yes"}, "BEIT_FAST_NATIVE='yes' is not supported (expected '0' or '1', or unset)"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS is 'many' (expected a positive number)"),
    ],
)
def test_build_in_place_invalid_setting_fails(tree, variables, message):
    done = build_in_place(tree, check=False, **variables)
    assert done.returncode != 0
    assert message in done.stderr


def pythons_with_torch():
    """Find interpreters of other Python versions that can import torch."""
    this = sys.version_info[:2]
    names = [f"python3.{minor}" for minor in range(11, 16) if (3, minor) != this]
    found = [path for path in map(shutil.which, names) if path is not None]
    return [path for path in found if run(path, "-c", "import torch, numpy, safetensors", check=False).returncode == 0]


def test_wheel_works_in_other_python_versions(wheel, tmp_path):
    interpreters = pythons_with_torch()
    if not interpreters:
        pytest.skip("no other Python version has torch")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for interpreter in interpreters:
        assert run(interpreter, "-c", FORWARD, PYTHONPATH=str(tmp_path)).stdout.strip() == "cpp"
