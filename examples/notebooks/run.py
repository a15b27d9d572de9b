"""Execute the notebooks and write their outputs back.

python examples/notebooks/run.py [NOTEBOOK ...]

Each runs offline in a kernel of this interpreter and in a temporary folder. A notebook whose cell fails is left as it
is. `make notebooks` does the same in `.venv`. It needs nbclient and ipykernel.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
HASH = "source_sha256"
"""Key in the metadata of a notebook: the hash of the sources that its outputs come from."""

CELL_SECONDS = 900
WITHOUT_TORCHVISION = "from benchmarks.baselines.timm_import import import_timm; import_timm(); del import_timm"
"""First line of a kernel without torchvision, which timm imports and its BEiT does not need."""


def main(arguments: list[str] | None = None) -> int:
    """Run the notebooks, print the seconds of each, and return the exit code."""
    parser = argparse.ArgumentParser(description="Execute notebooks and write their outputs back.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in this folder")
    for path in parser.parse_args(arguments).notebooks or sorted(FOLDER.glob("*.ipynb")):
        start, spent = time.perf_counter(), processor_seconds()
        try:
            notebook = execute(path)
        except (OSError, RuntimeError) as error:
            print(f"{path} is unchanged: {error}", file=sys.stderr)
            return 1
        write(notebook, path)
        seconds, spent = time.perf_counter() - start, processor_seconds() - spent
        print(f"{path.name}: {seconds:.0f} s, {spent:.0f} s of a core, {path.stat().st_size / 1024:.0f} KiB")
    return 0


def execute(path: Path) -> Any:
    """Run all cells of a notebook in a new kernel, and return the notebook with their outputs.

    Raises:
        RuntimeError: If a cell fails.
    """
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # Without folders the manager has one kernel: that of this interpreter.
        specs = KernelSpecManager(kernel_dirs=[])
        files = f"{folder}/kernel.json"  # and the sockets, beside it
        kernel = AsyncKernelManager(kernel_spec_manager=specs, transport="ipc", connection_file=files)
        client = NotebookClient(
            notebook,
            km=kernel,
            timeout=CELL_SECONDS,
            record_timing=False,
            resources={"metadata": {"path": folder}},
            extra_arguments=[f"--IPKernelApp.exec_lines={[WITHOUT_TORCHVISION]!r}"],
        )
        try:
            client.execute(env=_environment(folder), cleanup_kc=True)  # a kernel of ours is else left running
        except CellExecutionError as error:
            raise RuntimeError(f"{error.ename}: {error.evalue}\n{error}") from error
    return notebook


def write(notebook: Any, path: Path) -> None:
    """Write a notebook with the hash of its sources and without the versions of its kernel."""
    import nbformat

    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        HASH: source_hash(notebook),
    }
    unfinished = path.with_suffix(".unfinished")
    nbformat.write(notebook, unfinished)
    os.replace(unfinished, path)


def source_hash(notebook: Any) -> str:
    """Return the SHA-256 of the sources of all cells."""
    sources = "\0".join(f"{cell['cell_type']}\n{''.join(cell['source'])}" for cell in notebook["cells"])
    return hashlib.sha256(sources.encode()).hexdigest()


def processor_seconds() -> float:
    """Return the time that all finished kernels took of a core."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment(folder: str) -> dict[str, str]:
    """Return an environment that is offline and reads no configuration of the user."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, "IPYTHONDIR": folder, "MPLCONFIGDIR": folder}
    return {**os.environ, **own}


if __name__ == "__main__":
    raise SystemExit(main())
