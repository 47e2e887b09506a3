// The Python module mbv2._C: importing it registers the operators of ops.cpp; it has nothing in it.
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
