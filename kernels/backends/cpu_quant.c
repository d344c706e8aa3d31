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
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
extern int omp_get_thread_num(void);
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF blocks are little-endian"
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__AVX512BW__) && defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define NV 2                /* vectors of rows in a panel */
#define PANEL (NV * LANES)  /* weight rows in a panel */
#define CHUNK 512           /* weights of a row unpacked at a time: a multiple of every block */
#define TILE 4              /* activation rows multiplied together */
#define BLOCK_M 128         /* activation rows that share one unpacking */

typedef int32_t V __attribute__((vector_size(4 * LANES)));  /* one int, or two int16, a row */
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef int16_t H __attribute__((vector_size(4 * LANES)));
typedef float F __attribute__((vector_size(4 * LANES)));
typedef enum { F32 = 0, BF16 = 1, F16 = 2 } FloatType;
typedef const uint8_t *Bytes;

/* ---- what differs between instruction sets ----------------------------------------------- */

#if LANES == 16
INLINE V madd(V sum, V a, V b) {
#if defined(__AVX512VNNI__)
    return (V)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    return sum + (V)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
INLINE F fma_(F a, F b, F sum) { return _mm512_fmadd_ps(a, b, sum); }
INLINE F to_float(V v) { return _mm512_cvtepi32_ps((__m512i)v); }
INLINE F half_lanes(V v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)v)); }
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
INLINE V madd(V sum, V a, V b) {
#if defined(__AVXVNNI__)
    return (V)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
    return sum + (V)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
INLINE F fma_(F a, F b, F sum) { return _mm256_fmadd_ps(a, b, sum); }
INLINE F to_float(V v) { return _mm256_cvtepi32_ps((__m256i)v); }
INLINE F half_lanes(V v) {
    __m256i packed = _mm256_packus_epi32((__m256i)(v & 0xffff), (__m256i)(v & 0xffff));
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
}
#else
#define PORTABLE
INLINE V madd(V sum, V a, V b) {
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}
INLINE F fma_(F a, F b, F sum) { return a * b + sum; }
INLINE F to_float(V v) { return __builtin_convertvector(v, F); }
INLINE F half_lanes(V v) { /* rebias the exponent; subnormals and infinities apart */
    V bits = (v & 0x7fff) << 13, exponent = v & 0x7c00, sign = (v & 0x8000) << 16;
    V normal = bits + (112 << 23), special = bits | 0x7f800000;
    V small = (V)((F)(bits + (113 << 23)) - (F)((V){0} + (113 << 23)));
    V is_small = exponent == 0, is_special = exponent == 0x7c00;
    V value = (small & is_small) | (special & is_special) | (normal & ~(is_small | is_special));
    return (F)(value | sign);
}
#endif

INLINE V spread(const void *p) { /* four bytes to every lane */
    int32_t bits;
    memcpy(&bits, p, 4);
    return (V){0} + bits;
}
INLINE F spread_float(float value) { return (F){0} + value; }

/* out[j] = 32-bit word j of the 16 bytes at p[row] + at, one row a lane. */
INLINE void load_words(const Bytes *p, int at, V out[4]) {
#ifdef PORTABLE
    for (int j = 0; j < 4; j++)
        for (int r = 0; r < LANES; r++) {
            int32_t word;
            memcpy(&word, p[r] + at + 4 * j, 4);
            out[j][r] = word;
        }
#else
    __m256i t[LANES / 8][4];
    for (int h = 0; h < LANES / 8; h++) {
        __m256i a[4];
        for (int r = 0; r < 4; r++) {
            const __m128i *low = (const __m128i *)(p[8 * h + r] + at);
            const __m128i *high = (const __m128i *)(p[8 * h + r + 4] + at);
            a[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                           _mm_loadu_si128(high), 1);
        }
        __m256i b0 = _mm256_unpacklo_epi32(a[0], a[1]), b1 = _mm256_unpackhi_epi32(a[0], a[1]);
        __m256i b2 = _mm256_unpacklo_epi32(a[2], a[3]), b3 = _mm256_unpackhi_epi32(a[2], a[3]);
        t[h][0] = _mm256_unpacklo_epi64(b0, b2), t[h][1] = _mm256_unpackhi_epi64(b0, b2);
        t[h][2] = _mm256_unpacklo_epi64(b1, b3), t[h][3] = _mm256_unpackhi_epi64(b1, b3);
    }
    for (int j = 0; j < 4; j++)
#if LANES == 16
        out[j] = (V)_mm512_inserti64x4(_mm512_castsi256_si512(t[0][j]), t[1][j], 1);
#else
        out[j] = (V)t[0][j];
#endif
#endif
}

INLINE V load_word(const Bytes *p, int at, size_t bytes) {
    int32_t words[LANES] = {0};
    for (int r = 0; r < LANES; r++) memcpy(&words[r], p[r] + at, bytes);
    V out;
    memcpy(&out, words, sizeof out);
    return out;
}

/* ---- block formats ------------------------------------------------------------------------
 * name(p, q, scale, min): one block of LANES rows; p[row] points at the row's block.
 * q[s * NV]: step s of the block, two int16 a lane. A 32-bit word of four consecutive bytes
 * makes two steps, weights (0, 2) and (1, 3), because masking 16-bit halves gives these for
 * nothing; quantize_row() puts the activations in the same order.
 * scale[g * NV], min[g * NV]: w = scale * q + min for the weights of group g. */

#define PAIR(x) ((x) * 0x10001)

INLINE V field(V v, int from, int mask) { return (V)((U)v >> from) & PAIR(mask); }
/* One bit of every byte, moved to `to`. */
INLINE V bit_field(V v, int from, int to) {
    return (V)(from > to ? (U)v >> (from - to) : (U)v << (to - from)) & PAIR(1 << to);
}
INLINE V minus(V v, int16_t offset) { return (V)((H)v - offset); }

INLINE void q4_0(const Bytes *p, V *q, F *scale, F *min) {
    V v[4];
    *scale = half_lanes(load_word(p, 0, 2));
    load_words(p, 2, v);
#pragma GCC unroll 8
    for (int s = 0; s < 8; s++) {
        q[s * NV] = minus(field(v[s / 2], s % 2 * 8, 15), 8);
        q[(s + 8) * NV] = minus(field(v[s / 2], s % 2 * 8 + 4, 15), 8);
    }
}

INLINE void q4_1(const Bytes *p, V *q, F *scale, F *min) {
    V v[4], dm = load_word(p, 0, 4);
    *scale = half_lanes(dm);
    *min = half_lanes(dm >> 16);
    load_words(p, 4, v);
#pragma GCC unroll 8
    for (int s = 0; s < 8; s++) {
        q[s * NV] = field(v[s / 2], s % 2 * 8, 15);
        q[(s + 8) * NV] = field(v[s / 2], s % 2 * 8 + 4, 15);
    }
}

/* The fifth bits of Q5_0 and Q5_1: bit k of `bits` to bit 4 of weight k. */
INLINE void add_fifth_bits(V bits, V *q, int16_t offset) {
    V low = (bits & 0xffff) | (V)((U)bits >> 2 << 16);
    V high = (V)((U)bits >> 16) | ((V)((U)bits >> 18) << 16);
#pragma GCC unroll 8
    for (int s = 0; s < 8; s++) {
        int k = s / 2 * 4 + s % 2;
        q[s * NV] = minus(q[s * NV] | bit_field(low, k, 4), offset);
        q[(s + 8) * NV] = minus(q[(s + 8) * NV] | bit_field(high, k, 4), offset);
    }
}

INLINE void q5(const Bytes *p, int at, V *q, int16_t offset) {
    V v[4], bits = load_word(p, at, 4);
    load_words(p, at + 4, v);
#pragma GCC unroll 8
    for (int s = 0; s < 8; s++) {
        q[s * NV] = field(v[s / 2], s % 2 * 8, 15);
        q[(s + 8) * NV] = field(v[s / 2], s % 2 * 8 + 4, 15);
    }
    add_fifth_bits(bits, q, offset);
}

INLINE void q5_0(const Bytes *p, V *q, F *scale, F *min) {
    *scale = half_lanes(load_word(p, 0, 2));
    q5(p, 2, q, 16);
}

INLINE void q5_1(const Bytes *p, V *q, F *scale, F *min) {
    V dm = load_word(p, 0, 4);
    *scale = half_lanes(dm);
    *min = half_lanes(dm >> 16);
    q5(p, 4, q, 0);
}

INLINE void q8_0(const Bytes *p, V *q, F *scale, F *min) {
    V v[8];
    *scale = half_lanes(load_word(p, 0, 2));
    load_words(p, 2, v);
    load_words(p, 18, v + 4);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        q[2 * j * NV] = (V)((H)(v[j] << 8) >> 8);
        q[(2 * j + 1) * NV] = (V)((H)v[j] >> 8);
    }
}

