/* Elementary functions of both native libraries, written so that compilers vectorise them. */
#include <math.h>
#include <stdint.h>

/* e^x to about 1e-7 relative: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2] (Cephes). */
static inline float exp_fast(float x)
{
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
    return p * power.f;
}

static inline float silu(float x) { return x / (1.0f + exp_fast(-x)); }

/* 0.5 (1 + tanh z) = 1 / (1 + e^-2z) */
static inline float gelu_tanh(float x)
{
    float z = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp_fast(-2.0f * z));
}
