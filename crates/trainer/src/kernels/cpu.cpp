// The memory-bound parts of a step on a CPU, each in one pass over its data. `kernels/mod.rs` says what each computes;
// `kernels/composed.rs` has the same formulas as libtorch operations, which other devices take and the tests compare with.
//
// Compiled once for each instruction set (`build.rs`); the program picks a table when it starts. Numbers are float32 or
// bfloat16 in memory and float32 in registers. Threads are OpenMP's, of the same pool as libtorch's own.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <cstdlib>
#include <initializer_list>

namespace {

struct bfloat16 {
    uint16_t bits;
};

// A thread's own numbers. Not std::vector: a template of the library is linked once for all variants of this file, and the one
// that is kept may use instructions this machine lacks.
template <class N>
struct Buffer {
    N* at;
    explicit Buffer(int64_t length) : at(static_cast<N*>(std::malloc(length * sizeof(N)))) {
        if (!at) std::abort();
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(at); }
};

inline float load(float x) { return x; }
inline float load(bfloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline void store(float* at, float x) { *at = x; }
inline void store(bfloat16* at, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    // To nearest, ties to even. A NaN stays one: its mantissa's top bit is set.
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40;
    at->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

// e^x in float32, within 2 units in the last place; written so that a loop of it becomes vector instructions.
inline float exponential(float x) {
    x = x < -87.33f ? -87.33f : (x > 88.72f ? 88.72f : x);
    float n = x * 1.44269504f;
    n = (n + 12582912.0f) - 12582912.0f;  // rounds to a whole number
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n in two factors, since n may be 128, which has no float of its own.
    int32_t whole = static_cast<int32_t>(n), half = whole >> 1;
    int32_t low_bits = (half + 127) << 23, high_bits = (whole - half + 127) << 23;
    float low, high;
    std::memcpy(&low, &low_bits, sizeof low);
    std::memcpy(&high, &high_bits, sizeof high);
    return p * low * high;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
inline float tangent(float x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

// ---- RMS norm -------------------------------------------------------------------------------------------------------------

template <class T>
void rms_norm(T* y, float* inverse, const T* x, const float* weight, int64_t rows, int64_t width, float epsilon) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T* in = x + row * width;
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < width; i++) square += load(in[i]) * load(in[i]);
        float scale = 1.0f / std::sqrt(square / width + epsilon);
        inverse[row] = scale;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) store(y + row * width + i, load(in[i]) * scale * weight[i]);
    }
}

// With x̂ = x·s: dx = s·(w·dy − x̂·mean(w·dy·x̂)), added to `also` where that is given.
template <class T>
void rms_norm_backward(T* dx, const T* dy, const T* x, const float* inverse, const float* weight, const T* also, int64_t rows,
                       int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *in = x + row * width, *by = dy + row * width;
        T* out = dx + row * width;
        float scale = inverse[row], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < width; i++) dot += load(by[i]) * weight[i] * load(in[i]);
        float along = dot * scale * scale / width;
        if (also) {
            const T* more = also + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                store(out + i, scale * (load(by[i]) * weight[i] - load(in[i]) * along) + load(more[i]));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) store(out + i, scale * (load(by[i]) * weight[i] - load(in[i]) * along));
        }
    }
}

// ---- Heads ----------------------------------------------------------------------------------------------------------------

// Where a pass's tokens lie: packed one row behind the other, and in attention's rectangle [rows, width].
struct Layout {
    const int64_t* starts;  // [rows + 1]: the packed index of each row's first token, and the end
    int64_t rows, width, heads, shared, head_dim;
};

// Rotates one head's vector, after its norm where it has one; `sign` −1 turns back.
inline void turn(float* out, const float* in, const float* cosine, const float* sine, float sign, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = in[i], b = in[i + half], c = cosine[i], s = sign * sine[i];
        out[i] = a * c - b * s;
        out[i + half] = b * c + a * s;
    }
}

