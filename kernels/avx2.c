// avx2.c: AVX2 with FMA and F16C: x86-64 since Haswell (2013).
//
// 16 registers of 8 floats. Products keep a tile of results in registers while the inner dimension
// passes; q8 and q4 weights meet their inputs in products of 16-bit integers or of bytes. Shapes
// that no vector fits end in scalar.c.
#define DELTA_BYTES 32
#include "kernels/x86.h"

#ifdef __x86_64__
#define TARGET AVX2
#define INLINE AVX2_INLINE

// ---- half precision ----

TARGET static void f16_to_f32(float *out, const uint16_t *in, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(in + i))));
    kernels_scalar.f16_to_f32(out + i, in + i, n - i);
}

TARGET static void f32_to_f16(uint16_t *out, const float *in, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm_storeu_si128((void *)(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
    }
    kernels_scalar.f32_to_f16(out + i, in + i, n - i);
}

// ---- vectors ----

// exp(x) = 2^n exp(r), |r| <= ln2 / 2, a polynomial of degree 6 for exp(r). Within 2 ulp (tests
// measure 1.1) of the true value; below -87.3 the result is 0, above 88.3 it stays at exp(88.3).
INLINE __m256 exp_lanes(__m256 x) {
    const __m256 lo = _mm256_set1_ps(-87.33f), hi = _mm256_set1_ps(88.37f);
    __m256 in_range = _mm256_cmp_ps(x, lo, _CMP_NLT_UQ);  // true for NaN, which must stay one
    x = _mm256_min_ps(hi, x);
    __m256 n =
        _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145752f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), r);
    __m256 p = _mm256_set1_ps(1.0f / 720);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), e));
    return _mm256_and_ps(p, in_range);
}

TARGET static void rmsnorm(float *out, const float *x, const float *w, int n, float eps) {
    __m256 acc = _mm256_setzero_ps();
    int i = 0;
    for (; i + 8 <= n; i += 8)
        acc = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i), acc);
    float ss = hsum(acc);
    for (; i < n; i++) ss += x[i] * x[i];
    float r = 1.0f / sqrtf(ss / (float)n + eps);
    for (i = 0; i + 8 <= n; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(r));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(v, _mm256_loadu_ps(w + i)));
    }
    for (; i < n; i++) out[i] = x[i] * r * w[i];
}

TARGET static void add(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    kernels_scalar.add(x + i, y + i, n - i);
}

TARGET static void scale(float *x, float a, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(a)));
    kernels_scalar.scale(x + i, a, n - i);
}

// x / (1 + exp(-u)) * y
INLINE __m256 gate(__m256 x, __m256 u, __m256 y) {
    __m256 e = exp_lanes(_mm256_sub_ps(_mm256_setzero_ps(), u));
    return _mm256_mul_ps(_mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), e)), y);
}

TARGET static void delta_rule(const DeltaRule *d) { delta_rule_lanes(d); }

TARGET static void silu_mul(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        _mm256_storeu_ps(x + i, gate(v, v, _mm256_loadu_ps(y + i)));
    }
    kernels_scalar.silu_mul(x + i, y + i, n - i);
}

TARGET static void gelu_mul(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i), v2 = _mm256_mul_ps(v, v);
        __m256 u = _mm256_fmadd_ps(_mm256_mul_ps(v2, v), _mm256_set1_ps(GELU_B), v);
        u = _mm256_mul_ps(u, _mm256_set1_ps(GELU_A));
        _mm256_storeu_ps(x + i, gate(v, u, _mm256_loadu_ps(y + i)));
    }
    kernels_scalar.gelu_mul(x + i, y + i, n - i);
}

// ---- scores ----

TARGET static void max_rows(float *max, const float *s, int n) {
    for (int i = 0; i < n; i++, s += PAGE) {
        __m256 m = _mm256_loadu_ps(s);
        for (int j = 8; j < PAGE; j += 8) m = _mm256_max_ps(m, _mm256_loadu_ps(s + j));
        max[i] = hmax(m);
    }
}

