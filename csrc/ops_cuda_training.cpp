// Of the Python module mbv2._cuda: the training depthwise kernels. Like launch_block they take addresses and a stream,
// no tensors; the whole argument struct comes as bytes, which kernels/cuda/depthwise.py fills.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>

#include "cuda/depthwise_params.h"

namespace {

using mbv2::cuda::DepthwiseBackwardParams;
using mbv2::cuda::DepthwiseParams;
using mbv2::cuda::DepthwiseType;

template <class Params, const char* (*kLaunch)(const Params&, DepthwiseType, int, cudaStream_t)>
PyObject* launch(PyObject*, PyObject* args) {
    const char* bytes = nullptr;
    Py_ssize_t size = 0;
    int type = 0, stride = 0;
    unsigned long long stream = 0;
    if (!PyArg_ParseTuple(args, "y#iiK", &bytes, &size, &type, &stride, &stream)) return nullptr;
    Params params;
    if (size != sizeof params || type < mbv2::cuda::kFloat16 || type > mbv2::cuda::kFloat32 ||
        (stride != 1 && stride != 2)) {
        PyErr_SetString(PyExc_ValueError,
                        "not arguments of this build: mbv2's Python and mbv2._cuda differ in version");
        return nullptr;
    }
    std::memcpy(&params, bytes, sizeof params);
    const char* error =
        kLaunch(params, static_cast<DepthwiseType>(type), stride, reinterpret_cast<cudaStream_t>(stream));
    if (error != nullptr) {
        PyErr_Format(PyExc_RuntimeError, "the depthwise kernel could not be launched: %s", error);
        return nullptr;
    }
    Py_RETURN_NONE;
}

}  // namespace

namespace mbv2::cuda {

PyMethodDef training_methods[] = {
    {"launch_depthwise", launch<DepthwiseParams, launch_depthwise>, METH_VARARGS,
     "launch_depthwise(params, type, stride, stream): params is a DepthwiseParams, type 0 float16, 1 bfloat16, 2 "
     "float32."},
    {"launch_depthwise_backward", launch<DepthwiseBackwardParams, launch_depthwise_backward>, METH_VARARGS,
     "launch_depthwise_backward(params, type, stride, stream): params is a DepthwiseBackwardParams."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace mbv2::cuda
