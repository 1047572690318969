// avx512.c: AVX-512 with VNNI, and BF16: servers, laptops from Ice Lake (2019) and Zen 4 (2022) on.
//
// 32 registers of 16 floats. q8 and q4 products add four products of bytes with one instruction
// (vpdpbusd). avx512bf16 is the same set with attention in pairs of bf16 (vdpbf16ps): twice as fast
// as in f32 where the instruction is as fast as one of f32, half as fast where it takes four times
// as long. What gains nothing from wider registers is AVX2's, and so are shapes that these do not
// fit.
#define DELTA_BYTES 64
#include "kernels/x86.h"

#ifdef __x86_64__
#define TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define INLINE                    \
    static inline __attribute__(( \
        always_inline, target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

// ---- vectors ----

// As in avx2.c; the power of two is one instruction.
INLINE __m512 exp_lanes(__m512 x) {
    __mmask16 in_range =
        _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33f), _CMP_NLT_UQ);  // true for NaN
    x = _mm512_min_ps(_mm512_set1_ps(88.37f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(in_range, p, n);
}

// x / (1 + exp(-u)) * y
INLINE __m512 gate(__m512 x, __m512 u, __m512 y) {
    __m512 e = exp_lanes(_mm512_sub_ps(_mm512_setzero_ps(), u));
    return _mm512_mul_ps(_mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e)), y);
}

TARGET static void delta_rule(const DeltaRule *d) { delta_rule_lanes(d); }

TARGET static void silu_mul(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        _mm512_storeu_ps(x + i, gate(v, v, _mm512_loadu_ps(y + i)));
    }
    kernels_avx2.silu_mul(x + i, y + i, n - i);
}

TARGET static void gelu_mul(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i), v2 = _mm512_mul_ps(v, v);
        __m512 u = _mm512_fmadd_ps(_mm512_mul_ps(v2, v), _mm512_set1_ps(GELU_B), v);
        u = _mm512_mul_ps(u, _mm512_set1_ps(GELU_A));
        _mm512_storeu_ps(x + i, gate(v, u, _mm512_loadu_ps(y + i)));
    }
    kernels_avx2.gelu_mul(x + i, y + i, n - i);
}

// ---- scores ----

// Of floats, or of integers.
INLINE __m512 max_or_sum(__m512 a, __m512 b, const bool sum) {
    if (!sum) return _mm512_max_ps(a, b);
    __m512i s = _mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b));
    return _mm512_castsi512_ps(s);
}

// Lane i: the largest number of v[i], or the sum of its 16 integers. 15 steps of three
// instructions; one by one the vectors would take 8 each.
INLINE __m512 reduce16(__m512 *v, const bool sum) {
    UNROLL for (int i = 0; i < 8; i++) v[i] =
        max_or_sum(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                   _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]), sum);
    UNROLL for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = max_or_sum(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                          _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)), sum);
    }
    UNROLL for (int n = 2; n > 0; n /= 2) {
        UNROLL for (int i = 0; i < n; i++) v[i] =
            max_or_sum(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                       _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd), sum);
    }
    return v[0];
}

// The largest of columns j, j + 16, j + 32 and j + 48 of a row of 64.
INLINE __m512 max_columns(const float *s) {
    __m512 a = _mm512_max_ps(_mm512_loadu_ps(s), _mm512_loadu_ps(s + 16));
    __m512 b = _mm512_max_ps(_mm512_loadu_ps(s + 32), _mm512_loadu_ps(s + 48));
    return _mm512_max_ps(a, b);
}

TARGET static void max_rows(float *max, const float *s, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 v[16];
        UNROLL for (int r = 0; r < 16; r++) v[r] = max_columns(s + (i + r) * PAGE);
        _mm512_storeu_ps(max + i, reduce16(v, false));
    }
    for (; i < n; i++) max[i] = _mm512_reduce_max_ps(max_columns(s + i * PAGE));
}

TARGET static float exp64(float *s, float m) {
    __m512 e[4];
    UNROLL for (int i = 0; i < 4; i++) {
        e[i] = exp_lanes(_mm512_sub_ps(_mm512_loadu_ps(s + 16 * i), _mm512_set1_ps(m)));
        _mm512_storeu_ps(s + 16 * i, e[i]);
    }
    return _mm512_reduce_add_ps(
        _mm512_add_ps(_mm512_add_ps(e[0], e[1]), _mm512_add_ps(e[2], e[3])));
}

