"""Builds the compiled CPU backend (engine/native/src) where there is a compiler.

Everything else is in pyproject.toml. Without a compiler the installation goes on, and torch runs
what the backend would have.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

_SOURCES = Path("engine/native/src")
# What engine/native/library.py compares with the header that it finds.
_ABI = hashlib.sha256((_SOURCES / "baton.h").read_bytes()).hexdigest()[:16]

setup(
    ext_modules=[
        Extension(
            "engine.native._library",
            sources=sorted(str(path) for path in _SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in _SOURCES.glob("*.[hi]*")),
            language="c++",
            define_macros=[("BATON_ABI", f'"{_ABI}"')],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-fno-math-errno",
                "-fopenmp-simd",
                "-fvisibility=hidden",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