TARGET static float exp64(float *s, float m) {
    __m256 sum = _mm256_setzero_ps();
    for (int i = 0; i < PAGE; i += 8) {
        __m256 e = exp_lanes(_mm256_sub_ps(_mm256_loadu_ps(s + i), _mm256_set1_ps(m)));
        _mm256_storeu_ps(s + i, e);
        sum = _mm256_add_ps(sum, e);
    }
    return hsum(sum);
}

TARGET static void max_into(float *run, const float *s, float b) {
    for (int i = 0; i < PAGE; i += 8) {
        __m256 v = _mm256_add_ps(_mm256_loadu_ps(s + i), _mm256_set1_ps(b));
        _mm256_storeu_ps(run + i, _mm256_max_ps(v, _mm256_loadu_ps(run + i)));
    }
}

// ---- inputs in 8 and 16 bits ----

// A row of q16.
INLINE void quantize_words(const Activations *a, int t) {
    const float *x = a->x + (size_t)t * a->stride;
    float max = abs_max(x, a->stride);
    __m256 inv = _mm256_set1_ps(wide_inverse(max));
    int16_t *q = a->q16 + (size_t)t * a->stride;
    for (int i = 0; i < a->stride; i += 16)
        _mm256_storeu_si256((void *)(q + i), round16(x + i, inv));
    a->unit16[t] = max / WIDE;
}

TARGET static void quantize(const Activations *a, int t0, int t1) {
    for (int t = t0; t < t1; t++) {
        if (a->for_q8) quantize_words(a, t);
        if (a->for_q4) quantize_bytes(a, t);
    }
}

// ---- products of floats ----

// R rows by C vectors of c, from row i and column j, stay in registers while all of inner passes:
// R * C + C + 1 <= 16.
INLINE void gemm_tile(const Gemm *g, int i, int j, const int R, const int C, const bool half) {
    const size_t ldb = (size_t)g->cols;
    float *c = g->c + (size_t)i * g->ldc + j;
    const float *a = (const float *)g->a + (size_t)i * g->lda;
    __m256 acc[6][4];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) {
            acc[r][v] = g->add ? _mm256_loadu_ps(c + r * g->ldc + 8 * v) : _mm256_setzero_ps();
        }
    }
    for (int k = 0; k < g->inner; k++) {
        if (half) __builtin_prefetch((const uint16_t *)g->ahead + k * ldb + j, 0, 1);
        __m256 b[4];
        UNROLL for (int v = 0; v < C; v++) b[v] = load8(g->b, k * ldb + (size_t)(j + 8 * v), half);
        UNROLL for (int r = 0; r < R; r++) {
            __m256 ar = _mm256_broadcast_ss(a + r * g->lda + k);
            UNROLL for (int v = 0; v < C; v++) acc[r][v] = _mm256_fmadd_ps(ar, b[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) _mm256_storeu_ps(c + r * g->ldc + 8 * v, acc[r][v]);
    }
}

// R rows over all columns, C vectors at a time while they last, then one.
INLINE void gemm_rows(const Gemm *g, int i, const int R, const int C, const bool half) {
    int j = 0;
    for (; j + 8 * C <= g->cols; j += 8 * C) gemm_tile(g, i, j, R, C, half);
    for (; j < g->cols; j += 8) gemm_tile(g, i, j, R, 1, half);
}

// g is a copy: stores through vectors may alias any other struct, whose fields would be read again.
INLINE void gemm(const Gemm g, const bool half) {
    int i = 0;
    for (; i + 6 <= g.n; i += 6) gemm_rows(&g, i, 6, 2, half);
    for (; i + 3 <= g.n; i += 3) gemm_rows(&g, i, 3, 4, half);
    for (; i < g.n; i++) gemm_rows(&g, i, 1, 4, half);
}

TARGET static void gemm_f32(const Gemm *g) {
    if (g->cols % 8)
        kernels_scalar.gemm_f32(g);
    else
        gemm(*g, false);
}

TARGET static void gemm_f16(const Gemm *g) {
    if (g->cols % 8)
        kernels_scalar.gemm_f16(g);
    else
        gemm(*g, true);
}

TARGET static void pack_f16(void *packed, const uint16_t *b, int inner, int cols) {
    f16_to_f32(packed, b, (size_t)inner * cols);
}

// ---- codes ----

// Row r of f = a * scales, as 16-bit integers, each four of them in the order 0, 2, 1, 3; a . min
// is the bias.
TARGET static void fold(Folded *f, int r, const float *a, const Codes *b) {
    const __m256 abs = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    float x[CODE_ROWS];
    __m256 max = _mm256_setzero_ps(), bias = max;
    __m256i sum = _mm256_setzero_si256();
    for (int k = 0; k < b->rows; k += 8) {
        __m256 v = _mm256_loadu_ps(a + k), s = _mm256_mul_ps(v, load8(b->scale, (size_t)k, true));
        __m256 min = b->min ? load8(b->min, (size_t)k, true) : _mm256_setzero_ps();
        bias = _mm256_fmadd_ps(v, min, bias);  // a NaN must be seen, so 0 is a factor too
        max = _mm256_max_ps(max, _mm256_and_ps(s, abs));
        _mm256_storeu_ps(x + k, s);
    }
    float most = hmax(max);
    __m256 inv = _mm256_set1_ps(most > 0.0f ? FOLD_MOST / most : 0.0f);
    uint8_t *out = f->q + (size_t)r * b->rows * 2;
    for (int k = 0; k < b->rows; k += 8, out += 16) {
        __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), inv));
        __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        _mm_storeu_si128((void *)out, _mm_shuffle_epi8(w, order));
        sum = _mm256_add_epi32(sum, _mm256_cvtepi16_epi32(w));  // garbage does not overflow
    }
    f->scale[r] = most / FOLD_MOST;
    f->bias[r] = hsum(bias);
    f->center[r] = code_center(b) * (int)hsum(_mm256_cvtepi32_ps(sum));
}