TARGET static void max_into(float *run, const float *s, float b) {
    for (int i = 0; i < PAGE; i += 16) {
        __m512 v = _mm512_add_ps(_mm512_loadu_ps(s + i), _mm512_set1_ps(b));
        _mm512_storeu_ps(run + i, _mm512_max_ps(v, _mm512_loadu_ps(run + i)));
    }
}

// ---- inputs in 8 bits ----

// group_scale of 16 groups.
INLINE __m512 group_scales(float row_max, __m512 group_max) {
    __m512i top = _mm512_castps_si512(_mm512_set1_ps(exp2_int(UNIT_STEPS)));
    __m512i n = _mm512_sub_epi32(_mm512_castps_si512(_mm512_set1_ps(row_max)),
                                 _mm512_castps_si512(group_max));
    n = _mm512_min_epu32(_mm512_srli_epi32(n, 23), _mm512_set1_epi32(UNIT_STEPS));
    __m512i exponent = _mm512_slli_epi32(n, 23);
    __m512 scale = _mm512_castsi512_ps(_mm512_sub_epi32(top, exponent));
    __m512 doubled =
        _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(group_max), exponent));
    __mmask16 fits = _mm512_cmp_ps_mask(doubled, _mm512_set1_ps(0.75f * row_max), _CMP_LE_OQ);
    fits &= _mm512_cmplt_epu32_mask(n, _mm512_set1_epi32(UNIT_STEPS));
    return _mm512_mask_mul_ps(scale, fits, scale, _mm512_set1_ps(0.75f));
}

// Up to 16 groups of a row. The inverses pass through memory without a mask: a masked store is not
// forwarded to the loads that follow (store forwarding).
INLINE void quantize_groups(const Activations *a, size_t group, int n, float row_max) {
    const float *x = a->x + group * QGROUP;
    int8_t *q = a->q + group * QGROUP;
    __mmask16 mask = (__mmask16)((1u << n) - 1);
    __m512 v[16];
    float inv[16];
    for (int i = 0; i < 16; i++) v[i] = _mm512_setzero_ps();
    for (int i = 0; i < n; i++)
        v[i] = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + i * QGROUP)),
                             _mm512_abs_ps(_mm512_loadu_ps(x + i * QGROUP + 16)));
    __m512 scale = group_scales(row_max, reduce16(v, false));
    __m512 row_inv = _mm512_set1_ps(row_max > 0.0f ? 127.0f / row_max : 0.0f);
    __m512 quotient = _mm512_div_ps(_mm512_set1_ps(exp2_int(UNIT_STEPS)), scale);
    _mm512_storeu_ps(inv, _mm512_mul_ps(row_inv, quotient));
    for (int i = 0; i < n; i++) {
        __m512i both = _mm512_setzero_si512();
        for (int h = 0; h < QGROUP; h += 16) {
            __m512 r = _mm512_mul_ps(_mm512_loadu_ps(x + i * QGROUP + h), _mm512_set1_ps(inv[i]));
            __m512i r32 = _mm512_cvtps_epi32(r);
            _mm_storeu_si128((void *)(q + i * QGROUP + h), _mm512_cvtepi32_epi8(r32));
            both = _mm512_add_epi32(both, r32);
        }
        v[i] = _mm512_castsi512_ps(both);
    }
    __m512i sum = _mm512_castps_si512(reduce16(v, true));
    _mm512_mask_storeu_ps(a->scale + group, mask, scale);
    _mm512_mask_storeu_ps(a->sum + group, mask, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum)));
    _mm512_mask_storeu_epi32(a->shift + group, mask,
                             _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128)));
}

TARGET static void quantize(const Activations *a, int t0, int t1) {
    for (int t = t0; t < t1; t++) {
        const float *x = a->x + (size_t)t * a->stride;
        __m512 v = _mm512_setzero_ps();
        for (int i = 0; i < a->stride; i += 16)
            v = _mm512_max_ps(v, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
        float max = _mm512_reduce_max_ps(v);
        int groups = a->stride / QGROUP;
        for (int g = 0; g < groups; g += 16)
            quantize_groups(a, (size_t)t * groups + g, groups - g < 16 ? groups - g : 16, max);
        a->unit[t] = row_unit(max);
    }
}

// ---- products of floats ----

INLINE __m512 load16(const void *b, size_t i, const bool half) {
    if (half) return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)((const uint16_t *)b + i)));
    return _mm512_loadu_ps((const float *)b + i);
}

