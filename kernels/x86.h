// x86.h: what AVX2, AVX2 with VNNI, AVX-512 and AMX share, private to kernels/.
//
// Functions carry their instruction set as an attribute, so that one program is built without
// -march and runs on every machine. All here need AVX2 only, but for the last chapter.
#ifndef X86_H
#define X86_H
#ifdef __x86_64__
#include "kernels/simd.h"

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

// The sum and the largest of 8 lanes.
AVX2_INLINE float hsum(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

AVX2_INLINE float hmax(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// Eight numbers of b from i on, in f32 or half precision.
AVX2_INLINE __m256 load8(const void *b, size_t i, const bool half) {
    if (half) return _mm256_cvtph_ps(_mm_loadu_si128((const void *)((const uint16_t *)b + i)));
    return _mm256_loadu_ps((const float *)b + i);
}

// ---- inputs in 8 bits ----

// Largest |x[i]| of n, a multiple of 8.
AVX2_INLINE float abs_max(const float *x, int n) {
    const __m256 abs = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 m = _mm256_setzero_ps();
    for (int i = 0; i < n; i += 8) m = _mm256_max_ps(m, _mm256_and_ps(_mm256_loadu_ps(x + i), abs));
    return hmax(m);
}

// Two registers of quotients as 16-bit integers.
AVX2_INLINE __m256i round16(const float *x, __m256 inv) {
    __m256i lo = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inv));
    __m256i hi = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), inv));
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
}

// A row. The groups' maxima rest where their scales will be.
AVX2_INLINE void quantize_bytes(const Activations *a, int t) {
    const size_t first = (size_t)t * a->stride / QGROUP, end = first + a->stride / QGROUP;
    float max = 0.0f;
    for (size_t g = first; g < end; g++) {
        a->scale[g] = abs_max(a->x + g * QGROUP, QGROUP);
        max = max_of(max, a->scale[g]);
    }
    for (size_t g = first; g < end; g++) {
        const float *x = a->x + g * QGROUP;
        float scale = group_scale(max, a->scale[g]);
        __m256 inv = _mm256_set1_ps(group_inverse(max, scale));
        __m256i lo = round16(x, inv), hi = round16(x + 16, inv);
        _mm256_storeu_si256((void *)(a->q + g * QGROUP),
                            _mm256_permute4x64_epi64(_mm256_packs_epi16(lo, hi), 0xd8));
        __m256i sum = _mm256_madd_epi16(_mm256_add_epi16(lo, hi), _mm256_set1_epi16(1));
        store_group(a, g, scale, (int)hsum(_mm256_cvtepi32_ps(sum)));
    }
    a->unit[t] = row_unit(max);
}

// ---- weights in 16 bits ----

// Half a line of 16-bit weights, [8 rows][2 columns], as its two columns. bf16: they are the halves
// of 32-bit lanes. f16: bytes are shuffled so that four rows of one column lie together, then
// converted.
AVX2_INLINE void split_line(const uint8_t *line, const bool bf16, __m256 *even, __m256 *odd) {
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                           0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    __m256i v = _mm256_loadu_si256((const void *)line);
    if (bf16) {
        *even = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
        *odd = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000)));
    } else {
        v = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, order), 0xd8);
        *even = _mm256_cvtph_ps(_mm256_castsi256_si128(v));
        *odd = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
    }
}

// A block of a panel of 16-bit weights as f32 [cols][16].
AVX2 static inline void unpack_halves(float *out, const Matrix *w, int panel, int c0, int cols) {
    const uint8_t *line = w->data + ((size_t)panel * w->cols_padded + c0) * PANEL * 2;
    for (int c = 0; c < cols; c += 2, line += 64, out += 2 * PANEL) {
        for (int half = 0; half < 2; half++) {
            __m256 even, odd;
            split_line(line + 32 * half, w->type == W_BF16, &even, &odd);
            _mm256_storeu_ps(out + 8 * half, even);
            _mm256_storeu_ps(out + PANEL + 8 * half, odd);
        }
    }
}

