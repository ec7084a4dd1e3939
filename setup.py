"""The packages, with `src` as one of them, which pyproject.toml cannot say beside packages that it finds."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["HPSv2*", "MPS*", "dnnlib*", "torch_utils*", "training*"]), "training.resources"],
    package_dir={"training.resources": "src"},
    package_data={"training.ppo": ["cfgs/*.yaml"], "training.resources": ["**/*"]},
)