/* u8 scales[16] (scale | min << 4), 2 bits [256], f16 d, f16 dmin. */
INLINE void q2_k(const Bytes *p, V *q, F *scale, F *min) {
    V v[8], s[4], dm = load_word(p, 80, 4);
    F d = half_lanes(dm), m = -half_lanes(dm >> 16);
    load_words(p, 0, s);
    for (int g = 0; g < 16; g++) {
        scale[g * NV] = d * to_float(s[g / 4] >> (g % 4 * 8) & 15);
        min[g * NV] = m * to_float(s[g / 4] >> (g % 4 * 8 + 4) & 15);
    }
    for (int half = 0; half < 2; half++) {
        load_words(p, 16 + 32 * half, v);
        load_words(p, 32 + 32 * half, v + 4);
        for (int g = 0; g < 4; g++, q += 16 * NV)
#pragma GCC unroll 16
            for (int s = 0; s < 16; s++) q[s * NV] = field(v[s / 2], s % 2 * 8 + 2 * g, 3);
    }
}

/* High bits u8 [32], 2 bits [256], 6-bit scales [12 bytes], f16 d. */
INLINE void q3_k(const Bytes *p, V *q, F *scale, F *min) {
    V v[8], high[8];
    V s[3] = {load_word(p, 96, 4), load_word(p, 100, 4), load_word(p, 104, 4)};
    F d = half_lanes(load_word(p, 108, 2));
    for (int g = 0; g < 16; g++) {
        V sub = (s[g / 4 % 2] >> (g % 4 * 8 + g / 8 * 4) & 15) |
                (s[2] >> (g % 4 * 8 + g / 4 * 2) & 3) << 4;
        scale[g * NV] = d * to_float(sub - 32);
    }
    load_words(p, 0, high);
    load_words(p, 16, high + 4);
    for (int half = 0; half < 2; half++) {
        load_words(p, 32 + 32 * half, v);
        load_words(p, 48 + 32 * half, v + 4);
        for (int g = 0; g < 4; g++, q += 16 * NV)
#pragma GCC unroll 16
            for (int s = 0; s < 16; s++)
                q[s * NV] = minus(field(v[s / 2], s % 2 * 8 + 2 * g, 3) |
                                  field(high[s / 2], s % 2 * 8 + 4 * half + g, 1) << 2, 4);
    }
}