// One token, straight from the file: the sums of the blocked product, in its order.
AVX2_INLINE void half_row(float *out, const Matrix *w, int panel, const float *x, const bool bf16) {
    const uint8_t *line = w->data + (size_t)panel * w->cols_padded * PANEL * 2;
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int c = 0; c < w->cols_padded; c += 2, line += 64) {
        UNROLL for (int half = 0; half < 2; half++) {
            __m256 even, odd;
            split_line(line + 32 * half, bf16, &even, &odd);
            sum[half] = _mm256_fmadd_ps(_mm256_broadcast_ss(x + c), even, sum[half]);
            sum[half] = _mm256_fmadd_ps(_mm256_broadcast_ss(x + c + 1), odd, sum[half]);
        }
    }
    _mm256_storeu_ps(out, sum[0]);
    _mm256_storeu_ps(out + 8, sum[1]);
}

// Up to two tokens of 16-bit weights, for which unpacking to memory does not pay; false for all
// else.
AVX2 static inline bool few_halves(const PanelProduct *p) {
    if (p->t1 - p->t0 > 2 || p->w->type == W_F32) return false;
    for (int t = p->t0; t < p->t1; t++) {
        const float *row = p->x->x + (size_t)t * p->x->stride;
        if (p->w->type == W_BF16)
            half_row(p->out + t * p->ld, p->w, p->panel, row, true);
        else
            half_row(p->out + t * p->ld, p->w, p->panel, row, false);
    }
    return true;
}

// ---- weights in 8 and 4 bits as bytes ----

// How unsigned bytes of weights meet signed bytes of activations. MADDUBS sums in 16 bits, which
// hold a group of 32 columns for nibbles (16 * 15 * 127 = 30480) but not for bytes. VNNI sums four
// products in 32 bits; the instruction has one encoding where there is AVX-512, another on machines
// without, and is written out because compilers want a whole function to be for one of them.
typedef enum { MADDUBS, VNNI_EVEX, VNNI_VEX } ByteDot;

#if defined __clang__ ? __clang_major__ >= 12 : __GNUC__ >= 11
enum { KNOWS_VEX = true };  // so does the assembler of its time
#define VPDPBUSD_VEX "%{vex%} vpdpbusd %2, %1, %0"
#else
enum { KNOWS_VEX = false };
#define VPDPBUSD_VEX ""  // never reached: choose.c asks KNOWS_VEX
#endif

// acc += w . a, of four neighbours (MADDUBS: of two).
AVX2_INLINE __m256i dot_bytes(__m256i acc, __m256i w, __m256i a, const ByteDot dot) {
    if (dot == MADDUBS) {
        acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, a));
        __asm__("" : "+x"(acc));  // as add_in_order
    } else if (dot == VNNI_EVEX) {
        __asm__("vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
    } else {
        __asm__(VPDPBUSD_VEX : "+x"(acc) : "x"(w), "x"(a));
    }
    return acc;
}

// Weights of 4 columns by 8 rows as unsigned bytes: q8 128 more than they are, q4 the nibble.
AVX2_INLINE __m256i load_bytes(const uint8_t *line, int quad, int half, const bool q4) {
    line += 64 * (q4 ? quad / 2 : quad) + 32 * half;
    __m256i v = _mm256_loadu_si256((const void *)line);
    if (!q4) return _mm256_xor_si256(v, _mm256_set1_epi8((char)0x80));
    if (quad % 2) v = _mm256_srli_epi16(v, 4);
    return _mm256_and_si256(v, _mm256_set1_epi8(15));
}

// What making the weights unsigned added to a group's sum, negated: 128 sum(q) for q8, 8 sum(q)
// for q4 without offsets.
AVX2_INLINE __m256i unsigned_shift(int shift, const bool q4, const bool offset) {
    if (offset) return _mm256_setzero_si256();
    return q4 ? _mm256_srai_epi32(_mm256_set1_epi32(shift), 4) : _mm256_set1_epi32(shift);
}

