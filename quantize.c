// Products of a matrix of 8 or 4 bits with a few vectors, and the matrix in floats, on CPUs with AVX-512 VNNI.
// quantize.py compiles this where it runs, and says how weights are packed for it. In order: numbers, vectors in
// bytes, the product, the matrix. Letters: N outputs, K inputs, G inputs of a group, M vectors.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))

typedef __m512 floats;          // 16 lanes
typedef __m512i ints;           // 16 lanes, or 64 bytes

// ---- Numbers

INLINE floats widen(const void *x) {            // 16 bfloat16, the upper halves of floats
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x)), 16));
}

INLINE floats load(const void *x, long i, int half) {
    return half ? widen((const uint16_t *)x + i) : _mm512_loadu_ps((const float *)x + i);
}

INLINE void store(void *y, long i, floats x, int half) {
    if (!half) {
        _mm512_storeu_ps((float *)y + i, x);
        return;
    }
    ints bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));        // to the nearest, or even
    _mm256_storeu_si256((void *)((uint16_t *)y + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

// The next 16 rows x 8 columns of the matrix. A lane holds 4 columns of its row: the first ones in a, the others in b.
INLINE const uint8_t *next(const uint8_t *w, int bits, ints *a, ints *b) {
    ints few = _mm512_set1_epi8(15), both = _mm512_loadu_si512(w);
    *a = bits == 8 ? both : _mm512_and_si512(both, few);
    *b = bits == 8 ? _mm512_loadu_si512(w + 64) : _mm512_and_si512(_mm512_srli_epi16(both, 4), few);
    return w + 16 * bits;
}

// ---- Vectors in bytes

// Two digits keep 16 bits of x: x = step * (high + low / 254). Gives the step; each group's sums of both go to sums.
INLINE float digits(const void *x, int half, long K, long G, int8_t *high, int8_t *low, int32_t (*sums)[2]) {
    floats most = _mm512_set1_ps(1e-30f), nan = _mm512_setzero_ps();
    for (long k = 0; k < K; k += 16) {
        floats v = load(x, k, half);
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
        nan = _mm512_fmadd_ps(v, _mm512_setzero_ps(), nan);     // what is no number must not become one
    }
    float step = _mm512_reduce_max_ps(most) / 127;
    for (long g = 0; g < K / G; g++) {
        ints of_high = _mm512_setzero_si512(), of_low = of_high;
        for (long k = g * G; k < g * G + G; k += 16) {
            floats v = _mm512_mul_ps(load(x, k, half), _mm512_set1_ps(1 / step));
            ints h = _mm512_cvtps_epi32(v);
            ints l = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(v, _mm512_cvtepi32_ps(h)), _mm512_set1_ps(254)));
            _mm_storeu_si128((void *)(high + k), _mm512_cvtsepi32_epi8(h));
            _mm_storeu_si128((void *)(low + k), _mm512_cvtsepi32_epi8(l));
            of_high = _mm512_add_epi32(of_high, h), of_low = _mm512_add_epi32(of_low, l);
        }
        sums[g][0] = _mm512_reduce_add_epi32(of_high), sums[g][1] = _mm512_reduce_add_epi32(of_low);
    }
    return step + _mm512_reduce_add_ps(nan);
}

// ---- The product

INLINE ints dot(ints sum, ints w, const int8_t *x) {            // 4 columns times 4 numbers, for 16 rows
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(*(const int32_t *)x));
}

