#include "train_memory.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mbv2::cpu::train {
namespace {

constexpr int64_t kPage = 4096, kHugePage = 2 << 20;
// Addresses asked of the system at a time; only pages that are written to become memory.
constexpr int64_t kSegment = int64_t{1} << 30;
// Blocks are this much longer than whole pages, so that tensors read together do not all begin in the same sets of a
// cache.
constexpr int64_t kStagger = 1280;

struct Pool {
    std::mutex mutex;
    std::map<char*, int64_t> free, used;  // address -> bytes; neighbours among the free are one
    PoolState state = {0, 0};
};

// Never destroyed: tensors may outlive static objects.
Pool& pool() {
    static Pool* const one = new Pool;
    return *one;
}

#if defined(__linux__)
// Advice on the whole pages inside; a refusal costs time or memory only.
void advise(char* memory, int64_t bytes, int64_t page, int advice) {
    const auto first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const auto last = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, advice);
}

// The system may take what of a block that is now free, and of its free neighbours, makes whole huge pages: advice on
// a part would split the page for good.
void leave(char* memory, int64_t bytes, std::pair<char*, int64_t> around) {
    char* const first = std::max(around.first, memory - kHugePage + 1);
    char* const last = std::min(around.first + around.second, memory + bytes + kHugePage - 1);
    advise(first, last - first, kHugePage, MADV_FREE);
}
#endif

// Returns the free range that the block is now part of.
std::pair<char*, int64_t> add_free(Pool& here, char* memory, int64_t bytes) {
    auto next = here.free.lower_bound(memory);
    if (next != here.free.end() && memory + bytes == next->first) {
        bytes += next->second;
        next = here.free.erase(next);
    }
    if (next != here.free.begin()) {
        auto before = std::prev(next);
        if (before->first + before->second == memory) {
            before->second += bytes;
            return *before;
        }
    }
    return *here.free.emplace_hint(next, memory, bytes);
}

void add_segment(Pool& here, int64_t least) {
    const int64_t bytes = std::max(kSegment, (least + kHugePage - 1) / kHugePage * kHugePage);
    char* memory = static_cast<char*>(std::aligned_alloc(kHugePage, static_cast<size_t>(bytes)));
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    advise(memory, bytes, kPage, MADV_HUGEPAGE);
#endif
    add_free(here, memory, bytes);
}

// The lowest free range that is long enough.
std::map<char*, int64_t>::iterator first_fit(Pool& here, int64_t bytes) {
    return std::find_if(here.free.begin(), here.free.end(), [&](const auto& range) { return range.second >= bytes; });
}

}  // namespace

void* borrow(int64_t bytes) {
    const int64_t whole = (bytes + kPage - 1) / kPage * kPage + kStagger;
    Pool& here = pool();
    const std::lock_guard<std::mutex> lock(here.mutex);
    auto range = first_fit(here, whole);
    if (range == here.free.end()) {
        add_segment(here, whole);
        range = first_fit(here, whole);
    }
    const auto [memory, length] = *range;
    here.used.emplace(memory, whole);
    here.free.erase(range);
    if (length > whole) here.free.emplace(memory + whole, length - whole);
    here.state.used += whole;
    here.state.peak = std::max(here.state.peak, here.state.used);
    return memory;
}

void give_back(void* data) {
    Pool& here = pool();
    const std::lock_guard<std::mutex> lock(here.mutex);
    const auto block = here.used.find(static_cast<char*>(data));
    const auto [memory, bytes] = *block;
    here.used.erase(block);
    here.state.used -= bytes;
    const auto around = add_free(here, memory, bytes);
#if defined(__linux__)
    leave(memory, bytes, around);
#endif
}

PoolState pool_state() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    return pool().state;
}

void release_idle() {
#if defined(__linux__)
    const std::lock_guard<std::mutex> lock(pool().mutex);
    for (const auto& [memory, bytes] : pool().free) advise(memory, bytes, kPage, MADV_DONTNEED);
    pool().state.peak = pool().state.used;
#endif
}

}  // namespace mbv2::cpu::train
