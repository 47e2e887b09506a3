// The stages of the CPU backend's training as operators, namespace mbv2. They have no derivatives:
// kernels/cpu/stages.py calls them inside the operators that do. Results nobody asked for are empty.
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "ops_cpu_stages.h"

namespace mbv2 {
namespace {

std::tuple<Tensor, Tensor> pointwise(const Tensor& x, const Optional& bn, const Tensor& weight) {
    check_weight(weight, x.size(1), 1);
    const Tensor in = dense(x, weight), y = new_dense(x, x.size(0), weight.size(0), x.size(2), x.size(3));
    const Tensor moments = new_vectors(x, {1, 3, weight.size(0)});
    const Optional norm = vectors(bn, 6, x.size(1));
    with_type(x, [&]<class T>(T) {
        cpu::train::pointwise<T>(machine(), data<T>(in), data<float>(norm), weight_of<const T>(weight), rows_of(x),
                                 data<T>(y), data<float>(moments));
    });
    return {y, moments};
}

std::tuple<Tensor, Tensor> stem(const Tensor& x, const Tensor& weight, int64_t stride) {
    check_weight(weight, x.size(1), 3);
    const Pictures p = pictures(x, stride);
    const Tensor in = dense(x, weight), y = new_dense(x, p.batch, weight.size(0), p.out_height(), p.out_width());
    const Tensor moments = new_vectors(x, {1, 3, weight.size(0)});
    with_type(x, [&]<class T>(T) {
        cpu::train::stem<T>(machine(), data<T>(in), p, weight_of<const T>(weight), data<T>(y), data<float>(moments));
    });
    return {y, moments};
}

std::tuple<Tensor, Tensor> depthwise(const Tensor& y1, const Optional& bn1, const Tensor& weight, int64_t stride) {
    check_weight(weight, 1, 3);
    TORCH_CHECK(weight.size(0) == y1.size(1), "a depthwise weight must have ", y1.size(1), " outputs");
    const Pictures p = pictures(y1, stride);
    const Tensor in = dense(y1, weight), y = new_dense(y1, p.batch, p.channels, p.out_height(), p.out_width());
    const Tensor moments = new_vectors(y1, {1, 3, p.channels});
    const Optional norm = vectors(bn1, 6, p.channels);
    with_type(y1, [&]<class T>(T) {
        cpu::train::depthwise<T>(machine(), data<T>(in), data<float>(norm), p, weight_of<const T>(weight), data<T>(y),
                                 data<float>(moments));
    });
    return {y, moments};
}

std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& y3, const Tensor& coef3,
                                                    const Tensor& weight, const Tensor& y2, const Tensor& bn2,
                                                    bool need_input, bool need_weight) {
    check_weight(weight, y2.size(1), 1);
    TORCH_CHECK(y3.size(1) == weight.size(0) && rows_of(y3) == rows_of(y2), "y3 ", y3.sizes(), " does not fit");
    const Tensor y3_in = dense(y3, weight), grad_in = dense_like(grad, y3), y2_in = dense(y2, weight);
    const Tensor coef = vectors(coef3, 3, y3.size(1)), norm = vectors(bn2, 6, y2.size(1));
    const Tensor dz2 = need_input ? new_like(y2) : nothing(y2);
    const Tensor sums = need_input ? new_vectors(y2, {1, 2, y2.size(1)}) : nothing(y2);
    const Tensor dweight = need_weight ? new_weight(weight) : nothing(y2);
    if (!need_input && !need_weight) return {dz2, sums, dweight};
    with_type(y2, [&]<class T>(T) {
        const Weight<T> into = need_weight ? weight_of<T>(dweight) : Weight<T>{};
        cpu::train::project_backward<T>(machine(), data<T>(grad_in), data<T>(y3_in), data<float>(coef),
                                        weight_of<const T>(weight), data<T>(y2_in), data<float>(norm), rows_of(y2),
                                        need_input ? data<T>(dz2) : nullptr, data<float>(sums),
                                        need_weight ? &into : nullptr);
    });
    return {dz2, sums, dweight};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const Tensor& dz2, const Tensor& y2, const Tensor& coef2,
                                                      const Tensor& y1, const Optional& bn1, const Tensor& weight,
                                                      int64_t stride, bool need_weight) {
    check_weight(weight, 1, 3);
    const Pictures p = pictures(y1, stride);
    TORCH_CHECK(y2.size(0) == p.batch && y2.size(1) == p.channels && y2.size(2) == p.out_height() &&
                    y2.size(3) == p.out_width() && weight.size(0) == p.channels,
                "y2 ", y2.sizes(), " does not fit y1 ", y1.sizes());
    const Tensor y2_in = dense(y2, weight), dz2_in = dense_like(dz2, y2), y1_in = dense(y1, weight);
    const Tensor coef = vectors(coef2, 3, p.channels);
    const Optional norm = vectors(bn1, 6, p.channels);
    const Tensor dz1 = new_like(y1), dweight = need_weight ? new_weight(weight) : nothing(y1);
    const Tensor sums = bn1.has_value() ? new_vectors(y1, {1, 2, p.channels}) : nothing(y1);
    with_type(y1, [&]<class T>(T) {
        const Weight<T> into = need_weight ? weight_of<T>(dweight) : Weight<T>{};
        cpu::train::depthwise_backward<T>(machine(), data<T>(dz2_in), data<T>(y2_in), data<float>(coef), data<T>(y1_in),
                                          data<float>(norm), p, weight_of<const T>(weight), data<T>(dz1),
                                          bn1.has_value() ? data<float>(sums) : nullptr, need_weight ? &into : nullptr);
    });
    return {dz1, sums, dweight};
}

std::tuple<Tensor, Tensor> expand_backward(const Tensor& dz1, const Tensor& y1, const Tensor& coef1,
                                           const Tensor& weight, const Tensor& x, const Optional& residual,
                                           bool need_input, bool need_weight) {
    check_weight(weight, x.size(1), 1);
    TORCH_CHECK(y1.size(1) == weight.size(0) && rows_of(y1) == rows_of(x), "y1 ", y1.sizes(), " does not fit");
    const Tensor y1_in = dense(y1, weight), dz1_in = dense_like(dz1, y1), x_in = dense(x, weight);
    const Optional skip = residual.has_value() ? Optional(dense_like(*residual, x)) : residual;
    const Tensor coef = vectors(coef1, 3, y1.size(1));
    const Tensor dx = need_input ? new_like(x) : nothing(x), dweight = need_weight ? new_weight(weight) : nothing(x);
    if (!need_input && !need_weight) return {dx, dweight};
    with_type(x, [&]<class T>(T) {
        const Weight<T> into = need_weight ? weight_of<T>(dweight) : Weight<T>{};
        cpu::train::expand_backward<T>(machine(), data<T>(dz1_in), data<T>(y1_in), data<float>(coef),
                                       weight_of<const T>(weight), data<T>(x_in), data<T>(skip), rows_of(x),
                                       need_input ? data<T>(dx) : nullptr, need_weight ? &into : nullptr);
    });
    return {dx, dweight};
}

Tensor stem_weight_backward(const Tensor& grad, const Tensor& y, const Tensor& bn, const Tensor& coef, const Tensor& x,
                            const Tensor& weight, int64_t stride) {
    check_weight(weight, x.size(1), 3);
    const Pictures p = pictures(x, stride);
    TORCH_CHECK(y.size(0) == p.batch && y.size(1) == weight.size(0) && y.size(2) == p.out_height() &&
                    y.size(3) == p.out_width(),
                "y ", y.sizes(), " does not fit x ", x.sizes());
    const Tensor y_in = dense(y, weight), grad_in = dense_like(grad, y), x_in = dense(x, weight);
    const Tensor norm = vectors(bn, 6, y.size(1)), affine = vectors(coef, 3, y.size(1)), dweight = new_weight(weight);
    with_type(x, [&]<class T>(T) {
        cpu::train::stem_backward<T>(machine(), data<T>(grad_in), data<T>(y_in), data<float>(norm), data<float>(affine),
                                     data<T>(x_in), p, weight_of<T>(dweight));
    });
    return dweight;
}

Tensor bn_apply(const Tensor& y, const Tensor& bn, const Optional& residual, bool relu6) {
    const Tensor in = dense(y), norm = vectors(bn, 6, y.size(1)), out = new_like(y);
    const Optional skip = residual.has_value() ? Optional(dense_like(*residual, y)) : residual;
    with_type(y, [&]<class T>(T) {
        cpu::train::bn_apply<T>(machine(), data<T>(in), data<float>(norm), data<T>(skip), relu6, rows_of(y), y.size(1),
                                data<T>(out));
    });
    return out;
}

Tensor bn_sums(const Tensor& grad, const Tensor& y, const Tensor& bn, bool relu6) {
    const Tensor in = dense(y), grad_in = dense_like(grad, y), norm = vectors(bn, 6, y.size(1));
    const Tensor sums = new_vectors(y, {1, 2, y.size(1)});
    with_type(y, [&]<class T>(T) {
        cpu::train::bn_sums<T>(machine(), data<T>(grad_in), data<T>(in), data<float>(norm), relu6, rows_of(y),
                               y.size(1), data<float>(sums));
    });
    return sums;
}

Tensor bn_relu6_pool(const Tensor& y, const Tensor& bn) {
    const Tensor in = dense(y), norm = vectors(bn, 6, y.size(1));
    const Tensor pooled = at::empty({y.size(0), y.size(1)}, y.options().memory_format(at::MemoryFormat::Contiguous));
    with_type(y, [&]<class T>(T) {
        cpu::train::pool<T>(machine(), data<T>(in), data<float>(norm), y.size(0), y.size(2) * y.size(3), y.size(1),
                            data<T>(pooled));
    });
    return pooled;
}

std::tuple<Tensor, Tensor> pool_backward(const Tensor& grad, const Tensor& y, const Tensor& bn) {
    TORCH_CHECK(grad.sizes() == y.sizes().slice(0, 2) && grad.scalar_type() == y.scalar_type(), "the gradient must be ",
                y.sizes().slice(0, 2), " of y's type, not ", grad.sizes());
    const Tensor in = dense(y), grad_in = grad.contiguous(), norm = vectors(bn, 6, y.size(1));
    const Tensor dz = new_like(y), sums = new_vectors(y, {1, 2, y.size(1)});
    with_type(y, [&]<class T>(T) {
        cpu::train::pool_backward<T>(machine(), data<T>(grad_in), data<T>(in), data<float>(norm), y.size(0),
                                     y.size(2) * y.size(3), y.size(1), data<T>(dz), data<float>(sums));
    });
    return {dz, sums};
}

Tensor merge_moments(const Tensor& moments) {
    TORCH_CHECK(moments.dim() == 3 && moments.size(1) == 3 && moments.scalar_type() == at::kFloat,
                "moments must be float32 [G, 3, C], not ", moments.scalar_type(), " ", moments.sizes());
    const Tensor parts = moments.contiguous();
    const int64_t channels = moments.size(2);
    const Tensor merged = new_vectors(moments, {3, channels});
    cpu::train::merge_moments(parts.const_data_ptr<float>(), moments.size(0), 3 * channels, channels, channels,
                              merged.mutable_data_ptr<float>());
    return merged;
}

Optional affine_vector(const Optional& x, int64_t channels) {
    if (!x.has_value()) return x;
    TORCH_CHECK(x->numel() == channels, "gamma and beta must have ", channels, " values, not ", x->numel());
    return x->to(at::kFloat).contiguous();
}

Tensor bn_finalize(const Tensor& moments, const Optional& gamma, const Optional& beta, double eps) {
    const int64_t channels = moments.size(2);
    const Tensor merged = merge_moments(moments), bn = new_vectors(moments, {6, channels});
    const Optional weight = affine_vector(gamma, channels), bias = affine_vector(beta, channels);
    const float *from = merged.const_data_ptr<float>(), *g = data<float>(weight), *b = data<float>(bias);
    float* to = bn.mutable_data_ptr<float>();
    for (int64_t c = 0; c < channels; ++c) {
        const double count = from[c], mean = from[channels + c], var = from[2 * channels + c] / count;
        const double rstd = 1 / std::sqrt(var + eps), scale = g == nullptr ? rstd : rstd * g[c];
        const double rows[6] = {mean, var, rstd, scale, (b == nullptr ? 0.0 : b[c]) - mean * scale, count};
        for (int64_t r = 0; r < 6; ++r) to[r * channels + c] = static_cast<float>(rows[r]);
    }
    return bn;
}

std::tuple<Tensor, Tensor> bn_backward(const Tensor& sums, const Tensor& bn) {
    TORCH_CHECK(sums.dim() == 3 && sums.size(1) == 2 && sums.scalar_type() == at::kFloat,
                "sums must be float32 [G, 2, C], not ", sums.scalar_type(), " ", sums.sizes());
    const int64_t channels = sums.size(2), parts = sums.size(0);
    const Tensor all = sums.contiguous(), norm = vectors(bn, 6, channels);
    const Tensor totals = new_vectors(sums, {2, channels}), coef = new_vectors(sums, {3, channels});
    const float *from = all.const_data_ptr<float>(), *at = norm.const_data_ptr<float>();
    float *total = totals.mutable_data_ptr<float>(), *to = coef.mutable_data_ptr<float>();
    for (int64_t c = 0; c < channels; ++c) {
        double dbeta = 0, centred = 0;
        for (int64_t p = 0; p < parts; ++p) {
            dbeta += from[2 * p * channels + c];
            centred += from[(2 * p + 1) * channels + c];
        }
        const double mean = at[c], rstd = at[2 * channels + c], scale = at[3 * channels + c];
        const double count = at[5 * channels + c], per_value = count > 0 ? 1 / count : 0, dgamma = centred * rstd;
        const double b = -scale * rstd * dgamma * per_value;
        total[c] = static_cast<float>(dbeta);
        total[channels + c] = static_cast<float>(dgamma);
        to[c] = static_cast<float>(scale);
        to[channels + c] = static_cast<float>(b);
        to[2 * channels + c] = static_cast<float>(-scale * dbeta * per_value - b * mean);
    }
    return {totals, coef};
}

std::tuple<int64_t, int64_t> memory() {
    const cpu::train::PoolState state = cpu::train::pool_state();
    return {state.used, state.peak};
}

TORCH_LIBRARY_FRAGMENT(mbv2, library) {
    library.def("cpu_stage_memory() -> (int, int)", memory);
    library.def("cpu_stage_release_memory() -> ()", cpu::train::release_idle);
    library.def("cpu_stage_pointwise(Tensor x, Tensor? bn, Tensor weight) -> (Tensor, Tensor)");
    library.def("cpu_stage_stem(Tensor x, Tensor weight, int stride) -> (Tensor, Tensor)");
    library.def("cpu_stage_depthwise(Tensor y1, Tensor? bn1, Tensor weight, int stride) -> (Tensor, Tensor)");
    library.def(
        "cpu_stage_project_backward(Tensor grad, Tensor y3, Tensor coef3, Tensor weight, Tensor y2, Tensor bn2, "
        "bool need_input, bool need_weight) -> (Tensor, Tensor, Tensor)");
    library.def(
        "cpu_stage_depthwise_backward(Tensor dz2, Tensor y2, Tensor coef2, Tensor y1, Tensor? bn1, Tensor weight, "
        "int stride, bool need_weight) -> (Tensor, Tensor, Tensor)");
    library.def(
        "cpu_stage_expand_backward(Tensor dz1, Tensor y1, Tensor coef1, Tensor weight, Tensor x, Tensor? residual, "
        "bool need_input, bool need_weight) -> (Tensor, Tensor)");
    library.def(
        "cpu_stage_stem_weight_backward(Tensor grad, Tensor y, Tensor bn, Tensor coef, Tensor x, Tensor weight, "
        "int stride) -> Tensor");
    library.def("cpu_stage_bn_apply(Tensor y, Tensor bn, Tensor? residual, bool relu6) -> Tensor");
    library.def("cpu_stage_bn_sums(Tensor grad, Tensor y, Tensor bn, bool relu6) -> Tensor");
    library.def("cpu_stage_bn_relu6_pool(Tensor y, Tensor bn) -> Tensor");
    library.def("cpu_stage_pool_backward(Tensor grad, Tensor y, Tensor bn) -> (Tensor, Tensor)");
    library.def("cpu_stage_merge_moments(Tensor moments) -> Tensor");
    library.def("cpu_stage_bn_finalize(Tensor moments, Tensor? gamma, Tensor? beta, float eps) -> Tensor");
    library.def("cpu_stage_bn_backward(Tensor sums, Tensor bn) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mbv2, CPU, library) {
    library.impl("cpu_stage_pointwise", pointwise);
    library.impl("cpu_stage_stem", stem);
    library.impl("cpu_stage_depthwise", depthwise);
    library.impl("cpu_stage_project_backward", project_backward);
    library.impl("cpu_stage_depthwise_backward", depthwise_backward);
    library.impl("cpu_stage_expand_backward", expand_backward);
    library.impl("cpu_stage_stem_weight_backward", stem_weight_backward);
    library.impl("cpu_stage_bn_apply", bn_apply);
    library.impl("cpu_stage_bn_sums", bn_sums);
    library.impl("cpu_stage_bn_relu6_pool", bn_relu6_pool);
    library.impl("cpu_stage_pool_backward", pool_backward);
    library.impl("cpu_stage_merge_moments", merge_moments);
    library.impl("cpu_stage_bn_finalize", bn_finalize);
    library.impl("cpu_stage_bn_backward", bn_backward);
}

}  // namespace
}  // namespace mbv2