// Codes of 8 columns, the eights' number n in their block, by 4 rows: even rows and odd rows.
INLINE void load_codes(const uint8_t *block, const int n, const CodeType type, __m256i *even,
                       __m256i *odd) {
    const __m256i mask = _mm256_set1_epi16(type == C_U8 ? 255 : type == C_U4 ? 15 : 3);
    int line = type == C_U8 ? n : type == C_U4 ? n % 2 : 0;
    int shift = type == C_U8 ? 0 : type == C_U4 ? n / 2 * 4 : n * 2;
    __m256i v = _mm256_loadu_si256((const void *)(block + 32 * line));
    *even = _mm256_and_si256(_mm256_srl_epi16(v, _mm_cvtsi32_si128(shift)), mask);
    *odd = _mm256_and_si256(_mm256_srl_epi16(v, _mm_cvtsi32_si128(shift + 8)), mask);
}

// R rows by C eights of columns; C = 4 is a whole block. Folding fills the out-of-order window, so
// that loads of the next codes start late: these are fetched ahead, into the second-level cache,
// since the first has few fill buffers and the product itself would wait for them.
INLINE void codes_tile(const FoldedGemm *g, int i, int j, const int R, const int C,
                       const CodeType type) {
    const size_t block = CODE_LINE >> type, rows = (size_t)g->b->rows;
    size_t step = code_blocks(g->b) * block;
    const uint8_t *at = g->b->data + j / CODE_COLS * block, *q = g->a->q + i * rows * 2;
    const uint8_t *ahead = g->b->ahead + (at - g->b->data);
    __m256i acc[3][4];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) acc[r][v] = _mm256_setzero_si256();
    }
    for (size_t k = 0; k < rows; k += 4, at += step, ahead += step, q += 8) {
        for (int l = 0; l < C * 32 >> type; l += 64) __builtin_prefetch(ahead + l, 0, 1);
        UNROLL for (int v = 0; v < C; v++) {
            __m256i even, odd;
            load_codes(at, C == 4 ? v : j % CODE_COLS / 8 + v, type, &even, &odd);
            UNROLL for (int r = 0; r < R; r++) {
                int pair, next;
                memcpy(&pair, q + r * rows * 2, 4);
                memcpy(&next, q + r * rows * 2 + 4, 4);
                __m256i a = _mm256_madd_epi16(even, _mm256_set1_epi32(pair));
                __m256i b = _mm256_madd_epi16(odd, _mm256_set1_epi32(next));
                acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_add_epi32(a, b));
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) {
            float *c = g->c + (i + r) * g->ldc + j + 8 * v;
            __m256i sum = _mm256_sub_epi32(acc[r][v], _mm256_set1_epi32(g->a->center[i + r]));
            __m256 bias = _mm256_set1_ps(g->a->bias[i + r]);
            if (g->add) bias = _mm256_add_ps(bias, _mm256_loadu_ps(c));
            __m256 scale = _mm256_set1_ps(g->a->scale[i + r]);
            _mm256_storeu_ps(c, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, bias));
        }
    }
}