// T tokens against a whole panel, straight from the file. The same integers as everywhere.
AVX2_INLINE void byte_tile(const IntPanel *p, int t, const bool q4, const bool offset,
                           const ByteDot dot, const int T) {
    const Activations *x = p->x;
    const int8_t *q = x->q + (size_t)t * x->stride;
    size_t at = (size_t)t * x->stride / QGROUP, step = x->stride / QGROUP;
    float sum[4][PANEL] = {{0}};
    for (int g = 0; g < p->groups; g++, at++, q += QGROUP) {
        const uint8_t *line = p->line + (size_t)g * QGROUP * PANEL / (q4 ? 2 : 1);
        __m256i acc[4][2];
        UNROLL for (int i = 0; i < T; i++) acc[i][0] = acc[i][1] =
            unsigned_shift(x->shift[at + i * step], q4, offset || dot == MADDUBS);
        UNROLL for (int quad = 0; quad < QGROUP / 4; quad++) {
            __m256i w0 = load_bytes(line, quad, 0, q4), w1 = load_bytes(line, quad, 1, q4);
            UNROLL for (int i = 0; i < T; i++) {
                int a;
                memcpy(&a, q + (size_t)i * x->stride + 4 * quad, 4);
                acc[i][0] = dot_bytes(acc[i][0], w0, _mm256_set1_epi32(a), dot);
                acc[i][1] = dot_bytes(acc[i][1], w1, _mm256_set1_epi32(a), dot);
            }
        }
        UNROLL for (int h = 0; h < 2; h++) {
            __m256 scale = load8(p->scale, (size_t)g * PANEL + 8 * h, true);
            __m256 shift = offset ? load8(p->offset, (size_t)g * PANEL + 8 * h, true) : scale;
            UNROLL for (int i = 0; i < T; i++) {
                __m256i n = acc[i][h];
                if (dot == MADDUBS)
                    n = _mm256_add_epi32(_mm256_madd_epi16(n, _mm256_set1_epi16(1)),
                                         unsigned_shift(x->shift[at + i * step], q4, offset));
                __m256 s = _mm256_mul_ps(scale, _mm256_set1_ps(x->scale[at + i * step]));
                __m256 v = _mm256_loadu_ps(sum[i] + 8 * h);
                v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(n), s, v);
                if (offset) v = _mm256_fmadd_ps(shift, _mm256_set1_ps(x->sum[at + i * step]), v);
                _mm256_storeu_ps(sum[i] + 8 * h, v);
            }
        }
    }
    for (int i = 0; i < T; i++) {
        const __m256 unit = _mm256_set1_ps(x->unit[t + i]);
        float *out = p->out + (t + i) * p->ld;
        UNROLL for (int h = 0; h < PANEL; h += 8)
            _mm256_storeu_ps(out + h, _mm256_mul_ps(_mm256_loadu_ps(sum[i] + h), unit));
    }
}

// A panel, four tokens at a time while they last.
AVX2_INLINE void matmul_bytes(const PanelProduct *p, const bool q4, const bool offset,
                              const ByteDot dot) {
    const IntPanel ip = int_panel(p, 0);
    int t = p->t0, t1 = p->t1;
    for (; t + 4 <= t1; t += 4) byte_tile(&ip, t, q4, offset, dot, 4);
    for (; t < t1; t++) byte_tile(&ip, t, q4, offset, dot, 1);
}

AVX2_INLINE void matmul_nibbles(const PanelProduct *p, const ByteDot dot) {
    if (p->w->offset)
        matmul_bytes(p, true, true, dot);
    else
        matmul_bytes(p, true, false, dot);
}

// ---- peaks ----

AVX2_INLINE float peak_bytes(int rounds, const ByteDot dot) {
    __m256i acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = _mm256_set1_epi32(i);
    for (int r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            dot_bytes(acc[i], acc[i], _mm256_set1_epi8(3), dot);
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm256_add_epi32(acc[0], acc[i]);
    return hsum(_mm256_cvtepi32_ps(acc[0]));
}

// ---- bf16, of AVX-512 and AMX ----

#define BF16_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c"
#define BF16 __attribute__((target(BF16_TARGET)))
#define BF16_INLINE static inline __attribute__((always_inline, target(BF16_TARGET)))

// Sixteen halves and sixteen others as pairs: 0 and 16, 1 and 17 and so on.
BF16_INLINE __m512i alternate(__m512i v) {
    static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), v);
}

#endif
#endif