/* The 6-bit scales and minimums of Q4_K and Q5_K: f16 d, f16 dmin, 12 bytes. */
INLINE void k_scales(const Bytes *p, F *scale, F *min) {
    V s[4];
    load_words(p, 0, s);
    F d = half_lanes(s[0]), m = -half_lanes(s[0] >> 16);
    V sub[2] = {s[1] & 0x3f3f3f3f, (s[3] & 0x0f0f0f0f) | (s[1] >> 2 & 0x30303030)};
    V low[2] = {s[2] & 0x3f3f3f3f, (s[3] >> 4 & 0x0f0f0f0f) | (s[2] >> 2 & 0x30303030)};
    for (int g = 0; g < 8; g++) {
        scale[g * NV] = d * to_float(sub[g / 4] >> (g % 4 * 8) & 0xff);
        min[g * NV] = m * to_float(low[g / 4] >> (g % 4 * 8) & 0xff);
    }
}

/* k_scales, 4 bits [256]: 32 bytes hold group 2j in their low and group 2j + 1 in their high
 * nibbles. */
INLINE void q4_k(const Bytes *p, V *q, F *scale, F *min) {
    k_scales(p, scale, min);
    for (int j = 0; j < 4; j++, q += 32 * NV) {
        V v[8];
        load_words(p, 16 + 32 * j, v);
        load_words(p, 32 + 32 * j, v + 4);
#pragma GCC unroll 16
        for (int s = 0; s < 16; s++) {
            q[s * NV] = field(v[s / 2], s % 2 * 8, 15);
            q[(s + 16) * NV] = field(v[s / 2], s % 2 * 8 + 4, 15);
        }
    }
}

