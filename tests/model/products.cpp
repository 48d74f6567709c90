// Products of quantised.h for test_quantised.py: (outputs, inputs) by (positions, width) floats.

#include "quantised.h"

template <class W> void products(const Linear& linear, const float* x, int width, int positions, float* out) {
    Meeting meeting;
    const size_t count = positions * elements<Signed>(width);
    std::vector<Signed> all(count);
    std::memset((void*)all.data(), 0xff, count * sizeof(Signed));  // numbers that are none, as another call may leave
    std::memset((void*)room<Signed, 1>(count), 0xff, count * sizeof(Signed));
    std::vector<float> rows(size_t(positions) * even(width));
    for (int m = 0; m < positions; m++) std::memcpy(&rows[size_t(m) * even(width)], x + size_t(m) * width, width * 4);
    product<1, W>(linear, ready(rows.data(), width, positions, all.data(), meeting), positions,
                  [&](int m, int block, const Lanes* sums, int count) {
        std::memcpy(out + size_t(m) * linear.outputs + block * BLOCK, sums, count * 64);
    });
}

extern "C" void by_quantised(int bits, const void* weight, int outputs, int inputs, const float* x, int width,
                             int positions, float* out) {
    const Linear linear{weight, nullptr, inputs, outputs};
    bits == 8 ? products<Eights>(linear, x, width, positions, out) : products<Fours>(linear, x, width, positions, out);
}
