// What the stages of training share: memory of a thread, tasks on threads, weights into panels and out of them.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "train_stages.h"

namespace mbv2::cpu::train {

// Memory that grows to the largest request and is kept for the thread's life, aligned to 64 bytes.
class Memory {
 public:
    float* get(int64_t floats) {
        if (floats > size_) {
            memory_.reset();
            size_ = 0;
            const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
            if (memory_ == nullptr) throw std::bad_alloc();
            size_ = floats;
        }
        return memory_.get();
    }

 private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t size_ = 0;
};

// `task` is of the thread that works, the others of the thread that called.
struct ThreadMemory {
    Memory task, weights, vectors, parts;
};
inline thread_local ThreadMemory memory;

// body(begin, end, scratch) for ranges that make up [0, count), each with `floats` of scratch memory.
template <class Body>
void run_ranges(const Machine& machine, int64_t count, int64_t floats, const Body& body) {
    const auto range = [&](int64_t begin, int64_t end) { body(begin, end, memory.task.get(floats)); };
    if (machine.threads.count == 1 || count == 1) return range(0, count);
    using Range = decltype(range);
    machine.threads.run(
        count, const_cast<void*>(static_cast<const void*>(&range)),
        [](void* context, int64_t begin, int64_t end) { (*static_cast<const Range*>(context))(begin, end); });
}

// body(i, scratch) for every i in [0, count).
template <class Body>
void run_tasks(const Machine& machine, int64_t count, int64_t floats, const Body& body) {
    run_ranges(machine, count, floats, [&](int64_t begin, int64_t end, float* scratch) {
        for (int64_t i = begin; i < end; ++i) body(i, scratch);
    });
}

// The machine, or one thread of it where there is too little to do for others to be woken: `work` in multiply-adds.
inline Machine for_work(const Machine& machine, int64_t work) {
    constexpr int64_t kLeast = 1 << 20;
    return work < kLeast ? Machine{machine.kernels, {1, nullptr}} : machine;
}
// Of stages that pass over values, and of weights on their way into panels and out of them.
inline Machine for_values(const Machine& machine, int64_t values) { return for_work(machine, 16 * values); }

// `count` parts of [0, rows), each a whole number of tiles but the last.
struct Parts {
    int64_t rows, count;

