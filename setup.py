"""Package layout and the compiled module.

The folder `kernels/` is installed as `mbv2.kernels` (a top-level `kernels` would clash). `csrc/` becomes `mbv2._C`;
without torch (give pip --no-build-isolation) or a C++ compiler the package is pure Python and one line says so.
MBV2_BUILD=0 leaves the compiled module out, MBV2_BUILD=1 makes its failure an error.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

packages = find_packages(include=["mbv2", "mbv2.*"]) + ["mbv2.kernels", "mbv2.kernels.triton"]

_FLAGS = ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden"]
# The rest is compiled for the oldest machine of the architecture, as these run only where the CPU has them.
_ISA_FLAGS = {
    # GCC 12 warns of its own _mm512_undefined_ps.
    "kernels_avx512.cpp": [
        "-mavx512f",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
}


class BuildParallel(build_ext):
    """Compiles every source on its own with its own flags; a failure leaves the module out."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext`."""
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                ext.extra_objects = [name for names in pool.map(self._compile_one, ext.sources) for name in names]
            ext.sources = []
            super().build_extension(ext)
        except Exception as error:
            if os.environ.get("MBV2_BUILD") == "1":
                raise
            _say(f"mbv2: no compiled kernels, as the C++ build failed ({error}); the package works without them")

    def _compile_one(self, source: str) -> list[str]:
        ext = self.extensions[0]
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        return self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            # Only the operators see torch's headers.
            include_dirs=ext.include_dirs if Path(source).parent.name == "csrc" else [],
            extra_postargs=_FLAGS + (_ISA_FLAGS.get(Path(source).name, []) if x86 else []),
            depends=ext.depends,
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _extensions() -> list[Extension]:
    if os.environ.get("MBV2_BUILD") == "0":
        return []
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension
    except ImportError:
        if os.environ.get("MBV2_BUILD") == "1":
            raise
        _say("mbv2: no compiled kernels, as torch is not importable here (pip install --no-build-isolation)")
        return []
    abi = int(torch.compiled_with_cxx11_abi())
    return [
        CppExtension(
            "mbv2._C",
            sorted(str(path) for path in Path("csrc").glob("**/*.cpp") if not path.name.startswith("ops_cuda")),
            define_macros=[("_GLIBCXX_USE_CXX11_ABI", str(abi))],
            depends=sorted(map(str, Path("csrc").glob("**/*.h"))),
            optional=True,
        )
    ]


setup(
    packages=packages,
    package_dir={"mbv2": "mbv2", "mbv2.kernels": "kernels"},
    package_data={
        "mbv2": ["py.typed", "imagenet_classes.txt", "configs/*.yaml"],
        "mbv2.kernels.triton": ["tiles/*.json"],
    },
    ext_modules=_extensions(),
    cmdclass={"build_ext": BuildParallel},
)
