"""The installed package: what wheel and sdist hold, where it imports from, and what importing it does not do."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import beit_fast

ROOT = Path(beit_fast.__file__).parents[1]
KERNEL_FILES = {file.name for file in (ROOT / "kernels" / "attention").glob("*.py")}
FORWARD = """
import torch, beit_fast
config = beit_fast.BeitConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
                              image_size=32, patch_size=8, use_relative_position_bias=True)
model = beit_fast.BeitForImageClassification(config, attn_implementation="triton").eval()
assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 2)
print(model.attention_report().kernel)
"""

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="runs from a checkout")


def python(code, cwd="/", executable=sys.executable, **environment):
    """Run code in a fresh process, away from the checkout unless told otherwise; returns what it printed."""
    run = subprocess.run(
        [str(executable), "-W", "error::UserWarning", "-c", code],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_wheel_and_sdist_hold_the_kernels_as_files(distributions):
    wheel, sdist = distributions
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"beit_fast/kernels/attention/{name}" for name in KERNEL_FILES} <= names
    assert {"beit_fast/py.typed", "beit_fast/kernels/README.md"} <= names
    assert "beit_fast/kernels/__init__.py" not in names
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/", "csrc/")) for name in names)
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers()}
    for name in KERNEL_FILES:
        assert members[f"beit_fast/kernels/attention/{name}"].isfile()


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_every_way_of_installing(distributions, tmp_path, kind):
    wheel, sdist = distributions
    source = {"wheel": [str(wheel)], "sdist": [str(sdist)], "editable": ["--editable", str(ROOT)]}[kind]
    venv.create(tmp_path / "env", system_site_packages=False, with_pip=False)
    interpreter = tmp_path / "env" / "bin" / "python"
    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=interpreter).strip())
    dependencies = Path(torch.__file__).parents[1]
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(interpreter),
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--force-reinstall",
            "--prefix",
            str(tmp_path / "env"),
            *source,
        ],
        check=True,
        capture_output=True,
    )
    where = python("import beit_fast; print(beit_fast.__file__)", executable=interpreter).strip()
    assert Path(where).is_relative_to(ROOT if kind == "editable" else site)
    assert python(FORWARD, executable=interpreter).strip() == "triton/composite"


@pytest.mark.parametrize("cwd", ["/", str(ROOT)])
def test_imports_from_anywhere(cwd):
    assert python(FORWARD, cwd=cwd).strip() == "triton/composite"


def test_importing_loads_nothing_but_the_package():
    """No Triton, no Transformers, no image or hub library: nothing that `import torch` had not loaded."""
    code = """
import json, sys, torch
before = set(sys.modules)
import beit_fast
print(json.dumps(sorted(name for name in set(sys.modules) - before if name.split(".")[0] != "beit_fast")))
"""
    assert json.loads(python(code)) == []


def test_importing_initialises_no_gpu_and_prints_nothing():
    code = "import torch, beit_fast; assert not torch.cuda.is_initialized(); torch.ops.beit_fast.patch_embed.default"
    assert python(code) == ""


def test_works_without_triton():
    code = "import sys; sys.modules['triton'] = None\n" + FORWARD
    code += "assert not any(name.startswith('triton.') for name in sys.modules)\n"
    code += "from beit_fast import attention\n"
    code += "reasons = attention.describe_kernels('cuda')[0][2]\n"
    code += "assert 'the package triton is not installed' in reasons, reasons\n"
    assert python(code).strip() == "triton/composite"


def test_the_folder_kernels_does_not_hide_the_package_kernels(tmp_path):
    """Transformers imports the package `kernels`; a regular package of that name in the checkout would shadow it."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("genuine = True\n")
    code = "import kernels, beit_fast.kernels.attention; assert kernels.genuine"
    python(code, cwd=str(ROOT), PYTHONPATH=str(tmp_path))
    python("from transformers import BeitModel; import beit_fast", cwd=str(ROOT))


def test_an_exported_program_loads_with_the_import_alone(tmp_path):
    config = beit_fast.BeitConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=32, patch_size=8,
        use_relative_position_bias=True,
    )  # fmt: skip
    model = beit_fast.BeitForImageClassification(config, attn_implementation="triton").eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.export.save(torch.export.export(model, (pixels,)), tmp_path / "model.pt2")
    torch.save((pixels, model(pixels).logits.detach()), tmp_path / "data.pt")
    code = f"""
import torch, beit_fast
pixels, logits = torch.load({str(tmp_path / "data.pt")!r})
output = torch.export.load({str(tmp_path / "model.pt2")!r}).module()(pixels)
torch.testing.assert_close(output.logits, logits)
"""
    python(code, cwd=str(tmp_path))


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert version("beit-fast") == beit_fast.__version__
