/* Small float32 operators of a decoder block, for the CPU.
 *
 * A decode step on a CPU runs hundreds of operators on a few kilobytes each, where every ATen call
 * costs more than its arithmetic. These do one operator in one call. Rows are shared out over
 * OpenMP threads only where there are enough of them to pay for waking the threads; `parallel` is
 * the address of GOMP_parallel in torch's OpenMP runtime, or null.
 *
 * Strides are in elements. All tensors are float32 unless said otherwise.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef void (*parallel_fn)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
typedef void (*task_fn)(const void *args, int64_t begin, int64_t end);

typedef struct {
    task_fn task;
    const void *args;
    int64_t count, grain, next;
} Work;

static void drain(void *data)
{
    Work *work = data;
    for (;;) {
        int64_t begin = __atomic_fetch_add(&work->next, work->grain, __ATOMIC_RELAXED);
        if (begin >= work->count)
            return;
        int64_t end = begin + work->grain;
        work->task(work->args, begin, end < work->count ? end : work->count);
    }
}

/* Run task over [0, count) in pieces of `grain`, on up to `threads` threads. */
static void run(parallel_fn parallel, int threads, int64_t count, int64_t grain, task_fn task,
                const void *args)
{
    if (!parallel || threads < 2 || count <= grain) {
        task(args, 0, count);
        return;
    }
    Work work = {task, args, count, grain, 0};
    int64_t pieces = (count + grain - 1) / grain;
    parallel(drain, &work, pieces < threads ? (unsigned)pieces : (unsigned)threads, 0);
}

/* e^x to about 1e-7 relative: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2] (Cephes). */
static inline float exp_fast(float x)
{
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
    return p * power.f;
}

/* ---- RMS norm: out = x / sqrt(mean(x^2) + eps) * weight, over rows [outer, inner, dim] -------- */

typedef struct {
    const float *x, *residual, *weight;
    float *out, *sum;
    int64_t inner, dim, outer_stride, inner_stride;
    float eps;
} Norm;

static void norm_rows(const void *data, int64_t begin, int64_t end)
{
    const Norm *a = data;
    const int64_t dim = a->dim;
    for (int64_t row = begin; row < end; row++) {
        const float *x = a->x + row / a->inner * a->outer_stride + row % a->inner * a->inner_stride;
        float *out = a->out + row * dim;
        float squares = 0.0f;
        if (a->residual) {
            const float *residual = a->residual + row * dim;
            float *sum = a->sum + row * dim;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < dim; i++) {
                float value = x[i] + residual[i];
                sum[i] = value;
                squares += value * value;
            }
            x = sum;
        } else {
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < dim; i++)
                squares += x[i] * x[i];
        }
        const float factor = 1.0f / sqrtf(squares / (float)dim + a->eps);
#pragma omp simd
        for (int64_t i = 0; i < dim; i++)
            out[i] = x[i] * factor * a->weight[i];
    }
}

/* x [rows / inner, inner, dim] by its strides; residual, sum (both or neither) and out are dense. */
void squall_rms_norm(void *parallel, int threads, const float *x, const float *residual,
                     const float *weight, float *out, float *sum, int64_t rows, int64_t inner,
                     int64_t dim, int64_t outer_stride, int64_t inner_stride, float eps)
{
    Norm args = {x, residual, weight, out, sum, inner, dim, outer_stride, inner_stride, eps};
    run((parallel_fn)parallel, threads, rows, 1 + 32768 / dim, norm_rows, &args);
}

/* ---- Rope: rotate the first `rotary` elements of every head, half-split layout ---------------- */

typedef struct {
    const float *x, *table;
    const int64_t *positions;
    float *out;
    int64_t heads, dim, rotary, token_stride, head_stride;
} Rope;

static void rope_tokens(const void *data, int64_t begin, int64_t end)
{
    const Rope *a = data;
    const int64_t half = a->rotary / 2;
    for (int64_t t = begin; t < end; t++) {
        const float *cosine = a->table + a->positions[t] * a->rotary, *sine = cosine + half;
        for (int64_t h = 0; h < a->heads; h++) {
            const float *x = a->x + t * a->token_stride + h * a->head_stride;
            float *out = a->out + (t * a->heads + h) * a->dim;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float low = x[i], high = x[i + half];
                out[i] = low * cosine[i] - high * sine[i];
                out[i + half] = high * cosine[i] + low * sine[i];
            }
            memcpy(out + a->rotary, x + a->rotary, (size_t)(a->dim - a->rotary) * sizeof(float));
        }
    }
}

