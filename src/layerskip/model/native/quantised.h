// Weights of 8 or 4 bits, and what stands beside them in a product: positions of 8 bits.
//
// A weight is a whole number times the scale of its group, 32 inputs of one output; so is a number of a position. Of a
// pair of groups the product is a sum of whole numbers, exact however a processor finds it. Scaled, the sums of the
// groups are added in their order. The processor multiplies bytes without a sign by bytes with one, so weights are kept
// with an offset, and what it adds to a group's sum is taken off before.

#pragma once

#include "products.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int GROUP = 32, GROUPS = 2;    // inputs of a group; groups of a piece, which fills whole lines of memory
constexpr int PIECE = GROUP * GROUPS;
constexpr int QUADS = GROUP / 4;         // the processor multiplies four inputs at a time

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int UNROLLED = QUADS;
#else
constexpr int UNROLLED = 1;  // what takes many instructions would take long to build
#endif

typedef int32_t Counts __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));

struct Eights {  // a block's weights of 64 inputs
    static constexpr int offset = 128;
    Half scales[GROUPS][BLOCK];
    uint8_t numbers[GROUPS][QUADS][BLOCK][4];
};

struct Fours {  // the same; the later half of a group lies in the upper bits
    static constexpr int offset = 8;
    Half scales[GROUPS][BLOCK];
    uint8_t numbers[GROUPS][QUADS / 2][BLOCK][4];
};

struct Signed {  // a position's numbers, 64 of them
    float scales[GROUPS];
    int32_t sums[GROUPS];
    int8_t numbers[GROUPS][QUADS][4];
};

template <> constexpr int HOLDS<Eights> = PIECE * BLOCK;
template <> constexpr int HOLDS<Fours> = PIECE * BLOCK;
template <> constexpr int HOLDS<Signed> = PIECE;
template <> constexpr int SUMS<Eights> = 12;  // each has a count of its group beside it
template <> constexpr int SUMS<Fours> = 12;

// The whole numbers of a quad of a group, offset and all.
inline Bytes quad(const Eights* weight, int group, int i) {
    Bytes out;
    std::memcpy(&out, weight->numbers[group][i], 64);
    return out;
}

inline Bytes quad(const Fours* weight, int group, int i) {
    Bits both;
    std::memcpy(&both, weight->numbers[group][i % (QUADS / 2)], 64);
    return (Bytes)((i < QUADS / 2 ? both : both >> 4) & 0x0f0f0f0fu);
}

// sum + what four inputs add to it. Every way is exact.
inline Counts dot(Counts sum, Bytes weight, const int8_t x[4]) {
#ifdef __AVX512VNNI__
    int four;
    std::memcpy(&four, x, 4);
    return (Counts)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weight, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
    __m256i sums[2], weights[2];
    std::memcpy(sums, &sum, 64);
    std::memcpy(weights, &weight, 64);
#ifdef __AVXVNNI__
    int four;
    std::memcpy(&four, x, 4);
    for (int h = 0; h < 2; h++) sums[h] = _mm256_dpbusd_avx_epi32(sums[h], weights[h], _mm256_set1_epi32(four));
#else
    const __m256i low = _mm256_set1_epi32(0x00ff00ff);  // products of bytes would not fit in 16 bits
    const __m256i even = _mm256_set1_epi32(int(uint16_t(x[0]) | uint32_t(uint16_t(x[2])) << 16));
    const __m256i odd = _mm256_set1_epi32(int(uint16_t(x[1]) | uint32_t(uint16_t(x[3])) << 16));
    for (int h = 0; h < 2; h++) {
        const __m256i first = _mm256_and_si256(weights[h], low);
        const __m256i second = _mm256_srli_epi16(weights[h], 8);
        const __m256i four = _mm256_add_epi32(_mm256_madd_epi16(first, even), _mm256_madd_epi16(second, odd));
        sums[h] = _mm256_add_epi32(sums[h], four);
    }
#endif
    std::memcpy(&sum, sums, 64);
    return sum;
#else
    for (int i = 0; i < 4; i++) sum += (Counts)((Bits)weight >> 8 * i & 0xff) * x[i];
    return sum;
#endif
}

