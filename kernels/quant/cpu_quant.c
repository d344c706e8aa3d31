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
 * Block layouts: ggml's, as documented by the gguf package. Compile with -ffp-contract=off:
 * dequantisation must round after every operation. Little-endian machines only.
 */
#include <math.h>
#include <stdlib.h>

#include "cpu_quant_formats.h"

#define PANEL (NV * LANES)  /* weight rows in a panel */
#define CHUNK 512           /* weights of a row unpacked at a time: a multiple of every block */
#define TILE 4              /* activation rows multiplied together */
#define BLOCK_M 128         /* activation rows that share one unpacking */
#define SERIAL_X (1 << 15)  /* so many activations one thread rounds while the others wait */
#define SERIAL_XW (1 << 16) /* and so many products it forms before the others would be awake */

typedef enum { F32 = 0, BF16 = 1, F16 = 2 } FloatType;

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
    X(q6_k, 14, 256, 210, 16, 0)

typedef struct {
    int type, elements, bytes, group, has_min;
    void (*unpack)(const Bytes *, int, int64_t, V *, F *, F *);
} Format;

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

#define ROW(name, code, elements, bytes, group, has_min) \
    {code, elements, bytes, group, has_min, name##_blocks},
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

typedef struct Job Job;
typedef void (*Single)(const Job *, int64_t, float *);
struct Job {
    const Format *format;
    const void *x;
    Bytes w;
    void *y;
    int64_t M, N, K, stride;
    int64_t next_row, next_item; /* what no thread has taken yet */
    FloatType type;
    int threads;
    int16_t *xq; /* [M, K], in the order of a format's steps */
    float *xs;   /* [M, K / 32] scales */
    float *sums; /* [M, K / group] of the rounded values */
    Single single;    /* for M = 1 where this machine has one for the format */
    int16_t *natural; /* [K]: then, the activations in their natural order */
};

/* ---- activations --------------------------------------------------------------------------- */

INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE void load_floats(const void *src, FloatType type, int64_t at, float out[32]) {
    if (type == F32) {
        memcpy(out, (const float *)src + at, 32 * sizeof *out);
    } else if (type == BF16) {
        const uint16_t *p = (const uint16_t *)src + at;
        for (int i = 0; i < 32; i++) out[i] = bits_float((uint32_t)p[i] << 16);
    } else {
        for (int i = 0; i < 32; i += LANES) {
            V bits;
            for (int l = 0; l < LANES; l++) bits[l] = ((const uint16_t *)src)[at + i + l];
            F value = half_lanes(bits);
            memcpy(out + i, &value, sizeof value);
        }
    }
}

static uint16_t to_bf16(float value) {
    uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* quiet NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static uint16_t to_half(float value) { /* round to nearest even */
    uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, mag = bits & 0x7fffffff;
    if (mag > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (mag >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (mag < 0x38800000) /* subnormal: adding 0.5 shifts and rounds the magnitude */
        return (uint16_t)(sign | (float_bits(bits_float(mag) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((mag + 0xfff + (mag >> 13 & 1) - 0x38000000) >> 13));
}

INLINE void store_float(void *dst, FloatType type, int64_t at, float value) {
    if (type == F32) ((float *)dst)[at] = value;
    if (type == BF16) ((uint16_t *)dst)[at] = to_bf16(value);
    if (type == F16) ((uint16_t *)dst)[at] = to_half(value);
}

/* Row m of x to int16. A group of 32 with a NaN or an infinity gets a NaN scale; one whose
 * largest magnitude is below 2^-110 counts as zero. */
static void quantize_row(const Job *j, int64_t m) {
    int16_t *q = j->xq + m * j->K;
    float *sums = j->sums + m * (j->K / j->format->group), v[32];
    for (int64_t b = 0; b < j->K / 32; b++, q += 32) {
        load_floats(j->x, j->type, m * j->K + 32 * b, v);
        uint32_t max = 0; /* of magnitudes as bits: ordered like the values, NaN above all */
        for (int i = 0; i < 32; i++) {
            uint32_t bits = float_bits(v[i]) & 0x7fffffff;
            max = bits > max ? bits : max;
        }
        float amax = bits_float(max), inverse = amax > 0x1p-110f ? 32767.0f / amax : 0.0f;
        float scale = max < 0x7f800000 ? amax / 32767.0f : NAN;
        int16_t r[32];
        for (int i = 0; i < 32; i++) /* adding 1.5 * 2^23 rounds to the nearest integer */
            r[i] = (int16_t)(float_bits(v[i] * inverse + 0x1.8p23f) & 0xffff);
        for (int i = 0; i < 32; i += 4)
            q[i] = r[i], q[i + 1] = r[i + 2], q[i + 2] = r[i + 1], q[i + 3] = r[i + 3];
        if (j->single) memcpy(j->natural + 32 * b, r, sizeof r);
        int32_t low = 0, high = 0;
        for (int i = 0; i < 16; i++) low += r[i], high += r[i + 16];
        j->xs[m * (j->K / 32) + b] = scale;
        if (j->format->group == 16) *sums++ = scale * (float)low, *sums++ = scale * (float)high;
        if (j->format->group == 32) *sums++ = scale * (float)(low + high);
    }
}

#if LANES == 8 && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "cpu_quant_single.h"
#else
static Single find_single(int type) {
    (void)type;
    return NULL;
}
#endif

/* ---- the product --------------------------------------------------------------------------- */

/* sum[tile][NV] += activation rows m.. times `count` weights, from k on, of the panel. */
INLINE void multiply_tile(const Job *j, const Panel *w, int64_t m, int64_t k, int count,
                          int tile, int group, F *sum) {
    const int64_t K = j->K;
    const int16_t *x = j->xq + m * K + k;
    const float *xs = j->xs + m * (K / 32) + k / 32;
    const float *sums = j->sums + m * (K / group) + k / group;
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

/* y[m:end, n:n+PANEL]. Rows past the last one repeat it. */
static void multiply_panel(const Job *j, int64_t n, int64_t m, int64_t end) {
    const Format *f = j->format;
    if (j->single) {
        float y[PANEL];
        for (int r = 0; r < PANEL; r += 8) j->single(j, n + r, y + r);
        for (int64_t r = 0; r < PANEL && n + r < j->N; r++)
            store_float(j->y, j->type, n + r, y[r]);
        return;
    }
    Panel panel;
    F sum[BLOCK_M * NV];
    Bytes rows[PANEL];
    memset(sum, 0, (size_t)(end - m) * NV * sizeof *sum);
    for (int r = 0; r < PANEL; r++)
        rows[r] = j->w + (n + r < j->N ? n + r : j->N - 1) * j->stride;
    for (int64_t k = 0; k < j->K; k += CHUNK) {
        int count = j->K - k < CHUNK ? (int)(j->K - k) : CHUNK, blocks = count / f->elements;
        for (int v = 0; v < NV; v++)
            f->unpack(rows + v * LANES, blocks, PANEL * j->stride, panel.q + v, panel.scale + v,
                      panel.min + v);
        for (int r = 0; r < PANEL; r++) rows[r] += blocks * f->bytes;
        (f->group == 16 ? multiply_16 : multiply_32)(j, &panel, m, end, k, count, sum);
    }
    int64_t columns = j->N - n < PANEL ? j->N - n : PANEL;
    for (int64_t i = 0; m + i < end; i++)
        for (int64_t r = 0; r < columns; r++)
            store_float(j->y, j->type, (m + i) * j->N + n + r, ((float *)sum)[i * PANEL + r]);
}

/* One thread's share of the activation rows. */
static void quantize(void *job) {
    Job *j = job;
    for (;;) {
        int64_t m = __atomic_fetch_add(&j->next_row, 1, __ATOMIC_RELAXED);
        if (m >= j->M) return;
        quantize_row(j, m);
    }
}

/* One thread's share of the items (block of activation rows, panel), taken a few at a time. */
static void multiply(void *job) {
    Job *j = job;
    const int64_t panels = (j->N + PANEL - 1) / PANEL;
    const int64_t items = panels * ((j->M + BLOCK_M - 1) / BLOCK_M);
    const int64_t share = 1 + items / (8 * j->threads);
    for (;;) {
        int64_t i = __atomic_fetch_add(&j->next_item, share, __ATOMIC_RELAXED);
        if (i >= items) return;
        for (int64_t last = i + share < items ? i + share : items; i < last; i++) {
            int64_t m = i / panels * BLOCK_M;
            multiply_panel(j, i % panels * PANEL, m, m + BLOCK_M < j->M ? m + BLOCK_M : j->M);
        }
    }
}

/* Bytes of a block of `format`; 0: unknown here. */
int squall_block_bytes(int format) {
    const Format *f = find_format(format, 0);
    return f ? f->bytes : 0;
}

/* GOMP_parallel() of the OpenMP runtime that torch uses, so that there is one pool of threads. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned threads, unsigned flags);

/* y[M, N] = x[M, K] times the transpose of w[N, K]; x and y of `type`, contiguous; w's rows
 * `stride` bytes apart. Without `parallel` the caller's thread does all. 0: done, 1: no memory,
 * 2: unknown format or K not whole blocks. */
int squall_quant_matmul(Parallel parallel, int format, const void *x, int type, Bytes w,
                        int64_t stride, void *y, int64_t M, int64_t N, int64_t K, int threads) {
    const Format *f = find_format(format, K);
    if (!f) return 2;
    size_t count = (size_t)(M * K);
    char *memory = malloc(count * 4 + (count / 32 + count / (size_t)f->group) * sizeof(float));
    if (!memory) return 1;
    float *xs = (float *)(memory + count * 4);
    Job job = {.format = f, .x = x, .w = w, .y = y, .M = M, .N = N, .K = K, .stride = stride,
               .type = (FloatType)type, .xq = (int16_t *)memory, .xs = xs,
               .sums = xs + count / 32,
               .single = M == 1 ? find_single(format) : NULL,
               .natural = (int16_t *)memory + count,
               .threads = parallel && M * K * N > SERIAL_XW ? threads : 1};
    if (job.threads > 1) {
        if (M * K > SERIAL_X) parallel(quantize, &job, (unsigned)threads, 0);
        else quantize(&job);
        parallel(multiply, &job, (unsigned)threads, 0);
    } else {
        quantize(&job);
        multiply(&job);
    }
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