/* x [tokens, heads, dim] by its strides, positions int64 [tokens], table [P, rotary] with cos in
 * the first half of a row and sin in the second; out is dense. */
void squall_rope(void *parallel, int threads, const float *x, const int64_t *positions,
                 const float *table, float *out, int64_t tokens, int64_t heads, int64_t dim,
                 int64_t rotary, int64_t token_stride, int64_t head_stride)
{
    Rope args = {x, table, positions, out, heads, dim, rotary, token_stride, head_stride};
    run((parallel_fn)parallel, threads, tokens, 1 + 16384 / (heads * dim), rope_tokens, &args);
}

/* ---- Gated activations: out = act(gate) * up, x [rows, 2 * width] dense ----------------------- */

typedef struct {
    const float *x;
    float *out;
    int64_t width;
} Gate;

static void silu_rows(const void *data, int64_t begin, int64_t end)
{
    const Gate *a = data;
    for (int64_t row = begin; row < end; row++) {
        const float *gate = a->x + row * 2 * a->width, *up = gate + a->width;
        float *out = a->out + row * a->width;
#pragma omp simd
        for (int64_t i = 0; i < a->width; i++)
            out[i] = gate[i] / (1.0f + exp_fast(-gate[i])) * up[i];
    }
}

static void gelu_tanh_rows(const void *data, int64_t begin, int64_t end)
{
    const Gate *a = data;
    for (int64_t row = begin; row < end; row++) {
        const float *gate = a->x + row * 2 * a->width, *up = gate + a->width;
        float *out = a->out + row * a->width;
#pragma omp simd
        for (int64_t i = 0; i < a->width; i++) {
            float g = gate[i];
            float inner = 0.7978845608028654f * (g + 0.044715f * g * g * g);
            /* 0.5 (1 + tanh z) = 1 / (1 + e^-2z) */
            out[i] = g / (1.0f + exp_fast(-2.0f * inner)) * up[i];
        }
    }
}

void squall_gated(void *parallel, int threads, int gelu, const float *x, float *out, int64_t rows,
                  int64_t width)
{
    Gate args = {x, out, width};
    run((parallel_fn)parallel, threads, rows, 1 + 8192 / width, gelu ? gelu_tanh_rows : silu_rows,
        &args);
}

/* ---- KV store: token rows into cache slots; a negative slot is skipped ------------------------ */

void squall_store_kv(const float *k, const float *v, float *k_cache, float *v_cache,
                     const int64_t *slots, int64_t tokens, int64_t heads, int64_t dim,
                     int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride,
                     int64_t v_head_stride)
{
    const size_t bytes = (size_t)dim * sizeof(float);
    for (int64_t t = 0; t < tokens; t++) {
        if (slots[t] < 0)
            continue;
        for (int64_t h = 0; h < heads; h++) {
            int64_t to = (slots[t] * heads + h) * dim;
            memcpy(k_cache + to, k + t * k_token_stride + h * k_head_stride, bytes);
            memcpy(v_cache + to, v + t * v_token_stride + h * v_head_stride, bytes);
        }
    }
}

/* ---- Decode attention: one query token a sequence over its cache blocks ----------------------- */

typedef struct {
    const float *q, *k_cache, *v_cache;
    const int32_t *tables, *contexts;
    float *out, *scores;
    int64_t heads, kv_heads, dim, block_size, table_stride, token_stride, head_stride, room;
    int64_t window;
    float scale, softcap;
} Decode;

#define INLINE static inline __attribute__((always_inline))
#define WIDE 8 /* floats the compiler keeps in one vector register, or in two */
typedef float Vec __attribute__((vector_size(4 * WIDE)));

