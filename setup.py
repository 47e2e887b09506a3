"""Package layout: the folder `kernels/` is installed as `mbv2.kernels` (a top-level `kernels` would clash)."""

from setuptools import find_packages, setup

packages = find_packages(include=["mbv2", "mbv2.*"]) + ["mbv2.kernels", "mbv2.kernels.triton"]

setup(
    packages=packages,
    package_dir={"mbv2": "mbv2", "mbv2.kernels": "kernels"},
    package_data={
        "mbv2": ["py.typed", "imagenet_classes.txt", "configs/*.yaml"],
        "mbv2.kernels.triton": ["tiles/*.json"],
    },
)
