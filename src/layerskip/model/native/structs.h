// What the kernels are given: the structs of span.py beside this file.
//
// B rows, T positions each; I inputs and O outputs of a product, H head width.

#pragma once

#include <cstdint>

struct Linear {
    const void* weight;       // blocks of 16 outputs: float32 (O/16, I, 16), bfloat16 (O/16, I/2, 16, 2); or quantised.h
    const float* bias;        // (O,), or null
    int32_t inputs, outputs;  // filled up with zeros: to an even number, or whole pieces of 64; to whole blocks
};

struct Table {
    const void* numbers;  // (vocabulary, D)
    int32_t format;       // 0 float32, 1 bfloat16
};

struct Layer {
    Linear query_key_value, output, gate_up, down;  // blocks of gate and up take turns
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm;
    int64_t window;  // positions a layer looks back on; 0 is all
};

struct Model {
    int32_t format;  // 0 float32, 1 bfloat16; weights of 8 bits and a cache of these 2, 3; of 4 bits 4, 5
    int32_t activation, width, heads, kv_heads, head_width, ffn_width, vocab;
    float eps;
};

inline bool bfloat16(const Model& model) { return model.format % 2; }  // the cache is

struct Call {
    int32_t rows, positions, limit, threads;  // B, T; attention reads slots below limit
    int64_t first_row;                        // of the cache, where the rows follow one another
    const int64_t* row;                       // (B,) else
    const int64_t *at, *slots;                // (B, T); beyond `spare`, or below 0, they are padding, written there
    int64_t spare;                            // the last slot of a row
    const float *cosines, *sines;             // (spare + 1 or more, H)
    const uint8_t* mask;                      // (B, T, limit) which slots are seen, or null: those up to `at`
    const int64_t* placed;                    // (rows of the cache, spare + 1) the position each slot holds
};

struct Stop {  // where a draft ends: each row's reach is multiplied by the factor of its probability's range
    const double *edges, *factors;  // (count,) between the ranges, (count + 1)
    int32_t count;
    double least;  // sum of reaches below which nobody goes on
};
