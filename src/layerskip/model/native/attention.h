// Attention of a few positions over the slots of a cache; every position on its own.

#pragma once

#include "products.h"

namespace {

// Halves of `count` lanes each, taken in turns from a and b, added to their other halves.
template <int count> inline Lanes fold(Lanes a, Lanes b) {
    typedef int32_t Places __attribute__((vector_size(64)));
    Places low, high;
    for (int i = 0; i < BLOCK; i++) {
        const int half = i / count, at = i % count + half / 2 * 2 * count;  // of a where half is even, else of b
        low[i] = at + half % 2 * BLOCK;
        high[i] = low[i] + count;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// The sums of sixteen vectors, in order; every one is added up alike.
inline Lanes totals(const Lanes x[BLOCK]) {
    Lanes eight[8], four[4], two[2];
    for (int i = 0; i < 8; i++) eight[i] = fold<8>(x[i], x[i + 8]);
    for (int i = 0; i < 4; i++) four[i] = fold<4>(eight[i], eight[i + 4]);
    for (int i = 0; i < 2; i++) two[i] = fold<2>(four[i], four[i + 2]);
    return fold<1>(two[0], two[1]);
}

// Rotary position embedding (Su et al., 2021), halves paired.
void rotate(float* x, const float* cosines, const float* sines, int width) {
    const int half = width / 2;
#pragma omp simd
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

// exp(x - max) in place; 0 where not seen. Returns their sum.
float soften(float* x, const uint8_t* seen, int count) {
    float most = -INFINITY, sum = 0;
    if (seen)
        for (int s = 0; s < count; s++) x[s] = seen[s] ? x[s] : -INFINITY;
#pragma omp simd reduction(max : most)
    for (int s = 0; s < count; s++) most = x[s] > most ? x[s] : most;
#pragma omp simd
    for (int s = 0; s < count; s++) x[s] = x[s] == -INFINITY ? 0.0f : exponential(x[s] - most);
#pragma omp simd reduction(+ : sum)
    for (int s = 0; s < count; s++) sum += x[s];
    return sum;
}

// One key/value head of one row: keys and values are written, then its queries attend. V vectors hold a head; what they
// attend to is written as X, any of the two that a product may take. (A class for each of them would take long to build.)
template <int V, class W> class Head {
  public:
    Head(const Model& model, const Call& call, const Layer& layer, W* keys, W* values, int b, int group)
        : model(model), call(call), layer(layer), width(model.head_width), b(b), group(group) {
        row = call.row ? call.row[b] : call.first_row + b;
        const size_t start = (size_t(row) * model.kv_heads + group) * (call.spare + 1) * width;
        this->keys = keys + start, this->values = values + start;
    }

    template <class X> void attend(float* fused, int fused_width, X* attended) {
        attend(fused, fused_width, attended, std::is_same<X, float>::value);
    }

  private:
    void attend(float* fused, int fused_width, void* attended, bool floats) {
        this->floats = floats;
        const int queries = model.heads / model.kv_heads * call.positions;
        for (int t = 0; t < call.positions; t++) remember(fused + size_t(b * call.positions + t) * fused_width, t);
        int q = 0;
        for (; q + 8 <= queries; q += 8) tile<8>(fused, fused_width, attended, q);
        if (queries - q == 5) return tile<5>(fused, fused_width, attended, q);  // as many as four drafted tokens ask
        for (; q + 4 <= queries; q += 4) tile<4>(fused, fused_width, attended, q);
        for (; q + 2 <= queries; q += 2) tile<2>(fused, fused_width, attended, q);
        if (q < queries) tile<1>(fused, fused_width, attended, q);
    }

    const Model& model;
    const Call& call;
    const Layer& layer;
    const int width, b, group;
    int64_t row;
    W *keys, *values;
    bool floats;

    int64_t held(int64_t wanted) const { return uint64_t(wanted) < uint64_t(call.spare) ? wanted : call.spare; }
    int64_t position(int m) const { return held(call.at[m]); }

    void remember(float* fused, int t) {
        const int m = b * call.positions + t;
        float* key = fused + size_t(model.heads + group) * width;
        const float* value = fused + size_t(model.heads + model.kv_heads + group) * width;
        if (layer.key_norm) norm(key, layer.key_norm, model.eps, width, key);
        const int64_t p = position(m), wanted = call.slots ? call.slots[m] : p;
        rotate(key, call.cosines + p * width, call.sines + p * width, width);
        const int64_t slot = held(wanted);
        W *k = keys + slot * width, *v = values + slot * width;
        for (int i = 0; i < width; i += BLOCK) put(k + i, get(key + i, width - i), width - i);
        for (int i = 0; i < width; i += BLOCK) put(v + i, get(value + i, width - i), width - i);
    }

    // Which of slots 0..count-1 a position sees, where it is not all of them; null where it is.
    const uint8_t* seen(int m, int& count, uint8_t* memory) {
        const int64_t p = position(m);
        if (!call.mask && p + 1 < count) count = int(p + 1);
        if (!call.mask && !layer.window) return nullptr;
        for (int s = 0; s < count; s++) {
            const bool near = !layer.window || call.placed[row * (call.spare + 1) + s] > p - layer.window;
            memory[s] = near && (!call.mask || call.mask[size_t(m) * call.limit + s]);
        }
        return memory;
    }

    // Numbers of the head at a slot, as V vectors.
    void look(const W* from, Lanes to[V]) const {
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) to[v] = get(from + v * BLOCK, v + 2 < V ? BLOCK : width - v * BLOCK);
    }

    // Q queries, from number q on: those of one position follow one another.
    template <int Q> void tile(const float* fused, int fused_width, void* attended, int q) {
        const int limit = call.limit, share = model.heads / model.kv_heads;
        const int stride = (limit + BLOCK - 1) / BLOCK * BLOCK;
        float* score = room<float, 3>(size_t(Q) * stride);
        uint8_t* visible = room<uint8_t, 4>(size_t(Q) * limit);
        Lanes query[Q][V], out[Q][V], number[V];
        const uint8_t* shown[Q];
        int reach[Q], furthest = 0, common = limit;  // slots that some, and that all of them see
        for (int i = 0; i < Q; i++) {
            const int m = b * call.positions + (q + i) / share, head = group * share + (q + i) % share;
            float* own = room<float, 2>(V * BLOCK);
            std::memcpy(own, fused + size_t(m) * fused_width + size_t(head) * width, width * sizeof(float));
            if (layer.query_norm) norm(own, layer.query_norm, model.eps, width, own);
            const int64_t p = position(m);
            rotate(own, call.cosines + p * width, call.sines + p * width, width);
            for (int v = 0; v < V; v++) {
                query[i][v] = get(own + v * BLOCK, width - v * BLOCK) * (1.0f / std::sqrt(float(width)));
                out[i][v] = Lanes{};
            }
            reach[i] = limit;
            shown[i] = seen(m, reach[i], visible + size_t(i) * limit);
            furthest = reach[i] > furthest ? reach[i] : furthest;
            common = shown[i] ? 0 : reach[i] < common ? reach[i] : common;
        }
        for (int s = 0; s < furthest; s += BLOCK) {
            const int count = furthest - s < BLOCK ? furthest - s : BLOCK;
            Lanes number[BLOCK][V], sums[BLOCK];
            for (int j = 0; j < count; j++) look(keys + size_t(s + j) * width, number[j]);
            for (int j = count; j < BLOCK; j++)
                for (int v = 0; v < V; v++) number[j][v] = Lanes{};
            for (int i = 0; i < Q; i++) {
                for (int j = 0; j < BLOCK; j++) {
                    sums[j] = query[i][0] * number[j][0];
#pragma GCC unroll 16
                    for (int v = 1; v < V; v++) sums[j] += query[i][v] * number[j][v];
                }
                const Lanes sixteen = totals(sums);
                std::memcpy(score + size_t(i) * stride + s, &sixteen, 64);
            }
        }
        float sum[Q];
        for (int i = 0; i < Q; i++) {
            float* own = score + size_t(i) * stride;
            sum[i] = soften(own, shown[i], reach[i]);
            for (int s = reach[i]; s < furthest; s++) own[s] = 0;
        }
        auto gather = [&](auto choosy, int s) {
            look(values + size_t(s) * width, number);
#pragma GCC unroll 8
            for (int i = 0; i < Q; i++) {
                const float p = score[size_t(i) * stride + s];
                if (choosy && p == 0) continue;
#pragma GCC unroll 16
                for (int v = 0; v < V; v++) out[i][v] += p * number[v];
            }
        };
        for (int s = 0; s < common; s++) gather(std::false_type(), s);
        // a slot that not all of them see may hold numbers that are not finite
        for (int s = common; s < furthest; s++) gather(std::true_type(), s);
        for (int i = 0; i < Q; i++) {
            const int m = b * call.positions + (q + i) / share, head = group * share + (q + i) % share;
            const size_t to = size_t(m) * even(model.heads * width) + size_t(head) * width;
            const float scale = 1.0f / sum[i];
            for (int v = 0; v < V; v++) {
                const size_t at = to + v * BLOCK;
                if (floats)
                    put((float*)attended + at, out[i][v] * scale, width - v * BLOCK);
                else
                    put((Beside*)attended + at, out[i][v] * scale, width - v * BLOCK);
            }
        }
    }
};

}  // namespace