template <class T>
inline void head_forward(T* out, const T* in, const float* norm, const float* cosine, const float* sine, int64_t head_dim,
                         float epsilon, float* from, float* to) {
    float square = 0;
    for (int64_t i = 0; i < head_dim; i++) from[i] = load(in[i]);
    if (norm) {
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < head_dim; i++) square += from[i] * from[i];
        float scale = 1.0f / std::sqrt(square / head_dim + epsilon);
        for (int64_t i = 0; i < head_dim; i++) from[i] *= scale * norm[i];
    }
    turn(to, from, cosine, sine, 1.0f, head_dim / 2);
    for (int64_t i = 0; i < head_dim; i++) store(out + i, to[i]);
}

template <class T>
inline void head_backward(T* out, const T* in, const float* norm, const float* by, const float* cosine, const float* sine,
                          int64_t head_dim, float epsilon, float* to) {
    turn(to, by, cosine, sine, -1.0f, head_dim / 2);
    if (norm) {
        float square = 0, dot = 0;
#pragma omp simd reduction(+ : square, dot)
        for (int64_t i = 0; i < head_dim; i++) {
            square += load(in[i]) * load(in[i]);
            dot += to[i] * norm[i] * load(in[i]);
        }
        float scale = 1.0f / std::sqrt(square / head_dim + epsilon), along = dot * scale * scale / head_dim;
        for (int64_t i = 0; i < head_dim; i++) to[i] = scale * (to[i] * norm[i] - load(in[i]) * along);
    }
    for (int64_t i = 0; i < head_dim; i++) store(out + i, to[i]);
}

// qkv [tokens, (heads + 2·shared)·head_dim] → q [rows, shared, width, group, head_dim], k and v [rows, shared, width, head_dim].
template <class T>
void split_heads(T* q, T* k, T* v, const T* qkv, const float* cosine, const float* sine, const float* q_norm,
                 const float* k_norm, float epsilon, Layout at) {
    int64_t d = at.head_dim, group = at.heads / at.shared, stride = (at.heads + 2 * at.shared) * d;
#pragma omp parallel
    {
        Buffer<float> from(d), to(d);
#pragma omp for schedule(static) collapse(2)
        for (int64_t row = 0; row < at.rows; row++)
            for (int64_t time = 0; time < at.width; time++) {
                bool padded = time >= at.starts[row + 1] - at.starts[row];
                const T* in = qkv + (at.starts[row] + time) * stride;
                const float *c = cosine + time * (d / 2), *s = sine + time * (d / 2);
                for (int64_t head = 0; head < at.shared; head++) {
                    int64_t place = (row * at.shared + head) * at.width + time;
                    if (padded) {
                        std::memset(static_cast<void*>(q + place * group * d), 0, group * d * sizeof(T));
                        std::memset(static_cast<void*>(k + place * d), 0, d * sizeof(T));
                        std::memset(static_cast<void*>(v + place * d), 0, d * sizeof(T));
                        continue;
                    }
                    for (int64_t g = 0; g < group; g++)
                        head_forward(q + (place * group + g) * d, in + (head * group + g) * d, q_norm, c, s, d, epsilon,
                                     from.at, to.at);
                    head_forward(k + place * d, in + (at.heads + head) * d, k_norm, c, s, d, epsilon, from.at, to.at);
                    std::memcpy(static_cast<void*>(v + place * d), in + (at.heads + at.shared + head) * d, d * sizeof(T));
                }
            }
    }
}

