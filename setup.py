"""Package layout and the compiled modules.

The folder `kernels/` is installed as `mbv2.kernels` (a top-level `kernels` would clash). `csrc/` becomes `mbv2._C`
(kernels for CPUs) and, where nvcc is found, `mbv2._cuda`; without torch (give pip --no-build-isolation) or a C++
compiler the package is pure Python. A module that cannot be built is left out and one line says so: MBV2_BUILD=1 makes
it an error, MBV2_BUILD=0 leaves both out, MBV2_CUDA=0 the second.
GPU code is made for the architectures of MBV2_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX"); by default for all of
_ARCHS, in the source folder (build_ext --inplace) for the GPUs of this machine or else for 8.0.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

packages = find_packages(include=["mbv2", "mbv2.*"]) + [
    "mbv2.kernels",
    "mbv2.kernels.cpu",
    "mbv2.kernels.cuda",
    "mbv2.kernels.triton",
]

# GCC 12 takes the empty std::optional of a tensor for an uninitialised one, and makes slower loops of the products
# where it may assume that indices do not wrap: most Pythons give the flag, not all.
_FLAGS = ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden", "-Wno-maybe-uninitialized", "-fwrapv"]
# The rest is compiled for the oldest machine of the architecture, as these run only where the CPU has them.
_ISA_FLAGS = {
    # GCC 12 warns of its own _mm512_undefined_ps.
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx2", "-mfma", "-Wno-uninitialized"],
    "avx512vnni": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512vnni"),
        *("-mavx2", "-mfma", "-Wno-uninitialized"),
    ],
    "avx512bf16": ["-mavx512f", "-mavx512dq", "-mavx512bf16", "-mavx2", "-mfma", "-Wno-uninitialized"],
    "avx2": ["-mavx2", "-mfma"],
}
_NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# The kernels begin at 8.0 (cp.async, bfloat16); newer architectures than the last run its PTX.
_ARCHS = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"


class BuildParallel(build_ext):
    """Compiles every source on its own with its own flags; a failure leaves the module out."""

    def finalize_options(self) -> None:
        """Note whether the source folder is what gets the modules: setuptools clears the flag while it builds."""
        super().finalize_options()
        self._for_development = bool(self.inplace)

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext`."""
        try:
            compile_one = self._compile_with_nvcc if ext.name == "mbv2._cuda" else self._compile_one
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_one(ext, source), ext.sources)
                ext.extra_objects = [name for names in objects for name in names]
            ext.sources = []
            super().build_extension(ext)
        except Exception as error:
            if os.environ.get("MBV2_BUILD") == "1":
                raise
            what = "CUDA" if ext.name == "mbv2._cuda" else "C++"
            _say(f"mbv2: no compiled {what} kernels, as their build failed ({error}); the package works without them")

    def _compile_one(self, ext: Extension, source: str) -> list[str]:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        with_torch = Path(source).parent.name == "csrc"
        return self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            # Only the operators see torch's headers.
            include_dirs=ext.include_dirs if with_torch else [],
            # kernels_avx2.cpp, train_avx2.cpp
            extra_postargs=_FLAGS
            + (_ISA_FLAGS.get(Path(source).stem.rpartition("_")[2], []) if x86 else [])
            + (ext.extra_compile_args if with_torch else []),
            depends=ext.depends,
        )

    def _compile_with_nvcc(self, ext: Extension, source: str) -> list[str]:
        if not source.endswith(".cu"):
            return self._compile_one(ext, source)
        nvcc = _nvcc()
        target = Path(self.build_temp, source).with_suffix(".cu.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-c", source, "-o", str(target), *_NVCC_FLAGS]
        done = subprocess.run([*command, *_arch_flags(nvcc, self._for_development)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc on {source}: {(done.stderr or done.stdout).strip()[-2000:]}")
        return [str(target)]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _nvcc() -> str | None:
    """The compiler of CUDA_HOME, else of the PATH; what a script on the PATH runs is its own business."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes]
    return next((path for path in candidates if os.access(path, os.X_OK)), shutil.which("nvcc"))


def _toolkit(nvcc: str) -> Path:
    """The folder with CUDA's headers and libraries, as nvcc itself sees it."""
    done = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE)
    return Path(top[1]) if top else Path(nvcc).resolve().parents[1]


def _arch_flags(nvcc: str, for_development: bool) -> list[str]:
    """What nvcc is to generate, of that what it can.

    Raises:
        RuntimeError: nothing is left.
    """
    asked = os.environ.get("MBV2_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    flags, left = [], []
    for entry in re.split(r"[;,\s]+", asked or (_native() if for_development else _ARCHS)):
        number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if number is None or int(number[1]) < 8 or f"compute_{number[1]}{number[2]}" not in known.split():
            left.append(entry)
            continue
        arch = number[1] + number[2]
        kinds = f"sm_{arch},compute_{arch}" if number[3] else f"sm_{arch}"
        flags.append(f"-gencode=arch=compute_{arch},code=[{kinds}]")
    if not flags:
        raise RuntimeError(f"of the architectures {' '.join(left)}, {nvcc} and the kernels support none")
    return flags


def _native() -> str:
    """The architectures of this machine's GPUs, "8.0+PTX" where it has none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        found = []
    found = sorted({entry for entry in found if re.fullmatch(r"\d+\.\d", entry) and int(entry.split(".")[0]) >= 8})
    return " ".join(found) or "8.0+PTX"


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
    headers = sorted(str(path) for path in Path("csrc").glob("**/*.*h"))
    macros = [("_GLIBCXX_USE_CXX11_ABI", str(int(torch.compiled_with_cxx11_abi())))]
    sources = [path for path in sorted(Path("csrc").glob("**/*.cpp")) if not path.name.startswith("ops_cuda")]
    # Without it, torch's headers make at::parallel_for a plain loop. The runtime is the one that torch brings along.
    threads = ["-fopenmp"] if torch.backends.openmp.is_available() and sys.platform == "linux" else []
    cpu = CppExtension(
        "mbv2._C",
        list(map(str, sources)),
        define_macros=macros,
        depends=headers,
        optional=True,
        extra_compile_args=threads,
        extra_link_args=threads,
    )
    return [cpu, *_cuda_extension(macros, headers)]


def _cuda_extension(macros: list[tuple[str, str]], headers: list[str]) -> list[Extension]:
    if os.environ.get("MBV2_CUDA", "1") == "0":
        return []
    nvcc = _nvcc()
    if nvcc is None:
        _say("mbv2: no compiled CUDA kernels, as there is no nvcc (set CUDA_HOME); GPUs run the Triton ones")
        return []
    from torch.utils.cpp_extension import CppExtension

    toolkit = _toolkit(nvcc)
    libraries = [path for path in (toolkit / "lib64", toolkit / "lib") if path.is_dir()]
    extension = CppExtension(
        "mbv2._cuda",
        [*map(str, sorted(Path("csrc").glob("ops_cuda*.cpp"))), *map(str, sorted(Path("csrc/cuda").glob("*.cu")))],
        include_dirs=[str(toolkit / "include")],
        define_macros=macros,
        depends=headers,
        library_dirs=list(map(str, libraries)),
        # The runtime is linked in, so importing the module needs neither a driver nor anybody's libcudart.
        libraries=["cudart_static", "dl", "rt", "pthread"],
        # What no operator uses of torch is not asked for at import.
        extra_link_args=["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"],
        py_limited_api=True,
        optional=True,
    )
    return [extension]


setup(
    packages=packages,
    package_dir={"mbv2": "mbv2", "mbv2.kernels": "kernels"},
    package_data={
        "mbv2": ["py.typed", "imagenet_classes.txt", "configs/*.yaml"],
        "mbv2.kernels.triton": ["tiles/*.json"],
        "mbv2.kernels.cuda": ["*.json"],
    },
    ext_modules=_extensions(),
    cmdclass={"build_ext": BuildParallel},
)
