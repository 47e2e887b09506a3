// The Python module mbv2._C: importing it registers the operators of ops.cpp; its one function plans fused GPU blocks,
// which takes no GPU.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cuda/plan.h"

namespace {

using mbv2::cuda::BlockPlan;
using mbv2::cuda::BlockShape;
using mbv2::cuda::Element;
using mbv2::cuda::Gpu;
using mbv2::cuda::Plan;
using mbv2::cuda::ProductPlan;
using mbv2::cuda::Wish;

PyObject* describe(const ProductPlan& plan) {
    return Py_BuildValue("{s:i,s:L,s:i,s:i,s:d,s:d,s:y#}", "tile", plan.tile, "blocks",
                         static_cast<long long>(plan.blocks), "threads", plan.threads, "shared_bytes",
                         plan.shared_bytes, "microseconds", plan.microseconds, "instructions", plan.instructions,
                         "params", reinterpret_cast<const char*>(&plan.params),
                         static_cast<Py_ssize_t>(sizeof plan.params));
}

PyObject* describe(const Plan& plan) {
    const mbv2::cuda::FusedParams& p = plan.params;
    const mbv2::cuda::TileShape& tile = mbv2::cuda::kTileShapes[plan.tile];
    return Py_BuildValue("{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:L,s:i,s:i,s:L,s:d,s:d,s:y#}", "tile", plan.tile, "chunk",
                         tile.chunk_bytes, "images", p.tile_images, "height", p.tile_height, "width", p.tile_width,
                         "splits", p.splits, "chunks", p.chunks, "warps", plan.threads / 32, "blocks",
                         static_cast<long long>(plan.blocks), "threads", plan.threads, "shared_bytes",
                         plan.shared_bytes, "partial_bytes", static_cast<long long>(plan.partial_bytes), "microseconds",
                         plan.microseconds, "instructions", plan.instructions, "params",
                         reinterpret_cast<const char*>(&p), static_cast<Py_ssize_t>(sizeof p));
}

PyObject* describe(const BlockPlan& plan) {
    PyObject* block = describe(plan.block);
    PyObject* product = plan.cut == mbv2::cuda::Cut::kWhole ? Py_NewRef(Py_None) : describe(plan.product);
    // "N" takes the references; where one is missing, so is the result.
    return Py_BuildValue("{s:i,s:N,s:N,s:d}", "cut", static_cast<int>(plan.cut), "block", block, "product", product,
                         "microseconds", plan.microseconds);
}

PyObject* plan_block(PyObject*, PyObject* args, PyObject* keywords) {
    static const char* names[] = {"element",
                                  "images",
                                  "height",
                                  "width",
                                  "inputs",
                                  "hidden",
                                  "outputs",
                                  "stride",
                                  "expands",
                                  "residual",
                                  "arch",
                                  "processors",
                                  "shared_per_block",
                                  "shared_per_processor",
                                  "tile",
                                  "tile_images",
                                  "tile_height",
                                  "tile_width",
                                  "splits",
                                  "cut",
                                  "product",
                                  nullptr};
    int element = 0, expands = 0, residual = 0;
    long long images = 0, height = 0, width = 0, inputs = 0, hidden = 0, outputs = 0, stride = 0;
    Gpu gpu = {};
    Wish wish;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iLLLLLLLppiiii|iiiiiii", const_cast<char**>(names), &element,
                                     &images, &height, &width, &inputs, &hidden, &outputs, &stride, &expands, &residual,
                                     &gpu.arch, &gpu.processors, &gpu.shared_per_block, &gpu.shared_per_processor,
                                     &wish.tile, &wish.tile_images, &wish.tile_height, &wish.tile_width, &wish.splits,
                                     &wish.cut, &wish.product)) {
        return nullptr;
    }
    if (element < 0 || element >= mbv2::cuda::kElements) {
        PyErr_SetString(PyExc_ValueError, "element is 0 (float16), 1 (bfloat16) or 2 (float32)");
        return nullptr;
    }
    const BlockShape shape = {static_cast<Element>(element),
                              images,
                              height,
                              width,
                              inputs,
                              hidden,
                              outputs,
                              stride,
                              expands != 0,
                              residual != 0};
    if (const char* reason = mbv2::cuda::refusal(shape, gpu)) {
        PyErr_SetString(PyExc_ValueError, reason);
        return nullptr;
    }
    BlockPlan plan;
    if (!mbv2::cuda::plan_block(shape, gpu, wish, &plan)) Py_RETURN_NONE;
    return describe(plan);
}

PyMethodDef methods[] = {
    {"plan_block", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plan_block)),
     METH_VARARGS | METH_KEYWORDS,
     "The plan of a block as a dict, None where no tile fits; ValueError where the kernels cannot run the block."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
