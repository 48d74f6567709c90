// Spans of a Llama-family decoder for the CPU: some of its layers, for a few positions, in one call.
//
// Knows numbers in memory. The structs are those of span.py beside this file, the order of the weights that of blocks.py.
//
// Every output of a product is one sum that walks the inputs in order, every position attends on its own, and norms are
// sums over one position. So what a position gets does not depend on how many others share the call: the numbers of a
// verification are those of decoding one by one, bit for bit.
//
// B rows, T positions each, M = B x T of them in all; D width, H head width; I inputs and O outputs of a product.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

struct Linear {
    const void* weight;       // blocks of 16 outputs: float32 (O/16, I, 16), bfloat16 (O/16, I/2, 16, 2)
    const float* bias;        // (O,), or null
    int32_t inputs, outputs;  // filled up with zeros: to an even number, to whole blocks
};

struct Layer {
    Linear query_key_value, output, gate_up, down;  // blocks of gate and up take turns
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm;
    int64_t window;  // positions a layer looks back on; 0 is all
};

struct Model {
    int32_t format, activation, width, heads, kv_heads, head_width, ffn_width, vocab;
    float eps;
};

struct Call {
    int32_t rows, positions, limit, threads;  // B, T; attention reads slots below limit
    int64_t first_row;                        // of the cache, where the rows follow one another
    const int64_t* row;                       // (B,) else
    const int64_t *at, *slots;                // (B, T); beyond `spare` they are padding, written there
    int64_t spare;                            // the last slot of a row
    const float *cosines, *sines;             // (spare + 1 or more, H)
    const uint8_t* mask;                      // (B, T, limit) which slots are seen, or null: those up to `at`
    const int64_t* placed;                    // (rows of the cache, spare + 1) the position each slot holds
};

namespace {

constexpr int BLOCK = 16;   // outputs side by side: a vector of float32
constexpr int ROWS = 6;     // positions whose sums stay in registers together
constexpr int COLUMNS = 4;  // blocks that share a look at a position's inputs
constexpr int ALONE = 8;    // up to so many positions every thread norms them for itself: cheaper than waiting

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Half;  // bfloat16

// What stands beside bfloat16 weights in a product: pairs, where the processor multiplies pairs.
#ifdef __AVX512BF16__
typedef Half Beside;
#else
typedef float Beside;
#endif

// ---- numbers

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
    int32_t bits = (int32_t(n) + 127) << 23;
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

// ---- products

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
        Lanes out[R][C];
        multiply<R, C>(weight + size_t(block) * inputs * BLOCK, x + size_t(m) * inputs, inputs, out);
        for (int r = 0; r < R; r++) use(m + r, block, out[r], C);
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
    for (; block + COLUMNS <= last; block += COLUMNS) strip(std::integral_constant<int, COLUMNS>(), block);
    for (; block < last; block += unit) strip(std::integral_constant<int, unit>(), block);
}

// How many numbers of a block lie within `width`.
inline int within(int block, int width) { return width - block * BLOCK < BLOCK ? width - block * BLOCK : BLOCK; }

inline int even(int count) { return count + (count & 1); }

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

// Norms of all positions, for a product: the thread's own, or everybody's.
template <class X>
const X* norms(const Model& model, const float* hidden, const float* weight, int positions, X* all, Meeting& meeting) {
    const int width = model.width;
    int first = 0, last = positions;
    X* to = all;
    if (positions > ALONE)
        share(positions, first, last);
    else
        to = room<X, 1>(size_t(positions) * even(width));
    for (int m = first; m < last; m++)
        norm(hidden + size_t(m) * width, weight, model.eps, width, to + size_t(m) * even(width));
    if (positions > ALONE) meeting.wait();
    return to;
}

// ---- attention

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

// One key/value head of one row: keys and values are written, then its queries attend. V vectors hold a head.
template <int V, class W, class X> class Head {
  public:
    Head(const Model& model, const Call& call, const Layer& layer, W* keys, W* values, int b, int group)
        : model(model), call(call), layer(layer), width(model.head_width), b(b), group(group) {
        row = call.row ? call.row[b] : call.first_row + b;
        const size_t start = (size_t(row) * model.kv_heads + group) * (call.spare + 1) * width;
        this->keys = keys + start, this->values = values + start;
    }

    void attend(float* fused, int fused_width, X* attended) {
        const int queries = model.heads / model.kv_heads * call.positions;
        for (int t = 0; t < call.positions; t++) remember(fused + size_t(b * call.positions + t) * fused_width, t);
        int q = 0;
        for (; q + 8 <= queries; q += 8) tile<8>(fused, fused_width, attended, q);
        if (queries - q == 5) return tile<5>(fused, fused_width, attended, q);  // as many as four drafted tokens ask
        for (; q + 4 <= queries; q += 4) tile<4>(fused, fused_width, attended, q);
        for (; q + 2 <= queries; q += 2) tile<2>(fused, fused_width, attended, q);
        if (q < queries) tile<1>(fused, fused_width, attended, q);
    }

  private:
    const Model& model;
    const Call& call;
    const Layer& layer;
    const int width, b, group;
    int64_t row;
    W *keys, *values;

    int64_t position(int m) const { return call.at[m] < call.spare ? call.at[m] : call.spare; }

    void remember(float* fused, int t) {
        const int m = b * call.positions + t;
        float* key = fused + size_t(model.heads + group) * width;
        const float* value = fused + size_t(model.heads + model.kv_heads + group) * width;
        if (layer.key_norm) norm(key, layer.key_norm, model.eps, width, key);
        const int64_t p = position(m), wanted = call.slots ? call.slots[m] : p;
        rotate(key, call.cosines + p * width, call.sines + p * width, width);
        const int64_t slot = wanted < call.spare ? wanted : call.spare;
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
    template <int Q> void tile(const float* fused, int fused_width, X* attended, int q) {
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
            X* to = attended + size_t(m) * even(model.heads * width) + size_t(head) * width;
            const float scale = 1.0f / sum[i];
            for (int v = 0; v < V; v++) put(to + v * BLOCK, out[i][v] * scale, width - v * BLOCK);
        }
    }
};

