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

#include "cpu_attention.h"
#include "team.h"

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

/* ---- Decode attention (cpu_attention.h) -------------------------------------------------------- */

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
    /* Few kv heads would leave threads without work: then every query head is done alone. */
    const int64_t share = seqs * kv_heads >= 4 * threads ? heads / kv_heads : 1;
    Decode args = {q, k_cache, v_cache, sinks, tables, contexts, out, scores, heads, kv_heads, dim,
                   block_size, table_stride, token_stride, head_stride, longest, window, share,
                   scale, softcap};
    int64_t work = 2 * dim * longest * share; /* multiplications of a share */
    run(team, threads, seqs * heads / share, 1 + 65536 / work, decode_shares, &args);
    free(scores);
    return 0;
}