template <class T>
void split_heads_backward(T* dqkv, const T* dq, const T* dk, const T* dv, const T* qkv, const float* cosine,
                          const float* sine, const float* q_norm, const float* k_norm, float epsilon, Layout at) {
    int64_t d = at.head_dim, group = at.heads / at.shared, stride = (at.heads + 2 * at.shared) * d;
#pragma omp parallel
    {
        Buffer<float> by(d), to(d);
#pragma omp for schedule(static) collapse(2)
        for (int64_t row = 0; row < at.rows; row++)
            for (int64_t time = 0; time < at.width; time++) {
                if (time >= at.starts[row + 1] - at.starts[row]) continue;
                T* out = dqkv + (at.starts[row] + time) * stride;
                const T* in = qkv ? qkv + (at.starts[row] + time) * stride : nullptr;
                const float *c = cosine + time * (d / 2), *s = sine + time * (d / 2);
                for (int64_t head = 0; head < at.shared; head++) {
                    int64_t place = (row * at.shared + head) * at.width + time;
                    for (int64_t g = 0; g < group; g++) {
                        int64_t column = (head * group + g) * d;
                        for (int64_t i = 0; i < d; i++) by.at[i] = load(dq[(place * group + g) * d + i]);
                        head_backward(out + column, in + (in ? column : 0), q_norm, by.at, c, s, d, epsilon, to.at);
                    }
                    int64_t column = (at.heads + head) * d;
                    for (int64_t i = 0; i < d; i++) by.at[i] = load(dk[place * d + i]);
                    head_backward(out + column, in + (in ? column : 0), k_norm, by.at, c, s, d, epsilon, to.at);
                    std::memcpy(static_cast<void*>(out + (at.heads + at.shared + head) * d), dv + place * d, d * sizeof(T));
                }
            }
    }
}

// Attention's output [rows, shared, width, group, head_dim] ↔ [tokens, heads·head_dim].
template <class T>
void join_heads(T* packed, T* heads, bool back, Layout at) {
    int64_t d = at.head_dim, group = at.heads / at.shared;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t row = 0; row < at.rows; row++)
        for (int64_t time = 0; time < at.width; time++) {
            bool padded = time >= at.starts[row + 1] - at.starts[row];
            for (int64_t head = 0; head < at.shared; head++) {
                T* inside = heads + ((row * at.shared + head) * at.width + time) * group * d;
                T* outside = packed + (at.starts[row] + time) * at.heads * d + head * group * d;
                size_t bytes = group * d * sizeof(T);
                if (padded && back) std::memset(static_cast<void*>(inside), 0, bytes);
                if (padded) continue;
                if (back)
                    std::memcpy(static_cast<void*>(inside), outside, bytes);
                else
                    std::memcpy(static_cast<void*>(outside), inside, bytes);
            }
        }
}

// ---- Attention's softmax --------------------------------------------------------------------------------------------------

// A block of scores [rows·shared, queries·group, keys]: query `first_query + i` sees keys up to itself, `window` of them at
// most. Keys are counted from `first_key`.
struct Block {
    const int64_t* starts;  // [rows + 1], as in Layout
    int64_t rows, shared, group, queries, keys, first_query, first_key, window;
    float scale;
};

// Softmax of one row of scores into `p`; returns the range of keys it sees.
inline void softmax_row(float* p, const float* score, const Block& at, int64_t row, int64_t query, int64_t* from, int64_t* to) {
    int64_t time = at.first_query + query, length = at.starts[row + 1] - at.starts[row];
    int64_t begin = time - at.window + 1 - at.first_key, end = time + 1 - at.first_key;
    begin = begin < 0 ? 0 : begin;
    end = end > at.keys ? at.keys : end;
    if (time >= length || end <= begin) {
        *from = *to = 0;
        return;
    }
    *from = begin;
    *to = end;
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = begin; j < end; j++) {
        p[j] = score[j] * at.scale;
        most = most > p[j] ? most : p[j];
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; j++) {
        p[j] = exponential(p[j] - most);
        sum += p[j];
    }
    float inverse = 1.0f / sum;
#pragma omp simd
    for (int64_t j = begin; j < end; j++) p[j] *= inverse;
}

template <class T>
void fill_row(T* out, const float* p, int64_t from, int64_t to, int64_t keys) {
    for (int64_t j = 0; j < from; j++) store(out + j, 0.0f);
#pragma omp simd
    for (int64_t j = from; j < to; j++) store(out + j, p[j]);
    for (int64_t j = to; j < keys; j++) store(out + j, 0.0f);
}

