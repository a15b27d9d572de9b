"""Build the native libraries that this machine supports, for any Python version.

`BEIT_FAST_NATIVE=0` builds none; `BEIT_FAST_NATIVE=1` makes it an error when one is missing for which there is a
compiler, or when there is no C++ compiler. csrc/build.py has the commands, and what else can be set. The long
description is README without its relative links.
"""

import filecmp
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, "csrc")
import build as native_build

PACKAGE = "beit_fast"
native = runpy.run_path(f"{PACKAGE}/native.py")  # what the package looks for; needs no torch
links = runpy.run_path("repository_links.py")


class BuildNative(build_ext):
    """Build the native libraries that this machine supports.

    One line reports the results. They are also written beside the package, for `beit-fast info`.
    """

    def get_ext_filename(self, fullname):
        return os.path.join(PACKAGE, native["file_name"](fullname.rpartition(".")[2]))

    def build_extensions(self):
        results = build_libraries([extension.name.rpartition(".")[2] for extension in self.extensions])
        self.extensions = [x for x in self.extensions if results[x.name.rpartition(".")[2]].file is not None]
        self.distribution.ext_modules = self.extensions
        folder = Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("_C*.so"):
            old.unlink()
        for name, result in results.items():
            if result.file is not None:
                shutil.copy(result.file, folder / native["file_name"](name))
        notes = {name: {"built": result.file is not None, "note": result.note} for name, result in results.items()}
        (folder / native["BUILD_NOTES"]).write_text(json.dumps(notes, indent=1) + "\n")

    def copy_extensions_to_source(self):
        """Replace whole files, and only if they differ: another process may have them open."""
        built = Path(self.build_lib, PACKAGE)
        files = [native["BUILD_NOTES"], *(file.name for file in built.glob("_C*.so"))]
        for old in Path(PACKAGE).glob("_C*.so"):
            if old.name not in files:
                old.unlink()
        for name in files:
            target = Path(PACKAGE, name)
            if not target.exists() or not filecmp.cmp(built / name, target, shallow=False):
                partial = shutil.copy(built / name, target.with_name(f"{name}.{os.getpid()}"))
                os.replace(partial, target)

    def get_outputs(self):
        return [*super().get_outputs(), os.path.join(self.build_lib, PACKAGE, native["BUILD_NOTES"])]


class BuildWheel(bdist_wheel):
    """Tag the wheel for every Python. Without a library, it is also for every platform."""

    def run(self):
        if not self.skip_build:
            self.run_command("build")
            self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()  # known only now that all is built
        super().run()

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def build_libraries(names):
    """Build the named libraries by BEIT_FAST_NATIVE; return results by name."""
    request = os.environ.get("BEIT_FAST_NATIVE", "")
    if request not in ("", "0", "1"):
        raise SystemExit(f"BEIT_FAST_NATIVE={request!r} is not supported (expected '0' or '1', or unset)")
    if request == "0":
        results = {name: native_build.Result(None, "BEIT_FAST_NATIVE=0 was set") for name in names}
    else:
        results = native_build.build(names, Path("build", "native"))
    line = "; ".join(
        f"{name} {'built for' if result.file else 'not built:'} {result.note}" for name, result in results.items()
    )
    print(f"beit_fast native libraries: {line}", file=sys.stderr)
    needed = {"_C"} if native_build.find_nvcc() is None else {"_C", "_C_cuda"}
    if request == "1" and any(results[name].file is None for name in needed):
        raise CompileError(f"BEIT_FAST_NATIVE=1 needs {' and '.join(sorted(needed))}: {line}")
    return results


setup(
    long_description=links["without_relative_links"](Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension(f"{PACKAGE}.{name}", sorted(map(str, Path("csrc").rglob(pattern))))
        for name, pattern in native_build.SOURCES.items()
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": BuildWheel},
)