INLINE void codes_rows(const FoldedGemm *g, int i, const int R, const CodeType type) {
    int j = 0;
    for (; R < 3 && j + 32 <= g->b->cols; j += 32) codes_tile(g, i, j, R, 4, type);
    for (; j + 16 <= g->b->cols; j += 16) codes_tile(g, i, j, R, 2, type);
    for (; j < g->b->cols; j += 8) codes_tile(g, i, j, R, 1, type);
}

// As many rows at a time as registers hold.
INLINE void codes_gemm(const FoldedGemm *g, const CodeType type) {
    for (int i = 0, step; i < g->n; i += step) {
        step = fold_step(g->n - i);
        if (step == 3)
            codes_rows(g, i, 3, type);
        else if (step == 2)
            codes_rows(g, i, 2, type);
        else
            codes_rows(g, i, 1, type);
    }
}

TARGET static void gemm_codes(const CodeGemm *g) {
    const Codes *b = g->b;
    Folded f;
    if (b->cols % 8) {
        kernels_scalar.gemm_codes(g);
        return;
    }
    for (int i = 0; i < g->n; i += FOLD_ROWS) {
        const FoldedGemm part = folded_rows(g, &f, i);
        for (int r = 0; r < part.n; r++) fold(&f, r, g->a + (i + r) * g->lda, b);
        if (b->type == C_U8)
            codes_gemm(&part, C_U8);
        else if (b->type == C_U4)
            codes_gemm(&part, C_U4);
        else
            codes_gemm(&part, C_U2);
    }
}

// Rows r to r + 3 by columns c to c + 7, as floats.
INLINE void unpack8(float *out, size_t ld, const Codes *b, int r, int c, const CodeType type) {
    const uint8_t *block = b->data + (r / 4 * code_blocks(b) + c / CODE_COLS) * (CODE_LINE >> type);
    const int n = c % CODE_COLS / 8;  // the eights' number in their block
    const __m256i mask = _mm256_set1_epi32(type == C_U8 ? 255 : type == C_U4 ? 15 : 3);
    int line = type == C_U8 ? n : type == C_U4 ? n % 2 : 0;
    int shift = type == C_U8 ? 0 : type == C_U4 ? n / 2 * 4 : n * 2;
    __m256i v = _mm256_loadu_si256((const void *)(block + 32 * line));
    for (int i = 0; i < 4; i++, out += ld) {
        __m256i code = _mm256_srl_epi32(v, _mm_cvtsi32_si128(8 * i + shift));
        __m256 x = _mm256_cvtepi32_ps(_mm256_and_si256(code, mask));
        __m256 min = _mm256_set1_ps(b->min ? f16_f32(b->min[r + i]) : 0.0f);
        x = _mm256_sub_ps(x, _mm256_set1_ps((float)code_center(b)));
        _mm256_storeu_ps(out, _mm256_fmadd_ps(x, _mm256_set1_ps(f16_f32(b->scale[r + i])), min));
    }
}

