// The model by which plans are compared: what a clock of an SM brings, and how thread blocks fill a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fused_params.h"

namespace mbv2::cuda {

inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return quotient_up(a, b) * b; }

inline Divisor divisor(int64_t value) {
    return {static_cast<uint32_t>(value), static_cast<uint32_t>(((int64_t{1} << 32) + value - 1) / value)};
}

// What a clock of one SM brings.
struct Rates {
    double products;  // multiply-adds of tensor cores, 16-bit operands and float32 sums
    double clock;     // MHz
    double dram;      // bytes: an SM's share of what the usual GPU of the kind reaches
    double l2;        // bytes of L2: an SM's share, likewise
};

inline Rates rates(int arch) {
    if (arch >= 120) return {256, 2400, 3.7, 565e3};
    if (arch >= 100) return {1024, 1850, 24.8, 850e3};
    if (arch >= 90) return {1280, 1750, 12.3, 380e3};
    if (arch >= 89) return {256, 2500, 2.7, 560e3};
    if (arch >= 86) return {256, 1700, 5.7, 73e3};
    return {1024, 1410, 8.7, 370e3};
}

inline constexpr double kIssueShare = 0.6;   // of four instructions a clock
inline constexpr double kSharedBytes = 128;  // a clock
inline constexpr double kL2Bytes = 40;       // a clock and SM
inline constexpr double kLoneWarp = 4;       // clocks an instruction takes a warp that is alone in its quarter of an SM
inline constexpr double kLatency = 700;      // clocks of a load from L2
inline constexpr double kBarrier = 40;       // clocks
inline constexpr double kStart = 1200;       // clocks until a thread block's first products
inline constexpr double kSecondLaunch = 2.0;  // microseconds of the kernel that adds partial sums

// A thread block's work between two barriers.
struct Phase {
    double instructions = 0;  // of all warps
    double longest = 0;       // of the warp that has most
    double shared = 0;        // bytes
    double products = 0;

    void add(int64_t items, int warps, double instructions_each, double shared_each, double products_each) {
        instructions += items * instructions_each;
        longest += quotient_up(items, warps) * instructions_each;
        shared += items * shared_each;
        products += items * products_each;
    }
};

// Clocks of a launch: `throughput` a thread block where others keep the SM busy, `longest` one that is alone, as many
// as `resident` at a time on each of the SMs.
inline double clocks(double throughput, double longest, int64_t blocks, int resident, int processors) {
    const int64_t slots = int64_t{processors} * resident, waves = blocks / slots, rest = blocks - waves * slots;
    const double full = std::max(throughput * resident, longest);
    // Of the last wave, only as many blocks share an SM as there are.
    const double last = rest == 0 ? 0 : std::max(throughput * quotient_up(rest, processors), longest);
    return waves * full + last;
}

}  // namespace mbv2::cuda