// As in avx2.c: R * C + C + 1 <= 32.
INLINE void gemm_tile(const Gemm *g, int i, int j, const int R, const int C, const bool half) {
    const size_t ldb = (size_t)g->cols;
    float *c = g->c + (size_t)i * g->ldc + j;
    const float *a = (const float *)g->a + (size_t)i * g->lda;
    __m512 acc[12][4];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) {
            acc[r][v] = g->add ? _mm512_loadu_ps(c + r * g->ldc + 16 * v) : _mm512_setzero_ps();
        }
    }
    for (int k = 0; k < g->inner; k++) {
        for (int v = 0; half && v < C; v += 2)
            __builtin_prefetch((const uint16_t *)g->ahead + k * ldb + j + 16 * v, 0, 1);
        __m512 b[4];
        UNROLL for (int v = 0; v < C; v++) b[v] =
            load16(g->b, k * ldb + (size_t)(j + 16 * v), half);
        UNROLL for (int r = 0; r < R; r++) {
            __m512 ar = _mm512_set1_ps(a[r * g->lda + k]);
            UNROLL for (int v = 0; v < C; v++) acc[r][v] = _mm512_fmadd_ps(ar, b[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) _mm512_storeu_ps(c + r * g->ldc + 16 * v, acc[r][v]);
    }
}

INLINE void gemm_rows(const Gemm *g, int i, const int R, const int C, const bool half) {
    int j = 0;
    for (; j + 16 * C <= g->cols; j += 16 * C) gemm_tile(g, i, j, R, C, half);
    for (; j < g->cols; j += 16) gemm_tile(g, i, j, R, 1, half);
}

// A copy, as in avx2.c.
INLINE void gemm(const Gemm g, const bool half) {
    int i = 0;
    if (g.cols < 64) {
        for (; i + 12 <= g.n; i += 12) gemm_rows(&g, i, 12, 1, half);
    }
    for (; i + 6 <= g.n; i += 6) gemm_rows(&g, i, 6, 4, half);
    for (; i + 3 <= g.n; i += 3) gemm_rows(&g, i, 3, 4, half);
    for (; i < g.n; i++) gemm_rows(&g, i, 1, 4, half);
}

TARGET static void gemm_f32(const Gemm *g) {
    if (g->cols % 16)
        kernels_avx2.gemm_f32(g);
    else
        gemm(*g, false);
}

TARGET static void gemm_f16(const Gemm *g) {
    if (g->cols % 16)
        kernels_avx2.gemm_f16(g);
    else
        gemm(*g, true);
}

// ---- codes ----

// As in avx2.c, but of each eight integers the high bytes come before the low ones. No masks, as
// above.
INLINE void fold(Folded *f, int r, const float *a, const Codes *b) {
    float x[CODE_ROWS];
    __m512 max = _mm512_setzero_ps(), bias = max;
    __m512i sum = _mm512_setzero_si512();
    for (int k = 0; k < b->rows; k += 16) {
        __m512 v = _mm512_loadu_ps(a + k);
        __m512 s = _mm512_mul_ps(v, load16(b->scale, (size_t)k, true));
        __m512 min = b->min ? load16(b->min, (size_t)k, true) : _mm512_setzero_ps();
        bias = _mm512_fmadd_ps(v, min, bias);
        max = _mm512_max_ps(max, _mm512_abs_ps(s));
        _mm512_storeu_ps(x + k, s);
    }
    float most = _mm512_reduce_max_ps(max);
    __m512 inv = _mm512_set1_ps(most > 0.0f ? FOLD_MOST / most : 0.0f);
    uint8_t *out = f->q + (size_t)r * b->rows * 2;
    for (int k = 0; k < b->rows; k += 16, out += 32) {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), inv));
        __m256i w = _mm512_cvtsepi32_epi16(q);
        __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
        __m256i high = _mm256_srai_epi16(_mm256_sub_epi16(w, low), 8);
        _mm256_storeu_si256((void *)out, _mm256_packs_epi16(high, low));
        sum = _mm512_add_epi32(sum, _mm512_cvtepi16_epi32(w));  // garbage does not overflow
    }
    f->scale[r] = most / FOLD_MOST;
    f->bias[r] = _mm512_reduce_add_ps(bias);
    f->center[r] = code_center(b) * _mm512_reduce_add_epi32(sum);
}

