"""The compiled CPU backend: a fused step in C++ (src/), and what loads and drives it.

Where no compiler was at hand when the package was installed, there is no library and torch runs
the step (engine/model/llama.py): `library.load` says which it is.
"""
