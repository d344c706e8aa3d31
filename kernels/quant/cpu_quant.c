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
#define CHUNK 256           /* weights of a row unpacked at a time: a multiple of every block */
#define TILE (LANES / 2)    /* activation rows multiplied together: TILE * NV sums in registers */
#define MOST_BYTES 272      /* of CHUNK weights in any format: Q8_0's */
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
    void (*unpack)(Column, int, Bytes, V *, F *, F *);
    void (*single)(const Job *, Column, int64_t, int, Bytes, F *);
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

/* Fetch `bytes` bytes from p on into L2. */
INLINE void fetch(Bytes p, int bytes) {
    UNROLL
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 0, 2);
}

/* name_blocks(): `count` blocks of LANES rows. On the way as many bytes are fetched from `next`
 * on: the rows of the next panel, which lie behind each other where the hardware's prefetcher sees
 * many short runs at once. */
#define DEFINE(name, code, elements, bytes, group, has_min)                        \
    static void name##_blocks(Column c, int count, Bytes next, V *q, F *scale, F *min) { \
        for (int b = 0; b < count; b++, c.p += bytes, next += LANES * bytes) {     \
            fetch(next, LANES * bytes);                                            \
            name(c, q, scale, min);                                                \
            q += elements / 2 * NV;                                                \
            scale += elements / group * NV;                                        \
            min += elements / group * NV;                                          \
        }                                                                          \
    }
FORMATS(DEFINE)

/* total + scale * xs * dot + min * sum for one group of one activation row. */
INLINE F add_group(F total, const V *q, F scale, F min, const int16_t *x, float xs, float sum,
                   int steps, int has_min) {
    V dot[4] = {{0}}; /* exact in any order: four chains hide the latency */
    UNROLL
    for (int s = 0; s < steps; s++) dot[s % 4] = madd(dot[s % 4], q[s * NV], spread(x + 2 * s));
    total = multiply_add(to_float(dot[0] + dot[1] + (dot[2] + dot[3])), scale * xs, total);
    return has_min ? multiply_add(min, spread_float(sum), total) : total;
}

/* name_single(): *sum += `count` blocks of LANES rows, from k on, times the only activation row.
 * With one use, what is unpacked stays in registers; the arithmetic is that of multiply_tile(). */
#define DEFINE_SINGLE(name, code, elements, bytes, group, has_min)                         \
    static void name##_single(const Job *j, Column c, int64_t k, int count, Bytes next,    \
                              F *sum) {                                                    \
        const int16_t *x = j->x.q + k;                                                     \
        const float *xs = j->x.scales, *sums = j->x.sums + k / group;                      \
        F total = *sum;                                                                    \
        for (int b = 0; b < count; b++, c.p += bytes, next += LANES * bytes) {             \
            V q[elements / 2 * NV];                                                        \
            F scale[elements / group * NV], min[elements / group * NV];                    \
            fetch(next, LANES * bytes);                                                    \
            name(c, q, scale, min);                                                        \
            for (int g = 0; g < elements / group; g++, x += group, k += group)             \
                total = add_group(total, q + g * group / 2 * NV, scale[g * NV],            \
                                  min[g * NV], x, xs[k / 32], *sums++, group / 2, has_min); \
        }                                                                                  \
        *sum = total;                                                                      \
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
    const int has_min = j->format->has_min;
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
                F total = multiply_add(to_float(dot[t][v]), scale, sum[t * NV + v]);
                if (has_min) {
                    F x_sum = spread_float(sums[t * (K / group) + g]);
                    total = multiply_add(w->min[g * NV + v], x_sum, total);
                }
                sum[t * NV + v] = total;
            }
    }
}