template <class T>
void attention_softmax(T* probability, const float* score, Block at) {
    int64_t lines = at.queries * at.group;
#pragma omp parallel
    {
        Buffer<float> p(at.keys);
#pragma omp for schedule(static) collapse(2)
        for (int64_t head = 0; head < at.rows * at.shared; head++)
            for (int64_t line = 0; line < lines; line++) {
                int64_t offset = (head * lines + line) * at.keys, from, to;
                softmax_row(p.at, score + offset, at, head / at.shared, line / at.group, &from, &to);
                fill_row(probability + offset, p.at, from, to, at.keys);
            }
    }
}

// From the scores and the derivative by the probabilities: the probabilities again, and in place of `derivative` the one by
// the scores, p·(dp − Σ p·dp)·scale.
template <class T>
void attention_softmax_backward(T* probability, T* derivative, const float* score, Block at) {
    int64_t lines = at.queries * at.group;
#pragma omp parallel
    {
        Buffer<float> p(at.keys), d(at.keys);
#pragma omp for schedule(static) collapse(2)
        for (int64_t head = 0; head < at.rows * at.shared; head++)
            for (int64_t line = 0; line < lines; line++) {
                int64_t offset = (head * lines + line) * at.keys, from, to;
                softmax_row(p.at, score + offset, at, head / at.shared, line / at.group, &from, &to);
                T* by = derivative + offset;
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int64_t j = from; j < to; j++) dot += p.at[j] * load(by[j]);
#pragma omp simd
                for (int64_t j = from; j < to; j++) d.at[j] = p.at[j] * (load(by[j]) - dot) * at.scale;
                fill_row(by, d.at, from, to, at.keys);
                fill_row(probability + offset, p.at, from, to, at.keys);
            }
    }
}

// ---- The feed-forward's gate ----------------------------------------------------------------------------------------------

const float ROOT_2_OVER_PI = 0.7978845608f, CUBIC = 0.044715f;

struct Silu {
    static inline void both(float x, float* value, float* slope) {
        float s = sigmoid(x);
        *value = x * s;
        *slope = s * (1.0f + x * (1.0f - s));
    }
};

struct GeluTanh {
    static inline void both(float x, float* value, float* slope) {
        float t = tangent(ROOT_2_OVER_PI * (x + CUBIC * x * x * x));
        *value = 0.5f * x * (1.0f + t);
        *slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * ROOT_2_OVER_PI * (1.0f + 3.0f * CUBIC * x * x);
    }
};

// gate_up [tokens, 2·inner] → f(gate)·up, [tokens, inner].
template <class T, class F>
void gated_of(T* out, const T* gate_up, int64_t rows, int64_t inner) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * inner, *up = gate + inner;
#pragma omp simd
        for (int64_t i = 0; i < inner; i++) {
            float value, slope;
            F::both(load(gate[i]), &value, &slope);
            store(out + row * inner + i, value * load(up[i]));
        }
    }
}

// Writes the derivative by gate_up, and f(gate)·up again, which the next map's adapter needs.
template <class T, class F>
void gated_backward_of(T* by_gate_up, T* out, const T* gate_up, const T* by_out, int64_t rows, int64_t inner) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * inner, *up = gate + inner, *by = by_out + row * inner;
        T *by_gate = by_gate_up + row * 2 * inner, *by_up = by_gate + inner, *product = out + row * inner;
#pragma omp simd
        for (int64_t i = 0; i < inner; i++) {
            float value, slope, u = load(up[i]), d = load(by[i]);
            F::both(load(gate[i]), &value, &slope);
            store(by_gate + i, d * u * slope);
            store(by_up + i, d * value);
            store(product + i, value * u);
        }
    }
}

template <class T>
void gated(T* out, const T* gate_up, int64_t rows, int64_t inner, bool gelu) {
    gelu ? gated_of<T, GeluTanh>(out, gate_up, rows, inner) : gated_of<T, Silu>(out, gate_up, rows, inner);
}