/* As Q4_K with fifth bits u8 [32] before the nibbles: bit g of byte k for weight k of group g. */
INLINE void q5_k(const Bytes *p, V *q, F *scale, F *min) {
    V high[8];
    k_scales(p, scale, min);
    load_words(p, 16, high);
    load_words(p, 32, high + 4);
    for (int j = 0; j < 4; j++, q += 32 * NV) {
        V v[8];
        load_words(p, 48 + 32 * j, v);
        load_words(p, 64 + 32 * j, v + 4);
#pragma GCC unroll 16
        for (int s = 0; s < 16; s++) {
            V low_bit = field(high[s / 2], s % 2 * 8 + 2 * j, 1) << 4;
            V high_bit = field(high[s / 2], s % 2 * 8 + 2 * j + 1, 1) << 4;
            q[s * NV] = field(v[s / 2], s % 2 * 8, 15) | low_bit;
            q[(s + 16) * NV] = field(v[s / 2], s % 2 * 8 + 4, 15) | high_bit;
        }
    }
}

/* Low 4 bits [256], high 2 bits [256], i8 scales[16], f16 d. */
INLINE void q6_k(const Bytes *p, V *q, F *scale, F *min) {
    V s[4];
    F d = half_lanes(load_word(p, 208, 2));
    load_words(p, 192, s);
    for (int g = 0; g < 16; g++)
        scale[g * NV] = d * to_float(s[g / 4] << (24 - g % 4 * 8) >> 24);
    for (int half = 0; half < 2; half++) {
        V v[16], high[8];
        for (int j = 0; j < 4; j++) load_words(p, 64 * half + 16 * j, v + 4 * j);
        load_words(p, 128 + 32 * half, high);
        load_words(p, 144 + 32 * half, high + 4);
        for (int g = 0; g < 4; g++, q += 16 * NV)
#pragma GCC unroll 16
            for (int s = 0; s < 16; s++)
                q[s * NV] = minus(field(v[g % 2 * 8 + s / 2], s % 2 * 8 + g / 2 * 4, 15) |
                                  field(high[s / 2], s % 2 * 8 + 2 * g, 3) << 4, 32);
    }
}

/* name, ggml's type code, weights and bytes a block, weights a group, has minimums */
#define FORMATS(X)            \
    X(q4_0, 2, 32, 18, 32, 0)   \
    X(q4_1, 3, 32, 20, 32, 1)   \
    X(q5_0, 6, 32, 22, 32, 0)   \
    X(q5_1, 7, 32, 24, 32, 1)   \
    X(q8_0, 8, 32, 34, 32, 0)   \
    X(q2_k, 10, 256, 84, 16, 1)  \
    X(q3_k, 11, 256, 110, 16, 0) \
    X(q4_k, 12, 256, 144, 32, 1) \
    X(q5_k, 13, 256, 176, 32, 1) \
    X(q6_k, 14, 256, 210, 16, 0)

