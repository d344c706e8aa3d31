/* Decode attention on the CPU: one query token a sequence over its cache blocks.
 *
 * The query heads of a kv head read the same keys and values. As many as the registers hold are
 * done together, so that a row of the cache is loaded once for all of them; the sums of a head are
 * formed in the same order whichever heads are beside it. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu_math.h"

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *q, *k_cache, *v_cache, *sinks;
    const int32_t *tables, *contexts;
    float *out, *scores;
    int64_t heads, kv_heads, dim, block_size, table_stride, token_stride, head_stride, room;
    int64_t window; /* as attention/window.py says */
    int64_t share;  /* query heads of one kv head that a thread does */
    float scale, softcap;
} Decode;

#ifdef __AVX512F__
#define WIDE 16  /* floats in a vector register */
#define TOGETHER 4 /* query heads done together: 16 sums in 32 registers */
#define PER_QUARTER(f) f(0), f(4), f(8), f(12)
#define SWAP_HALVES 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7
#else
#define WIDE 8
#define TOGETHER 2 /* 8 sums in 16 registers */
#define PER_QUARTER(f) f(0), f(4)
#endif
#define EVEN(i) i, i + 2, i + WIDE, i + WIDE + 2 /* of four lanes of two vectors */
#define ODD(i) i + 1, i + 3, i + WIDE + 1, i + WIDE + 3
#define NEXT_QUARTER(i) (i + 4) % WIDE, (i + 5) % WIDE, (i + 6) % WIDE, (i + 7) % WIDE
#define KEYS 4 /* scored together */

typedef float Vec __attribute__((vector_size(4 * WIDE)));
typedef int32_t Lanes __attribute__((vector_size(4 * WIDE)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Lanes){__VA_ARGS__})
#endif

INLINE Vec load(const float *p)
{
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE Vec add_neighbours(Vec a, Vec b)
{
    return SHUFFLE(a, b, PER_QUARTER(EVEN)) + SHUFFLE(a, b, PER_QUARTER(ODD));
}

/* out[n] = the sum of v[n]'s lanes */
INLINE void totals(const Vec v[KEYS], float out[KEYS])
{
    Vec sum = add_neighbours(add_neighbours(v[0], v[1]), add_neighbours(v[2], v[3]));
#ifdef SWAP_HALVES
    sum += SHUFFLE(sum, sum, SWAP_HALVES);
#endif
    sum += SHUFFLE(sum, sum, PER_QUARTER(NEXT_QUARTER));
    memcpy(out, &sum, KEYS * sizeof *out);
}

/* Rows of a cache that follow each other: of one block, for one kv head. */
typedef struct {
    int64_t row, count; /* offset of the first in the cache, and how many */
} Span;

/* The rows from `at` on, up to the end of their block or to `end`. */
INLINE Span span_at(const Decode *a, const int32_t *table, int64_t kv, int64_t at, int64_t end)
{
    const int64_t size = a->block_size, block = at / size, offset = at - block * size;
    const int64_t count = size - offset < end - at ? size - offset : end - at;
    const int64_t row = (int64_t)table[block] * size + offset;
    return (Span){(row * a->kv_heads + kv) * a->dim, count};
}

/* Some query heads of one kv head of one sequence, whose cache rows are [first, end). */
typedef struct {
    const int32_t *table;
    const float *q;
    float *scores; /* [heads, room] */
    int64_t kv, first, end;
} Tile;

/* scores[h, n] = scale * q[h] . key[n] for KEYS keys, of which `count` are there. */
INLINE void score_some(const Decode *a, const float *q, const float *key, int64_t count,
                       float *scores, int heads, int64_t dim)
{
    const float *keys[KEYS];
    Vec sum[TOGETHER][KEYS];
    for (int n = 0; n < KEYS; n++)
        keys[n] = key + (n < count ? n : count - 1) * a->kv_heads * dim;
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
        for (int n = 0; n < KEYS; n++)
            sum[h][n] = (Vec){0};
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + WIDE <= dim; i += WIDE) {
        Vec row[KEYS];
        for (int n = 0; n < KEYS; n++)
            row[n] = load(keys[n] + i);
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            Vec query = load(q + h * a->head_stride + i);
            for (int n = 0; n < KEYS; n++)
                sum[h][n] += query * row[n];
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++) {
        float score[KEYS];
        totals(sum[h], score);
        for (int64_t rest = i; rest < dim; rest++)
            for (int n = 0; n < KEYS; n++)
                score[n] += q[h * a->head_stride + rest] * keys[n][rest];
        for (int n = 0; n < KEYS; n++)
            score[n] *= a->scale;
        memcpy(scores + h * a->room, score, (size_t)(count < KEYS ? count : KEYS) * sizeof *score);
    }
}

/* All scores of a tile. The keys of the next block and the values of this one are fetched on the
 * way: the rows of one kv head are not what the hardware's prefetcher looks for. */