INLINE Vec load(const float *p)
{
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE float total(Vec v)
{
    return (v[0] + v[4]) + (v[1] + v[5]) + ((v[2] + v[6]) + (v[3] + v[7]));
}

static inline int64_t row_of(const Decode *a, const int32_t *table, int64_t at, int64_t kv)
{
    const int64_t size = a->block_size;
    return (((int64_t)table[at / size] * size + at % size) * a->kv_heads + kv) * a->dim;
}

/* scores[j] = scale * q . key j for the keys from `first` on. `dim` is a constant where inlined. */
INLINE void score_keys(const Decode *a, const int32_t *table, const float *q, int64_t kv,
                       int64_t first, int64_t count, float *scores, int64_t dim)
{
    for (int64_t j = 0; j < count; j++) {
        const float *key = a->k_cache + row_of(a, table, first + j, kv);
        Vec low = {0}, high = {0};
        int64_t i = 0;
        for (; i + 2 * WIDE <= dim; i += 2 * WIDE) {
            low += load(q + i) * load(key + i);
            high += load(q + i + WIDE) * load(key + i + WIDE);
        }
        float score = total(low + high);
        for (; i < dim; i++)
            score += q[i] * key[i];
        scores[j] = score * a->scale;
    }
}

/* out = sum over j of weights[j] * value j, 64 elements at a time in registers. */
INLINE void mix_values(const Decode *a, const int32_t *table, const float *weights, int64_t kv,
                       int64_t first, int64_t count, float *out, int64_t dim)
{
    int64_t i = 0;
    for (; i + 8 * WIDE <= dim; i += 8 * WIDE) {
        Vec sum[8] = {{0}};
        for (int64_t j = 0; j < count; j++) {
            const float *value = a->v_cache + row_of(a, table, first + j, kv) + i;
#pragma GCC unroll 8
            for (int n = 0; n < 8; n++)
                sum[n] += weights[j] * load(value + n * WIDE);
        }
        memcpy(out + i, sum, sizeof sum);
    }
    for (; i < dim; i++) {
        float sum = 0.0f;
        for (int64_t j = 0; j < count; j++)
            sum += weights[j] * a->v_cache[row_of(a, table, first + j, kv) + i];
        out[i] = sum;
    }
}

static void softmax(float *row, int64_t count, float softcap)
{
    float top = -INFINITY, sum = 0.0f;
    for (int64_t j = 0; j < count; j++) {
        if (softcap > 0.0f)
            row[j] = softcap * tanhf(row[j] / softcap);
        top = row[j] > top ? row[j] : top;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) {
        row[j] = exp_fast(row[j] - top);
        sum += row[j];
    }
    const float share = 1.0f / sum;
#pragma omp simd
    for (int64_t j = 0; j < count; j++)
        row[j] *= share;
}

/* One query head of one sequence: scores, softmax, weighted values. */
INLINE void decode_head(const Decode *a, int64_t s, int64_t head, float *scores, int64_t dim)
{
    const int64_t kv = head / (a->heads / a->kv_heads), context = a->contexts[s];
    const int64_t first = a->window && context > a->window ? context - a->window : 0;
    const int32_t *table = a->tables + s * a->table_stride;
    const float *q = a->q + s * a->token_stride + head * a->head_stride;
    score_keys(a, table, q, kv, first, context - first, scores, dim);
    softmax(scores, context - first, a->softcap);
    mix_values(a, table, scores, kv, first, context - first,
               a->out + (s * a->heads + head) * dim, dim);
}

static void decode_heads(const void *data, int64_t begin, int64_t end)
{
    const Decode *a = data;
    for (int64_t i = begin; i < end; i++) { /* each (sequence, head) has its own scores */
        float *scores = a->scores + i * a->room;
        const int64_t s = i / a->heads, head = i % a->heads;
        switch (a->dim) { /* the common sizes with their loops unrolled */
        case 64: decode_head(a, s, head, scores, 64); break;
        case 128: decode_head(a, s, head, scores, 128); break;
        case 256: decode_head(a, s, head, scores, 256); break;
        default: decode_head(a, s, head, scores, a->dim);
        }
    }
}

/* q [seqs, heads, dim] by its strides; caches [blocks, block_size, kv_heads, dim] dense; tables
 * int32 [seqs, *], contexts int32 [seqs], all at least 1; out dense. `longest` bounds the contexts.
 * Returns 0, or 1 when there is no memory for the scores. */
int squall_decode_attention(void *parallel, int threads, const float *q, const float *k_cache,
                            const float *v_cache, const int32_t *tables, const int32_t *contexts,
                            float *out, int64_t seqs, int64_t heads, int64_t kv_heads, int64_t dim,
                            int64_t block_size, int64_t table_stride, int64_t token_stride,
                            int64_t head_stride, int64_t longest, int64_t window, float scale,
                            float softcap)
{
    float *scores = malloc((size_t)(seqs * heads * longest) * sizeof(float));
    if (!scores)
        return 1;
    Decode args = {q, k_cache, v_cache, tables, contexts, out, scores, heads, kv_heads, dim,
                   block_size, table_stride, token_stride, head_stride, longest, window, scale,
                   softcap};
    int64_t work = 2 * dim * longest; /* multiplications of a head */
    run((parallel_fn)parallel, threads, seqs * heads, 1 + 524288 / work, decode_heads, &args);
    free(scores);
    return 0;
}
