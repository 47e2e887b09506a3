// The compiled operators in torch.library, namespace mbv2.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <string>
#include <vector>

#include "ops_cpu_format.h"

namespace mbv2 {
namespace {

void check_floats(const at::Tensor& tensor, const char* name) {
    TORCH_CHECK(tensor.device().is_cpu() && tensor.scalar_type() == at::kFloat, name,
                " must be a float32 tensor on the CPU, not ", tensor.scalar_type(), " on ", tensor.device());
}

cpu::Plan read_plan(const at::Tensor& plan) {
    TORCH_CHECK(plan.device().is_cpu() && plan.scalar_type() == at::kLong && plan.dim() == 1 && plan.is_contiguous(),
                "the plan must be a vector of int64 on the CPU");
    return cpu::Plan(plan.const_data_ptr<int64_t>(), plan.numel());
}

std::string cpu_isa(const std::string& format) {
    return cpu::with_format(format, [](auto f) { return std::string(cpu::kernels<decltype(f)>().name); });
}

// A page of 4 KiB costs its first toucher a microsecond or two, and 14 MB of weights are 3,500 of them.
void ask_for_large_pages(const at::Tensor& bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = sysconf(_SC_PAGESIZE), begin = reinterpret_cast<uintptr_t>(bytes.const_data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes.nbytes()) / page * page;
    // Where the kernel has none, memory is as good as before.
    if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

at::Tensor pack_network(at::TensorList weights, const at::Tensor& plan_tensor, const std::string& isa,
                        const std::string& format) {
    const cpu::Plan plan = read_plan(plan_tensor);
    return cpu::with_format(format, [&](auto f) {
        using F = decltype(f);
        const std::vector<int64_t> sizes = cpu::weight_sizes<F>(plan);
        TORCH_CHECK(weights.size() == sizes.size(), "the plan has ", sizes.size(), " weights, not ", weights.size());
        std::vector<at::Tensor> dense;
        std::vector<const float*> pointers;
        for (size_t i = 0; i < sizes.size(); ++i) {
            check_floats(weights[i], "a weight");
            TORCH_CHECK(weights[i].numel() == sizes[i], "weight ", i, " has ", weights[i].numel(), " values, not ",
                        sizes[i]);
            dense.push_back(weights[i].contiguous());
            pointers.push_back(dense.back().const_data_ptr<float>());
        }
        const cpu::Kernels<F>& kernels = cpu::kernels<F>(isa.c_str());
        at::Tensor packed = at::empty({cpu::packed_size(plan, kernels)}, at::kByte);
        ask_for_large_pages(packed);
        cpu::pack(plan, kernels, pointers.data(), reinterpret_cast<std::byte*>(packed.mutable_data_ptr<uint8_t>()));
        return packed;
    });
}

void run_on_torch_threads(int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

at::Tensor network(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& plan_tensor, int64_t classes,
                   const std::string& isa, const std::string& format) {
    check_floats(x, "the input");
    TORCH_CHECK(x.dim() == 4 && x.size(1) == 3, "the input must be [N, 3, H, W], not ", x.sizes());
    TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0, "the input has no pixels: ", x.sizes());
    const cpu::Plan plan = read_plan(plan_tensor);
    TORCH_CHECK(plan.classes == classes, "the plan has ", plan.classes, " classes, not ", classes);
    at::Tensor logits = at::empty({x.size(0), classes}, x.options().memory_format(at::MemoryFormat::Contiguous));
    if (x.size(0) == 0) return logits;
    const int64_t column = x.stride(3);
    const at::Tensor input = x.size(3) == 1 || column == 1 || column == 3 ? x : x.contiguous();
    const cpu::Image image = {input.const_data_ptr<float>(),
                              input.size(0),
                              input.size(2),
                              input.size(3),
                              input.stride(0),
                              input.stride(1),
                              input.stride(2),
                              input.stride(3)};
    const cpu::Threads threads = {at::in_parallel_region() ? 1 : at::get_num_threads(), run_on_torch_threads};
    cpu::with_format(format, [&](auto f) {
        const auto& kernels = cpu::kernels<decltype(f)>(isa.c_str());
        const std::byte* weights = cpu::packed_bytes(packed, plan, kernels);
        cpu::run(plan, kernels, weights, image, threads, logits.mutable_data_ptr<float>());
    });
    return logits;
}

// What compilers and exporters see. In Python it would cost a new process 5 ms: torch looks for its source text.
at::Tensor network_shape(const at::Tensor& x, const at::Tensor&, const at::Tensor&, int64_t classes, const std::string&,
                         const std::string&) {
    return at::empty_symint({x.sym_size(0), classes}, x.options().memory_format(at::MemoryFormat::Contiguous));
}

TORCH_LIBRARY_FRAGMENT(mbv2, library) {
    library.def("cpu_isa(str format='float32') -> str", cpu_isa);
    library.def("cpu_pack_network(Tensor[] weights, Tensor plan, str isa, str format='float32') -> Tensor");
    library.def(
        "cpu_network(Tensor x, Tensor packed, Tensor plan, int classes, str isa, str format='float32') -> Tensor");
}

TORCH_LIBRARY_IMPL(mbv2, CPU, library) {
    library.impl("cpu_pack_network", pack_network);
    library.impl("cpu_network", network);
}

TORCH_LIBRARY_IMPL(mbv2, Meta, library) { library.impl("cpu_network", network_shape); }

}  // namespace
}  // namespace mbv2
