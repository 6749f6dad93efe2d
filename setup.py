"""Builds the optional C++ extension. Everything else stands in pyproject.toml.

``KERNELAB_BUILD``: ``auto`` (default: a failed build warns and kernelab falls back to torch), ``cpu`` (a failed build
is an error), ``none`` (no extension).
"""

import os
from glob import glob

from setuptools import setup

choice = os.environ.get("KERNELAB_BUILD", "auto")
if choice not in ("auto", "cpu", "none"):
    raise SystemExit(f"KERNELAB_BUILD: expected auto, cpu or none, got {choice!r}")

if choice == "none":
    setup()
else:
    from pybind11.setup_helpers import Pybind11Extension, build_ext

    extension = Pybind11Extension(
        "kernelab._C_cpu",
        sorted([*glob("csrc/*/*.cpp")]),
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        include_dirs=["csrc"],
        cxx_std=17,
        extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno"],
        extra_link_args=["-fopenmp"],
    )
    extension.optional = choice == "auto"
    setup(ext_modules=[extension], cmdclass={"build_ext": build_ext})