TARGET static void unpack_codes(float *out, size_t ld, const Codes *b) {
    if (b->cols % 8) {
        kernels_scalar.unpack_codes(out, ld, b);
        return;
    }
    for (int r = 0; r < b->rows; r += 4, out += 4 * ld) {
        for (int c = 0; c < b->cols; c += 8) {
            if (b->type == C_U8)
                unpack8(out + c, ld, b, r, c, C_U8);
            else if (b->type == C_U4)
                unpack8(out + c, ld, b, r, c, C_U4);
            else
                unpack8(out + c, ld, b, r, c, C_U2);
        }
    }
}

// ---- weights in floats ----

TARGET static void matmul_float(const PanelProduct *p) {
    if (few_halves(p)) return;
    float block[BLOCK * PANEL];
    const Matrix *w = p->w;
    for (int c0 = 0; c0 < w->cols_padded; c0 += BLOCK) {
        int cols = min_int(BLOCK, w->cols_padded - c0);
        const float *b = block;
        if (w->type == W_F32)
            b = (const float *)w->data + ((size_t)p->panel * w->cols_padded + c0) * PANEL;
        else
            unpack_halves(block, w, p->panel, c0, cols);
        const Gemm g = float_block(p, b, c0, cols);
        gemm_f32(&g);
    }
}

// ---- weights in 8 and 4 bits ----

// Adds without letting the compiler reorder a chain of sums, which would cost registers.
INLINE __m256i add_in_order(__m256i a, __m256i b) {
    a = _mm256_add_epi32(a, b);
    __asm__("" : "+x"(a));
    return a;
}

// 64 bytes [16 rows][4 columns] to 16-bit integers [2][16 rows][2]. Within eight rows the two
// halves of a register interleave, so rows come out in the order 0 1 4 5 2 3 6 7; scales and sums
// follow it.
INLINE void widen_line(int16_t *out, __m256i rows0_7, __m256i rows8_15) {
    for (int half = 0; half < 2; half++) {
        __m256i v = half ? rows8_15 : rows0_7;
        __m256 lo = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(v)));
        __m256 hi = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(v, 1)));
        _mm256_storeu_ps((float *)(out + 16 * half), _mm256_shuffle_ps(lo, hi, 0x88));
        _mm256_storeu_ps((float *)(out + 32 + 16 * half), _mm256_shuffle_ps(lo, hi, 0xdd));
    }
}

INLINE __m256 swap_rows(__m256 v) {  // 0 1 2 3 4 5 6 7 <-> 0 1 4 5 2 3 6 7
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}

TARGET static void unpack_q8(IntBlock *b, const Matrix *w, int panel, int c0, int cols) {
    size_t first = (size_t)panel * w->cols_padded + c0;
    b->c0 = c0, b->cols = cols;
    const uint16_t *scale = w->scale + first / QGROUP * PANEL;
    const uint8_t *line = w->data + first * PANEL;
    for (int i = 0; i < cols / QGROUP * PANEL; i += 8)
        _mm256_storeu_ps(b->scale + i, swap_rows(load8(scale, (size_t)i, true)));
    for (int c = 0; c < cols; c += 4, line += 64) {
        widen_line(b->w + c * PANEL, _mm256_loadu_si256((const void *)line),
                   _mm256_loadu_si256((const void *)(line + 32)));
    }
}

