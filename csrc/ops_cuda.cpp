// The Python module mbv2._cuda: launches the fused block and pairs. It takes addresses and a stream, not tensors, so it
// needs no torch at all; with Python's stable interface one build serves every torch and every Python from 3.10 on.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>

#include "cuda/fused_launch.h"

namespace {

using mbv2::cuda::Element;
using mbv2::cuda::FusedParams;

PyObject* launch_block(PyObject*, PyObject* args) {
    int element = 0, tile = 0, shared_bytes = 0;
    long long blocks = 0;
    const char* bytes = nullptr;
    Py_ssize_t size = 0;
    unsigned long long stream = 0, at[9] = {};
    if (!PyArg_ParseTuple(args, "iiLiy#K(KKKKKKKKK)", &element, &tile, &blocks, &shared_bytes, &bytes, &size, &stream,
                          &at[0], &at[1], &at[2], &at[3], &at[4], &at[5], &at[6], &at[7], &at[8])) {
        return nullptr;
    }
    FusedParams params;
    if (size != sizeof params || element < 0 || element >= mbv2::cuda::kElements || tile < 0 ||
        tile >= mbv2::cuda::kTiles) {
        PyErr_SetString(PyExc_ValueError, "not a plan of this build: mbv2._C and mbv2._cuda are of different versions");
        return nullptr;
    }
    std::memcpy(&params, bytes, sizeof params);
    params.x = reinterpret_cast<const void*>(at[0]);
    params.w1 = reinterpret_cast<const void*>(at[1]);
    params.wd = reinterpret_cast<const void*>(at[2]);
    params.w3 = reinterpret_cast<const void*>(at[3]);
    params.b1 = reinterpret_cast<const float*>(at[4]);
    params.bd = reinterpret_cast<const float*>(at[5]);
    params.b3 = reinterpret_cast<const float*>(at[6]);
    params.out = reinterpret_cast<void*>(at[7]);
    params.partial = reinterpret_cast<float*>(at[8]);
    const char* error = mbv2::cuda::launch_fused(static_cast<Element>(element), tile, blocks, shared_bytes, params,
                                                 reinterpret_cast<void*>(stream));
    if (error != nullptr) {
        PyErr_Format(PyExc_RuntimeError, "the fused block could not be launched: %s", error);
        return nullptr;
    }
    Py_RETURN_NONE;
}

PyObject* launch_product(PyObject*, PyObject* args) {
    int element = 0, tile = 0, shared_bytes = 0;
    long long blocks = 0;
    const char* bytes = nullptr;
    Py_ssize_t size = 0;
    unsigned long long stream = 0, at[5] = {};
    if (!PyArg_ParseTuple(args, "iiLiy#K(KKKKK)", &element, &tile, &blocks, &shared_bytes, &bytes, &size, &stream,
                          &at[0], &at[1], &at[2], &at[3], &at[4])) {
        return nullptr;
    }
    mbv2::cuda::ProductParams params;
    if (size != sizeof params || element < 0 || element >= mbv2::cuda::kElements || tile < 0 ||
        tile >= mbv2::cuda::kProducts) {
        PyErr_SetString(PyExc_ValueError, "not a plan of this build: mbv2._C and mbv2._cuda are of different versions");
        return nullptr;
    }
    std::memcpy(&params, bytes, sizeof params);
    params.x = reinterpret_cast<const void*>(at[0]);
    params.w = reinterpret_cast<const void*>(at[1]);
    params.bias = reinterpret_cast<const float*>(at[2]);
    params.shortcut = reinterpret_cast<const void*>(at[3]);
    params.out = reinterpret_cast<void*>(at[4]);
    const char* error = mbv2::cuda::launch_product(static_cast<Element>(element), tile, blocks, shared_bytes, params,
                                                   reinterpret_cast<void*>(stream));
    if (error != nullptr) {
        PyErr_Format(PyExc_RuntimeError, "the product of a pair could not be launched: %s", error);
        return nullptr;
    }
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"launch_block", launch_block, METH_VARARGS,
     "launch_block(element, tile, blocks, shared_bytes, params, stream, (x, w1, wd, w3, b1, bd, b3, out, partial)): "
     "launch a plan of mbv2._C.plan_block on the current device."},
    {"launch_product", launch_product, METH_VARARGS,
     "launch_product(element, tile, blocks, shared_bytes, params, stream, (x, w, bias, shortcut, out)): the same of a "
     "pair's second launch."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

namespace mbv2::cuda {
extern PyMethodDef training_methods[];
}

PyMODINIT_FUNC PyInit__cuda() {
    PyObject* made = PyModule_Create(&module);
    if (made != nullptr && PyModule_AddFunctions(made, mbv2::cuda::training_methods) != 0) {
        Py_DECREF(made);
        return nullptr;
    }
    return made;
}