// Sums of R positions with C blocks. One copy for all who multiply: building as many as there are takes long.
template <int R, int C, class W>
[[gnu::noinline]] void multiply(const W* weight, const Signed* x, int inputs, Lanes out[R][C]) {
    const int pieces = inputs / PIECE;
    Lanes sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = Lanes{};
    for (int i = 0; i < pieces; i++)
        for (int g = 0; g < GROUPS; g++) {
            Counts counts[R][C];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) counts[r][c] = Counts{} - W::offset * x[r * pieces + i].sums[g];
#pragma GCC unroll UNROLLED
            for (int q = 0; q < QUADS; q++) {
                Bytes quads[C];
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) {
                    const W* piece = weight + size_t(c) * pieces + i;
                    quads[c] = quad(piece, g, q);
                    // many sums of few bytes: the processor would not look ahead far enough
                    if (W::offset == 8 && R > 2) __builtin_prefetch((const char*)(piece + 2) + (g * QUADS + q) * 36);
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                    for (int c = 0; c < C; c++)
                        counts[r][c] = dot(counts[r][c], quads[c], x[r * pieces + i].numbers[g][q]);
            }
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                const Lanes scale = get(weight[size_t(c) * pieces + i].scales[g], BLOCK);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
                    sums[r][c] += __builtin_convertvector(counts[r][c], Lanes) * (scale * x[r * pieces + i].scales[g]);
            }
        }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) out[r][c] = sums[r][c];
}

// Sixteen numbers, each `far` places on.
template <int far, class V> inline V across(V x) {
    constexpr int n = BLOCK - 1;
    const Counts places = {far, 1 + far, 2 + far, 3 + far, 4 + far, 5 + far, 6 + far, 7 + far,
                           (8 + far) & n, (9 + far) & n, (10 + far) & n, (11 + far) & n,
                           (12 + far) & n, (13 + far) & n, (14 + far) & n, (15 + far) & n};
    return __builtin_shuffle(x, places);
}

// The largest of sixteen, and their sum.
template <int half = BLOCK / 2> inline uint32_t largest(Bits x) {
    const Bits other = across<half>(x);
    x = x > other ? x : other;
    if constexpr (half > 1) return largest<half / 2>(x);
    return x[0];
}

template <int half = BLOCK / 2> inline int32_t total(Counts x) {
    x += across<half>(x);
    if constexpr (half > 1) return total<half / 2>(x);
    return x[0];
}

// A position's numbers as whole numbers from -127 to 127 and a scale for each group. Where one is not finite, neither
// is the scale.
void quantise(const float* x, int width, Signed* to) {
    constexpr float shift = 12582912.0f;  // 1.5 x 2^23: what is added to it is rounded, and lies in its last bits
    uint32_t zero;
    std::memcpy(&zero, &shift, 4);
    for (int start = 0; start < width; start += GROUP) {
        const int g = start / GROUP % GROUPS, left = width - start;
        Signed& piece = to[start / PIECE];
        const Lanes halves[2] = {get(x + start, left), get(x + start + BLOCK, left - BLOCK)};
        const Bits above = (Bits)halves[0] & 0x7fffffffu, below = (Bits)halves[1] & 0x7fffffffu;
        const uint32_t bits = largest(above > below ? above : below);  // sizes are in the order of their bits, NaN last
        float most;
        std::memcpy(&most, &bits, 4);
        const float inverse = most == 0 ? 0.0f : 127.0f / most;
        Counts whole[2];
        for (int h = 0; h < 2; h++) whole[h] = (Counts)((Bits)(halves[h] * inverse + shift) - zero);
        int32_t plain[GROUP];
        std::memcpy(plain, whole, sizeof plain);
        int8_t* numbers = &piece.numbers[g][0][0];
#pragma omp simd
        for (int i = 0; i < GROUP; i++) numbers[i] = int8_t(plain[i]);
        piece.scales[g] = most / 127.0f;
        piece.sums[g] = total(whole[0] + whole[1]);
    }
    if (width % PIECE && width % PIECE <= GROUP) to[width / PIECE].scales[1] = 0, to[width / PIECE].sums[1] = 0;
}

void norm(const float* x, const float* weight, float eps, int width, Signed* to) {
    float* plain = room<float, 9>(even(width));
    norm(x, weight, eps, width, plain);
    quantise(plain, width, to);
}

// What was written, as a product reads it: the thread's own, or everybody's.
const Signed* ready(const float* written, int width, int positions, Signed* all, Meeting& meeting) {
    return each_position(positions, elements<Signed>(width), all, meeting, [&](int m, Signed* to) {
        quantise(written + size_t(m) * even(width), width, to);
    });
}

}  // namespace
