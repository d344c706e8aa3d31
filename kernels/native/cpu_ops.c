/* Small float32 operators of a decoder block, for the CPU.
 *
 * A decode step on a CPU runs a hundred operators on a few kilobytes each, where every ATen call
 * costs more than its arithmetic. These do one operator in one call. Rows are shared out over the
 * team's threads (team.c) only where there are enough of them to pay for it.
 *
 * Strides are in elements. All tensors are float32 unless said otherwise.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_math.h"
#include "team.h"

#define INLINE static inline __attribute__((always_inline))

typedef void (*Range)(const void *args, int64_t begin, int64_t end);

typedef struct {
    Range range;
    const void *args;
    int64_t count, pieces;
} Split;

static void run_piece(const void *data, int64_t piece)
{
    const Split *s = data;
    s->range(s->args, piece_begin(piece, s->pieces, s->count),
             piece_begin(piece + 1, s->pieces, s->count));
}

/* Run range over [0, count), in pieces of at least `grain` items. */
static void run(TeamRun team, int threads, int64_t count, int64_t grain, Range range,
                const void *args)
{
    if (count <= grain) {
        range(args, 0, count);
        return;
    }
    Split split = {range, args, count, pieces_of((count + grain - 1) / grain, threads)};
    team(run_piece, &split, split.pieces, threads);
}

/* ---- RMS norm: y = x / sqrt(mean(x^2) + eps) * weight ----------------------------------------- */

INLINE float norm_factor(const float *x, int64_t dim, float eps)
{
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < dim; i++)
        squares += x[i] * x[i];
    return 1.0f / sqrtf(squares / (float)dim + eps);
}

typedef struct {
    const float *x, *weight;
    float *y;
    int64_t dim, stride;
    float eps;
    int add;
} Norm;

static void norm_rows(const void *data, int64_t begin, int64_t end)
{
    const Norm *a = data;
    for (int64_t row = begin; row < end; row++) {
        const float *x = a->x + row * a->stride;
        float *y = a->y + row * a->dim;
        const float factor = norm_factor(x, a->dim, a->eps);
        if (a->add)
#pragma omp simd
            for (int64_t i = 0; i < a->dim; i++)
                y[i] += x[i] * factor * a->weight[i];
        else
#pragma omp simd
            for (int64_t i = 0; i < a->dim; i++)
                y[i] = x[i] * factor * a->weight[i];
    }
}

/* y [rows, dim], dense, is the norm of x's rows, or has it added. */
void squall_rms_norm(TeamRun team, int threads, const float *x, const float *weight, float *y,
                     int64_t rows, int64_t dim, int64_t stride, float eps, int add)
{
    Norm args = {x, weight, y, dim, stride, eps, add};
    run(team, threads, rows, 1 + 32768 / dim, norm_rows, &args);
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
            out[i] = silu(gate[i]) * up[i];
    }
}

static void gelu_tanh_rows(const void *data, int64_t begin, int64_t end)
{
    const Gate *a = data;
    for (int64_t row = begin; row < end; row++) {
        const float *gate = a->x + row * 2 * a->width, *up = gate + a->width;
        float *out = a->out + row * a->width;
#pragma omp simd
        for (int64_t i = 0; i < a->width; i++)
            out[i] = gelu_tanh(gate[i]) * up[i];
    }
}

void squall_gated(TeamRun team, int threads, int gelu, const float *x, float *out, int64_t rows,
                  int64_t width)
{
    Gate args = {x, out, width};
    run(team, threads, rows, 1 + 8192 / width, gelu ? gelu_tanh_rows : silu_rows, &args);
}

/* ---- Head norms, rotary embedding and the write to the cache ---------------------------------- */

typedef struct {
    const float *qkv, *q_norm, *k_norm, *table;
    const void *positions, *slots;
    float *k_cache, *v_cache, *q;
    int64_t heads, kv_heads, dim, rotary, stride;
    float eps;
    int wide_positions, wide_slots; /* int64, else int32 */
} RopeStore;