// 16 rows with R vectors: y[r] = x[r] W^T / step[r].
INLINE void tile(int bits, int R, const uint8_t *w, const uint16_t *scale, long K, long G, const int8_t *high,
                 const int8_t *low, const int32_t (*sums)[2], floats *y) {
    int zero = 1 << (bits - 1);                                 // unsigned integers stand this much too high
    for (int r = 0; r < R; r++)
        y[r] = _mm512_setzero_ps();
    for (long g = 0; g < K / G; g++, scale += 32) {
        ints h[2][4], l[2][4], a, b;                            // two sums: the next need not wait for the last
        for (int r = 0; r < R; r++) {
            const int32_t *sum = sums[r * (K / G) + g];
            h[0][r] = _mm512_set1_epi32(-zero * sum[0]), l[0][r] = _mm512_set1_epi32(-zero * sum[1]);
            h[1][r] = l[1][r] = _mm512_setzero_si512();
            y[r] = _mm512_fmadd_ps(_mm512_set1_ps(sum[0] + sum[1] / 254.f), widen(scale + 16), y[r]);
        }
        for (long k = g * G; k < g * G + G; k += 8) {
            for (int line = 0; line < 16 * bits; line += 64)
                _mm_prefetch((const void *)(w + 2048 + line), _MM_HINT_T1);
            w = next(w, bits, &a, &b);
            for (int r = 0; r < R; r++) {
                h[0][r] = dot(h[0][r], a, high + r * K + k), h[1][r] = dot(h[1][r], b, high + r * K + k + 4);
                l[0][r] = dot(l[0][r], a, low + r * K + k), l[1][r] = dot(l[1][r], b, low + r * K + k + 4);
            }
        }
        for (int r = 0; r < R; r++) {
            floats of_high = _mm512_cvtepi32_ps(_mm512_add_epi32(h[0][r], h[1][r]));
            floats of_low = _mm512_cvtepi32_ps(_mm512_add_epi32(l[0][r], l[1][r]));
            y[r] = _mm512_fmadd_ps(_mm512_fmadd_ps(of_low, _mm512_set1_ps(1 / 254.f), of_high), widen(scale), y[r]);
        }
    }
}

INLINE void multiplied(int bits, const uint8_t *w, const uint16_t *scale, const void *x, void *y, int half,
                       long M, long N, long K, long G) {
    int8_t (*high)[K] = malloc(2 * M * K), (*low)[K] = high + M;
    int32_t sums[M][K / G][2];
    float step[M];
    for (long m = 0; m < M; m++)
        step[m] = digits((const char *)x + m * K * (half ? 2 : 4), half, K, G, high[m], low[m], sums[m]);

    #pragma omp parallel for
    for (long n = 0; n < N; n += 16)
        for (long m = 0, R; m < M; m += R) {                    // from the second tile on out of the cache
            const uint8_t *rows = w + n * K * bits / 8;
            const uint16_t *s = scale + n * (K / G) * 2;
            floats part[4];
            R = M - m < 4 ? 1 : 4;
            if (R == 1)
                tile(bits, 1, rows, s, K, G, high[m], low[m], sums[m], part);
            else
                tile(bits, 4, rows, s, K, G, high[m], low[m], sums[m], part);
            for (int r = 0; r < R; r++)
                store(y, (m + r) * N + n, _mm512_mul_ps(part[r], _mm512_set1_ps(step[m + r])), half);
        }
    free(high);
}

// y (M, N) = x (M, K) W^T, both bfloat16 (half) or float.
void multiply(int bits, const uint8_t *w, const uint16_t *scale, const void *x, void *y, int half,
              long M, long N, long K, long G) {
    bits == 8 ? multiplied(8, w, scale, x, y, half, M, N, K, G) : multiplied(4, w, scale, x, y, half, M, N, K, G);
}

// ---- The matrix

// W^T (K, N), bfloat16 (half) or float, 32 of its rows at a time.
void expand(int bits, const uint8_t *w, const uint16_t *scale, void *y, int half, long N, long K, long G) {
    ints zero = _mm512_set1_epi32(1 << (bits - 1)), byte = _mm512_set1_epi32(255);

    #pragma omp parallel for
    for (long start = 0; start < K; start += 32)
        for (long n = 0; n < N; n += 16) {
            const uint8_t *at = w + (n * K + start * 16) * bits / 8;
            const uint16_t *s = scale + (n * (K / G) + start / G * 16) * 2;
            for (long k = start; k < start + 32; k += 8) {
                ints part[2];
                at = next(at, bits, part, part + 1);
                for (long i = 0; i < 8; i++) {
                    ints q = _mm512_and_si512(_mm512_srli_epi32(part[i / 4], i % 4 * 8), byte);
                    floats v = _mm512_cvtepi32_ps(_mm512_sub_epi32(q, zero));
                    store(y, (k + i) * N + n, _mm512_fmadd_ps(v, widen(s), widen(s + 16)), half);
                }
            }
        }
}