template <class T>
void gated_backward(T* by_gate_up, T* out, const T* gate_up, const T* by_out, int64_t rows, int64_t inner, bool gelu) {
    gelu ? gated_backward_of<T, GeluTanh>(by_gate_up, out, gate_up, by_out, rows, inner)
         : gated_backward_of<T, Silu>(by_gate_up, out, gate_up, by_out, rows, inner);
}

// ---- Losses ---------------------------------------------------------------------------------------------------------------

inline float capped(float logit, float cap) { return cap > 0 ? cap * tangent(logit / cap) : logit; }
// d capped / d logit, of the capped value.
inline float cap_slope(float value, float cap) { return cap > 0 ? 1.0f - (value / cap) * (value / cap) : 1.0f; }

// Of a row of logits: the largest, Σ e^(logit − largest), and which it is. Probabilities are e^(logit − largest) over that sum,
// never by way of its logarithm, which would cost them digits.
struct Total {
    float most, sum;
    int64_t largest;
};

template <class T>
inline Total total(const T* logits, int64_t vocabulary, float cap) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < vocabulary; i++) most = most > load(logits[i]) ? most : load(logits[i]);
    int64_t largest = 0;
    while (largest < vocabulary - 1 && load(logits[largest]) < most) largest++;
    most = capped(most, cap);
    // Short sums in float32, their sum in float64.
    const int64_t block = 1024;
    double sum = 0;
    for (int64_t start = 0; start < vocabulary; start += block) {
        int64_t end = start + block < vocabulary ? start + block : vocabulary;
        float part = 0;
        if (cap > 0) {
#pragma omp simd reduction(+ : part)
            for (int64_t i = start; i < end; i++) part += exponential(capped(load(logits[i]), cap) - most);
        } else {
#pragma omp simd reduction(+ : part)
            for (int64_t i = start; i < end; i++) part += exponential(load(logits[i]) - most);
        }
        sum += part;
    }
    return {most, static_cast<float>(sum), largest};
}

// −log p(target), whether the target ranks first, and in place of the logits softmax − onehot.
template <class T>
void cross_entropy(T* logits, const int64_t* targets, float* loss, int64_t* correct, int64_t rows, int64_t vocabulary, float cap) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T* line = logits + row * vocabulary;
        Total of = total(line, vocabulary, cap);
        int64_t target = targets[row];
        float at_target = capped(load(line[target]), cap), inverse = 1.0f / of.sum;
        loss[row] = (of.most - at_target) + std::log(of.sum);
        correct[row] = of.largest == target;
        if (cap > 0) {
#pragma omp simd
            for (int64_t i = 0; i < vocabulary; i++) {
                float value = capped(load(line[i]), cap);
                store(line + i, exponential(value - of.most) * inverse * cap_slope(value, cap));
            }
        } else {
#pragma omp simd
            for (int64_t i = 0; i < vocabulary; i++) store(line + i, exponential(load(line[i]) - of.most) * inverse);
        }
        store(line + target, (exponential(at_target - of.most) * inverse - 1.0f) * cap_slope(at_target, cap));
    }
}

// Σ p_base·(log p_base − log p), and in place of the logits p − p_base.
template <class T>
void divergence(T* logits, const T* base, float* loss, int64_t rows, int64_t vocabulary, float cap) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T* line = logits + row * vocabulary;
        const T* other = base + row * vocabulary;
        Total of = total(line, vocabulary, cap), of_base = total(other, vocabulary, cap);
        float inverse = 1.0f / of.sum, base_inverse = 1.0f / of_base.sum, log_ratio = std::log(of.sum / of_base.sum);
        const int64_t block = 1024;
        double sum = 0;
        for (int64_t start = 0; start < vocabulary; start += block) {
            int64_t end = start + block < vocabulary ? start + block : vocabulary;
            float part = 0;
            if (cap > 0) {
#pragma omp simd reduction(+ : part)
                for (int64_t i = start; i < end; i++) {
                    float value = capped(load(line[i]), cap), at = value - of.most;
                    float base_at = capped(load(other[i]), cap) - of_base.most;
                    float p = exponential(at) * inverse, p_base = exponential(base_at) * base_inverse;
                    part += p_base * (base_at - at + log_ratio);
                    store(line + i, (p - p_base) * cap_slope(value, cap));
                }
            } else {
#pragma omp simd reduction(+ : part)
                for (int64_t i = start; i < end; i++) {
                    float at = load(line[i]) - of.most, base_at = load(other[i]) - of_base.most;
                    float p = exponential(at) * inverse, p_base = exponential(base_at) * base_inverse;
                    part += p_base * (base_at - at + log_ratio);
                    store(line + i, p - p_base);
                }
            }
            sum += part;
        }
        loss[row] = static_cast<float>(sum);
    }
}