// Codes of 16 columns, the first or second half of a block, by 4 rows.
INLINE __m512i load_codes(const uint8_t *block, const int half, const CodeType type) {
    if (type == C_U8) return _mm512_loadu_si512(block + 64 * half);
    if (type == C_U4) {
        __m512i v = _mm512_loadu_si512(block);
        return _mm512_and_si512(half ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
    }
    const __m512i shift = half ? _mm512_setr_epi64(4, 4, 4, 4, 6, 6, 6, 6)
                               : _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2);
    __m512i v = _mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)block));
    return _mm512_and_si512(_mm512_srlv_epi64(v, shift), _mm512_set1_epi8(3));
}

// R rows by C sixteens of columns: the instruction multiplies unsigned by signed bytes, so the high
// and the low bytes of a take a sum each. 2 * R * C + C <= 32.
INLINE void codes_tile(const FoldedGemm *g, int i, int j, const int R, const int C,
                       const CodeType type) {
    const size_t block = CODE_LINE >> type, rows = (size_t)g->b->rows;
    size_t step = code_blocks(g->b) * block;
    const uint8_t *at = g->b->data + j / CODE_COLS * block, *q = g->a->q + i * rows * 2;
    const uint8_t *ahead = g->b->ahead + (at - g->b->data);
    __m512i high[3][4], low[3][4];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) high[r][v] = low[r][v] = _mm512_setzero_si512();
    }
    for (size_t k = 0; k < rows; k += 8, q += 16) {
        UNROLL for (int four = 0; four < 8; four += 4, at += step, ahead += step) {
            for (int l = 0; l < C * 64 >> type; l += 64) __builtin_prefetch(ahead + l, 0, 1);
            __m512i b[4];
            UNROLL for (int v = 0; v < C; v++) b[v] =
                load_codes(at + v / 2 * block, C > 1 ? v % 2 : j % CODE_COLS / 16, type);
            UNROLL for (int r = 0; r < R; r++) {
                int a, a_low;
                memcpy(&a, q + r * rows * 2 + four, 4);
                memcpy(&a_low, q + r * rows * 2 + four + 8, 4);
                UNROLL for (int v = 0; v < C; v++) high[r][v] =
                    _mm512_dpbusd_epi32(high[r][v], b[v], _mm512_set1_epi32(a));
                UNROLL for (int v = 0; v < C; v++) low[r][v] =
                    _mm512_dpbusd_epi32(low[r][v], b[v], _mm512_set1_epi32(a_low));
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) {
            float *c = g->c + (i + r) * g->ldc + j + 16 * v;
            __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[r][v], 8), low[r][v]);
            sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(g->a->center[i + r]));
            __m512 bias = _mm512_set1_ps(g->a->bias[i + r]);
            if (g->add) bias = _mm512_add_ps(bias, _mm512_loadu_ps(c));
            __m512 scale = _mm512_set1_ps(g->a->scale[i + r]);
            _mm512_storeu_ps(c, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, bias));
        }
    }
}

