"""Builds the compiled CPU backend (engine/native/src) where there is a compiler.

Everything else is in pyproject.toml. Without a compiler the installation goes on, and torch runs
what the backend would have.
"""

from pathlib import Path

from setuptools import Extension, setup

_SOURCES = Path("engine/native/src")

setup(
    ext_modules=[
        Extension(
            "engine.native._library",
            sources=sorted(str(path) for path in _SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in _SOURCES.glob("*.[hi]*")),
            language="c++",
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