// ---- Vectors --------------------------------------------------------------------------------------------------------------

// ⟨x, y⟩ in float64.
void inner_product(double* out, const float* x, const float* y, int64_t length) {
    double sum = 0;
    // Blocks of a fixed size, added in order: the same sum whatever the number of threads.
    const int64_t block = 1 << 14;
    int64_t blocks = (length + block - 1) / block;
    Buffer<double> sums(blocks);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t end = (b + 1) * block < length ? (b + 1) * block : length;
        double part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t i = b * block; i < end; i++) part += static_cast<double>(x[i]) * y[i];
        sums.at[b] = part;
    }
    for (int64_t b = 0; b < blocks; b++) sum += sums.at[b];
    *out = sum;
}

inline uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

// x/(1 − share) or 0: what an element becomes depends on the key, its token's place and its column alone, so a backward pass
// can ask again, and how a step is cut into passes makes no difference.
template <class T>
void dropout(T* out, const T* x, uint64_t key, const int64_t* places, int64_t rows, int64_t width, float share) {
    uint32_t bound = static_cast<uint32_t>(static_cast<double>(share) * 4294967295.0);
    float scale = 1.0f / (1.0f - share);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        uint64_t place = static_cast<uint64_t>(places[row]);
        uint32_t line = static_cast<uint32_t>(key);
        for (uint64_t word : {key >> 32, place & 0xffffffffu, place >> 32}) line = mix(line ^ static_cast<uint32_t>(word));
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float kept = mix(line + static_cast<uint32_t>(i) * 0x9e3779b9u) >= bound ? scale : 0.0f;
            store(out + row * width + i, load(x[row * width + i]) * kept);
        }
    }
}

// ---- Sums of outer products ---------------------------------------------------------------------------------------------------

typedef float Lanes __attribute__((vector_size(64), aligned(4)));
const int64_t LANES = 16, RANKS = 8, PAIR = 2 * LANES, DEPTH = 64;