INLINE void codes_rows(const FoldedGemm *g, int i, const int R, const CodeType type) {
    int j = 0;
    for (; j + 64 <= g->b->cols; j += 64) codes_tile(g, i, j, R, 4, type);
    for (; j + 32 <= g->b->cols; j += 32) codes_tile(g, i, j, R, 2, type);
    for (; j < g->b->cols; j += 16) codes_tile(g, i, j, R, 1, type);
}

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
    if (b->cols % 16 || b->rows % 16) {
        kernels_avx2.gemm_codes(g);
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

// Weights of 4 columns by 16 rows as unsigned bytes, 128 more than they are (q4 with offsets: as
// they are). A q4 line holds two such quads.
INLINE __m512i load_quads(const uint8_t *line, int quad, const bool q4, const bool offset) {
    if (!q4)
        return _mm512_xor_si512(_mm512_loadu_si512(line + 64 * quad), _mm512_set1_epi8((char)0x80));
    __m512i v = _mm512_loadu_si512(line + 64 * (quad / 2));
    if (quad % 2) v = _mm512_srli_epi16(v, 4);
    v = _mm512_and_si512(v, _mm512_set1_epi8(15));
    return offset ? v : _mm512_add_epi8(v, _mm512_set1_epi8(120));
}

// A scale of 0 counts as 2^-100, so that what follows is a multiplication to the last bit.
INLINE __m512 load_scales(const uint16_t *scale) {
    enum { LARGER_MAGNITUDE = 7 };
    return _mm512_range_ps(load16(scale, 0, true), _mm512_set1_ps(0x1p-100f), LARGER_MAGNITUDE);
}

// Weights' scales, ready to be multiplied by many of activations, 2^n or 1.5 * 2^n, which bit 22
// tells: both factors have been multiplied, and have been taken out of the exponents to be added.
enum { ONE_BITS = 0x3f800000, HALF_BIT = 0x00400000 };

INLINE void scale_table(__m512i *table, __m512 scale) {
    table[0] = _mm512_sub_epi32(_mm512_castps_si512(scale), _mm512_set1_epi32(ONE_BITS));
    scale = _mm512_mul_ps(scale, _mm512_set1_ps(1.5f));
    table[1] = _mm512_sub_epi32(_mm512_castps_si512(scale), _mm512_set1_epi32(ONE_BITS + HALF_BIT));
}

INLINE __m512 table_product(const __m512i *table, float scale) {
    __m512i s = table[float_bits(scale) / HALF_BIT % 2];
    return _mm512_castsi512_ps(_mm512_add_epi32(s, _mm512_set1_epi32((int)float_bits(scale))));
}

// Bytes of weights that a few tokens' products fetch ahead, into the second-level cache: reading
// and multiplying take equally long then, and each would wait for the other.
enum { AHEAD = 16384 };

// T tokens against P panels, straight from the file. vpdpbusd multiplies unsigned by signed bytes,
// so weights are made unsigned and each sum starts at -128 * sum(q). The same integers as
// everywhere. For many tokens P is 2: 12 products of a quad of columns take 8 loads then instead of
// 13, and the scales' products are additions, which leave the multiplier to vpdpbusd.
INLINE void vnni_tile(const IntPanel *p, int t, const bool q4, const bool offset, const int T,
                      const int P) {
    float *out = p->out;
    const size_t ld = p->ld;
    const Activations *x = p->x;
    const int8_t *q = x->q + (size_t)t * x->stride;
    size_t at = (size_t)t * x->stride / QGROUP, step = x->stride / QGROUP;
    __m512 sum[8][2];
    UNROLL for (int i = 0; i < T * P; i++) {
        sum[i / P][i % P] = _mm512_setzero_ps();
        if (P > 1) __builtin_prefetch(out + (t + i / P) * ld + i % P * PANEL, 1);
    }
    for (int g = 0; g < p->groups; g++, at++, q += QGROUP) {
        const size_t line = (size_t)g * QGROUP * PANEL / (q4 ? 2 : 1);
        __m512i acc[8][2], table[2][2];
        UNROLL for (int v = 0; v < P; v++) {
            if (P > 1) scale_table(table[v], load_scales(p[v].scale + (size_t)g * PANEL));
        }
        UNROLL for (int i = 0; i < T * P; i++) acc[i / P][i % P] =
            offset ? _mm512_setzero_si512() : _mm512_set1_epi32(x->shift[at + i / P * step]);
        UNROLL for (int quad = 0; quad < QGROUP / 4; quad++) {
            if (P == 1 && T > 1)
                __builtin_prefetch(p->line + line + (q4 ? 32 : 64) * quad + AHEAD, 0, 1);
            __m512i w[2];
            UNROLL for (int v = 0; v < P; v++) w[v] =
                load_quads(p[v].line + line, quad, q4, offset);
            UNROLL for (int i = 0; i < T; i++) {
                int a;
                memcpy(&a, q + (size_t)i * x->stride + 4 * quad, 4);
                UNROLL for (int v = 0; v < P; v++) acc[i][v] =
                    _mm512_dpbusd_epi32(acc[i][v], w[v], _mm512_set1_epi32(a));
            }
        }
        UNROLL for (int i = 0; i < T * P; i++) {
            const int v = i % P;
            float acts = x->scale[at + i / P * step];
            __m512 s = P > 1 ? table_product(table[v], acts)
                             : _mm512_mul_ps(load_scales(p->scale + (size_t)g * PANEL),
                                             _mm512_set1_ps(acts));
            __m512 *to = &sum[i / P][v];
            *to = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i / P][v]), s, *to);
            if (offset)
                *to = _mm512_fmadd_ps(load16(p[v].offset, (size_t)g * PANEL, true),
                                      _mm512_set1_ps(x->sum[at + i / P * step]), *to);
        }
    }
    UNROLL for (int i = 0; i < T * P; i++) {
        __m512 unit = _mm512_set1_ps(x->unit[t + i / P]);
        _mm512_storeu_ps(out + (t + i / P) * ld + i % P * PANEL,
                         _mm512_mul_ps(sum[i / P][i % P], unit));
    }
}