// ---- layers

template <class W, class X> class Span {
  public:
    Span(const Model& model, const Call& call, float* hidden)
        : model(model), call(call), positions(call.rows * call.positions), hidden(hidden) {
        fused_width = (model.heads + 2 * model.kv_heads) * model.head_width;
        fused_width = (fused_width + BLOCK - 1) / BLOCK * BLOCK;
        const size_t M = positions;
        fused = room<float, 5>(M * fused_width);
        attended = room<X, 6>(M * even(model.heads * model.head_width));
        gated = room<X, 7>(M * even(model.ffn_width));
        normed = room<X, 8>(M * even(model.width));
        for (size_t m = 0; m < M; m++) attended[(m + 1) * even(model.heads * model.head_width) - 1] = 0;
    }

    void run(const Layer& layer, W* keys, W* values) {  // by every thread
        product<1, W>(layer.query_key_value, norms(model, hidden, layer.attention_norm, positions, normed, meeting), positions,
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
        residual(layer.output, attended);
        meeting.wait();
        const int width = model.ffn_width;
        product<2, W>(layer.gate_up, norms(model, hidden, layer.mlp_norm, positions, normed, meeting), positions,
                      [&](int m, int block, const Lanes* sums, int count) {
            for (int c = 0; c < count; c += 2) {
                Lanes gate = biased(layer.gate_up, block + c, sums[c]);
                const Lanes up = biased(layer.gate_up, block + c + 1, sums[c + 1]);
                const int own = (block + c) / 2, inside = within(own, width);
                X* to = gated + size_t(m) * even(width) + own * BLOCK;
                activate((float*)&gate, model.activation);
                gate *= up;
                put(to, gate, inside);
                if ((width & 1) && own * BLOCK + inside == width) to[inside] = 0;
            }
        });
        meeting.wait();
        residual(layer.down, gated);
        meeting.wait();
    }

  private:
    const Model& model;
    const Call& call;
    Meeting meeting;
    const int positions;
    float* hidden;  // (M, D)
    int fused_width;
    float* fused;                  // (M, queries, keys and values side by side)
    X *attended, *gated, *normed;  // (M, what goes into a product)

    static Lanes biased(const Linear& linear, int block, Lanes sum) {
        return linear.bias ? sum + load(linear.bias + block * BLOCK) : sum;
    }

    void residual(const Linear& linear, const X* x) {
        product<1, W>(linear, x, positions, [&](int m, int block, const Lanes* sums, int count) {
            for (int c = 0; c < count; c++) {
                const Lanes sum = biased(linear, block + c, sums[c]);
                float* to = hidden + size_t(m) * model.width + (block + c) * BLOCK;
                const int inside = within(block + c, model.width);
                put(to, get(to, inside) + sum, inside);
            }
        });
    }

    void attend(const Layer& layer, W* keys, W* values, int b, int group) {
        auto head = [&](auto vectors) {
            Head<decltype(vectors)::value, W, X>(model, call, layer, keys, values, b, group)
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
    for (int i = first; i < last; i++) span.run(layers[i], (W*)keys[i], (W*)values[i]);
}

template <class W, class X>
void predict(const Model& model, const Linear& head, const float* weight, const float* hidden, int positions, float* out,
             int threads) {
    X* normed = room<X, 8>(size_t(positions) * even(model.width));
    Meeting meeting;
#pragma omp parallel num_threads(threads) if (threads > 1)
    product<1, W>(head, norms(model, hidden, weight, positions, normed, meeting), positions,
                  [&](int m, int block, const Lanes* sums, int count) {
        for (int c = 0; c < count; c++)
            std::memcpy(out + size_t(m) * model.vocab + (block + c) * BLOCK, sums + c,
                        within(block + c, model.vocab) * sizeof(float));
    });
}

}  // namespace

extern "C" {

// Layers first..last-1 of `hidden` (M, D) in place; writes keys and values.
void layerskip_span(const Model* model, const Layer* layers, int32_t first, int32_t last, float* hidden,
                    const Call* call, void* const* keys, void* const* values) {
    if (model->format == 0)
        span<float, float>(*model, layers, first, last, hidden, *call, keys, values);
    else
        span<Half, Beside>(*model, layers, first, last, hidden, *call, keys, values);
}

// The final norm and the head: `hidden` (M, D) -> `out` (M, vocabulary).
void layerskip_predict(const Model* model, const Linear* head, const float* norm, const float* hidden, int32_t positions,
                       float* out, int32_t threads) {
    if (model->format == 0)
        predict<float, float>(*model, *head, norm, hidden, positions, out, threads);
    else
        predict<Half, Beside>(*model, *head, norm, hidden, positions, out, threads);
}

}