    int64_t begin(int64_t part) const { return std::min(rows, part * ceil_div(rows, kRows) / count * tile_rows(rows)); }
    int64_t end(int64_t part) const { return part + 1 == count ? rows : begin(part + 1); }
};

constexpr int64_t kMostParts = 64;

// As many parts as there is work for, when a part leaves behind no more than a few vectors.
inline Parts parts_of(int64_t rows) { return {rows, std::min(ceil_div(rows, kRows), kMostParts)}; }

// The same when each part leaves a weight's gradient: few enough that adding them up costs a few percent.
inline Parts weight_parts(int64_t rows, int64_t weights) {
    constexpr int64_t kRowsPerPart = 4 * kRows, kMostFloats = 4 << 20;
    const int64_t most = std::min(kMostParts, std::max<int64_t>(1, kMostFloats / weights));
    return {rows, std::clamp<int64_t>(rows / kRowsPerPart, 1, most)};
}

// Dense [rows][channels] -> [rows][padded(channels)], zeros beyond.
inline void pad(const float* from, int64_t rows, int64_t channels, float* to) {
    for (int64_t r = 0; r < rows; ++r, from += channels, to += padded(channels)) {
        std::copy(from, from + channels, to);
        std::fill(to + channels, to + padded(channels), 0.0f);
    }
}

// Whether a result is so large that little of it would be in a cache when the next stage reads it.
template <class T>
bool beyond_caches(int64_t values) {
    constexpr int64_t kCached = 24 << 20;
    return values * static_cast<int64_t>(sizeof(T)) > kCached;
}

inline float as_float(float x) { return x; }
inline float as_float(bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
inline void assign(float value, float& to) { to = value; }
inline void assign(float value, bf16& to) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    to.bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Which side of a weight lies along the vectors of a panel; the other is its length.
enum class Along { outputs, inputs };

template <class T>
int64_t panels_floats(const Weight<T>& weight, Along along, int64_t lanes) {
    const int64_t across = along == Along::outputs ? weight.outputs : weight.length();
    const int64_t length = along == Along::outputs ? weight.length() : weight.outputs;
    return ceil_div(across, lanes) * lanes * length;
}

// One panel of a weight: `used` values across it and zeros up to `width`, `length` times.
template <class T>
struct Panel {
    T* data;  // of the first value
    int64_t used, width, length, across_stride, length_stride;
};

template <class T>
Panel<T> panel_of(const Weight<T>& weight, Along along, int64_t lanes, int64_t panel) {
    const bool outputs = along == Along::outputs;
    const int64_t across = outputs ? weight.outputs : weight.inputs, first = 2 * panel * lanes;
    const int64_t width = panel_vectors(ceil_div(across, lanes), panel) * lanes;
    const int64_t stride = outputs ? weight.output_stride : weight.input_stride;
    return {weight.data + first * stride,
            std::min(width, across - first),
            width,
            outputs ? weight.inputs : weight.outputs,
            stride,
            outputs ? weight.input_stride : weight.output_stride};
}

// body(value of the weight, its place in the panel) for each, by runs of the weight's memory that stay in L1.
template <class T, class Body>
void walk_panel(const Panel<T>& panel, float* at, const Body& body) {
    constexpr int64_t kRun = 16;
    if (panel.across_stride == 1) {
        for (int64_t l = 0; l < panel.length; ++l) {
            T* from = panel.data + l * panel.length_stride;
            float* to = at + l * panel.width;
            for (int64_t i = 0; i < panel.used; ++i) body(from[i], to[i]);
        }
        return;
    }
    for (int64_t begin = 0; begin < panel.length; begin += kRun) {
        const int64_t end = std::min(begin + kRun, panel.length);
        for (int64_t i = 0; i < panel.used; ++i) {
            T* from = panel.data + i * panel.across_stride;
            for (int64_t l = begin; l < end; ++l) body(from[l * panel.length_stride], at[l * panel.width + i]);
        }
    }
}

// The same for a weight whose length is dense and that is only read: 4 x 4 values at a time.
inline void transpose_panel(const Panel<const float>& panel, float* at) {
    using Four = float __attribute__((vector_size(16), aligned(4)));
    constexpr int64_t kRun = 16;
    const int64_t whole = panel.used / 4 * 4, length = panel.length / 4 * 4;
    for (int64_t begin = 0; begin < length; begin += kRun) {
        for (int64_t i = 0; i < whole; i += 4) {
            for (int64_t l = begin; l < std::min(begin + kRun, length); l += 4) {
                const float* from = panel.data + i * panel.across_stride + l;
                Four rows[4], pairs[4];
                for (int64_t r = 0; r < 4; ++r)
                    rows[r] = *reinterpret_cast<const Four*>(from + r * panel.across_stride);
                for (int64_t r = 0; r < 2; ++r) {
                    pairs[r] = __builtin_shufflevector(rows[2 * r], rows[2 * r + 1], 0, 4, 1, 5);
                    pairs[2 + r] = __builtin_shufflevector(rows[2 * r], rows[2 * r + 1], 2, 6, 3, 7);
                }
                for (int64_t r = 0; r < 4; r += 2) {
                    float* to = at + (l + r) * panel.width + i;
                    *reinterpret_cast<Four*>(to) = __builtin_shufflevector(pairs[r], pairs[r + 1], 0, 1, 4, 5);
                    *reinterpret_cast<Four*>(to + panel.width) =
                        __builtin_shufflevector(pairs[r], pairs[r + 1], 2, 3, 6, 7);
                }
            }
        }
    }
    const auto copy = [&](int64_t i, int64_t l) { at[l * panel.width + i] = panel.data[i * panel.across_stride + l]; };
    for (int64_t i = 0; i < panel.used; ++i) {
        for (int64_t l = i < whole ? length : 0; l < panel.length; ++l) copy(i, l);
    }
}

// The stem's 3x3 weight, whose length is (tap, input), lies along its outputs; 1x1 weights along either side.
template <class T, class Body>
void walk_weight(const Weight<T>& weight, Along along, int64_t lanes, int64_t panel, float* panels, const Body& body) {
    float* at = panels + 2 * panel * lanes * (along == Along::outputs ? weight.length() : weight.outputs);
    if (weight.taps == 1) return walk_panel(panel_of(weight, along, lanes, panel), at, body);
    const bool outputs = along == Along::outputs;
    const int64_t across = outputs ? weight.outputs : weight.length(), first = 2 * panel * lanes;
    const int64_t length = outputs ? weight.length() : weight.outputs;
    const int64_t width = panel_vectors(ceil_div(across, lanes), panel) * lanes, used = std::min(width, across - first);
    for (int64_t l = 0; l < length; ++l) {
        for (int64_t i = 0; i < used; ++i) {
            body(outputs ? *weight.at(first + i, l) : *weight.at(l, first + i), at[l * width + i]);
        }
    }
}

template <class T>
void pack(const Machine& machine, const Weight<const T>& weight, Along along, float* panels) {
    const int64_t lanes = machine.kernels.lanes;
    const int64_t across = along == Along::outputs ? weight.outputs : weight.length();
    const int64_t length = along == Along::outputs ? weight.length() : weight.outputs;
    const int64_t vectors = ceil_div(across, lanes), count = train::panels(vectors);
    run_tasks(for_values(machine, across * length), count, 0, [&](int64_t p, float*) {
        const int64_t width = panel_vectors(vectors, p) * lanes, used = std::min(width, across - 2 * p * lanes);
        float* at = panels + 2 * p * lanes * length;
        if (used < width) std::fill(at, at + width * length, 0.0f);
        if constexpr (std::is_same_v<T, float>) {
            const Panel<const float> panel = panel_of(weight, along, lanes, p);
            if (weight.taps == 1 && panel.across_stride != 1 && panel.length_stride == 1) {
                return transpose_panel(panel, at);
            }
        }
        walk_weight(weight, along, lanes, p, panels, [](const T& from, float& to) { to = as_float(from); });
    });
}

// A depthwise weight [C, 1, 3, 3] -> [vectors][9][lanes], and back.
inline int64_t taps_floats(int64_t channels, int64_t lanes) { return ceil_div(channels, lanes) * 9 * lanes; }

template <class T>
void pack_taps(const Weight<const T>& weight, int64_t lanes, float* taps) {
    std::fill(taps, taps + taps_floats(weight.outputs, lanes), 0.0f);
    for (int64_t c = 0; c < weight.outputs; ++c) {
        for (int64_t t = 0; t < 9; ++t)
            taps[c / lanes * 9 * lanes + t * lanes + c % lanes] = as_float(*weight.at(c, t));
    }
}

template <class T>
void unpack_taps(const float* taps, int64_t lanes, const Weight<T>& weight) {
    for (int64_t c = 0; c < weight.outputs; ++c) {
        for (int64_t t = 0; t < 9; ++t) assign(taps[c / lanes * 9 * lanes + t * lanes + c % lanes], *weight.at(c, t));
    }
}

// The sum, in order, of `count` parts of `floats` each -> weight; the first part is overwritten.
template <class T>
void unpack(const Machine& machine, float* parts, int64_t count, int64_t floats, Along along, const Weight<T>& weight) {
    const int64_t lanes = machine.kernels.lanes;
    const int64_t across = along == Along::outputs ? weight.outputs : weight.length();
    const int64_t length = along == Along::outputs ? weight.length() : weight.outputs;
    const int64_t vectors = ceil_div(across, lanes);
    run_tasks(for_values(machine, count * across * length), train::panels(vectors), 0, [&](int64_t p, float*) {
        float* first = parts + 2 * p * lanes * length;
        const int64_t size = panel_vectors(vectors, p) * lanes * length;
        for (int64_t part = 1; part < count; ++part) machine.kernels.add(first + part * floats, size, first);
        walk_weight(weight, along, lanes, p, parts, [](T& to, const float& from) { assign(from, to); });
    });
}

// Parts [count][rows][padded(channels)] added up in order -> [rows][channels].
inline void add_parts(const Machine& machine, float* parts, int64_t count, int64_t rows, int64_t channels, float* out) {
    const int64_t floats = rows * padded(channels);
    for (int64_t part = 1; part < count; ++part) machine.kernels.add(parts + part * floats, floats, parts);
    for (int64_t r = 0; r < rows; ++r) {
        std::copy(parts + r * padded(channels), parts + r * padded(channels) + channels, out + r * channels);
    }
}

}  // namespace mbv2::cpu::train