// P panels from a panel on, in tiles of as many tokens as registers hold.
INLINE void vnni_panels(const PanelProduct *p, const bool q4, const bool offset, const int P) {
    IntPanel ip[2];
    int t = p->t0, t1 = p->t1;
    for (int v = 0; v < P; v++) ip[v] = int_panel(p, v);
    if (P == 2) {
        for (; t + 6 <= t1; t += 6) vnni_tile(ip, t, q4, offset, 6, P);
        for (; t + 2 <= t1; t += 2) vnni_tile(ip, t, q4, offset, 2, P);
    } else {
        for (; t + 8 <= t1; t += 8) vnni_tile(ip, t, q4, offset, 8, P);
        for (; t + 4 <= t1; t += 4) vnni_tile(ip, t, q4, offset, 4, P);
    }
    for (; t < t1; t++) vnni_tile(ip, t, q4, offset, 1, P);
}

INLINE void matmul_vnni(const PanelProduct *p, const bool q4, const int P) {
    if (q4 && p->w->offset)
        vnni_panels(p, q4, true, P);
    else
        vnni_panels(p, q4, false, P);
}

TARGET static void matmul_q8(const PanelProduct *p) { matmul_vnni(p, false, 1); }
TARGET static void matmul_q4(const PanelProduct *p) { matmul_vnni(p, true, 1); }
TARGET static void matmul_pair_q8(const PanelProduct *p) { matmul_vnni(p, false, 2); }
TARGET static void matmul_pair_q4(const PanelProduct *p) { matmul_vnni(p, true, 2); }

// ---- peaks ----

