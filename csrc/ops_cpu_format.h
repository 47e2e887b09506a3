// The number format of a network by its name, for the operators on it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <string>

#include "cpu/isa.h"
#include "cpu/network.h"

namespace mbv2::cpu {

// What body(F()) returns for the format F of this name.
template <class Body>
auto with_format(const std::string& format, const Body& body) {
    if (format == Int8::name) return body(Int8());
    if (format == Bfloat16::name) return body(Bfloat16());
    TORCH_CHECK(format == Float32::name, "there is no network in ", format);
    return body(Float32());
}

// The packed weights, once it is clear that they are for these kernels.
template <class F>
const std::byte* packed_bytes(const at::Tensor& packed, const Plan& plan, const Kernels<F>& kernels) {
    TORCH_CHECK(packed.device().is_cpu() && packed.scalar_type() == at::kByte && packed.is_contiguous() &&
                    packed.numel() == packed_size(plan, kernels) &&
                    reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 64 == 0,
                "the packed network does not belong to this plan, the instruction set ", kernels.name, " and ",
                F::name);
    return static_cast<const std::byte*>(packed.const_data_ptr());
}

}  // namespace mbv2::cpu
