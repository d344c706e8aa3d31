/* One activation row times Q4_0, Q4_1 or Q8_0 weights, on AVX2.
 *
 * With a single activation row a panel would be unpacked, stored and read for one use. Here a
 * vector holds neighbours of one weight row instead, straight from its block, and eight rows' sums
 * are turned into one row a lane at the end of a block. From there on the arithmetic, and so the
 * result, is bit for bit that of multiply_tile().
 */

INLINE V halves_dot(__m256i low, __m256i high, const int16_t *x) {
    const __m256i *at = (const __m256i *)x; /* 32 activations in their natural order */
    return (V)_mm256_add_epi32(_mm256_madd_epi16(low, _mm256_loadu_si256(at)),
                               _mm256_madd_epi16(high, _mm256_loadu_si256(at + 1)));
}

INLINE V nibbles_dot(Bytes p, int16_t offset, const int16_t *x) {
    __m128i q = _mm_loadu_si128((const __m128i *)p), mask = _mm_set1_epi8(15);
    __m256i low = _mm256_cvtepu8_epi16(_mm_and_si128(q, mask));
    __m256i high = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(q, 4), mask));
    if (offset) {
        low = _mm256_sub_epi16(low, _mm256_set1_epi16(offset));
        high = _mm256_sub_epi16(high, _mm256_set1_epi16(offset));
    }
    return halves_dot(low, high, x);
}

INLINE V q4_0_dot(Bytes p, const int16_t *x) { return nibbles_dot(p + 2, 8, x); }
INLINE V q4_1_dot(Bytes p, const int16_t *x) { return nibbles_dot(p + 4, 0, x); }
INLINE V q8_0_dot(Bytes p, const int16_t *x) {
    const __m128i *q = (const __m128i *)(p + 2);
    return halves_dot(_mm256_cvtepi8_epi16(_mm_loadu_si128(q)),
                      _mm256_cvtepi8_epi16(_mm_loadu_si128(q + 1)), x);
}

/* Lane r of the result: the sum of s[r]'s lanes. */
INLINE V sum_lanes(const V s[8]) {
    __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32((__m256i)s[0], (__m256i)s[1]),
                                  _mm256_hadd_epi32((__m256i)s[2], (__m256i)s[3]));
    __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32((__m256i)s[4], (__m256i)s[5]),
                                  _mm256_hadd_epi32((__m256i)s[6], (__m256i)s[7]));
    return (V)_mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                               _mm256_permute2x128_si256(a, b, 0x31));
}

/* name_single(): y[n:n+8] of the only activation row; rows past the last one repeat it. */
#define DEFINE_SINGLE(name, bytes, has_min)                                               \
    static void name##_single(const Job *j, int64_t n, float *y) {                        \
        Bytes p[8];                                                                       \
        F sum = {0};                                                                      \
        for (int r = 0; r < 8; r++)                                                       \
            p[r] = j->w + (n + r < j->N ? n + r : j->N - 1) * j->stride;                  \
        for (int64_t b = 0; b < j->K / 32; b++) {                                         \
            V s[8], words;                                                                \
            UNROLL                                                                        \
            for (int r = 0; r < 8; r++) {                                                 \
                s[r] = name##_dot(p[r], j->natural + 32 * b);                             \
                words[r] = has_min ? word_at(p[r]) : half_at(p[r]);                       \
                __builtin_prefetch(p[r] + 8 * j->stride, 0, 2);                           \
                p[r] += bytes;                                                            \
            }                                                                             \
            F scale = half_lanes(words) * j->xs[b];                                       \
            sum = multiply_add(to_float(sum_lanes(s)), scale, sum);                       \
            if (has_min)                                                                  \
                sum = multiply_add(half_lanes(words >> 16), spread_float(j->sums[b]), sum); \
        }                                                                                 \
        memcpy(y, &sum, sizeof sum);                                                      \
    }
DEFINE_SINGLE(q4_0, 18, 0)
DEFINE_SINGLE(q4_1, 20, 1)
DEFINE_SINGLE(q8_0, 34, 0)

/* The function for a format's type code, NULL where panels serve. */
static Single find_single(int type) {
    return type == 2 ? q4_0_single : type == 3 ? q4_1_single : type == 8 ? q8_0_single : NULL;
}
