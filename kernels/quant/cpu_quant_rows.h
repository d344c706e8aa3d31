/* Activation rows: read, normed, rounded to 16 bits; and results written.
 *
 * A row is rounded once a call to int16 with one scale per 32, into three arrays: the integers in
 * the order of a format's steps (cpu_quant_formats.h), the scales, and the sums of the rounded
 * values over every group.
 */
#include <math.h>

#include "cpu_quant_formats.h"

typedef enum { F32 = 0, BF16 = 1, F16 = 2 } FloatType;

typedef struct {
    const void *x; /* [M, K] dense, of `type` */
    FloatType type;
    const float *norm; /* [K] or null: then rows are normed, and rounded to `rounded` */
    float eps;
    FloatType rounded;
    int64_t M, K;
    int group;       /* the format's */
    int16_t *q;      /* [M, K], in the order of a format's steps */
    float *scales;   /* [M, K / 32] */
    float *sums;     /* [M, K / group] of the rounded values */
} Rows;

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

/* The first factor of the RMS norm of x[K]: 1 / sqrt(mean(x^2) + eps). */
static float norm_factor(const float *x, int64_t K, float eps) {
    F sum = {0}; /* lane by lane: the same bits for a row wherever it stands */
    for (int64_t k = 0; k < K; k += LANES) {
        F v;
        memcpy(&v, x + k, sizeof v);
        sum = multiply_add(v, v, sum);
    }
    float total = 0.0f;
    for (int l = 0; l < LANES; l++) total += sum[l];
    return 1.0f / sqrtf(total / (float)K + eps);
}

INLINE void apply_norm(const Rows *rows, float factor, int64_t at, float v[32]) {
    uint16_t bits[32];
    for (int i = 0; i < 32; i++) v[i] = v[i] * factor * rows->norm[at + i];
    if (rows->rounded == F32) return;
    for (int i = 0; i < 32; i++) store_float(bits, rows->rounded, i, v[i]);
    load_floats(bits, rows->rounded, 0, v);
}

/* Row m to int16. A group of 32 with a NaN or an infinity gets a NaN scale; one whose largest
 * magnitude is below 2^-110 counts as zero. */
static void quantize_row(const Rows *rows, int64_t m) {
    const int64_t K = rows->K;
    int16_t *q = rows->q + m * K;
    float *sums = rows->sums + m * (K / rows->group), v[32], factor = 0.0f;
    if (rows->norm) factor = norm_factor((const float *)rows->x + m * K, K, rows->eps);
    for (int64_t b = 0; b < K / 32; b++, q += 32) {
        load_floats(rows->x, rows->type, m * K + 32 * b, v);
        if (rows->norm) apply_norm(rows, factor, 32 * b, v);
        uint32_t max = 0; /* of magnitudes as bits: ordered like the values, NaN above all */
        for (int i = 0; i < 32; i++) {
            uint32_t bits = float_bits(v[i]) & 0x7fffffff;
            max = bits > max ? bits : max;
        }
        float amax = bits_float(max), inverse = amax > 0x1p-110f ? 32767.0f / amax : 0.0f;
        float scale = max < 0x7f800000 ? amax / 32767.0f : NAN;
        int32_t r[32];
        for (int i = 0; i < 32; i++) /* adding 1.5 * 2^23 rounds to the nearest integer */
            r[i] = (int16_t)(float_bits(v[i] * inverse + 0x1.8p23f) & 0xffff);
        for (int i = 0; i < 32; i += 4)
            q[i] = (int16_t)r[i], q[i + 1] = (int16_t)r[i + 2], q[i + 2] = (int16_t)r[i + 1],
            q[i + 3] = (int16_t)r[i + 3];
        int32_t low = 0, all = 0;
        for (int i = 0; i < 32; i++) all += r[i];
        rows->scales[m * (K / 32) + b] = scale;
        if (rows->group == 32) {
            *sums++ = scale * (float)all;
            continue;
        }
        for (int i = 0; i < 16; i++) low += r[i];
        *sums++ = scale * (float)low, *sums++ = scale * (float)(all - low);
    }
}
