// The table of one instruction set's training tasks.
#pragma once

#include "train_depthwise.h"
#include "train_few_rows.h"
#include "train_stream.h"

namespace mbv2::cpu::train {
namespace {

template <class V, class T>
constexpr Tasks<T> tasks_of() {
    return {forward<V, T>,
            project_backward<V, T>,
            pointwise_backward<V, T>,
            depthwise<V, T>,
            depthwise_backward<V, T>,
            folded<V, T>,
            forward_few<V, T>,
            project_backward_few<V, T>,
            expand_backward_few<V, T>,
            bn_apply<V, T>,
            bn_sums<V, T>,
            pool<V, T>,
            pool_backward<V, T>};
}

template <class V>
constexpr Kernels kernels_of(const char* name) {
    return {name, V::lanes, tasks_of<V, float>(), tasks_of<V, bf16>(), add<V>};
}

}  // namespace
}  // namespace mbv2::cpu::train
