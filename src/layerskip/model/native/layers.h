// Layers: what every thread does of them, and the head.

#pragma once

#include <algorithm>

#include "attention.h"
#include "quantised.h"

namespace {

// What attention and the MLP write for a product that reads X.
template <class X> struct Written { typedef X type; };
template <> struct Written<Signed> { typedef float type; };

// Weights W, products that read X beside them.
template <class W, class X> class Span {
  public:
    Span(const Model& model, const Call& call, float* hidden)
        : model(model), call(call), positions(call.rows * call.positions), hidden(hidden) {
        fused_width = (model.heads + 2 * model.kv_heads) * model.head_width;
        fused_width = (fused_width + BLOCK - 1) / BLOCK * BLOCK;
        const size_t M = positions;
        fused = room<float, 5>(M * fused_width);
        const int attended_width = model.heads * model.head_width;
        attended = room<Raw, 6>(M * even(attended_width));
        gated = room<Raw, 7>(M * even(model.ffn_width));
        int widest = model.width > model.ffn_width ? model.width : model.ffn_width;
        widest = widest > attended_width ? widest : attended_width;
        read = room<X, 8>(M * elements<X>(widest));
        for (size_t m = 0; m < M; m++) attended[(m + 1) * even(attended_width) - 1] = 0;
    }

    void run(const Layer& layer, void* keys, void* values) {  // by every thread
        product<1, W>(layer.query_key_value, norms(model, hidden, layer.attention_norm, positions, read, meeting), positions,
                      [&](int m, int block, const Lanes* sums, int count) {
            float* to = fused + size_t(m) * fused_width + block * BLOCK;
            for (int c = 0; c < count; c++) {
                const Lanes sum = biased(layer.query_key_value, block + c, sums[c]);
                std::memcpy(to + c * BLOCK, &sum, 64);
            }
        });
        meeting.wait();
        int first, last;
        share(call.rows * model.kv_heads, first, last);
        for (int i = first; i < last; i++) attend(layer, keys, values, i / model.kv_heads, i % model.kv_heads);
        meeting.wait();
        residual(layer.output, attended, model.heads * model.head_width);
        meeting.wait();
        const int width = model.ffn_width;
        product<2, W>(layer.gate_up, norms(model, hidden, layer.mlp_norm, positions, read, meeting), positions,
                      [&](int m, int block, const Lanes* sums, int count) {
            for (int c = 0; c < count; c += 2) {
                Lanes gate = biased(layer.gate_up, block + c, sums[c]);
                const Lanes up = biased(layer.gate_up, block + c + 1, sums[c + 1]);
                const int own = (block + c) / 2, inside = within(own, width);
                Raw* to = gated + size_t(m) * even(width) + own * BLOCK;
                activate((float*)&gate, model.activation);
                gate *= up;
                put(to, gate, inside);
                if ((width & 1) && own * BLOCK + inside == width) to[inside] = 0;
            }
        });
        meeting.wait();
        residual(layer.down, gated, model.ffn_width);
        meeting.wait();
    }

  private:
    typedef typename Written<X>::type Raw;
    const Model& model;
    const Call& call;
    Meeting meeting;
    const int positions;
    float* hidden;  // (M, D)
    int fused_width;
    float* fused;            // (M, queries, keys and values side by side)
    Raw *attended, *gated;   // (M, what goes into a product)
    X* read;                 // the same as the product reads it, where many positions share the work

    static Lanes biased(const Linear& linear, int block, Lanes sum) {
        return linear.bias ? sum + load(linear.bias + block * BLOCK) : sum;
    }

    void residual(const Linear& linear, const Raw* x, int width) {
        product<1, W>(linear, ready(x, width, positions, read, meeting), positions,
                      [&](int m, int block, const Lanes* sums, int count) {
            for (int c = 0; c < count; c++) {
                const Lanes sum = biased(linear, block + c, sums[c]);
                float* to = hidden + size_t(m) * model.width + (block + c) * BLOCK;
                const int inside = within(block + c, model.width);
                put(to, get(to, inside) + sum, inside);
            }
        });
    }

    void attend(const Layer& layer, void* keys, void* values, int b, int group) {
        if (bfloat16(model))
            attend(layer, (Half*)keys, (Half*)values, b, group);
        else
            attend(layer, (float*)keys, (float*)values, b, group);
    }

    template <class K> void attend(const Layer& layer, K* keys, K* values, int b, int group) {
        auto head = [&](auto vectors) {
            Head<decltype(vectors)::value, K>(model, call, layer, keys, values, b, group)
                .attend(fused, fused_width, attended);
        };
        switch ((model.head_width + BLOCK - 1) / BLOCK) {
            case 1:
            case 2: return head(std::integral_constant<int, 2>());
            case 3: return head(std::integral_constant<int, 3>());
            case 4: return head(std::integral_constant<int, 4>());
            case 5:
            case 6: return head(std::integral_constant<int, 6>());
            default: return head(std::integral_constant<int, 8>());
        }
    }
};

template <class W, class X>
void span(const Model& model, const Layer* layers, int first, int last, float* hidden, const Call& call,
          void* const* keys, void* const* values) {
    Span<W, X> span(model, call, hidden);
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    for (int i = first; i < last; i++) span.run(layers[i], keys[i], values[i]);
}

template <class W, class X>
void predict(const Model& model, const Linear& head, const float* weight, const float* hidden, int positions, float* out,
             int threads) {
    X* normed = room<X, 8>(size_t(positions) * elements<X>(model.width));
    Meeting meeting;
#pragma omp parallel num_threads(threads) if (threads > 1)
    product<1, W>(head, norms(model, hidden, weight, positions, normed, meeting), positions,
                  [&](int m, int block, const Lanes* sums, int count) {
        for (int c = 0; c < count; c++)
            std::memcpy(out + size_t(m) * model.vocab + (block + c) * BLOCK, sums + c,
                        within(block + c, model.vocab) * sizeof(float));
    });
}

// The tokens' vectors, as a model of K holds them.
template <class K> void embed(const Table& table, const int64_t* tokens, int count, int width, float* hidden) {
    for (int m = 0; m < count; m++)
        for (int i = 0; i < width; i += BLOCK) {
            const size_t at = size_t(tokens[m]) * width + i;
            K rounded[BLOCK];
            put(rounded, table.format == 0 ? get((const float*)table.numbers + at, width - i)
                                           : get((const Half*)table.numbers + at, width - i), BLOCK);
            put(hidden + size_t(m) * width + i, get(rounded, BLOCK), width - i);
        }
}

// The first of the largest, and its probability where that is asked for.
int64_t largest(const float* x, int count, float* probability) {
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < count; i++) most = x[i] > most ? x[i] : most;
    if (probability) {
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < count; i++) sum += exponential(x[i] - most);
        *probability = 1.0f / sum;
    }
    for (int i = 0; i < count; i++)
        if (x[i] == most) return i;
    return 0;  // none is a number: what follows does not matter
}