INLINE void score_keys(const Decode *a, const Tile *t, int heads, int64_t dim)
{
    float *scores = t->scores;
    Span span = span_at(a, t->table, t->kv, t->first, t->end);
    for (int64_t at = t->first; at < t->end;) {
        at += span.count;
        const Span next = at < t->end ? span_at(a, t->table, t->kv, at, t->end) : span;
        for (int64_t j = 0; j < span.count; j += KEYS, scores += KEYS) {
            const int64_t left = span.count - j, offset = j * a->kv_heads * dim;
            for (int n = 0; n < KEYS; n++)
                for (int64_t i = 0; i < dim; i += 16) { /* cache lines */
                    const int64_t in_row = n * a->kv_heads * dim + offset + i;
                    __builtin_prefetch(a->k_cache + next.row + in_row, 0, 3);
                    __builtin_prefetch(a->v_cache + span.row + in_row, 0, 2);
                }
            score_some(a, t->q, a->k_cache + span.row + offset, left, scores, heads, dim);
            if (left < KEYS)
                scores -= KEYS - left;
        }
        span = next;
    }
}

/* out[h, 0 ... vectors * WIDE) = sum over j of scores[h, j] * value first + j, from `i` on. */
INLINE void mix_some(const Decode *a, const Tile *t, float *out, int heads, int64_t dim, int64_t i,
                     int vectors)
{
    Vec sum[TOGETHER][4];
    const float *weight = t->scores;
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
        for (int n = 0; n < vectors; n++)
            sum[h][n] = (Vec){0};
    for (int64_t at = t->first; at < t->end;) {
        const Span span = span_at(a, t->table, t->kv, at, t->end);
        const float *value = a->v_cache + span.row + i;
        at += span.count;
        for (int64_t j = 0; j < span.count; j++, value += a->kv_heads * dim, weight++) {
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++)
                for (int n = 0; n < vectors; n++)
                    sum[h][n] += weight[h * a->room] * load(value + n * WIDE);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
        for (int n = 0; n < vectors; n++)
            memcpy(out + h * dim + i + n * WIDE, &sum[h][n], sizeof(Vec));
}

INLINE void mix_values(const Decode *a, const Tile *t, float *out, int heads, int64_t dim)
{
    int64_t i = 0;
    for (; i + 4 * WIDE <= dim; i += 4 * WIDE)
        mix_some(a, t, out, heads, dim, i, 4);
    for (; i + WIDE <= dim; i += WIDE)
        mix_some(a, t, out, heads, dim, i, 1);
    for (; i < dim; i++)
        for (int h = 0; h < heads; h++) {
            const float *weight = t->scores + h * a->room;
            float sum = 0.0f;
            for (int64_t at = t->first; at < t->end;) {
                const Span span = span_at(a, t->table, t->kv, at, t->end);
                at += span.count;
                for (int64_t j = 0; j < span.count; j++)
                    sum += *weight++ * a->v_cache[span.row + j * a->kv_heads * dim + i];
            }
            out[h * dim + i] = sum;
        }
}

/* Softmax of row[count] and, where given, of one more score that is no key's. */
static void softmax(float *row, int64_t count, float softcap, const float *sink)
{
    float top = sink ? *sink : -INFINITY, sum = 0.0f;
    if (softcap > 0.0f)
        for (int64_t j = 0; j < count; j++)
            row[j] = softcap * tanhf(row[j] / softcap);
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < count; j++)
        top = row[j] > top ? row[j] : top;
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

/* The first key that the query at `position` sees. */
INLINE int64_t first_key(int64_t position, int64_t window)
{
    if (window < 0)
        return position - position % -window;
    return window && position >= window ? position - window + 1 : 0;
}

/* `heads` query heads, from `head` on, of one kv head of one sequence. Both numbers are constants
 * where inlined. */
INLINE void decode_tile(const Decode *a, int64_t s, int64_t head, int heads, int64_t dim)
{
    const int64_t context = a->contexts[s];
    const Tile tile = {
        .table = a->tables + s * a->table_stride,
        .q = a->q + s * a->token_stride + head * a->head_stride,
        .scores = a->scores + (s * a->heads + head) * a->room,
        .kv = head / (a->heads / a->kv_heads),
        .first = first_key(context - 1, a->window),
        .end = context,
    };
    score_keys(a, &tile, heads, dim);
    for (int h = 0; h < heads; h++)
        softmax(tile.scores + h * a->room, context - tile.first, a->softcap,
                a->sinks ? a->sinks + head + h : NULL);
    mix_values(a, &tile, a->out + (s * a->heads + head) * dim, heads, dim);
}

INLINE void decode_share(const Decode *a, int64_t s, int64_t head, int64_t dim)
{
    int64_t left = a->share;
    for (; left >= TOGETHER; left -= TOGETHER, head += TOGETHER)
        decode_tile(a, s, head, TOGETHER, dim);
#if TOGETHER > 2
    if (left == 3)
        decode_tile(a, s, head, 3, dim);
    if (left == 2)
        decode_tile(a, s, head, 2, dim);
#endif
    if (left == 1)
        decode_tile(a, s, head, 1, dim);
}

static void decode_shares(const void *data, int64_t begin, int64_t end)
{
    const Decode *a = data;
    const int64_t shares = a->heads / a->share;
    for (int64_t i = begin; i < end; i++) {
        const int64_t s = i / shares, head = i % shares * a->share;
        switch (a->dim) { /* the common sizes with their loops unrolled */
        case 64: decode_share(a, s, head, 64); break;
        case 128: decode_share(a, s, head, 128); break;
        case 256: decode_share(a, s, head, 256); break;
        default: decode_share(a, s, head, a->dim);
        }
    }
}