// T tokens against one block: 16-bit products of column pairs are summed over a group of 32 columns
// in 32-bit integers, then scaled. sum [T][16] are the running results.
INLINE void q8_tile(float (*sum)[PANEL], const IntBlock *b, const Activations *x, int t,
                    const int T) {
    const int16_t *q = x->q16 + (size_t)t * x->stride + b->c0;
    for (int g = 0; g < b->cols / QGROUP; g++) {
        __m256i acc[4][2];
        UNROLL for (int i = 0; i < T; i++) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
        const int16_t *w = b->w + g * QGROUP * PANEL;
        UNROLL for (int c = 0; c < QGROUP; c += 2) {
            __m256i w0 = _mm256_loadu_si256((const void *)(w + c * PANEL));
            __m256i w1 = _mm256_loadu_si256((const void *)(w + c * PANEL + 16));
            UNROLL for (int i = 0; i < T; i++) {
                int pair;
                memcpy(&pair, q + (size_t)i * x->stride + g * QGROUP + c, 4);
                __m256i a = _mm256_set1_epi32(pair);
                acc[i][0] = add_in_order(acc[i][0], _mm256_madd_epi16(w0, a));
                acc[i][1] = add_in_order(acc[i][1], _mm256_madd_epi16(w1, a));
            }
        }
        UNROLL for (int i = 0; i < T; i++) {
            UNROLL for (int h = 0; h < 2; h++) {
                __m256 s = _mm256_loadu_ps(b->scale + g * PANEL + 8 * h);
                __m256 v = _mm256_loadu_ps(sum[i] + 8 * h);
                v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i][h]), s, v);
                _mm256_storeu_ps(sum[i] + 8 * h, v);
            }
        }
    }
}

// Tokens [t, t + T) of one block; sums rest in out in memory order between blocks.
INLINE void q8_tokens(const PanelProduct *p, const IntBlock *b, int t, const int T) {
    const Activations *x = p->x;
    float sum[4][PANEL], *out = p->out + t * p->ld;
    for (int i = 0; i < T; i++) {
        for (int h = 0; h < PANEL; h += 8) {
            __m256 v =
                b->c0 ? swap_rows(_mm256_loadu_ps(out + i * p->ld + h)) : _mm256_setzero_ps();
            _mm256_storeu_ps(sum[i] + h, v);
        }
    }
    q8_tile(sum, b, x, t, T);
    for (int i = 0; i < T; i++) {
        __m256 unit = _mm256_set1_ps(b->c0 + b->cols < x->stride ? 1.0f : x->unit16[t + i]);
        for (int h = 0; h < PANEL; h += 8) {
            __m256 v = _mm256_mul_ps(swap_rows(_mm256_loadu_ps(sum[i] + h)), unit);
            _mm256_storeu_ps(out + i * p->ld + h, v);
        }
    }
}

// 16 bytes, 4 rows by 4 columns, against 4 activations: two partial sums for each row.
INLINE __m256i madd_quad(__m256i acc, __m128i w, __m256i a) {
    return add_in_order(acc, _mm256_madd_epi16(_mm256_cvtepi8_epi16(w), a));
}

// Four inputs, four times.
INLINE __m256i load_quad(const int16_t *q) {
    long long quad;
    memcpy(&quad, q, 8);
    return _mm256_set1_epi64x(quad);
}

// Partial sums of rows 0..3 and 4..7 to the sums of rows 0..7.
INLINE __m256 join_pairs(__m256i a, __m256i b) {
    __m256 fa = _mm256_castsi256_ps(a), fb = _mm256_castsi256_ps(b);
    __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(fa, fb, 0x88));
    __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(fa, fb, 0xdd));
    return swap_rows(_mm256_cvtepi32_ps(_mm256_add_epi32(even, odd)));
}