typedef struct {
    int type, elements, bytes, group, has_min;
    void (*unpack)(const Bytes *, int, V *, F *, F *);
} Format;

/* name_blocks(): `count` blocks of LANES rows */
#define DEFINE(name, code, elements, bytes, group, has_min)                          \
    static void name##_blocks(const Bytes *rows, int count, V *q, F *scale, F *min) { \
        Bytes p[LANES];                                                              \
        memcpy(p, rows, sizeof p);                                                   \
        for (int b = 0; b < count; b++) {                                            \
            name(p, q, scale, min);                                                  \
            for (int r = 0; r < LANES; r++) p[r] += bytes;                           \
            q += elements / 2 * NV;                                                  \
            scale += elements / group * NV;                                          \
            min += elements / group * NV;                                            \
        }                                                                            \
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

typedef struct {
    const Format *format;
    const void *x;
    Bytes w;
    void *y;
    int64_t M, N, K, stride, next;
    FloatType type;
    int threads;
    int16_t *xq;  /* [M, K], in the order of a Format's steps */
    float *xs;    /* [M, K / 32] scales */
    float *sums;  /* [M, K / group] of the rounded values */
} Job;

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
        int32_t low = 0, high = 0;
        for (int i = 0; i < 16; i++) low += r[i], high += r[i + 16];
        j->xs[m * (j->K / 32) + b] = scale;
        if (j->format->group == 16) *sums++ = scale * (float)low, *sums++ = scale * (float)high;
        if (j->format->group == 32) *sums++ = scale * (float)(low + high);
    }
}

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
#pragma GCC unroll 8
    for (int t = 0; t < tile; t++)
        for (int v = 0; v < NV; v++) total[t][v] = sum[t * NV + v];
    for (int g = 0; g < count / group; g++, x += group) {
        V dot[TILE][NV];
#pragma GCC unroll 8
        for (int t = 0; t < tile; t++)
            for (int v = 0; v < NV; v++) dot[t][v] = (V){0};
#pragma GCC unroll 4
        for (int s = 0; s < group / 2; s++, q += NV)
#pragma GCC unroll 8
            for (int t = 0; t < tile; t++) {
                V pair = spread(x + t * K + 2 * s);
                for (int v = 0; v < NV; v++) dot[t][v] = madd(dot[t][v], q[v], pair);
            }
#pragma GCC unroll 8
        for (int t = 0; t < tile; t++)
            for (int v = 0; v < NV; v++) {
                F scale = w->scale[g * NV + v] * xs[t * (K / 32) + g * group / 32];
                total[t][v] = fma_(to_float(dot[t][v]), scale, total[t][v]);
                if (j->format->has_min) {
                    F x_sum = spread_float(sums[t * (K / group) + g]);
                    total[t][v] = fma_(w->min[g * NV + v], x_sum, total[t][v]);
                }
            }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tile; t++)
        for (int v = 0; v < NV; v++) sum[t * NV + v] = total[t][v];
}

#define DEFINE_TILES(group)                                                                    \
    static void multiply_##group(const Job *j, const Panel *w, int64_t m, int64_t end,         \
                                 int64_t k, int count, F *sum) {                               \
        for (; m + 4 <= end; m += 4, sum += 4 * NV)                                            \
            multiply_tile(j, w, m, k, count, 4, group, sum);                                   \
        if (end - m == 3) multiply_tile(j, w, m, k, count, 3, group, sum);                     \
        if (end - m == 2) multiply_tile(j, w, m, k, count, 2, group, sum);                     \
        if (end - m == 1) multiply_tile(j, w, m, k, count, 1, group, sum);                     \
    }
DEFINE_TILES(16)
DEFINE_TILES(32)

