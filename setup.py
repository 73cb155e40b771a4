"""``pip install .`` makes a pure wheel that carries ``csrc``: no torch and no compiler is needed.

``FASTNORM_AOT=1 pip install --no-build-isolation .`` also compiles the kernels, with the sources,
flags and code that the first use would compile them with (`fastnorm._build.build_ahead`).
"""

import os
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
AHEAD_OF_TIME = os.environ.get("FASTNORM_AOT", "0") not in ("", "0")


def _build_module() -> types.ModuleType:
    """``fastnorm._build`` without the package's ``__init__``, which imports every operator."""
    package = types.ModuleType("fastnorm")
    package.__path__ = [str(ROOT / "fastnorm")]
    sys.modules["fastnorm"] = package
    import fastnorm._build

    return fastnorm._build


class BuildWithSources(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "fastnorm"
        for name in ("csrc", "prebuilt"):
            shutil.rmtree(package / name, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", package / "csrc")
        if AHEAD_OF_TIME:
            _build_module().build_ahead(package / "prebuilt")


class AheadOfTimeDistribution(Distribution):
    """Marks the wheel as one for this platform and Python."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    cmdclass={"build_py": BuildWithSources},
    **({"distclass": AheadOfTimeDistribution} if AHEAD_OF_TIME else {}),
)
