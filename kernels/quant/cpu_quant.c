/* Matrix product with GGUF-quantised weights on the CPU, and exact dequantisation.
 *
 * y[m, n] = sum_k x[m, k] * w[n, k], where w's rows are GGUF blocks exactly as in the file.
 *
 * Activations are rounded once a call to int16 with one scale per 32, which is the only error
 * against fp32 arithmetic. A group g is the 16 or 32 weights that share a scale and a minimum:
 *
 *     y = sum_g  scale_w[g] * scale_x[g] * dot(q_w[g], q_x[g])  +  min_w[g] * sum(x[g])
 *
 * One vector lane is one weight row. A panel of NV * LANES rows is unpacked, CHUNK weights of
 * each at a time, to pairs of int16 in the L1 cache and used for every activation row. The dot
 * product of a group is an exact integer (|q_w| <= 128, |q_x| < 2^15, 32 products: below 2^31),
 * and the floating-point additions of one (m, n) always run over g in order: a row's result does
 * not depend on M, N, the rows beside it or the number of threads.
 *
 * What surrounds a product in a decoder layer is done on the way, where the values already are:
 * the RMS norm of x as it is rounded, and the gated activation or the addition to the residual
 * stream as y is written.
 *
 * Block layouts: ggml's, as documented by the gguf package. Compile with -ffp-contract=off:
 * dequantisation must round after every operation. Little-endian machines only.
 */
#include <stdlib.h>

#include "../native/cpu_math.h"
#include "../native/team.h"
#include "cpu_quant_rows.h"

#define PANEL (NV * LANES)  /* weight rows in a panel */
#define CHUNK 512           /* weights of a row unpacked at a time: a multiple of every block */
#define TILE 4              /* activation rows multiplied together */
#define BLOCK_M 128         /* activation rows that share one unpacking */
#define SERIAL_X (1 << 15)  /* so many activations one thread rounds while the others wait */
#define SERIAL_XW (1 << 16) /* and so many products it forms before the others would be awake */

/* name, ggml's type code, weights and bytes a block, weights a group, has minimums */
#define FORMATS(X)               \
    X(q4_0, 2, 32, 18, 32, 0)    \
    X(q4_1, 3, 32, 20, 32, 1)    \
    X(q5_0, 6, 32, 22, 32, 0)    \
    X(q5_1, 7, 32, 24, 32, 1)    \
    X(q8_0, 8, 32, 34, 32, 0)    \
    X(q2_k, 10, 256, 84, 16, 1)  \
    X(q3_k, 11, 256, 110, 16, 0) \
    X(q4_k, 12, 256, 144, 32, 1) \
    X(q5_k, 13, 256, 176, 32, 1) \
    X(q6_k, 14, 256, 210, 16, 0) \
    X(mxfp4, 39, 32, 17, 32, 0)

typedef struct Job Job;
typedef struct {
    int type, elements, bytes, group, has_min;
    void (*unpack)(const Bytes *, int, int64_t, V *, F *, F *);
    void (*single)(const Job *, int64_t, F *);
} Format;

typedef enum { STORE = 0, SILU = 1, GELU_TANH = 2, ADD = 3 } Epilogue;

struct Job {
    const Format *format;
    Rows x;
    Bytes w;
    void *y;
    int64_t N, stride, columns; /* rows of w, bytes between them, columns of y */
    int64_t items, pieces;
    FloatType type; /* of y */
    Epilogue epilogue;
};

/* name_blocks(): `count` blocks of LANES rows, fetching those `ahead` bytes on into L2: so many
 * short runs at once are too much for the hardware's prefetcher. */
#define DEFINE(name, code, elements, bytes, group, has_min)                      \
    static void name##_blocks(const Bytes *rows, int count, int64_t ahead, V *q, \
                              F *scale, F *min) {                                \
        Bytes p[LANES];                                                          \
        memcpy(p, rows, sizeof p);                                               \
        for (int b = 0; b < count; b++) {                                        \
            UNROLL for (int r = 0; r < LANES; r++)                               \
                for (int at = 0; at < bytes; at += 64)                           \
                    __builtin_prefetch(p[r] + ahead + at, 0, 2);                 \
            name(p, q, scale, min);                                              \
            UNROLL for (int r = 0; r < LANES; r++) p[r] += bytes;                \
            q += elements / 2 * NV;                                              \
            scale += elements / group * NV;                                      \
            min += elements / group * NV;                                        \
        }                                                                        \
    }
FORMATS(DEFINE)

/* The row of w that row n of a panel stands for: rows past the last one repeat it. */
INLINE Bytes row_of(const Job *j, int64_t n) {
    return j->w + (n < j->N ? n : j->N - 1) * j->stride;
}

