// Products of a matrix of 8 or 4 bits with vectors, and the matrix in floats, on CPUs with AVX-512 VNNI, better AMX.
// quantize.py compiles this where it runs; QuantLinear.pack says how weights lie. In order: numbers, vectors in bytes,
// products, the matrix. Letters: N outputs, K inputs, G inputs of a group, M vectors.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define INLINE static inline __attribute__((always_inline))

typedef __m512 floats;          // 16 lanes
typedef __m512i ints;           // 16 lanes, or 64 bytes

// ---- Numbers

INLINE floats widen(const void *x) {                            // 16 bfloat16, the upper halves of floats
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

INLINE void prefetch(const uint8_t *w, long n) {
    for (long i = 0; i < n; i += 64)
        _mm_prefetch((const void *)(w + 2048 + i), _MM_HINT_T1);
}

// ---- Vectors in bytes

// Two digits keep 16 bits of x: x = step * (high + low / 254). Gives the step; each group's sums of both go to sums.
static float digits(const void *x, int half, long K, long G, int8_t *high, int8_t *low, int32_t (*sums)[2]) {
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

// ---- Products

// What a group adds to 16 outputs: h and l are its sums of products, whose unsigned weights stand `zero` too high.
INLINE floats add(floats y, ints h, ints l, const int32_t *sum, int zero, const uint16_t *scale) {
    floats of_high = _mm512_cvtepi32_ps(_mm512_sub_epi32(h, _mm512_set1_epi32(zero * sum[0])));
    floats of_low = _mm512_cvtepi32_ps(_mm512_sub_epi32(l, _mm512_set1_epi32(zero * sum[1])));
    y = _mm512_fmadd_ps(_mm512_fmadd_ps(of_low, _mm512_set1_ps(1 / 254.f), of_high), widen(scale), y);
    return _mm512_fmadd_ps(_mm512_set1_ps(sum[0] + sum[1] / 254.f), widen(scale + 16), y);
}

INLINE ints dot(ints sum, ints w, const int8_t *x) {            // 4 columns times 4 numbers, for 16 rows
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(*(const int32_t *)x));
}

// 16 rows with a vector: x W^T / step.
INLINE floats one(int bits, const uint8_t *w, const uint16_t *scale, long K, long G, const int8_t *high,
                  const int8_t *low, const int32_t (*sums)[2]) {
    floats y = _mm512_setzero_ps();
    for (long g = 0; g < K / G; g++, scale += 32) {
        ints h = _mm512_setzero_si512(), h2 = h, l = h, l2 = h, a, b;       // two sums each: none waits for the last
        for (long k = g * G; k < g * G + G; k += 8) {
            prefetch(w, 16 * bits);
            w = next(w, bits, &a, &b);
            h = dot(h, a, high + k), h2 = dot(h2, b, high + k + 4);
            l = dot(l, a, low + k), l2 = dot(l2, b, low + k + 4);
        }
        y = add(y, _mm512_add_epi32(h, h2), _mm512_add_epi32(l, l2), sums[g], 1 << (bits - 1), scale);
    }
    return y;
}

// 16 rows with R <= 16 vectors: AMX multiplies tiles of 16 x 64 bytes. The vectors lie K bytes apart; it reads 16 ones.
__attribute__((target("amx-tile,amx-int8")))
static void tile(int bits, int R, const uint8_t *w, const uint16_t *scale, long K, long G, const int8_t *high,
                 const int8_t *low, const int32_t (*sums)[2], floats *y) {
    static const struct { uint8_t palette, rest[15]; uint16_t width[16]; uint8_t rows[16]; } shape = {
        1, {0}, {64, 64, 64, 64, 64}, {16, 16, 16, 16, 16}};
    ints bytes[16], h[16], l[16];
    for (int r = 0; r < R; r++)
        y[r] = _mm512_setzero_ps();
    _tile_loadconfig(&shape);
    for (long g = 0; g < K / G; g++, scale += 32) {
        _tile_zero(0);
        _tile_zero(1);
        for (long k = g * G; k < g * G + G; k += 64, w += 128 * bits) {
            prefetch(w, 128 * bits);
            for (int i = 0; i < 8 && bits == 4; i++)
                next(w + 64 * i, bits, bytes + 2 * i, bytes + 2 * i + 1);
            __asm__ volatile("" ::: "memory");                  // older compilers do not know that a tile reads bytes
            _tile_loadd(2, bits == 8 ? (const void *)w : bytes, 64);
            _tile_loadd(3, high + k, K);
            _tile_loadd(4, low + k, K);
            _tile_dpbsud(0, 3, 2);
            _tile_dpbsud(1, 4, 2);
        }
        _tile_stored(0, h, 64);
        _tile_stored(1, l, 64);
        for (int r = 0; r < R; r++)
            y[r] = add(y[r], h[r], l[r], sums[r * (K / G) + g], 1 << (bits - 1), scale);
    }
    _tile_release();
}

static int tiles;                                               // whether AMX may be used

// Asks the system for AMX, and says how many vectors multiply should get at most: more are quicker by expand.
int few(void) {
    tiles = __builtin_cpu_supports("amx-int8") && !syscall(SYS_arch_prctl, 0x1023, 18);     // for tiles' contents
    return tiles ? 128 : 16;
}

INLINE void products(int bits, const uint8_t *w, const uint16_t *scale, const void *x, void *y, int half,
                     long M, long N, long K, long G) {
    int8_t (*high)[K] = malloc(2 * (M + 15) * K), (*low)[K] = high + M + 15;
    int32_t (*sums)[K / G][2] = malloc(M * sizeof *sums);
    float step[M];

    #pragma omp parallel for if (M > 4)
    for (long m = 0; m < M; m++)
        step[m] = digits((const char *)x + m * K * (half ? 2 : 4), half, K, G, high[m], low[m], sums[m]);

    #pragma omp parallel for
    for (long n = 0; n < N; n += 16)
        for (long m = 0, R; m < M; m += R) {                    // from the second round on out of the cache
            const uint8_t *rows = w + n * K * bits / 8;
            const uint16_t *s = scale + n * (K / G) * 2;
            floats part[16];
            R = tiles && M > 1 && G % 64 == 0 ? (M - m < 16 ? M - m : 16) : 1;
            if (R > 1)
                tile(bits, R, rows, s, K, G, high[m], low[m], sums[m], part);
            else
                part[0] = one(bits, rows, s, K, G, high[m], low[m], sums[m]);
            for (int r = 0; r < R; r++)
                store(y, (m + r) * N + n, _mm512_mul_ps(part[r], _mm512_set1_ps(step[m + r])), half);
        }
    free(high), free(sums);
}

// y (M, N) = x (M, K) W^T, both bfloat16 (half) or float.
void multiply(int bits, const uint8_t *w, const uint16_t *scale, const void *x, void *y, int half,
              long M, long N, long K, long G) {
    bits == 8 ? products(8, w, scale, x, y, half, M, N, K, G) : products(4, w, scale, x, y, half, M, N, K, G);
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