TARGET static float peak_f32(int rounds) {
    __m512 acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_set1_ps((float)i);
    for (int r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            _mm512_fmadd_ps(acc[i], _mm512_set1_ps(0.5f), _mm512_set1_ps(1.0f));
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    return _mm512_reduce_add_ps(acc[0]);
}

TARGET static float peak_int(int rounds) {
    __m512i acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_set1_epi32(i);
    for (int r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            _mm512_dpbusd_epi32(acc[i], acc[i], _mm512_set1_epi8(3));
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm512_add_epi32(acc[0], acc[i]);
    return _mm512_reduce_add_ps(_mm512_cvtepi32_ps(acc[0]));
}

static const Peak f32_peak = {2 * 16 * CHAINS, peak_f32};
static const Peak int_peak = {2 * 64 * CHAINS, peak_int};

// ---- products of bf16, for attention ----

// Shapes that the tiles below cover; all others stay in f32.
static bool fits_bf16(int inner, int cols) {
    return inner % 2 == 0 && cols % 16 == 0 && inner <= 256;
}

static size_t packed_bytes_bf16(int inner, int cols) {
    return packed_bytes_f32(inner, cols) / (fits_bf16(inner, cols) ? 2 : 1);
}

// Half precision becomes bf16 by a shift, without its way through f32:
//
//   half h             s eeeee mmmmmmmmmm        2^(e - 15) * 1.m
//   h >> 3             s sss eeeee mmmmmmm       the sign repeats
//   and 0x8fff         s 000 eeeee mmmmmmm       as bf16: 2^(e - 127) * 1.m = h * 2^-112
//
// So rows are made 2^112 times as large; like halves they stay below 2^16. The shift is the high
// half of a multiplication by 2^12, which rounds, ties upward. Halves below 2^-14, whose e is 0,
// are read as 0.
static const float ROWS_BY = 0x1p112f;

BF16_INLINE __m512i halves_to_bf16(__m512i h) {
    h = _mm512_mulhrs_epi16(h, _mm512_set1_epi16(1 << 12));
    return _mm512_and_si512(h, _mm512_set1_epi16((short)0x8fff));
}

// Sixteen numbers of b in half precision, which f32 is rounded to.
BF16_INLINE __m256i load_halves(const void *b, size_t at, const bool half) {
    if (half) return _mm256_loadu_si256((const void *)((const uint16_t *)b + at));
    return _mm512_cvtps_ph(_mm512_loadu_ps((const float *)b + at), _MM_FROUND_TO_NEAREST_INT);
}

// Rows 2k and 2k + 1 of b [..][ldb], columns j to j + 15, as pairs of bf16.
BF16_INLINE __m512i load_pairs(const void *b, size_t ldb, int k, int j, const bool half) {
    size_t at = (size_t)k * ldb + j;
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(load_halves(b, at, half)),
                                      load_halves(b, at + ldb, half), 1);
    return halves_to_bf16(alternate(both));
}

// [inner/2][cols][2] bf16: rows 2k and 2k + 1 of b alternate.
BF16_INLINE void pack_bf16(void *packed, const void *b, int inner, int cols, const bool half) {
    uint8_t *out = packed;
    for (int k = 0; k < inner; k += 2) {
        for (int j = 0; j < cols; j += 16, out += 64)
            _mm512_storeu_si512(out, load_pairs(b, (size_t)cols, k, j, half));
    }
}

BF16 static void pack_f16_bf16(void *packed, const uint16_t *b, int inner, int cols) {
    if (fits_bf16(inner, cols))
        pack_bf16(packed, b, inner, cols, true);
    else
        kernels_avx2.pack_f16(packed, b, inner, cols);
}

BF16 static void pack_f32_bf16(void *packed, const float *b, int inner, int cols) {
    if (fits_bf16(inner, cols))
        pack_bf16(packed, b, inner, cols, false);
    else
        pack_f32(packed, b, inner, cols);
}

// As gemm_tile, on pairs of the inner dimension: a [R][inner] bf16, b packed or, for so few rows
// that packing it would not pay, in half precision as it lies. Such pages lie far apart, and the
// hardware fetches ahead only within 4 KB, so that each product fetches the lines of the page that
// follows, a few at a time, into the second-level cache: the first-level cache has too few fill
// buffers.
BF16_INLINE void bf16_tile(const Gemm *g, int i, int j, const int R, const int C, const bool half) {
    const size_t ldb = (size_t)g->cols;
    float *c = g->c + (size_t)i * g->ldc + j;
    const uint16_t *a = (const uint16_t *)g->a + (size_t)i * g->inner;
    const uint8_t *b = (const uint8_t *)g->b + (size_t)j * 4;
    __m512 acc[12][4];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) {
            acc[r][v] = g->add ? _mm512_loadu_ps(c + r * g->ldc + 16 * v) : _mm512_setzero_ps();
        }
    }
    for (int k = 0; k < g->inner; k += 2, b += ldb * 4) {
        for (int v = 0; half && v < C; v += 2) {
            __builtin_prefetch((const uint16_t *)g->ahead + k * ldb + j + 16 * v, 0, 1);
            __builtin_prefetch((const uint16_t *)g->ahead + (k + 1) * ldb + j + 16 * v, 0, 1);
        }
        __m512i w[4];
        UNROLL for (int v = 0; v < C; v++) w[v] =
            half ? load_pairs(g->b, ldb, k, j + 16 * v, true) : _mm512_loadu_si512(b + 64 * v);
        UNROLL for (int r = 0; r < R; r++) {
            int pair;
            memcpy(&pair, a + r * g->inner + k, 4);
            __m512i ar = _mm512_set1_epi32(pair);
            UNROLL for (int v = 0; v < C; v++) acc[r][v] =
                _mm512_dpbf16_ps(acc[r][v], (__m512bh)ar, (__m512bh)w[v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) _mm512_storeu_ps(c + r * g->ldc + 16 * v, acc[r][v]);
    }
}

BF16_INLINE void bf16_rows(const Gemm *g, int i, const int R, const int C, const bool half) {
    int j = 0;
    for (; j + 16 * C <= g->cols; j += 16 * C) bf16_tile(g, i, j, R, C, half);
    for (; j < g->cols; j += 16) bf16_tile(g, i, j, R, 1, half);
}

// Halves are read, and turned into bf16, once for as many rows as registers hold.
BF16_INLINE void gemm_bf16(const Gemm g, const bool half) {
    int i = 0;
    for (; half && i + 12 <= g.n; i += 12) bf16_rows(&g, i, 12, 2, half);
    for (; i + 6 <= g.n; i += 6) bf16_rows(&g, i, 6, 4, half);
    for (; i + 3 <= g.n; i += 3) bf16_rows(&g, i, 3, 4, half);
    for (; i < g.n; i++) bf16_rows(&g, i, 1, 4, half);
}

// [n][inner] bf16, times 2^112.
BF16 static const void *pack_rows_bf16(uint16_t *room, const float *a, int n, int inner, int cols) {
    if (!fits_bf16(inner, cols)) return a;
    const __m512 by = _mm512_set1_ps(ROWS_BY);
    int k = 0, all = n * inner;
    for (; k + 16 <= all; k += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(a + k), by);
        _mm256_storeu_si256((void *)(room + k), (__m256i)_mm512_cvtneps_pbh(v));
    }
    if (k == all) return room;
    __mmask16 tail = (__mmask16)((1 << (all - k)) - 1);
    __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(tail, a + k), by);
    _mm256_mask_storeu_epi16(room + k, tail, (__m256i)_mm512_cvtneps_pbh(v));
    return room;
}

