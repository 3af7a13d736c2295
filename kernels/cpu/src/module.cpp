// This file defines an empty Python module, because setuptools builds the library as an extension module. Python calls
// the library's functions through ctypes.
#include <Python.h>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
