// Products of positions with weights, and the norms before them.
//
// Every output is one sum that walks the inputs in order, however many positions share the call.

#pragma once

#include <type_traits>

#include "numbers.h"
#include "structs.h"
#include "threads.h"

namespace {

constexpr int ROWS = 6;     // positions whose sums stay in registers together
constexpr int COLUMNS = 4;  // blocks that share a look at a position's inputs
constexpr int ALONE = 8;    // up to so many positions every thread norms them for itself: cheaper than waiting

template <class W> constexpr int SUMS = ROWS * COLUMNS;  // that fit registers; less in quantised.h
template <class T> constexpr int HOLDS = 1;              // numbers in an element of memory; more in quantised.h

inline void add(Lanes& sum, const float* weight, const float* x) {  // two inputs at a time, as the others
    sum += load(weight) * x[0];
    sum += load(weight + BLOCK) * x[1];
}

inline void add(Lanes& sum, const Half* weight, const float* x) {
    Bits pairs;
    std::memcpy(&pairs, weight, 64);
    sum += (Lanes)(pairs << 16) * x[0];
    sum += (Lanes)(pairs & 0xffff0000u) * x[1];
}

#ifdef __AVX512BF16__
inline void add(Lanes& sum, const Half* weight, const Half* x) {
    int pair;
    std::memcpy(&pair, x, 4);
    sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weight), (__m512bh)_mm512_set1_epi32(pair));
}
#endif

// Sums of R positions with C blocks; they stay in registers.
template <int R, int C, class W, class X>
inline void multiply(const W* weight, const X* x, int inputs, Lanes out[R][C]) {
    Lanes sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = Lanes{};
    for (int i = 0; i < inputs; i += 2)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                add(sums[r][c], weight + (size_t(c) * inputs + i) * BLOCK, x + size_t(r) * inputs + i);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) out[r][c] = sums[r][c];
}

// use(position, block, sums of it and of those behind it, how many) for a thread's part of a product. `unit` blocks
// stay together.
template <int unit, class W, class X, class Use> void product(const Linear& linear, const X* x, int positions, Use use) {
    const W* weight = (const W*)linear.weight;
    const int inputs = linear.inputs;
    int first, last;
    share(linear.outputs / (BLOCK * unit), first, last);
    first *= unit, last *= unit;
    auto tile = [&](auto rows, auto columns, int m, int block) {
        constexpr int R = decltype(rows)::value, C = decltype(columns)::value;
        if constexpr (R * C <= SUMS<W>) {
            Lanes out[R][C];
            const W* from = weight + size_t(block) * inputs * BLOCK / HOLDS<W>;
            multiply<R, C>(from, x + size_t(m) * inputs / HOLDS<X>, inputs, out);
            for (int r = 0; r < R; r++) use(m + r, block, out[r], C);
        }
    };
    auto strip = [&](auto columns, int block) {
        int m = 0;
        for (; m + ROWS <= positions; m += ROWS) tile(std::integral_constant<int, ROWS>(), columns, m, block);
        switch (positions - m) {
            case 5: tile(std::integral_constant<int, 5>(), columns, m, block); break;
            case 4: tile(std::integral_constant<int, 4>(), columns, m, block); break;
            case 3: tile(std::integral_constant<int, 3>(), columns, m, block); break;
            case 2: tile(std::integral_constant<int, 2>(), columns, m, block); break;
            case 1: tile(std::integral_constant<int, 1>(), columns, m, block); break;
        }
    };
    int block = first;
    const int most = SUMS<W> / (positions < ROWS ? positions : ROWS);
    if (most >= COLUMNS)
        for (; block + COLUMNS <= last; block += COLUMNS) strip(std::integral_constant<int, COLUMNS>(), block);
    if constexpr (SUMS<W> < ROWS * COLUMNS)
        for (; block + 2 <= last; block += 2) strip(std::integral_constant<int, 2>(), block);
    for (; block < last; block += unit) strip(std::integral_constant<int, unit>(), block);
}

// How many numbers of a block lie within `width`.
inline int within(int block, int width) { return width - block * BLOCK < BLOCK ? width - block * BLOCK : BLOCK; }

inline int even(int count) { return count + (count & 1); }

// Elements of memory that hold what a product reads of a position.
template <class X> inline int elements(int width) {
    return HOLDS<X> == 1 ? even(width) : (width + HOLDS<X> - 1) / HOLDS<X>;
}

// Root mean square norm of a position (Zhang and Sennrich, 2019).
template <class T> void norm(const float* x, const float* weight, float eps, int width, T* to) {
    Lanes squares{};
    for (int i = 0; i < width; i += BLOCK) {
        const Lanes piece = get(x + i, width - i);
        squares += piece * piece;
    }
    float sum = 0;
    for (int i = 0; i < BLOCK; i++) sum += squares[i];
    const float scale = 1.0f / std::sqrt(sum / width + eps);
    for (int i = 0; i < width; i += BLOCK)
        put(to + i, get(x + i, width - i) * scale * get(weight + i, width - i), width - i);
    if (width & 1) to[width] = 0;
}

// What `make` makes of every position, for a product: the thread's own, or everybody's.
template <class X, class Make>
const X* each_position(int positions, int stride, X* all, Meeting& meeting, Make make) {
    int first = 0, last = positions;
    X* to = all;
    if (positions > ALONE)
        share(positions, first, last);
    else
        to = room<X, 1>(size_t(positions) * stride);
    for (int m = first; m < last; m++) make(m, to + size_t(m) * stride);
    if (positions > ALONE) meeting.wait();
    return to;
}

// Norms of all positions.
template <class X>
const X* norms(const Model& model, const float* hidden, const float* weight, int positions, X* all, Meeting& meeting) {
    return each_position(positions, elements<X>(model.width), all, meeting, [&](int m, X* to) {
        norm(hidden + size_t(m) * model.width, weight, model.eps, model.width, to);
    });
}

// What was written before, as a product reads it: as it is, but for quantised.h.
template <class X> const X* ready(const X* written, int, int, X*, Meeting&) { return written; }

}  // namespace