#define DEFINE_TILES(group)                                                            \
    static void multiply_##group(const Job *j, const Panel *w, int64_t m, int64_t end, \
                                 int64_t k, int count, F *sum) {                       \
        for (; m + TILE <= end; m += TILE, sum += TILE * NV)                           \
            multiply_tile(j, w, m, k, count, TILE, group, sum);                        \
        if (TILE > 4 && m + 4 <= end) {                                                \
            multiply_tile(j, w, m, k, count, 4, group, sum);                           \
            m += 4, sum += 4 * NV;                                                     \
        }                                                                              \
        if (end - m == 3) multiply_tile(j, w, m, k, count, 3, group, sum);             \
        if (end - m == 2) multiply_tile(j, w, m, k, count, 2, group, sum);             \
        if (end - m == 1) multiply_tile(j, w, m, k, count, 1, group, sum);             \
    }
DEFINE_TILES(16)
DEFINE_TILES(32)

/* Blocks from k on of rows n ... n + LANES - 1 of w. Where w ends before, they are in `edge`, with
 * zeros after the last row. */
static Column column_at(const Job *j, int64_t n, int64_t k, int blocks, uint8_t *edge) {
    const Format *f = j->format;
    const int64_t bytes = blocks * f->bytes;
    const Bytes from = j->w + n * j->stride + k / f->elements * f->bytes;
    if (n + LANES <= j->N) return (Column){from, j->stride};
    memset(edge, 0, LANES * bytes);
    for (int64_t r = 0; r < j->N - n; r++) memcpy(edge + r * bytes, from + r * j->stride, bytes);
    return (Column){edge, bytes};
}

/* sum[m - first][NV] = activation rows [first, end) times rows n ... n + PANEL - 1. */
static void multiply_panel(const Job *j, int64_t n, int64_t first, int64_t end, F *sum) {
    const Format *f = j->format;
    uint8_t edge[LANES * MOST_BYTES];
    Panel panel;
    memset(sum, 0, (size_t)(end - first) * NV * sizeof *sum);
    const int64_t chunk = j->x.M == 1 && n + PANEL <= j->N ? j->x.K : CHUNK;
    for (int64_t k = 0; k < j->x.K; k += chunk) {
        const int count = (int)(j->x.K - k < chunk ? j->x.K - k : chunk);
        const int blocks = count / f->elements;
        for (int v = 0; v < NV; v++) {
            Column c = column_at(j, n + v * LANES, k, blocks, edge);
            Bytes next = j->w + (n + PANEL + v * LANES) * j->stride;
            next += k / f->elements * f->bytes * LANES;
            if (j->x.M == 1)
                f->single(j, c, k, blocks, next, sum + v);
            else
                f->unpack(c, blocks, next, panel.q + v, panel.scale + v, panel.min + v);
        }
        if (j->x.M > 1)
            (f->group == 16 ? multiply_16 : multiply_32)(j, &panel, first, end, k, count, sum);
    }
}

/* y[m, n:n+PANEL] from the products with those rows and, behind an activation, the `up` rows. */
static void write_row(const Job *j, int64_t m, int64_t n, const float *sum, const float *up) {
    const int64_t count = j->columns - n < PANEL ? j->columns - n : PANEL, at = m * j->columns + n;
    float y[PANEL], *out = (float *)j->y + at;
    if (j->epilogue == SILU)
        for (int r = 0; r < PANEL; r++) y[r] = silu(sum[r]) * up[r];
    else if (j->epilogue == GELU_TANH)
        for (int r = 0; r < PANEL; r++) y[r] = gelu_tanh(sum[r]) * up[r];
    else
        memcpy(y, sum, sizeof y);
    if (j->epilogue == ADD)
        for (int r = 0; r < count; r++) out[r] += y[r];
    else if (j->type == F32)
        memcpy(out, y, (size_t)count * sizeof *y);
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
    uint8_t blocks[LANES * MOST_BYTES] = {0};
    for (int64_t k = 0; k < K; k += f->elements) {
        for (int r = 0; r < count; r++)
            memcpy(blocks + r * f->bytes, rows[r] + k / f->elements * f->bytes, f->bytes);
        f->unpack((Column){blocks, f->bytes}, 1, blocks, q, scale, min);
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