// How `reach` (B,) changes by what was drafted so surely; whether that ends the draft.
inline bool over(const Stop& stop, const float* sure, int rows, double* reach) {
    double sum = 0;
    for (int b = 0; b < rows; b++) {
        const double* above = std::upper_bound(stop.edges, stop.edges + stop.count, double(sure[b]));
        reach[b] *= std::isnan(sure[b]) ? 0 : stop.factors[above - stop.edges];
        sum += reach[b];
    }
    return sum < stop.least;
}

// Up to `count` tokens a row, each the likeliest after the one before it at `exit`; how many. `tokens` (count + 1, B)
// begins with the last known ones; `states` (count + 1, B, D) are those of all of them at the exit. `predict` gives a
// row's logits of `outputs` tokens; output n means token names[n], or n without names. With a `stop` the probabilities
// of the drafted tokens are written to `sure` (count, B).
template <class W, class X, class Predict>
int draft(const Model& model, const Layer* layers, int exit, int outputs, const int64_t* names, const Table& table,
          Call call, void* const* keys, void* const* values, int count, const Stop* stop, int64_t* tokens, float* states,
          float* sure, Predict predict) {
    const int rows = call.rows;
    int64_t* at = room<int64_t, 9>(rows);
    float* logits = room<float, 10>(size_t(rows) * outputs);
    std::memcpy(at, call.at, rows * sizeof(int64_t));
    call.at = at;
    double* reach = room<double, 11>(rows);
    std::fill(reach, reach + rows, 1.0);
    for (int i = 0;; i++) {
        float* hidden = states + size_t(i) * rows * model.width;
        const int64_t* last = tokens + size_t(i) * rows;
        bfloat16(model) ? embed<Half>(table, last, rows, model.width, hidden)
                        : embed<float>(table, last, rows, model.width, hidden);
        span<W, X>(model, layers, 0, exit, hidden, call, keys, values);
        if (i == count) return count;
        predict(hidden, rows, logits);
        for (int b = 0; b < rows; b++) {
            float* probability = stop ? sure + size_t(i) * rows + b : nullptr;
            const int64_t best = largest(logits + size_t(b) * outputs, outputs, probability);
            tokens[size_t(i + 1) * rows + b] = names ? names[best] : best;
            at[b]++;
        }
        if (stop && over(*stop, sure + size_t(i) * rows, rows, reach)) count = i + 1;
        call.limit += call.limit < call.spare;
    }
}

}  // namespace
