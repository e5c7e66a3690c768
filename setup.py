"""Says the one thing pyproject.toml cannot: the top-level folder passes/ is the package onnxcompress.passes."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["onnxcompress*"], exclude=["onnxcompress.passes*"]),
        "onnxcompress.passes",
        *(f"onnxcompress.passes.{name}" for name in find_packages("passes")),
    ],
    package_dir={"onnxcompress.passes": "passes"},
)
