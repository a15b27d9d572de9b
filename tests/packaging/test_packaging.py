"""The installed package: imports, side effects, types, exports and version."""

import json
import os
import subprocess
import sys
import tomllib

import pytest
import torch

import beit_fast

from ..support.checkout import FORWARD, ROOT
from ..support.devices import CPU_ATTENTION

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="runs from a checkout")


def python(code, cwd="/", executable=sys.executable, **environment):
    """Run code in a new process and return its output.

    By default the process does not run in the checkout.
    """
    run = subprocess.run(
        [str(executable), "-W", "error::UserWarning", "-c", code],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_dependencies_have_no_upper_bound():
    """An upper bound would refuse the torch that a user has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    users = [*project["dependencies"], *(project["optional-dependencies"][name] for name in ("hf", "timm", "plot"))]
    assert [name for name in map(str, users) if "<" in name or "==" in name.partition(";")[0]] == []


@pytest.mark.parametrize("cwd", ["/", str(ROOT)])
def test_import_from_any_folder_works(cwd):
    assert python(FORWARD, cwd=cwd).strip() == CPU_ATTENTION


def test_import_loads_only_what_models_need():
    """Load these parts of the package and no other module, besides those of torch."""
    code = """
import json, sys, torch
before = set(sys.modules)
import beit_fast
print(json.dumps(sorted({".".join(name.split(".")[:2]) for name in set(sys.modules) - before})))
"""
    parts = ("configuration", "layers", "models", "native", "ops", "position_bias", "utils")
    assert json.loads(python(code)) == ["beit_fast", *(f"beit_fast.{part}" for part in parts)]


def test_public_names_are_attributes():
    assert [name for name in beit_fast.__all__ if not hasattr(beit_fast, name)] == []


def test_import_initializes_no_gpu_and_prints_nothing():
    code = "import torch, beit_fast; assert not torch.cuda.is_initialized(); torch.ops.beit_fast.patch_embed.default"
    assert python(code) == ""


def test_import_in_development_mode_gives_no_warning():
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", "import beit_fast"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_without_triton_works():
    code = "import sys; sys.modules['triton'] = None\n" + FORWARD
    code += "assert not any(name.startswith('triton.') for name in sys.modules)\n"
    code += "from beit_fast.ops.dispatch import attention\n"
    code += "reasons = attention.describe_kernels('cuda')[0][2]\n"
    code += "assert 'the package triton is not installed' in reasons, reasons\n"
    assert python(code).strip() == CPU_ATTENTION


def test_dir_returns_public_names():
    assert dir(beit_fast) == sorted(beit_fast.__all__)
    assert {"BeitImageProcessor", "BeitImageProcessorFast", "BeitFeatureExtractor"} <= set(dir(beit_fast))


@pytest.mark.slow
def test_mypy_finds_editable_install(tmp_path):
    """mypy reads .pth files, but not the import hook of an editable install."""
    script = tmp_path / "script.py"
    script.write_text("from beit_fast import BeitConfig\nreveal_type(BeitConfig())\n")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'Revealed type is "beit_fast.configuration.beit_config.BeitConfig"' in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_from_pretrained_is_typed_as_its_class(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from beit_fast import BeitConfig, BeitModel\n"
        "reveal_type(BeitModel.from_pretrained('x', subfolder='y'))\n"
        "reveal_type(BeitModel.from_pretrained('x', output_loading_info=True))\n"
        "reveal_type(BeitConfig.from_pretrained('x'))\n"
        "BeitModel.from_pretrained('x', subfolder=3)\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    revealed = [line.partition("Revealed type is ")[2] for line in done.stdout.splitlines() if "Revealed" in line]
    model = "beit_fast.models.beit.BeitModel"
    config = "beit_fast.configuration.beit_config.BeitConfig"
    revealed = [kind.replace("builtins.", "") for kind in revealed]
    assert revealed == [f'"{model}"', f'"tuple[{model}, dict[str, Any]]"', f'"{config}"'], done.stdout + done.stderr
    assert "script.py:5: error: " in done.stdout


def test_kernels_folder_does_not_shadow_kernels_package(tmp_path):
    """A regular package `kernels` would shadow the one that Transformers imports."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("genuine = True\n")
    code = "import kernels, beit_fast.kernels.attention; assert kernels.genuine"
    python(code, cwd=str(ROOT), PYTHONPATH=str(tmp_path))
    python("from transformers import BeitModel; import beit_fast", cwd=str(ROOT))


def test_exported_program_loads_after_import(tmp_path):
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


def test_version_equals_distribution_version():
    from importlib.metadata import version

    assert version("beit-fast") == beit_fast.__version__
