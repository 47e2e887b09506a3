// What the operators of the CPU backend's stages share: tensors checked, dense memory, results allocated, threads lent.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <optional>

#include "cpu/train_memory.h"
#include "cpu/train_stages.h"

namespace mbv2 {
namespace {

using at::Tensor;
using cpu::train::bf16;
using cpu::train::Machine;
using cpu::train::Pictures;
using cpu::train::Weight;
using Optional = std::optional<Tensor>;

inline void run_on_torch_threads(int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

inline Machine machine() {
    const char* isa = std::getenv("MBV2_CPU_ISA");
    return {cpu::train::kernels(isa == nullptr ? "" : isa),
            {at::in_parallel_region() ? 1 : at::get_num_threads(), run_on_torch_threads}};
}

template <class T>
T* data(const Tensor& x) {
    return static_cast<T*>(x.data_ptr());
}
template <class T>
const T* data(const Optional& x) {
    return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// body(T()) with T the C++ type of the activations.
template <class Body>
inline void with_type(const Tensor& x, const Body& body) {
    TORCH_CHECK(x.device().is_cpu(), "the CPU stages take tensors on the CPU, not on ", x.device());
    switch (x.scalar_type()) {
        case at::kFloat:
            return body(float());
        case at::kBFloat16:
            return body(bf16());
        default:
            TORCH_CHECK(false, "the CPU stages take float32 and bfloat16, not ", x.scalar_type());
    }
}

// Dense NHWC memory: the same tensor where it has that already. `like` has the type it must have.
inline Tensor dense(const Tensor& x, const Tensor& like) {
    TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "activations must be [N, C, H, W] and not empty, not ", x.sizes());
    TORCH_CHECK(x.scalar_type() == like.scalar_type(), "activations and weights must be of one type, not ",
                x.scalar_type(), " and ", like.scalar_type());
    const int64_t c = x.size(1), w = x.size(3), strides[] = {c * x.size(2) * w, 1, w * c, c};
    if (x.strides() == at::IntArrayRef(strides)) return x;
    return x.permute({0, 2, 3, 1}).contiguous();
}
inline Tensor dense(const Tensor& x) { return dense(x, x); }

inline Tensor dense_like(const Tensor& x, const Tensor& like) {
    TORCH_CHECK(x.sizes() == like.sizes(), "tensors of ", x.sizes(), " and ", like.sizes(), " do not fit");
    return dense(x, like);
}

inline Tensor new_dense(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
    // No permuted view: what an operator returns must allow operations in place.
    const int64_t sizes[] = {n, c, h, w}, strides[] = {c * h * w, 1, w * c, c};
    const int64_t bytes = n * c * h * w * like.element_size();
    if (bytes < cpu::train::kLeastPooled) return at::empty_strided(sizes, strides, like.options());
    void* const memory = cpu::train::borrow(bytes);
    return at::from_blob(memory, sizes, strides, cpu::train::give_back, like.options());
}
inline Tensor new_like(const Tensor& x) { return new_dense(x, x.size(0), x.size(1), x.size(2), x.size(3)); }

inline Tensor new_vectors(const Tensor& like, at::IntArrayRef sizes) {
    return at::empty(sizes, like.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
}
inline Tensor nothing(const Tensor& like) { return new_vectors(like, {0}); }

// [rows, channels] of float32.
inline Tensor vectors(const Tensor& x, int64_t rows, int64_t channels) {
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.sizes() == at::IntArrayRef({rows, channels}),
                "statistics must be float32 [", rows, ", ", channels, "], not ", x.scalar_type(), " ", x.sizes());
    return x.contiguous();
}
inline Optional vectors(const Optional& x, int64_t rows, int64_t channels) {
    return x.has_value() ? Optional(vectors(*x, rows, channels)) : x;
}
inline Tensor bias_vector(const Tensor& x, int64_t channels) {
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.numel() == channels, "the bias must be float32 of ", channels,
                " values");
    return x.contiguous();
}

inline int64_t rows_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }
inline Pictures pictures(const Tensor& x, int64_t stride) {
    TORCH_CHECK(stride == 1 || stride == 2, "the stride must be 1 or 2, not ", stride);
    return {x.size(0), x.size(1), x.size(2), x.size(3), stride};
}

// A weight [outputs, inputs, kernel, kernel] in any memory, checked.
inline void check_weight(const Tensor& w, int64_t inputs, int64_t kernel) {
    TORCH_CHECK(w.dim() == 4 && w.size(0) > 0 && w.size(1) == inputs && w.size(2) == kernel && w.size(3) == kernel,
                "a weight must be [outputs, ", inputs, ", ", kernel, ", ", kernel, "], not ", w.sizes());
}
template <class T>
Weight<T> weight_of(const Tensor& w) {
    return {static_cast<T*>(const_cast<void*>(w.const_data_ptr())),
            w.size(0),
            w.size(1),
            w.size(2) * w.size(3),
            w.stride(0),
            w.stride(1),
            w.stride(2),
            w.stride(3)};
}
inline Tensor new_weight(const Tensor& w) { return at::empty_strided(w.sizes(), w.strides(), w.options()); }

}  // namespace
}  // namespace mbv2