/* total + scale * xs * dot + min * sum for one group of one activation row. */
INLINE F add_group(F total, const V *q, F scale, F min, const int16_t *x, float xs, float sum,
                   int steps, int has_min) {
    V dot[4] = {{0}}; /* exact in any order: four chains hide the latency */
    UNROLL
    for (int s = 0; s < steps; s++) dot[s % 4] = madd(dot[s % 4], q[s * NV], spread(x + 2 * s));
    total = multiply_add(to_float(dot[0] + dot[1] + (dot[2] + dot[3])), scale * xs, total);
    return has_min ? multiply_add(min, spread_float(sum), total) : total;
}

/* name_single(): the only activation row times rows n ... n + LANES - 1 of w. With one use, what
 * is unpacked stays in registers; the arithmetic is that of multiply_tile(). */
#define DEFINE_SINGLE(name, code, elements, bytes, group, has_min)                       \
    static void name##_single(const Job *j, int64_t n, F *y) {                           \
        const int16_t *x = j->x.q;                                                       \
        const float *xs = j->x.scales, *sums = j->x.sums;                                \
        Bytes p[LANES];                                                                  \
        F total = {0};                                                                   \
        for (int r = 0; r < LANES; r++) p[r] = row_of(j, n + r);                         \
        for (int64_t k = 0; k < j->x.K; k += elements) {                                 \
            V q[elements / 2 * NV];                                                      \
            F scale[elements / group * NV], min[elements / group * NV];                  \
            UNROLL for (int r = 0; r < LANES; r++)                                       \
                for (int at = 0; at < bytes; at += 64)                                   \
                    __builtin_prefetch(p[r] + LANES * j->stride + at, 0, 2);             \
            name(p, q, scale, min);                                                      \
            UNROLL for (int r = 0; r < LANES; r++) p[r] += bytes;                        \
            for (int g = 0; g < elements / group; g++, x += group)                       \
                total = add_group(total, q + g * group / 2 * NV, scale[g * NV],          \
                                  min[g * NV], x, xs[(k + g * group) / 32], *sums++,     \
                                  group / 2, has_min);                                   \
        }                                                                                \
        *y = total;                                                                      \
    }
FORMATS(DEFINE_SINGLE)

#define ROW(name, code, elements, bytes, group, has_min) \
    {code, elements, bytes, group, has_min, name##_blocks, name##_single},
static const Format formats[] = {FORMATS(ROW)};

static const Format *find_format(int type, int64_t K) {
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (formats[i].type == type) return K % formats[i].elements ? NULL : &formats[i];
    return NULL;
}

/* CHUNK weights of a panel's rows. */
typedef struct {
    V q[CHUNK / 2 * NV];
    F scale[CHUNK / 16 * NV], min[CHUNK / 16 * NV];
} Panel;

/* ---- the product --------------------------------------------------------------------------- */

/* sum[tile][NV] += activation rows m.. times `count` weights, from k on, of the panel. */
INLINE void multiply_tile(const Job *j, const Panel *w, int64_t m, int64_t k, int count,
                          int tile, int group, F *sum) {
    const int64_t K = j->x.K;
    const int16_t *x = j->x.q + m * K + k;
    const float *xs = j->x.scales + m * (K / 32) + k / 32;
    const float *sums = j->x.sums + m * (K / group) + k / group;
    const V *q = w->q;
    F total[TILE][NV];
    UNROLL
    for (int t = 0; t < tile; t++)
        for (int v = 0; v < NV; v++) total[t][v] = sum[t * NV + v];
    for (int g = 0; g < count / group; g++, x += group) {
        V dot[TILE][NV];
        UNROLL
        for (int t = 0; t < tile; t++)
            for (int v = 0; v < NV; v++) dot[t][v] = (V){0};
        UNROLL_BY_4
        for (int s = 0; s < group / 2; s++, q += NV)
            UNROLL
            for (int t = 0; t < tile; t++) {
                V pair = spread(x + t * K + 2 * s);
                for (int v = 0; v < NV; v++) dot[t][v] = madd(dot[t][v], q[v], pair);
            }
        UNROLL
        for (int t = 0; t < tile; t++)
            for (int v = 0; v < NV; v++) {
                F scale = w->scale[g * NV + v] * xs[t * (K / 32) + g * group / 32];
                total[t][v] = multiply_add(to_float(dot[t][v]), scale, total[t][v]);
                if (j->format->has_min) {
                    F x_sum = spread_float(sums[t * (K / group) + g]);
                    total[t][v] = multiply_add(w->min[g * NV + v], x_sum, total[t][v]);
                }
            }
    }
    UNROLL
    for (int t = 0; t < tile; t++)
        for (int v = 0; v < NV; v++) sum[t * NV + v] = total[t][v];
}

#define DEFINE_TILES(group)                                                            \
    static void multiply_##group(const Job *j, const Panel *w, int64_t m, int64_t end, \
                                 int64_t k, int count, F *sum) {                       \
        for (; m + 4 <= end; m += 4, sum += 4 * NV)                                    \
            multiply_tile(j, w, m, k, count, 4, group, sum);                           \
        if (end - m == 3) multiply_tile(j, w, m, k, count, 3, group, sum);             \
        if (end - m == 2) multiply_tile(j, w, m, k, count, 2, group, sum);             \
        if (end - m == 1) multiply_tile(j, w, m, k, count, 1, group, sum);             \
    }
