// Large activations' memory, kept for the next step: fresh pages from the system cost a training step more than a
// third of its time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mbv2::cpu::train {

// Smaller requests are the ordinary allocator's business.
constexpr int64_t kLeastPooled = 1 << 18;

// At least `bytes` of memory, aligned to 64 bytes, with anything in it. Throws std::bad_alloc.
void* borrow(int64_t bytes);

// May be called from any thread. The system may take the pages when it is short of memory; else they serve later
// requests. As requests take the lowest free addresses, what is kept is about the most that was in use at once.
void give_back(void* data);

struct PoolState {
    int64_t used, peak;  // bytes
};
PoolState pool_state();

// Returns the pages of all free memory to the system.
void release_idle();

}  // namespace mbv2::cpu::train
