// Sixteen numbers at a time: from and to memory, in float32 and bfloat16, and functions of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 16;   // outputs side by side: a vector of float32

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Half;  // bfloat16

// What stands beside bfloat16 weights in a product: pairs, where the processor multiplies pairs.
#ifdef __AVX512BF16__
typedef Half Beside;
#else
typedef float Beside;
#endif

inline Lanes load(const float* from) {
    Lanes out;
    std::memcpy(&out, from, 64);
    return out;
}

typedef Half Halves __attribute__((vector_size(32)));

inline Halves narrow(Lanes x) {  // the nearest, ties to even; NaN stays NaN
    Halves out;
#ifdef __AVX512BF16__
    const __m256bh near = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(&out, &near, 32);
#else
    const Bits bits = (Bits)x, near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (Bits)(x != x);
    out = __builtin_convertvector((near & ~nan) | (0x7fc0 & nan), Halves);
#endif
    return out;
}

// Sixteen numbers, or the first `count` of them, from and to memory. What is not read is zero.
inline Lanes get(const float* from, int count) {
    if (count >= BLOCK) return load(from);
    Lanes out{};
    if (count > 0) std::memcpy(&out, from, count * sizeof(float));
    return out;
}

inline Lanes get(const Half* from, int count) {
    Halves halves{};
    if (count >= BLOCK)
        std::memcpy(&halves, from, 32);
    else if (count > 0)
        std::memcpy(&halves, from, count * sizeof(Half));
    return (Lanes)(__builtin_convertvector(halves, Bits) << 16);
}

inline void put(float* to, Lanes x, int count) {
    if (count >= BLOCK)
        std::memcpy(to, &x, 64);
    else if (count > 0)
        std::memcpy(to, &x, count * sizeof(float));
}

inline void put(Half* to, Lanes x, int count) {
    const Halves halves = narrow(x);
    if (count >= BLOCK)
        std::memcpy(to, &halves, 32);
    else if (count > 0)
        std::memcpy(to, &halves, count * sizeof(Half));
}

inline float exponential(float x) {  // Cephes' expf, within 2 units of the last place; NaN stays NaN
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t bits = (uint32_t(int32_t(n)) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

enum Activation { SILU, RELU, GELU, GELU_TANH };

template <class F> inline void each(float* x, F f) {
#pragma omp simd
    for (int i = 0; i < BLOCK; i++) x[i] = f(x[i]);
}

void activate(float* x, int kind) {  // a block
    switch (kind) {
        case SILU: return each(x, [](float y) { return y / (1.0f + exponential(-y)); });
        case RELU: return each(x, [](float y) { return y < 0 ? 0.0f : y; });
        case GELU: for (int i = 0; i < BLOCK; i++) x[i] *= 0.5f + 0.5f * std::erf(x[i] * 0.70710678118654752f); return;
        case GELU_TANH:
            return each(x, [](float y) {
                return y / (1.0f + exponential(-1.59576912160573071f * (y + 0.044715f * y * y * y)));
            });
    }
}

}  // namespace