DEFINE_TILES(16)
DEFINE_TILES(32)

/* sum[m - first][NV] = activation rows [first, end) times rows n ... n + PANEL - 1. */
static void multiply_panel(const Job *j, int64_t n, int64_t first, int64_t end, F *sum) {
    const Format *f = j->format;
    Bytes rows[PANEL];
    if (j->x.M == 1) {
        for (int v = 0; v < NV; v++) f->single(j, n + v * LANES, sum + v);
        return;
    }
    Panel panel;
    memset(sum, 0, (size_t)(end - first) * NV * sizeof *sum);
    for (int r = 0; r < PANEL; r++) rows[r] = row_of(j, n + r);
    for (int64_t k = 0; k < j->x.K; k += CHUNK) {
        int count = j->x.K - k < CHUNK ? (int)(j->x.K - k) : CHUNK, blocks = count / f->elements;
        for (int v = 0; v < NV; v++)
            f->unpack(rows + v * LANES, blocks, PANEL * j->stride, panel.q + v, panel.scale + v,
                      panel.min + v);
        for (int r = 0; r < PANEL; r++) rows[r] += blocks * f->bytes;
        (f->group == 16 ? multiply_16 : multiply_32)(j, &panel, first, end, k, count, sum);
    }
}

/* y[m, n:n+PANEL] from the products with those rows and, behind an activation, the `up` rows. */
static void write_row(const Job *j, int64_t m, int64_t n, const float *sum, const float *up) {
    const int64_t count = j->columns - n < PANEL ? j->columns - n : PANEL, at = m * j->columns + n;
    float y[PANEL];
    if (j->epilogue == SILU)
        for (int r = 0; r < PANEL; r++) y[r] = silu(sum[r]) * up[r];
    else if (j->epilogue == GELU_TANH)
        for (int r = 0; r < PANEL; r++) y[r] = gelu_tanh(sum[r]) * up[r];
    else
        memcpy(y, sum, sizeof y);
    if (j->epilogue == ADD)
        for (int r = 0; r < count; r++) ((float *)j->y)[at + r] += y[r];
    else
        for (int r = 0; r < count; r++) store_float(j->y, j->type, at + r, y[r]);
}

/* y[first:end, n:n+PANEL] */
static void fill_panel(const Job *j, int64_t n, int64_t first, int64_t end) {
    F sum[BLOCK_M * NV], up[BLOCK_M * NV];
    multiply_panel(j, n, first, end, sum);
    if (j->columns < j->N) multiply_panel(j, j->columns + n, first, end, up);
    for (int64_t m = first; m < end; m++) {
        int64_t at = (m - first) * NV;
        write_row(j, m, n, (const float *)(sum + at), (const float *)(up + at));
    }
}

/* A piece of the activation rows. */
static void quantize(const void *job, int64_t piece) {
    const Job *j = job;
    int64_t end = piece_begin(piece + 1, j->pieces, j->x.M);
    for (int64_t m = piece_begin(piece, j->pieces, j->x.M); m < end; m++) quantize_row(&j->x, m);
}

/* A piece of the items (block of activation rows, panel). */
static void multiply(const void *job, int64_t piece) {
    const Job *j = job;
    const int64_t panels = (j->columns + PANEL - 1) / PANEL, M = j->x.M;
    int64_t i = piece_begin(piece, j->pieces, j->items);
    for (int64_t end = piece_begin(piece + 1, j->pieces, j->items); i < end; i++) {
        int64_t m = i / panels * BLOCK_M;
        fill_panel(j, i % panels * PANEL, m, m + BLOCK_M < M ? m + BLOCK_M : M);
    }
}

