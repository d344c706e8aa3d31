/* GGUF blocks of LANES weight rows at a time, unpacked to vectors with one row a lane.
 *
 * Everything that differs between instruction sets or between block formats is in this file; a
 * format is one function, described before q4_0(). Layouts: ggml's, as documented by the gguf
 * package.
 */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF blocks are little-endian"
#endif

#ifdef __clang__ /* loops over arrays of vectors must go, or these live in memory */
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_BY_4 _Pragma("clang loop unroll_count(4)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_BY_4 _Pragma("GCC unroll 4")
#endif
#define INLINE static inline __attribute__((always_inline))
#if defined(__AVX512BW__) && defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define NV 2 /* vectors of rows in a panel */

typedef int32_t V __attribute__((vector_size(4 * LANES))); /* one int, or two int16, a row */
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef int16_t H __attribute__((vector_size(4 * LANES)));
typedef float F __attribute__((vector_size(4 * LANES)));
typedef const uint8_t *Bytes;
typedef struct { /* LANES rows (or their blocks at one k) under each other */
    Bytes p;
    int64_t stride; /* bytes from a row to the next */
} Column;

/* ---- what differs between instruction sets ----------------------------------------------- */

#if LANES == 16
INLINE V madd(V sum, V a, V b) {
#if defined(__AVX512VNNI__)
    return (V)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    return sum + (V)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
INLINE F multiply_add(F a, F b, F sum) { return _mm512_fmadd_ps(a, b, sum); }
INLINE F to_float(V v) { return _mm512_cvtepi32_ps((__m512i)v); }
INLINE F half_lanes(V v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)v)); }
INLINE V look_up(const int8_t table[16], V v) { /* table[byte], below 16, in every byte */
    __m512i entries = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return (V)_mm512_shuffle_epi8(entries, (__m512i)v);
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
INLINE V madd(V sum, V a, V b) {
#if defined(__AVXVNNI__)
    return (V)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
    return sum + (V)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
INLINE F multiply_add(F a, F b, F sum) { return _mm256_fmadd_ps(a, b, sum); }
INLINE F to_float(V v) { return _mm256_cvtepi32_ps((__m256i)v); }
INLINE F half_lanes(V v) {
    __m256i packed = _mm256_packus_epi32((__m256i)(v & 0xffff), (__m256i)(v & 0xffff));
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
}
INLINE V look_up(const int8_t table[16], V v) {
    __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (V)_mm256_shuffle_epi8(entries, (__m256i)v);
}
#else
#define PORTABLE
INLINE V madd(V sum, V a, V b) {
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}
INLINE F multiply_add(F a, F b, F sum) { return a * b + sum; }
INLINE F to_float(V v) { return __builtin_convertvector(v, F); }
INLINE F half_lanes(V v) { /* rebias the exponent; subnormals and infinities apart */
    V bits = (v & 0x7fff) << 13, exponent = v & 0x7c00, sign = (v & 0x8000) << 16;
    V normal = bits + (112 << 23), special = bits | 0x7f800000;
    V small = (V)((F)(bits + (113 << 23)) - (F)((V){0} + (113 << 23)));
    V is_small = exponent == 0, is_special = exponent == 0x7c00;
    V value = (small & is_small) | (special & is_special) | (normal & ~(is_small | is_special));
    return (F)(value | sign);
}
INLINE V look_up(const int8_t table[16], V v) {
    for (size_t i = 0; i < sizeof v; i++) ((int8_t *)&v)[i] = table[((uint8_t *)&v)[i]];
    return v;
}
#endif

INLINE V spread(const void *p) { /* four bytes to every lane */
    int32_t bits;
    memcpy(&bits, p, 4);
    return (V){0} + bits;
}
INLINE F spread_float(float value) { return value - (F){0}; } /* + would turn -0 into 0 */

/* out[j] = 32-bit word j of the 16 bytes at `at` in every row, one row a lane. */
INLINE void load_words(Column c, int at, V out[4]) {
#ifdef PORTABLE
    UNROLL
    for (int j = 0; j < 4; j++)
        UNROLL
        for (int r = 0; r < LANES; r++) {
            int32_t word;
            memcpy(&word, c.p + r * c.stride + at + 4 * j, 4);
            out[j][r] = word;
        }
#elif LANES == 16
    __m512i a[4]; /* of row 4 i + r in the i-th quarter of a[r] */
    UNROLL
    for (int r = 0; r < 4; r++) {
        Bytes p = c.p + r * c.stride + at;
#define ROW16(i) _mm_loadu_si128((const __m128i *)(p + 4 * (i) * c.stride))
        a[r] = _mm512_inserti32x4(_mm512_castsi128_si512(ROW16(0)), ROW16(1), 1);
        a[r] = _mm512_inserti32x4(_mm512_inserti32x4(a[r], ROW16(2), 2), ROW16(3), 3);
#undef ROW16
    }
    __m512i b0 = _mm512_unpacklo_epi32(a[0], a[1]), b1 = _mm512_unpackhi_epi32(a[0], a[1]);
    __m512i b2 = _mm512_unpacklo_epi32(a[2], a[3]), b3 = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = (V)_mm512_unpacklo_epi64(b0, b2), out[1] = (V)_mm512_unpackhi_epi64(b0, b2);
    out[2] = (V)_mm512_unpacklo_epi64(b1, b3), out[3] = (V)_mm512_unpackhi_epi64(b1, b3);
#else
    __m256i a[4];
    UNROLL
    for (int r = 0; r < 4; r++) {
        const __m128i *low = (const __m128i *)(c.p + r * c.stride + at);
        const __m128i *high = (const __m128i *)(c.p + (r + 4) * c.stride + at);
        a[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                       _mm_loadu_si128(high), 1);
    }
    __m256i b0 = _mm256_unpacklo_epi32(a[0], a[1]), b1 = _mm256_unpackhi_epi32(a[0], a[1]);
    __m256i b2 = _mm256_unpacklo_epi32(a[2], a[3]), b3 = _mm256_unpackhi_epi32(a[2], a[3]);
    out[0] = (V)_mm256_unpacklo_epi64(b0, b2), out[1] = (V)_mm256_unpackhi_epi64(b0, b2);
    out[2] = (V)_mm256_unpacklo_epi64(b1, b3), out[3] = (V)_mm256_unpackhi_epi64(b1, b3);
#endif
}

/* Word j of those four. All 16 bytes must be the block's: one load a row and a few shuffles cost
 * half of what LANES words inserted one by one do. */
INLINE V load_word(Column c, int at, int j) {
    V words[4];
    load_words(c, at, words);
    return words[j];
}

/* ---- block formats ------------------------------------------------------------------------
 * name(c, q, scale, min): one block of LANES rows.
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

INLINE void q4_0(Column c, V *q, F *scale, F *min) {
    V v[4];
    *scale = half_lanes(load_word(c, 0, 0));
    load_words(c, 2, v);
    UNROLL
    for (int s = 0; s < 8; s++) {
        q[s * NV] = minus(field(v[s / 2], s % 2 * 8, 15), 8);
        q[(s + 8) * NV] = minus(field(v[s / 2], s % 2 * 8 + 4, 15), 8);
    }
}

INLINE void q4_1(Column c, V *q, F *scale, F *min) {
    V v[4], dm = load_word(c, 0, 0);
    *scale = half_lanes(dm);
    *min = half_lanes(dm >> 16);
    load_words(c, 4, v);
    UNROLL
    for (int s = 0; s < 8; s++) {
        q[s * NV] = field(v[s / 2], s % 2 * 8, 15);
        q[(s + 8) * NV] = field(v[s / 2], s % 2 * 8 + 4, 15);
    }
}

/* The fifth bits of Q5_0 and Q5_1: bit k of `bits` to bit 4 of weight k. */
INLINE void add_fifth_bits(V bits, V *q, int16_t offset) {
    V low = (bits & 0xffff) | (V)((U)bits >> 2 << 16);
    V high = (V)((U)bits >> 16) | ((V)((U)bits >> 18) << 16);
    UNROLL
    for (int s = 0; s < 8; s++) {
        int k = s / 2 * 4 + s % 2;
        q[s * NV] = minus(q[s * NV] | bit_field(low, k, 4), offset);
        q[(s + 8) * NV] = minus(q[(s + 8) * NV] | bit_field(high, k, 4), offset);
    }
}

INLINE void q5(Column c, int at, V *q, int16_t offset) {
    V v[4], bits = load_word(c, at, 0);
    load_words(c, at + 4, v);
    UNROLL
    for (int s = 0; s < 8; s++) {
        q[s * NV] = field(v[s / 2], s % 2 * 8, 15);
        q[(s + 8) * NV] = field(v[s / 2], s % 2 * 8 + 4, 15);
    }
    add_fifth_bits(bits, q, offset);
}

INLINE void q5_0(Column c, V *q, F *scale, F *min) {
    *scale = half_lanes(load_word(c, 0, 0));
    q5(c, 2, q, 16);
}

INLINE void q5_1(Column c, V *q, F *scale, F *min) {
    V dm = load_word(c, 0, 0);
    *scale = half_lanes(dm);
    *min = half_lanes(dm >> 16);
    q5(c, 4, q, 0);
}

/* Steps of the four int8 in every word. */
INLINE void byte_steps(V v, V *q) {
    q[0] = (V)((H)(v << 8) >> 8);
    q[NV] = (V)((H)v >> 8);
}

INLINE void q8_0(Column c, V *q, F *scale, F *min) {
    V v[8];
    *scale = half_lanes(load_word(c, 0, 0));
    load_words(c, 2, v);
    load_words(c, 18, v + 4);
    UNROLL
    for (int j = 0; j < 8; j++) byte_steps(v[j], q + 2 * j * NV);
}

/* Exponent u8, 4 bits [32] that stand for twice an e2m1 number. */
INLINE void mxfp4(Column c, V *q, F *scale, F *min) {
    static const int8_t codes[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    V v[4], e = load_word(c, 0, 0) & 0xff, small = e < 2; /* 2^(e - 128): the first two are subnormal */
    *scale = (F)((((0x00200000 + (V){0}) << (e & 1)) & small) | (V)((U)(e - 1) << 23) & ~small);
    load_words(c, 1, v);
    UNROLL
    for (int j = 0; j < 4; j++) {
        byte_steps(look_up(codes, v[j] & 0x0f0f0f0f), q + 2 * j * NV);
        byte_steps(look_up(codes, (V)((U)v[j] >> 4) & 0x0f0f0f0f), q + (2 * j + 8) * NV);
    }
}

/* u8 scales[16] (scale | min << 4), 2 bits [256], f16 d, f16 dmin. */
INLINE void q2_k(Column c, V *q, F *scale, F *min) {
    V v[8], s[4], dm = load_word(c, 68, 3);
    F d = half_lanes(dm), m = -half_lanes(dm >> 16);
    load_words(c, 0, s);
    for (int g = 0; g < 16; g++) {
        scale[g * NV] = d * to_float(s[g / 4] >> (g % 4 * 8) & 15);
        min[g * NV] = m * to_float(s[g / 4] >> (g % 4 * 8 + 4) & 15);
    }
    for (int half = 0; half < 2; half++) {
        load_words(c, 16 + 32 * half, v);
        load_words(c, 32 + 32 * half, v + 4);
        for (int g = 0; g < 4; g++, q += 16 * NV)
            UNROLL
            for (int s = 0; s < 16; s++) q[s * NV] = field(v[s / 2], s % 2 * 8 + 2 * g, 3);
    }
}

/* High bits u8 [32], 2 bits [256], 6-bit scales [12 bytes], f16 d. */
INLINE void q3_k(Column c, V *q, F *scale, F *min) {
    V v[8], high[8];
    V s[4]; /* high bits, then the scales */
    F d = half_lanes(load_word(c, 94, 3) >> 16);
    load_words(c, 92, s);
    for (int g = 0; g < 16; g++) {
        V sub = (s[1 + g / 4 % 2] >> (g % 4 * 8 + g / 8 * 4) & 15) |
                (s[3] >> (g % 4 * 8 + g / 4 * 2) & 3) << 4;
        scale[g * NV] = d * to_float(sub - 32);
    }
    load_words(c, 0, high);
    load_words(c, 16, high + 4);
    for (int half = 0; half < 2; half++) {
        load_words(c, 32 + 32 * half, v);
        load_words(c, 48 + 32 * half, v + 4);
        for (int g = 0; g < 4; g++, q += 16 * NV)
            UNROLL
            for (int s = 0; s < 16; s++)
                q[s * NV] = minus(field(v[s / 2], s % 2 * 8 + 2 * g, 3) |
                                  field(high[s / 2], s % 2 * 8 + 4 * half + g, 1) << 2, 4);
    }
}

/* The 6-bit scales and minimums of Q4_K and Q5_K: f16 d, f16 dmin, 12 bytes. */
INLINE void k_scales(Column c, F *scale, F *min) {
    V s[4];
    load_words(c, 0, s);
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
INLINE void q4_k(Column c, V *q, F *scale, F *min) {
    k_scales(c, scale, min);
    for (int j = 0; j < 4; j++, q += 32 * NV) {
        V v[8];
        load_words(c, 16 + 32 * j, v);
        load_words(c, 32 + 32 * j, v + 4);
        UNROLL
        for (int s = 0; s < 16; s++) {
            q[s * NV] = field(v[s / 2], s % 2 * 8, 15);
            q[(s + 16) * NV] = field(v[s / 2], s % 2 * 8 + 4, 15);
        }
    }
}

/* As Q4_K with fifth bits u8 [32] before the nibbles: bit g of byte k for weight k of group g. */
INLINE void q5_k(Column c, V *q, F *scale, F *min) {
    V high[8];
    k_scales(c, scale, min);
    load_words(c, 16, high);
    load_words(c, 32, high + 4);
    for (int j = 0; j < 4; j++, q += 32 * NV) {
        V v[8];
        load_words(c, 48 + 32 * j, v);
        load_words(c, 64 + 32 * j, v + 4);
        UNROLL
        for (int s = 0; s < 16; s++) {
            V low_bit = field(high[s / 2], s % 2 * 8 + 2 * j, 1) << 4;
            V high_bit = field(high[s / 2], s % 2 * 8 + 2 * j + 1, 1) << 4;
            q[s * NV] = field(v[s / 2], s % 2 * 8, 15) | low_bit;
            q[(s + 16) * NV] = field(v[s / 2], s % 2 * 8 + 4, 15) | high_bit;
        }
    }
}

/* Low 4 bits [256], high 2 bits [256], i8 scales[16], f16 d. */
INLINE void q6_k(Column c, V *q, F *scale, F *min) {
    V s[4];
    F d = half_lanes(load_word(c, 194, 3) >> 16);
    load_words(c, 192, s);
    for (int g = 0; g < 16; g++)
        scale[g * NV] = d * to_float(s[g / 4] << (24 - g % 4 * 8) >> 24);
    for (int half = 0; half < 2; half++) {
        V v[16], high[8];
        for (int j = 0; j < 4; j++) load_words(c, 64 * half + 16 * j, v + 4 * j);
        load_words(c, 128 + 32 * half, high);
        load_words(c, 144 + 32 * half, high + 4);
        for (int g = 0; g < 4; g++, q += 16 * NV)
            UNROLL
            for (int s = 0; s < 16; s++)
                q[s * NV] = minus(field(v[g % 2 * 8 + s / 2], s % 2 * 8 + g / 2 * 4, 15) |
                                  field(high[s / 2], s % 2 * 8 + 2 * g, 3) << 4, 32);
    }
}

