// What makes the library importable, so that Python's own machinery finds and names it. It offers
// Python nothing: library.py calls baton.h through ctypes.
#include <Python.h>

namespace {

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_library", "The compiled CPU backend; see engine/native/library.py.",
    0, nullptr, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__library() { return PyModule_Create(&definition); }
