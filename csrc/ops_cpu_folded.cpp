// Stages of the CPU backend for evaluation, BatchNorm folded into weights and biases, as operators, namespace mbv2.
#include <torch/library.h>

#include "cpu/stem_folded.h"
#include "ops_cpu_stages.h"

namespace mbv2 {
namespace {

// Whether the network's kernel reads the picture where it lies.
bool is_picture(const Tensor& x, const Tensor& weight, int64_t stride) {
    const int64_t column = x.stride(3);
    return x.device().is_cpu() && x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat &&
           x.size(1) == 3 && stride == 2 && x.numel() > 0 && (column == 1 || column == 3 || x.size(3) == 1);
}

Tensor stem_folded(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride) {
    check_weight(weight, x.size(1), 3);
    const Pictures p = pictures(x, stride);
    const Tensor shift = bias_vector(bias, weight.size(0));
    if (is_picture(x, weight, stride)) {
        const Tensor taps = weight.contiguous();
        const Tensor y = new_dense(x, p.batch, weight.size(0), p.out_height(), p.out_width());
        const cpu::Image image = {data<float>(x), p.batch,     p.height,    p.width,
                                  x.stride(0),    x.stride(1), x.stride(2), x.stride(3)};
        const Machine here = machine();
        cpu::stem_folded(here.kernels.name, here.threads, image, data<float>(taps), data<float>(shift), weight.size(0),
                         data<float>(y));
        return y;
    }
    const Tensor in = dense(x, weight);
    const Tensor y = new_dense(x, p.batch, weight.size(0), p.out_height(), p.out_width());
    with_type(x, [&]<class T>(T) {
        cpu::train::stem_folded<T>(machine(), data<T>(in), p, weight_of<const T>(weight), data<float>(shift),
                                   data<T>(y));
    });
    return y;
}

Tensor pointwise_folded(const Tensor& x, const Tensor& weight, const Tensor& bias, bool relu6,
                        const Optional& residual) {
    check_weight(weight, x.size(1), 1);
    const Tensor in = dense(x, weight), shift = bias_vector(bias, weight.size(0));
    const Tensor y = new_dense(x, x.size(0), weight.size(0), x.size(2), x.size(3));
    const Optional skip = residual.has_value() ? Optional(dense_like(*residual, y)) : residual;
    with_type(x, [&]<class T>(T) {
        cpu::train::pointwise_folded<T>(machine(), data<T>(in), weight_of<const T>(weight), data<float>(shift), relu6,
                                        data<T>(skip), rows_of(x), data<T>(y));
    });
    return y;
}

Tensor depthwise_folded(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride) {
    check_weight(weight, 1, 3);
    TORCH_CHECK(weight.size(0) == x.size(1), "a depthwise weight must have ", x.size(1), " outputs");
    const Pictures p = pictures(x, stride);
    const Tensor in = dense(x, weight), shift = bias_vector(bias, p.channels);
    const Tensor y = new_dense(x, p.batch, p.channels, p.out_height(), p.out_width());
    with_type(x, [&]<class T>(T) {
        cpu::train::depthwise_folded<T>(machine(), data<T>(in), p, weight_of<const T>(weight), data<float>(shift),
                                        data<T>(y));
    });
    return y;
}

Tensor block_folded(const Tensor& x, const Optional& w1, const Optional& b1, const Tensor& wd, const Tensor& bd,
                    const Tensor& w3, const Tensor& b3, int64_t stride, bool residual) {
    check_weight(wd, 1, 3);
    check_weight(w3, wd.size(0), 1);
    TORCH_CHECK(w1.has_value() == b1.has_value(), "give both w1 and b1, or neither");
    if (w1.has_value()) check_weight(*w1, x.size(1), 1);
    TORCH_CHECK((w1.has_value() ? w1->size(0) : x.size(1)) == wd.size(0), "the depthwise weight does not fit");
    TORCH_CHECK(!residual || (stride == 1 && w3.size(0) == x.size(1)), "a shortcut needs equal shapes");
    const Pictures p = pictures(x, stride);
    const Tensor in = dense(x, wd), shift2 = bias_vector(bd, wd.size(0)), shift3 = bias_vector(b3, w3.size(0));
    const Optional shift1 = w1.has_value() ? Optional(bias_vector(*b1, w1->size(0))) : b1;
    const Tensor y = new_dense(x, p.batch, w3.size(0), p.out_height(), p.out_width());
    with_type(x, [&]<class T>(T) {
        const Weight<const T> expand = w1.has_value() ? weight_of<const T>(*w1) : Weight<const T>{};
        cpu::train::block_folded<T>(machine(), data<T>(in), p, w1.has_value() ? &expand : nullptr, data<float>(shift1),
                                    weight_of<const T>(wd), data<float>(shift2), weight_of<const T>(w3),
                                    data<float>(shift3), residual, data<T>(y));
    });
    return y;
}

Tensor head_folded(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    check_weight(weight, x.size(1), 1);
    const Tensor in = dense(x, weight), shift = bias_vector(bias, weight.size(0));
    const Tensor pooled =
        at::empty({x.size(0), weight.size(0)}, x.options().memory_format(at::MemoryFormat::Contiguous));
    with_type(x, [&]<class T>(T) {
        cpu::train::head_folded<T>(machine(), data<T>(in), weight_of<const T>(weight), data<float>(shift), x.size(0),
                                   x.size(2) * x.size(3), data<T>(pooled));
    });
    return pooled;
}

TORCH_LIBRARY_FRAGMENT(mbv2, library) {
    library.def("cpu_stage_stem_folded(Tensor x, Tensor weight, Tensor bias, int stride) -> Tensor");
    library.def(
        "cpu_stage_pointwise_folded(Tensor x, Tensor weight, Tensor bias, bool relu6, Tensor? residual) -> Tensor");
    library.def("cpu_stage_depthwise_folded(Tensor x, Tensor weight, Tensor bias, int stride) -> Tensor");
    library.def(
        "cpu_stage_block_folded(Tensor x, Tensor? w1, Tensor? b1, Tensor wd, Tensor bd, Tensor w3, Tensor b3, "
        "int stride, bool residual) -> Tensor");
    library.def("cpu_stage_head_folded(Tensor x, Tensor weight, Tensor bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(mbv2, CPU, library) {
    library.impl("cpu_stage_stem_folded", stem_folded);
    library.impl("cpu_stage_pointwise_folded", pointwise_folded);
    library.impl("cpu_stage_depthwise_folded", depthwise_folded);
    library.impl("cpu_stage_block_folded", block_folded);
    library.impl("cpu_stage_head_folded", head_folded);
}

}  // namespace
}  // namespace mbv2