/* y[m:end, n:n+PANEL]. Rows past the last one repeat it. */
static void multiply_panel(const Job *j, int64_t n, int64_t m, int64_t end) {
    const Format *f = j->format;
    Panel panel;
    F sum[BLOCK_M * NV];
    Bytes rows[PANEL];
    memset(sum, 0, (size_t)(end - m) * NV * sizeof *sum);
    for (int r = 0; r < PANEL; r++)
        rows[r] = j->w + (n + r < j->N ? n + r : j->N - 1) * j->stride;
    for (int64_t k = 0; k < j->K; k += CHUNK) {
        int count = j->K - k < CHUNK ? (int)(j->K - k) : CHUNK, blocks = count / f->elements;
        for (int v = 0; v < NV; v++)
            f->unpack(rows + v * LANES, blocks, panel.q + v, panel.scale + v, panel.min + v);
        for (int r = 0; r < PANEL; r++) rows[r] += blocks * f->bytes;
        (f->group == 16 ? multiply_16 : multiply_32)(j, &panel, m, end, k, count, sum);
    }
    int64_t columns = j->N - n < PANEL ? j->N - n : PANEL;
    for (int64_t i = 0; m + i < end; i++)
        for (int64_t r = 0; r < columns; r++)
            store_float(j->y, j->type, (m + i) * j->N + n + r, ((float *)sum)[i * PANEL + r]);
}

/* One thread's share of the items (block of activation rows, panel), taken a few at a time. */
static void multiply(Job *j) {
    const int64_t panels = (j->N + PANEL - 1) / PANEL;
    const int64_t items = panels * ((j->M + BLOCK_M - 1) / BLOCK_M);
    const int64_t share = 1 + items / (8 * j->threads);
    for (;;) {
        int64_t i = __atomic_fetch_add(&j->next, share, __ATOMIC_RELAXED);
        if (i >= items) return;
        for (int64_t last = i + share < items ? i + share : items; i < last; i++) {
            int64_t m = i / panels * BLOCK_M;
            multiply_panel(j, i % panels * PANEL, m, m + BLOCK_M < j->M ? m + BLOCK_M : j->M);
        }
    }
}

/* y[M, N] = x[M, K] times the transpose of w[N, K]; x and y of `type`, contiguous; w's rows
 * `stride` bytes apart. 0: done, 1: no memory, 2: unknown format or K not whole blocks. */
int squall_quant_matmul(int format, const void *x, int type, Bytes w, int64_t stride, void *y,
                        int64_t M, int64_t N, int64_t K, int threads) {
    const Format *f = find_format(format, K);
    if (!f) return 2;
    size_t count = (size_t)(M * K);
    char *memory = malloc(count * 2 + (count / 32 + count / (size_t)f->group) * sizeof(float));
    if (!memory) return 1;
    float *xs = (float *)(memory + count * 2);
    Job job = {f, x, w, y, M, N, K, stride, 0, (FloatType)type, threads, (int16_t *)memory,
               xs, xs + count / 32};
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    {
        for (int64_t m = omp_get_thread_num(); m < M; m += threads) quantize_row(&job, m);
#pragma omp barrier
        multiply(&job);
    }
#else
    for (int64_t m = 0; m < M; m++) quantize_row(&job, m);
    multiply(&job);
#endif
    free(memory);
    return 0;
}

/* out[t:t+LANES] of `type`, rounded as the reference rounds: scale * q, then + min. */
static void dequantize_rows(const Format *f, const Bytes *rows, int count, int64_t K, void *out,
                            FloatType type) {
    V q[128 * NV];
    F scale[16 * NV], min[16 * NV];
    Bytes p[LANES];
    for (int r = 0; r < LANES; r++) p[r] = rows[r < count ? r : count - 1];
    for (int64_t k = 0; k < K; k += f->elements) {
        f->unpack(p, 1, q, scale, min);
        for (int r = 0; r < LANES; r++) p[r] += f->bytes;
        for (int r = 0; r < count; r++)
            for (int i = 0; i < f->elements; i++) {
                int g = i / f->group * NV, s = (i / 4 * 2 + i % 2) * NV;
                int16_t value = ((int16_t *)(q + s))[2 * r + i / 2 % 2];
                float y = scale[g][r] * (float)value;
                store_float(out, type, r * K + k + i, f->has_min ? y + min[g][r] : y);
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
