// Runs every training and folded stage on awkward shapes with every instruction set of this machine; built with the
// address and undefined-behaviour sanitizers by test_cpu_training.py. Prints the number of runs.
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "train_memory.h"
#include "train_stages.h"

using namespace mbv2::cpu::train;

namespace {

void two_threads(int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
    std::thread other([&] { body(context, 0, count / 2); });
    body(context, count / 2, count);
    other.join();
}

void store(float value, float& to) { to = value; }
void store(float value, bf16& to) { to.bits = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16); }
float number(float x) { return x; }
float number(bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

// The vector of exactly these values, so that one step beyond them is seen.
template <class T>
std::vector<T> values(int64_t count, int seed) {
    std::vector<T> result(static_cast<size_t>(count));
    unsigned state = static_cast<unsigned>(seed) * 2654435761u + 1;
    for (T& value : result) {
        state = state * 1664525u + 1013904223u;
        store(static_cast<float>(state >> 8) / 8388608.0f - 1.0f, value);
    }
    return result;
}

template <class T>
Weight<const T> weight(const std::vector<T>& data, int64_t outputs, int64_t inputs, int64_t taps) {
    return {data.data(), outputs, inputs, taps, inputs * taps, taps, 3, 1};
}
template <class T>
Weight<T> gradient(std::vector<T>& data, int64_t outputs, int64_t inputs, int64_t taps) {
    return {data.data(), outputs, inputs, taps, inputs * taps, taps, 3, 1};
}

struct Shape {
    int64_t batch, inputs, hidden, outputs, height, width, stride;
};

// All results of all stages, one after the other.
template <class T>
std::vector<float> everything(const Machine& m, const Shape& s) {
    const Pictures in = {s.batch, s.inputs, s.height, s.width, s.stride};
    const Pictures middle = {s.batch, s.hidden, s.height, s.width, s.stride};
    const int64_t before = s.batch * s.height * s.width, after = s.batch * in.out_height() * in.out_width();
    const auto x = values<T>(before * s.inputs, 1), y1 = values<T>(before * s.hidden, 2);
    const auto y2 = values<T>(after * s.hidden, 3), y3 = values<T>(after * s.outputs, 4);
    const auto w1 = values<T>(s.hidden * s.inputs, 5), wd = values<T>(s.hidden * 9, 6);
    const auto w3 = values<T>(s.outputs * s.hidden, 7), ws = values<T>(s.hidden * s.inputs * 9, 8);
    const auto bn = values<float>(6 * s.hidden, 9), bn3 = values<float>(6 * s.outputs, 10);
    std::vector<T> a(before * s.hidden), b(after * s.hidden), c(after * s.outputs), d(before * s.inputs);
    std::vector<T> dw1(w1.size()), dwd(wd.size()), dw3(w3.size()), dws(ws.size()), pooled(s.batch * s.hidden);
    std::vector<float> moments(3 * s.hidden), moments3(3 * s.outputs), sums(2 * s.hidden), all;
    const auto keep = [&](const auto&... results) {
        const auto one = [&](const auto& result) {
            for (const auto& value : result) all.push_back(number(value));
        };
        (one(results), ...);
    };
    const Weight<const T> expand = weight(w1, s.hidden, s.inputs, 1), project = weight(w3, s.outputs, s.hidden, 1);
    const Weight<const T> taps = weight(wd, s.hidden, 1, 9), dense = weight(ws, s.hidden, s.inputs, 9);
    const Weight<T> to1 = gradient(dw1, s.hidden, s.inputs, 1), to3 = gradient(dw3, s.outputs, s.hidden, 1);
    const Weight<T> to_taps = gradient(dwd, s.hidden, 1, 9);

    pointwise<T>(m, x.data(), nullptr, expand, before, a.data(), moments.data());
    keep(a, moments);
    for (const float* norm : {bn.data(), static_cast<const float*>(nullptr)}) {
        depthwise<T>(m, y1.data(), norm, middle, taps, b.data(), moments.data());
        keep(b, moments);
        depthwise_backward<T>(m, b.data(), y2.data(), bn.data(), y1.data(), norm, middle, taps, a.data(),
                              norm == nullptr ? nullptr : sums.data(), &to_taps);
        keep(a, sums, dwd);
    }
    pointwise<T>(m, y2.data(), bn.data(), project, after, c.data(), moments3.data());
    keep(c, moments3);
    stem<T>(m, x.data(), in, dense, b.data(), moments.data());
    keep(b, moments);
    for (int need = 1; need < 4; ++need) {
        project_backward<T>(m, c.data(), y3.data(), bn3.data(), project, y2.data(), bn.data(), after,
                            need & 1 ? b.data() : nullptr, sums.data(), need & 2 ? &to3 : nullptr);
        expand_backward<T>(m, y1.data(), a.data(), bn.data(), expand, x.data(), need & 2 ? x.data() : nullptr, before,
                           need & 1 ? d.data() : nullptr, need & 2 ? &to1 : nullptr);
        keep(b, sums, dw3, d, dw1);
    }
    stem_backward<T>(m, y2.data(), b.data(), bn.data(), bn.data(), x.data(), in, gradient(dws, s.hidden, s.inputs, 9));
    keep(dws);
    bn_apply<T>(m, y3.data(), bn3.data(), c.data(), false, after, s.outputs, c.data());
    bn_sums<T>(m, y2.data(), b.data(), bn.data(), true, after, s.hidden, sums.data());
    keep(c, sums);
    pool<T>(m, y1.data(), bn.data(), s.batch, s.height * s.width, s.hidden, pooled.data());
    pool_backward<T>(m, pooled.data(), y1.data(), bn.data(), s.batch, s.height * s.width, s.hidden, a.data(),
                     sums.data());
    keep(pooled, a, sums);
    stem_folded<T>(m, x.data(), in, dense, bn.data(), b.data());
    keep(b);
    depthwise_folded<T>(m, y1.data(), middle, taps, bn.data(), b.data());
    keep(b);
    pointwise_folded<T>(m, y2.data(), project, bn3.data(), true, y3.data(), after, c.data());
    keep(c);
    block_folded<T>(m, x.data(), in, &expand, bn.data(), taps, bn.data(), project, bn3.data(),
                    s.stride == 1 && s.inputs == s.outputs, c.data());
    keep(c);
    block_folded<T>(m, y1.data(), middle, nullptr, nullptr, taps, bn.data(), project, bn3.data(), false, c.data());
    keep(c);
    head_folded<T>(m, x.data(), expand, bn.data(), s.batch, s.height * s.width, pooled.data());
    keep(pooled);
    return all;
}

template <class T>
bool agree(const Kernels& kernels, const Shape& shape) {
    const auto alone = everything<T>({kernels, {1, nullptr}}, shape);
    const auto together = everything<T>({kernels, {2, two_threads}}, shape);
    for (size_t i = 0; i < alone.size(); ++i) {
        if (alone[i] != together[i] || std::isnan(alone[i])) {
            std::printf("%s: result %zu differs between one and two threads, or is not a number\n", kernels.name, i);
            return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    const Shape shapes[] = {{2, 16, 96, 24, 15, 14, 2}, {3, 5, 19, 7, 9, 13, 2},   {1, 8, 8, 8, 1, 1, 1},
                            {2, 24, 40, 24, 12, 10, 1}, {1, 72, 520, 72, 7, 9, 1}, {3, 3, 33, 17, 1, 20, 1},
                            {3, 24, 99, 24, 12, 9, 1}};
    int runs = 0;
    for (const char* name : {"avx512", "avx2", "portable"}) {
        const Kernels* kernels = nullptr;
        try {
            kernels = &mbv2::cpu::train::kernels(name);
        } catch (const std::runtime_error&) {
            continue;
        }
        for (const Shape& shape : shapes) {
            if (!agree<float>(*kernels, shape) || !agree<bf16>(*kernels, shape)) return 1;
            runs += 4;
        }
    }
    void *one = borrow(1 << 20), *two = borrow(3 << 20);
    give_back(one);
    one = borrow(1 << 19);
    give_back(two);
    give_back(one);
    release_idle();
    if (pool_state().used != 0) return 1;
    std::printf("%d runs\n", runs);
    return 0;
}
