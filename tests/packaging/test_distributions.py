"""What people install: what wheel and sdist hold, that each way of installing builds and works, and what a missing
compiler does. Everything is built in the folder that the sdist unpacks to, so that it is compiled once at most."""

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
OUR_VARIABLES = ("BEIT_FAST_NATIVE", "CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "PYTHONPATH", "TRITON_INTERPRET")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OUR_VARIABLES}
HAS_COMPILER = shutil.which("c++") is not None
CPU_LIBRARY = f"beit_fast/{native.file_name('_C')}"
LIBRARIES = {f"beit_fast/{native.file_name(library)}" for library in native.LIBRARIES}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="runs from a checkout"),
    pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler"),
]


def run(*command, cwd="/", check=True, **environment):
    """A command with its output, in an environment that says nothing of how to build."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def build(kind, tree, out, **environment):
    """The path of a wheel or an sdist of `tree`, and what its build wrote to stderr."""
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
    # Objects that the checkout has are as good here as long as every file that they were made from is there and older.
    if (objects := ROOT / "build" / "native").exists():
        shutil.copytree(objects, unpacked / "build" / "native")
    return unpacked


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"), BEIT_FAST_NATIVE="1")[0]


@pytest.fixture(scope="module")
def pure_wheel(tree, tmp_path_factory):
    """A wheel made where no compiler works, and what its build wrote, in a folder where one was made that does."""
    return build("wheel", tree, tmp_path_factory.mktemp("pure"), CXX="/bin/false")


def names_in(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_sdist_holds_all_sources_and_nothing_compiled(sdist):
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers()}
    assert all(members[f"beit_fast/kernels/attention/{name}"].isfile() for name in KERNEL_FILES)
    assert not NATIVE_FILES - set(members)
    assert not [name for name in members if name.startswith("beit_fast/kernels/aot")]
    assert not [name for name in members if name.endswith((".so", ".o", native.BUILD_NOTES))]


def test_the_wheel_holds_kernels_and_libraries_and_no_sources(wheel):
    names = names_in(wheel)
    assert {f"beit_fast/kernels/attention/{name}" for name in KERNEL_FILES} <= names
    assert {
        "beit_fast/py.typed",
        "beit_fast/kernels/README.md",
        f"beit_fast/{native.BUILD_NOTES}",
        CPU_LIBRARY,
    } <= names
    assert not [name for name in names if name.startswith(("beit_fast/kernels/__init__.py", "beit_fast/kernels/aot"))]
    assert {name for name in names if name.endswith(".so")} <= LIBRARIES
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/", "csrc/", "build/"))]


def test_the_wheel_is_for_this_platform_and_any_python(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"beit_fast-{beit_fast.__version__}-py3-none-{platform}.whl"
    metadata = zipfile.ZipFile(wheel).read(f"beit_fast-{beit_fast.__version__}.dist-info/WHEEL").decode()
    assert f"Root-Is-Purelib: false\nTag: py3-none-{platform}\n" in metadata.split("\n\n")[0] + "\n"


def test_without_a_compiler_the_wheel_is_for_any_platform(pure_wheel):
    wheel, said = pure_wheel
    assert wheel.name == f"beit_fast-{beit_fast.__version__}-py3-none-any.whl"
    assert not [name for name in names_in(wheel) if name.endswith((".so", ".cpp"))]
    lines = [line for line in said.splitlines() if line.startswith("beit_fast native libraries")]
    assert len(lines) == 1
    assert "_C not built: the C++ compiler /bin/false" in lines[0]


def test_without_a_compiler_the_package_works_and_info_says_what_is_missing(pure_wheel, tmp_path):
    zipfile.ZipFile(pure_wheel[0]).extractall(tmp_path)
    path = {"PYTHONPATH": str(tmp_path)}
    assert run(sys.executable, "-c", FORWARD, **path).stdout.strip() == "torch"
    facts = json.loads(run(sys.executable, "-m", "beit_fast", "info", "--json", **path).stdout)
    reason = f"{native.file_name('_C')} was not built: the C++ compiler /bin/false does not support C++17"
    assert facts["native_libraries"]["_C"]["reason"] == reason
    assert reason in {row["kernel"]: row["reasons"] for row in facts["kernels"]}["cpp"]
    assert reason in run(sys.executable, "-m", "beit_fast", "info", **path).stdout


def test_libraries_need_torchs_c_functions_and_neither_python_nor_each_other(wheel, tmp_path):
    """That is what lets one file serve every Python, and every torch from the oldest that it was compiled for."""
    for library in sorted(LIBRARIES & names_in(wheel)):
        file = zipfile.ZipFile(wheel).extract(library, tmp_path)
        undefined = run("nm", "--dynamic", "--undefined-only", file).stdout.split()
        assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
        assert not [name for name in undefined if re.match(r"_Z.*(c10|2at|5torch|9beit_fast)", name)]
        assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)


@pytest.mark.usefixtures("wheel")
def test_loading_a_library_runs_no_code_for_a_newer_machine(tree, monkeypatch):
    """What an object does when it is loaded it does on every machine, so one for an instruction set does nothing."""
    monkeypatch.chdir(tree)
    monkeypatch.delenv("CXXFLAGS", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    objects = load_native_build(tree)._plan_cpu(Path("build", "native")).objects
    variants = [file for file in objects if ".isa.cpp." in file.name]
    assert variants
    for file in variants:
        sections = run("readelf", "--section-headers", "--wide", file, cwd=tree).stdout
        assert ".init_array" not in sections, f"{file.name} has a static initialiser"
        assert ".ctors" not in sections, f"{file.name} has a static initialiser"


@pytest.fixture
def environment(tmp_path):
    """A fresh environment: its interpreter, and its site-packages, which sees what this one has installed."""
    venv.create(tmp_path / "env", system_site_packages=False, with_pip=False)
    interpreter = tmp_path / "env" / "bin" / "python"
    site = Path(run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return interpreter, site


def install(interpreter, *what, **environment):
    prefix = interpreter.parents[1]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall", "--prefix", prefix]
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", *options, *what, **environment)


def test_a_wheel_installs(wheel, environment):
    interpreter, site = environment
    install(interpreter, wheel)
    where = run(interpreter, "-c", "import beit_fast; print(beit_fast.__file__)").stdout.strip()
    assert Path(where).is_relative_to(site)
    assert run(interpreter, "-c", FORWARD).stdout.strip() == "cpp"


def test_an_installed_wheel_reads_digits(wheel, environment, tmp_path):
    """In a folder of its own, beside the torch that the tests have."""
    interpreter, _ = environment
    install(interpreter, wheel)
    shutil.copytree(ROOT / "examples" / "digits", tmp_path / "digits")
    images = sorted((tmp_path / "digits" / "images").glob("*.png"))
    command = ["-m", "beit_fast", "classify", *images, "--model", "digits", "--top", "1", "--json"]
    results = json.loads(run(interpreter, *command, cwd=tmp_path).stdout)
    assert right_digits(results) >= 19
    assert len(images) == 20


def right_digits(results):
    """How many of the images, which are named after their digit, have the right class first."""
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    firsts = {Path(row["image"]).name: row["classes"][0]["label"] for row in results["results"]}
    return sum(label == names[int(name[0])] for name, label in firsts.items())


def test_twine_accepts_sdist_and_wheel(sdist, wheel):
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)


def test_an_sdist_installs_without_libraries_if_told_so(sdist, environment):
    """That it builds them is what the wheel shows, which comes from the same files."""
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
def test_a_checkout_installs_editable(tree, environment, mode):
    interpreter, _ = environment
    install(interpreter, "--config-settings", f"editable_mode={mode}", "--editable", tree)
    where = run(interpreter, "-c", "import beit_fast; print(beit_fast.__file__)").stdout.strip()
    assert Path(where).is_relative_to(tree)
    assert run(interpreter, "-c", FORWARD).stdout.strip() == "cpp"


def build_in_place(tree, check=True, **environment):
    return run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=tree, check=check, **environment)


@pytest.mark.usefixtures("wheel")
def test_building_in_place_replaces_what_is_there_and_removes_what_is_stale(tree):
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
    ("variables", "said"),
    [
        ({"BEIT_FAST_NATIVE": "1", "CXX": "/bin/false"}, "BEIT_FAST_NATIVE=1 needs _C"),
        ({"BEIT_FAST_NATIVE": "1", "CXX": "no-such-compiler"}, "the C++ compiler no-such-compiler was not found"),
        ({"BEIT_FAST_NATIVE": "yes"}, "BEIT_FAST_NATIVE is 'yes'; accepted are 0, 1, or nothing"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS is 'many' (expected a positive number)"),
    ],
)
def test_what_stops_a_build(tree, variables, said):
    done = build_in_place(tree, check=False, **variables)
    assert done.returncode != 0
    assert said in done.stderr


def pythons_with_torch():
    """Interpreters of other versions than this one's that can import torch."""
    this = sys.version_info[:2]
    names = [f"python3.{minor}" for minor in range(11, 16) if (3, minor) != this]
    found = [path for path in map(shutil.which, names) if path is not None]
    return [path for path in found if run(path, "-c", "import torch, numpy, safetensors", check=False).returncode == 0]


def test_the_wheel_serves_another_python(wheel, tmp_path):
    interpreters = pythons_with_torch()
    if not interpreters:
        pytest.skip("no Python of another version has torch here")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for interpreter in interpreters:
        assert run(interpreter, "-c", FORWARD, PYTHONPATH=str(tmp_path)).stdout.strip() == "cpp"