static void run_job(TeamRun team, int threads, Job *j) {
    const int64_t M = j->x.M, panels = (j->columns + PANEL - 1) / PANEL;
    if (M * j->x.K <= SERIAL_X) {
        for (int64_t m = 0; m < M; m++) quantize_row(&j->x, m);
    } else {
        j->pieces = pieces_of(M, threads);
        team(quantize, j, j->pieces, threads);
    }
    j->items = panels * ((M + BLOCK_M - 1) / BLOCK_M);
    j->pieces = pieces_of(j->items, M * j->x.K * j->N > SERIAL_XW ? threads : 1);
    team(multiply, j, j->pieces, threads);
}

/* Bytes of a block of `format`; 0: unknown here. */
int squall_block_bytes(int format) {
    const Format *f = find_format(format, 0);
    return f ? f->bytes : 0;
}

/* y = x[M, K] times the transpose of w[N, K], whose rows are `stride` bytes apart. x and y are
 * dense; their element types, as FloatType, are `x_type` and `y_type`. With `norm` [K], x is
 * float32 and stands for its RMS norm rounded to `rounded`. y [M, N] is written or (ADD) added to;
 * of a gated activation it is [M, N / 2]: the first N / 2 rows of w are the gate. 0: done, 1: no
 * memory, 2: unknown format or K not whole blocks. */
int squall_quant_matmul(TeamRun team, int threads, int format, Bytes w, int64_t stride, int64_t M,
                        int64_t N, int64_t K, const void *x, int x_type, const float *norm,
                        float eps, int rounded, void *y, int y_type, int epilogue) {
    const Format *f = find_format(format, K);
    if (!f) return 2;
    size_t count = (size_t)(M * K);
    char *memory = malloc(count * 2 + (count / 32 + count / (size_t)f->group) * sizeof(float));
    if (!memory) return 1;
    float *scales = (float *)(memory + count * 2);
    int gated = epilogue == SILU || epilogue == GELU_TANH;
    Job job = {.format = f, .w = w, .y = y, .N = N, .stride = stride,
               .columns = gated ? N / 2 : N, .type = (FloatType)y_type,
               .epilogue = (Epilogue)epilogue,
               .x = {.x = x, .type = (FloatType)x_type, .norm = norm, .eps = eps,
                     .rounded = (FloatType)rounded, .M = M, .K = K, .group = f->group,
                     .q = (int16_t *)memory, .scales = scales, .sums = scales + count / 32}};
    run_job(team, threads, &job);
    free(memory);
    return 0;
}

/* `count` rows to out[count, K] of `type`, rounded as the reference rounds: scale * q, + min. */
static void dequantize_rows(const Format *f, const Bytes *rows, int count, int64_t K, void *out,
                            FloatType type) {
    const int groups = f->elements / f->group, steps = f->group / 2;
    V q[128 * NV];
    F scale[16 * NV], min[16 * NV];
    Bytes p[LANES];
    for (int r = 0; r < LANES; r++) p[r] = rows[r < count ? r : count - 1];
    for (int64_t k = 0; k < K; k += f->elements) {
        f->unpack(p, 1, 0, q, scale, min);
        for (int r = 0; r < LANES; r++) p[r] += f->bytes;
        for (int g = 0; g < groups; g++)
            for (int r = 0; r < count; r++) {
                float d = scale[g * NV][r], m = f->has_min ? min[g * NV][r] : -0.0f;
                int64_t at = r * K + k + g * f->group;
                for (int s = 0; s < steps; s++) {
                    int32_t pair = q[(g * steps + s) * NV][r];
                    int64_t i = at + s / 2 * 4 + s % 2;
                    store_float(out, type, i, d * (float)(int16_t)pair + m);
                    store_float(out, type, i + 2, d * (float)(pair >> 16) + m);
                }
            }
    }
}

/* out[T, K] (of `type`) = rows rows[0..T) of w[N, K]. 0, 2: as above, 3: a row is not in w. */
int squall_dequantize(int format, Bytes w, int64_t stride, int64_t N, const int64_t *rows,
                      int64_t T, int64_t K, void *out, int type) {
    const Format *f = find_format(format, K);
    if (!f) return 2;
    for (int64_t t = 0; t < T; t++)
        if (rows[t] < 0 || rows[t] >= N) return 3;
    for (int64_t t = 0; t < T; t += LANES) {
        Bytes p[LANES];
        int count = T - t < LANES ? (int)(T - t) : LANES;
        for (int r = 0; r < count; r++) p[r] = w + rows[t + r] * stride;
        dequantize_rows(f, p, count, K, (char *)out + t * K * (type == F32 ? 4 : 2),
                        (FloatType)type);
    }
    return 0;
}