// One token, straight from the file: nothing is unpacked to memory, and the same integers come out.
INLINE void q8_row(const IntPanel *p, int t) {
    const Activations *x = p->x;
    const uint8_t *line = p->line;
    const int16_t *q = x->q16 + (size_t)t * x->stride;
    float *out = p->out + t * p->ld;
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int g = 0; g < p->groups; g++) {
        __m256i acc[4];  // four rows each
        UNROLL for (int r = 0; r < 4; r++) acc[r] = _mm256_setzero_si256();
        UNROLL for (int c = 0; c < QGROUP; c += 4, line += 64) {
            __m256i a = load_quad(q + g * QGROUP + c);
            UNROLL for (int r = 0; r < 4; r++) acc[r] =
                madd_quad(acc[r], _mm_loadu_si128((const void *)(line + 16 * r)), a);
        }
        UNROLL for (int h = 0; h < 2; h++) {
            __m256 s = load8(p->scale, (size_t)g * PANEL + 8 * h, true);
            sum[h] = _mm256_fmadd_ps(join_pairs(acc[2 * h], acc[2 * h + 1]), s, sum[h]);
        }
    }
    __m256 unit = _mm256_set1_ps(x->unit16[t]);
    _mm256_storeu_ps(out, _mm256_mul_ps(sum[0], unit));
    _mm256_storeu_ps(out + 8, _mm256_mul_ps(sum[1], unit));
}

// Unpacking a block pays from four tokens on.
TARGET static void matmul_q8(const PanelProduct *p) {
    if (p->t1 - p->t0 < 4) {
        const IntPanel ip = int_panel(p, 0);
        for (int t = p->t0; t < p->t1; t++) q8_row(&ip, t);
        return;
    }
    IntBlock b;
    for (int c0 = 0; c0 < p->w->cols_padded; c0 += BLOCK) {
        int t = p->t0;
        unpack_q8(&b, p->w, p->panel, c0, min_int(BLOCK, p->w->cols_padded - c0));
        for (; t + 4 <= p->t1; t += 4) q8_tokens(p, &b, t, 4);
        for (; t < p->t1; t++) q8_tokens(p, &b, t, 1);
    }
}

TARGET static void matmul_q4(const PanelProduct *p) { matmul_nibbles(p, MADDUBS); }

// ---- peaks ----

TARGET static float peak_f32(int rounds) {
    __m256 acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = _mm256_set1_ps((float)i);
    for (int r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            _mm256_fmadd_ps(acc[i], _mm256_set1_ps(0.5f), _mm256_set1_ps(1.0f));
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm256_add_ps(acc[0], acc[i]);
    return hsum(acc[0]);
}

// What a product is made of takes the sums as a factor too, or it would be computed once.
TARGET static float peak_q8(int rounds) {
    __m256i acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = _mm256_set1_epi32(i);
    for (int r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            add_in_order(acc[i], _mm256_madd_epi16(acc[i], _mm256_set1_epi16(3)));
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm256_add_epi32(acc[0], acc[i]);
    return hsum(_mm256_cvtepi32_ps(acc[0]));
}

TARGET static float peak_maddubs(int rounds) { return peak_bytes(rounds, MADDUBS); }

static const Peak f32_peak = {2 * 8 * CHAINS, peak_f32};
static const Peak q8_peak = {2 * 16 * CHAINS, peak_q8};
static const Peak q4_peak = {2 * 32 * CHAINS, peak_maddubs};

// ---- the table ----

const Kernels kernels_avx2 = {
    .matmul = {matmul_float, matmul_float, matmul_float, matmul_q8, matmul_q4},
    .wide = true,
    .quantize = quantize,
    .gemm_f32 = gemm_f32,
    .gemm_f16 = gemm_f16,
    .pack_f16 = pack_f16,
    .packed_bytes = packed_bytes_f32,
    .pack_rows = rows_as_they_are,
    .gemm_packed = gemm_f32,
    .peak = {&f32_peak, &f32_peak, &f32_peak, &q8_peak, &q4_peak},
    .peak_packed = &f32_peak,
    .pack_f32 = pack_f32,
    .gemm_codes = gemm_codes,
    .unpack_codes = unpack_codes,
    .rmsnorm = rmsnorm,
    .add = add,
    .scale = scale,
    .delta_rule = delta_rule,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
    .max_rows = max_rows,
    .exp64 = exp64,
    .max_into = max_into,
    .f16_to_f32 = f16_to_f32,
    .f32_to_f16 = f32_to_f16,
};

#endif
