// Spans of a Llama-family decoder for the CPU: some of its layers, for a few positions, in one call.
//
// Knows numbers in memory. The structs are those of span.py beside this file, the order of the weights that of
// blocks.py.
//
// Every output of a product is one sum that walks the inputs in order, every position attends on its own, and norms are
// sums over one position. So what a position gets does not depend on how many others share the call: the numbers of a
// verification are those of decoding one by one, bit for bit.
//
// B rows, T positions each, M = B x T of them in all; D width, H head width; I inputs and O outputs of a product.

#include "layers.h"

namespace {

template <class Weight, class Factor> struct Types {  // of weights, and of what a product reads beside them
    typedef Weight W;
    typedef Factor X;
};

// use(types of a format).
template <class Use> auto typed(int format, Use use) {
    switch (format) {
        case 0: return use(Types<float, float>());
        case 1: return use(Types<Half, Beside>());
        case 2:
        case 3: return use(Types<Eights, Signed>());
        default: return use(Types<Fours, Signed>());
    }
}

}  // namespace

extern "C" {

// Layers first..last-1 of `hidden` (M, D) in place; writes keys and values.
void layerskip_span(const Model* model, const Layer* layers, int32_t first, int32_t last, float* hidden,
                    const Call* call, void* const* keys, void* const* values) {
    typed(model->format, [&](auto types) {
        typedef decltype(types) T;
        span<typename T::W, typename T::X>(*model, layers, first, last, hidden, *call, keys, values);
    });
}

// The final norm and the head: `hidden` (M, D) -> `out` (M, vocabulary).
void layerskip_predict(const Model* model, const Linear* head, const float* norm, const float* hidden, int32_t positions,
                       float* out, int32_t threads) {
    typed(model->format, [&](auto types) {
        typedef decltype(types) T;
        predict<typename T::W, typename T::X>(*model, *head, norm, hidden, positions, out, threads);
    });
}

// Drafts up to `count` tokens for every row, the likeliest at `exit` each time, and says how many: `tokens`
// (count + 1, B), of which the first B are given, and `states` (count + 1, B, D) of all of them at the exit. `head` is that
// of `predicts`, a model of its own vocabulary and format; `names` are the tokens that its outputs mean, or null. With a
// `stop` the draft may end earlier, and `sure` (count, B) are the probabilities of its tokens.
int32_t layerskip_draft(const Model* model, const Layer* layers, int32_t exit, const Model* predicts, const Linear* head,
                        const int64_t* names, const float* norm, const Table* table, const Call* call, void* const* keys,
                        void* const* values, int32_t count, const Stop* stop, int64_t* tokens, float* states,
                        float* sure) {
    auto predicted = [&](const float* hidden, int positions, float* logits) {
        layerskip_predict(predicts, head, norm, hidden, positions, logits, call->threads);
    };
    return typed(model->format, [&](auto types) {
        typedef decltype(types) T;
        return draft<typename T::W, typename T::X>(*model, layers, exit, predicts->vocab, names, *table, *call, keys, values,
                                                  count, stop, tokens, states, sure, predicted);
    });
}

}