INLINE int64_t index_at(const void *array, int wide, int64_t i)
{
    return wide ? ((const int64_t *)array)[i] : ((const int32_t *)array)[i];
}

/* `heads` heads of one token: norm, then rotate the first `rotary` elements, half-split. */
static void turn_heads(const RopeStore *a, const float *x, const float *norm, const float *cosine,
                       float *out, int64_t heads)
{
    const int64_t dim = a->dim, half = a->rotary / 2;
    const float *sine = cosine + half;
    for (int64_t h = 0; h < heads; h++, x += dim, out += dim) {
        const float *from = x;
        if (norm) {
            const float factor = norm_factor(x, dim, a->eps);
#pragma omp simd
            for (int64_t i = 0; i < dim; i++)
                out[i] = x[i] * factor * norm[i];
            from = out;
        } else {
            memcpy(out + a->rotary, x + a->rotary, (size_t)(dim - a->rotary) * sizeof *out);
        }
#pragma omp simd
        for (int64_t i = 0; i < half; i++) {
            float low = from[i], high = from[i + half];
            out[i] = low * cosine[i] - high * sine[i];
            out[i + half] = high * cosine[i] + low * sine[i];
        }
    }
}

static void rope_store_tokens(const void *data, int64_t begin, int64_t end)
{
    const RopeStore *a = data;
    const int64_t q_size = a->heads * a->dim, kv_size = a->kv_heads * a->dim;
    for (int64_t t = begin; t < end; t++) {
        const float *q = a->qkv + t * a->stride, *k = q + q_size, *v = k + kv_size;
        const float *cosine = a->table + index_at(a->positions, a->wide_positions, t) * a->rotary;
        const int64_t slot = index_at(a->slots, a->wide_slots, t);
        turn_heads(a, q, a->q_norm, cosine, a->q + t * q_size, a->heads);
        if (slot < 0)
            continue;
        turn_heads(a, k, a->k_norm, cosine, a->k_cache + slot * kv_size, a->kv_heads);
        memcpy(a->v_cache + slot * kv_size, v, (size_t)kv_size * sizeof *v);
    }
}

/* qkv [tokens, (heads + 2 kv_heads) dim] by its row stride; norms [dim] or null; table
 * [positions, rotary]: cosines, then sines; caches [slots, kv_heads, dim]; q [tokens, heads, dim].
 * A negative slot stores nothing. */
void squall_rope_store(TeamRun team, int threads, const float *qkv, const float *q_norm,
                       const float *k_norm, float eps, const void *positions, int wide_positions,
                       const float *table, float *k_cache, float *v_cache, const void *slots,
                       int wide_slots, float *q, int64_t tokens, int64_t heads, int64_t kv_heads,
                       int64_t dim, int64_t rotary, int64_t stride)
{
    RopeStore args = {qkv, q_norm, k_norm, table, positions, slots, k_cache, v_cache, q, heads,
                      kv_heads, dim, rotary, stride, eps, wide_positions, wide_slots};
    run(team, threads, tokens, 1 + 16384 / (heads * dim), rope_store_tokens, &args);
}

/* ---- Decode attention: one query token a sequence over its cache blocks ----------------------- */

typedef struct {
    const float *q, *k_cache, *v_cache, *sinks;
    const int32_t *tables, *contexts;
    float *out, *scores;
    int64_t heads, kv_heads, dim, block_size, table_stride, token_stride, head_stride, room;
    int64_t window;
    float scale, softcap;
} Decode;

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

/* Rows of a cache that follow each other: of one block, for one kv head. */
typedef struct {
    const float *row;
    int64_t count;
} Span;

/* The rows from `at` on, up to the end of their block or to `end`. */
INLINE Span span_at(const Decode *a, const float *cache, const int32_t *table, int64_t kv,
                    int64_t at, int64_t end)
{
    const int64_t size = a->block_size, block = at / size, offset = at - block * size;
    const int64_t count = size - offset < end - at ? size - offset : end - at;
    const int64_t row = (int64_t)table[block] * size + offset;
    return (Span){cache + (row * a->kv_heads + kv) * a->dim, count};
}