BF16 void gemm_packed_bf16(const Gemm *g) {
    if (fits_bf16(g->inner, g->cols))
        gemm_bf16(*g, false);
    else
        gemm_f32(g);
}

// 2^y, relative error below 7.6e-5, a twentieth of what rounding to bf16 costs; 0 for -inf, NaN for
// NaN. A minimax polynomial on [0, 1), two instructions for the parts of y.
BF16_INLINE __m512 exp2_rough(__m512 y) {
    __m512 r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF), p = _mm512_set1_ps(0.0780245938f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.226067374f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.695833285f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.999925264f));
    return _mm512_scalef_ps(p, y);
}

// exp64 and pack_rows in one, so that the weights do not pass through memory in between. 2^112 is a
// term of the exponent.
BF16 static const void *exp_packed_bf16(uint16_t *room, float *s, const float *max, float *sum,
                                        int n, int cols) {
    if (!fits_bf16(PAGE, cols)) {
        for (int i = 0; i < n; i++) sum[i] += exp64(s + i * PAGE, softmax_shift(max[i]));
        return s;
    }
    const float log2e = 1.44269504f;
    for (int i = 0; i < n; i++) {
        __m512 shift = _mm512_set1_ps(softmax_shift(max[i]) * log2e - 112.0f), e[4];
        UNROLL for (int v = 0; v < 4; v++) {
            __m512 y = _mm512_loadu_ps(s + i * PAGE + 16 * v);
            e[v] = exp2_rough(_mm512_fmsub_ps(y, _mm512_set1_ps(log2e), shift));
        }
        UNROLL for (int v = 0; v < 4; v += 2) {
            _mm512_storeu_si512(room + i * PAGE + 16 * v,
                                (__m512i)_mm512_cvtne2ps_pbh(e[v + 1], e[v]));
        }
        sum[i] += _mm512_reduce_add_ps(
                      _mm512_add_ps(_mm512_add_ps(e[0], e[1]), _mm512_add_ps(e[2], e[3]))) /
                  ROWS_BY;
    }
    return room;
}

BF16 static float peak_bf16(int rounds) {
    __m512 acc[CHAINS];
    const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_set1_ps((float)i);
    for (int r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_dpbf16_ps(acc[i], one, one);
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    return _mm512_reduce_add_ps(acc[0]);
}

static const Peak bf16_peak = {2 * 32 * CHAINS, peak_bf16};

BF16 static void gemm_f16_bf16(const Gemm *g) {
    if (fits_bf16(g->inner, g->cols))
        gemm_bf16(*g, true);
    else
        gemm_f16(g);
}

// ---- the table ----

void adapt_avx512(Kernels *k, const Features *f) {
    (void)f;
    k->matmul[W_F32] = k->matmul[W_F16] = k->matmul[W_BF16] = matmul_float;
    k->matmul[W_Q8] = matmul_q8, k->matmul[W_Q4] = matmul_q4;
    k->matmul_pair[W_Q8] = matmul_pair_q8, k->matmul_pair[W_Q4] = matmul_pair_q4;
    k->wide = false;
    k->quantize = quantize;
    k->gemm_f32 = gemm_f32;
    k->gemm_f16 = gemm_f16;
    k->gemm_packed = gemm_f32;
    k->peak[W_F32] = k->peak[W_F16] = k->peak[W_BF16] = k->peak_packed = &f32_peak;
    k->peak[W_Q8] = k->peak[W_Q4] = &int_peak;
    k->gemm_codes = gemm_codes;
    k->delta_rule = delta_rule;
    k->silu_mul = silu_mul;
    k->gelu_mul = gelu_mul;
    k->max_rows = max_rows;
    k->exp64 = exp64;
    k->max_into = max_into;
}

void adapt_avx512bf16(Kernels *k, const Features *f) {
    adapt_avx512(k, f);
    k->pack_f16 = pack_f16_bf16;
    k->pack_f32 = pack_f32_bf16;
    k->packed_bytes = packed_bytes_bf16;
    k->pack_rows = pack_rows_bf16;
    k->gemm_packed = gemm_packed_bf16;
    k->exp_packed = exp_packed_bf16;
    k->gemm_f16 = gemm_f16_bf16;
    k->halves_packed = true;
    k->packed_error = 0x1p-8f;
    k->peak_packed = &bf16_peak;
}

#endif
