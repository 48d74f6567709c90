// Who does what, where threads wait for each other, and the memory they keep.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include <omp.h>

namespace {

// Memory of a thread that later calls find again.
template <class T, int purpose> T* room(size_t count) {
    static thread_local std::vector<T> memory;
    if (memory.size() < count) memory.resize(count);
    return memory.data();
}

// Where threads wait for each other. A short while they spin; then they let others have the processor: on a machine with
// more to do than it has cores, whoever is waited for may need just this one.
class Meeting {
  public:
    void wait() {
        const int threads = omp_get_num_threads(), now = turn.load(std::memory_order_relaxed);
        if (threads == 1) return;
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            turn.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn.load(std::memory_order_acquire) == now; spins++)
            if (spins > 4000) std::this_thread::yield();
    }

  private:
    std::atomic<int> arrived{0}, turn{0};
};

// A thread's part of `count` pieces of work.
void share(int count, int& first, int& last) {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    first = int(count * me / threads);
    last = int(count * (me + 1) / threads);
}

}  // namespace