template <class T>
inline Lanes load_lanes(const T* at) {
    Lanes x;
    for (int64_t i = 0; i < LANES; i++) x[i] = load(at[i]);
    return x;
}
template <>
inline Lanes load_lanes<float>(const float* at) {
    Lanes x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

// Eight rows of the sum over 32 columns, in registers.
template <class T>
__attribute__((optimize("fp-contract=fast"))) inline void outer_block(float* out, int64_t out_stride, const T* low, int64_t low_stride,
                                                                      const T* wide, int64_t wide_stride, int64_t depth) {
    Lanes sum[RANKS][2];
#pragma GCC unroll 8
    for (int64_t r = 0; r < RANKS; r++) {
        sum[r][0] = load_lanes(out + r * out_stride);
        sum[r][1] = load_lanes(out + r * out_stride + LANES);
    }
    for (int64_t t = 0; t < depth; t++) {
        Lanes first = load_lanes(wide + t * wide_stride), second = load_lanes(wide + t * wide_stride + LANES);
#pragma GCC unroll 8
        for (int64_t r = 0; r < RANKS; r++) {
            float by = load(low[t * low_stride + r]);
            sum[r][0] += first * by;
            sum[r][1] += second * by;
        }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < RANKS; r++) {
        std::memcpy(out + r * out_stride, &sum[r][0], sizeof(Lanes));
        std::memcpy(out + r * out_stride + LANES, &sum[r][1], sizeof(Lanes));
    }
}

// out [rank, width] += Σ over tokens of low[t] ⊗ wide[t], float32 whatever the kind: low [tokens, rank], wide [tokens, width],
// both with rows of their own stride. A product this flat (LoRA's factors, attention's keys) leaves a general one packing more
// than it computes.
template <class T>
void outer_sum(float* out, const T* low, int64_t low_stride, const T* wide, int64_t wide_stride, int64_t tokens, int64_t rank,
               int64_t width) {
    const int64_t tall = 64;  // rows of the result that a thread takes at a time
    int64_t blocks = (width + PAIR - 1) / PAIR, stacks = (rank + tall - 1) / tall;
#pragma omp parallel
    {
        // Rows of `low` far longer than what is read of them fall on the same lines of the cache, so they are copied together.
        bool packs = stacks > 1;
        Buffer<T> packed(packs ? DEPTH * tall : 1);
#pragma omp for schedule(static) collapse(2)
        for (int64_t stack = 0; stack < stacks; stack++)
            for (int64_t block = 0; block < blocks; block++) {
                int64_t first = block * PAIR, columns = width - first < PAIR ? width - first : PAIR;
                int64_t top = stack * tall, ranks = rank - top < tall ? rank - top : tall;
                float* sum = out + top * width + first;
                for (int64_t start = 0; start < tokens; start += DEPTH) {
                    int64_t depth = tokens - start < DEPTH ? tokens - start : DEPTH, stride = packs ? tall : low_stride;
                    const T *l = low + start * low_stride + top, *w = wide + start * wide_stride + first;
                    if (packs) {
                        for (int64_t t = 0; t < depth; t++) std::memcpy(static_cast<void*>(packed.at + t * tall), l + t * low_stride, ranks * sizeof(T));
                        l = packed.at;
                    }
                    int64_t r = 0;
                    if (columns == PAIR)
                        for (; r + RANKS <= ranks; r += RANKS) outer_block(sum + r * width, width, l + r, stride, w, wide_stride, depth);
                    for (; r < ranks; r++)
                        for (int64_t t = 0; t < depth; t++) {
                            float by = load(l[t * stride + r]);
#pragma omp simd
                            for (int64_t i = 0; i < columns; i++) sum[r * width + i] += by * load(w[t * wide_stride + i]);
                        }
                }
            }
    }
}

template <class T>
struct Of {
    decltype(&rms_norm<T>) rms_norm = ::rms_norm<T>;
    decltype(&rms_norm_backward<T>) rms_norm_backward = ::rms_norm_backward<T>;
    decltype(&split_heads<T>) split_heads = ::split_heads<T>;
    decltype(&split_heads_backward<T>) split_heads_backward = ::split_heads_backward<T>;
    decltype(&join_heads<T>) join_heads = ::join_heads<T>;
    decltype(&attention_softmax<T>) attention_softmax = ::attention_softmax<T>;
    decltype(&attention_softmax_backward<T>) attention_softmax_backward = ::attention_softmax_backward<T>;
    decltype(&gated<T>) gated = ::gated<T>;
    decltype(&gated_backward<T>) gated_backward = ::gated_backward<T>;
    decltype(&cross_entropy<T>) cross_entropy = ::cross_entropy<T>;
    decltype(&divergence<T>) divergence = ::divergence<T>;
    decltype(&dropout<T>) dropout = ::dropout<T>;
    decltype(&outer_sum<T>) outer_sum = ::outer_sum<T>;
};

struct Table {
    Of<float> of_float;
    Of<bfloat16> of_bfloat16;
    decltype(&inner_product) inner = inner_product;
};

const Table TABLE;

}  // namespace

// `cpu.rs` has the same layout.
extern "C" const void* HOLDFAST_KERNELS() { return &TABLE; }