/* scores[j] = scale * q . key first + j. `dim` is a constant where inlined. */
INLINE void score_keys(const Decode *a, const int32_t *table, const float *q, int64_t kv,
                       int64_t first, int64_t end, float *scores, int64_t dim)
{
    for (int64_t at = first; at < end;) {
        Span span = span_at(a, a->k_cache, table, kv, at, end);
        const float *key = span.row;
        at += span.count;
        for (int64_t j = 0; j < span.count; j++, key += a->kv_heads * dim) {
            Vec low = {0}, high = {0};
            int64_t i = 0;
            for (; i + 2 * WIDE <= dim; i += 2 * WIDE) {
                low += load(q + i) * load(key + i);
                high += load(q + i + WIDE) * load(key + i + WIDE);
            }
            float score = total(low + high);
            for (; i < dim; i++)
                score += q[i] * key[i];
            *scores++ = score * a->scale;
        }
    }
}

/* out = sum over j of weights[j] * value first + j, 64 elements at a time in registers. */
INLINE void mix_values(const Decode *a, const int32_t *table, const float *weights, int64_t kv,
                       int64_t first, int64_t end, float *out, int64_t dim)
{
    int64_t i = 0;
    for (; i + 8 * WIDE <= dim; i += 8 * WIDE) {
        Vec sum[8] = {{0}};
        const float *weight = weights;
        for (int64_t at = first; at < end;) {
            Span span = span_at(a, a->v_cache, table, kv, at, end);
            const float *value = span.row + i;
            at += span.count;
            for (int64_t j = 0; j < span.count; j++, value += a->kv_heads * dim, weight++) {
#pragma GCC unroll 8
                for (int n = 0; n < 8; n++)
                    sum[n] += *weight * load(value + n * WIDE);
            }
        }
        memcpy(out + i, sum, sizeof sum);
    }
    for (; i < dim; i++) {
        float sum = 0.0f;
        const float *weight = weights;
        for (int64_t at = first; at < end;) {
            Span span = span_at(a, a->v_cache, table, kv, at, end);
            at += span.count;
            for (int64_t j = 0; j < span.count; j++)
                sum += *weight++ * span.row[j * a->kv_heads * dim + i];
        }
        out[i] = sum;
    }
}

/* Softmax of row[count] and, where given, of one more score that is no key's. */
static void softmax(float *row, int64_t count, float softcap, const float *sink)
{
    float top = sink ? *sink : -INFINITY, sum = 0.0f;
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
    if (sink)
        sum += exp_fast(*sink - top);
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
    score_keys(a, table, q, kv, first, context, scores, dim);
    softmax(scores, context - first, a->softcap, a->sinks ? a->sinks + head : NULL);
    mix_values(a, table, scores, kv, first, context, a->out + (s * a->heads + head) * dim, dim);
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
 * int32 [seqs, *], contexts int32 [seqs]; sinks [heads] or null; out dense. `longest` bounds the
 * contexts. Returns 0, or 1 when there is no memory for the scores. */
int squall_decode_attention(TeamRun team, int threads, const float *q, const float *k_cache,
                            const float *v_cache, const int32_t *tables, const int32_t *contexts,
                            const float *sinks, float *out, int64_t seqs, int64_t heads,
                            int64_t kv_heads, int64_t dim, int64_t block_size,
                            int64_t table_stride, int64_t token_stride, int64_t head_stride,
                            int64_t longest, int64_t window, float scale, float softcap)
{
    float *scores = malloc((size_t)(seqs * heads * longest) * sizeof(float));
    if (!scores)
        return 1;
    Decode args = {q, k_cache, v_cache, sinks, tables, contexts, out, scores, heads, kv_heads, dim,
                   block_size, table_stride, token_stride, head_stride, longest, window, scale,
                   softcap};
    int64_t work = 2 * dim * longest; /* multiplications of a head */
    run(team, threads, seqs * heads, 1 + 65536 / work, decode_heads, &args);
    free(scores);
    return 0;
}
