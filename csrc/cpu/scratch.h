// Memory of a thread for the run of a network: kept between calls, so that nothing is allocated in steady state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace mbv2::cpu {

// Memory that grows to the largest request and is kept for the thread's life.
class Buffer {
 public:
    // Room for `count` values, aligned to 64 bytes; what it held is lost if it must grow.
    template <class T>
    T* get(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            memory_.reset();
            size_ = 0;
            memory_.reset(std::aligned_alloc(64, bytes));
            if (memory_ == nullptr) throw std::bad_alloc();
            size_ = bytes;
        }
        return static_cast<T*>(memory_.get());
    }

 private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t size_ = 0;
};

// `hidden` and `tile` are of the thread that works, the others of the thread that called.
struct Scratch {
    Buffer activations[2], shared, pooled, logits, hidden, tile;
};
inline thread_local Scratch scratch;

}  // namespace mbv2::cpu
