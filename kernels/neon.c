// neon.c: NEON, which every AArch64 machine has, and the dot product of ARMv8.2 where there is one.
//
// 32 registers of 4 floats. q8 and q4 weights meet inputs of 8 bits: sdot adds four products to a
// 32-bit sum; without it two steps of widening give the same integers.
#include "kernels/simd.h"

#ifdef __aarch64__
#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

// ---- half precision ----

static void f16_to_f32(float *out, const uint16_t *in, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(in + i))));
    kernels_scalar.f16_to_f32(out + i, in + i, n - i);
}

static void f32_to_f16(uint16_t *out, const float *in, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + i))));
    kernels_scalar.f32_to_f16(out + i, in + i, n - i);
}

// ---- vectors ----

// As in avx2.c.
INLINE float32x4_t exp_lanes(float32x4_t x) {
    uint32x4_t too_low = vcltq_f32(x, vdupq_n_f32(-87.33f));  // false for NaN, which must stay one
    x = vminq_f32(x, vdupq_n_f32(88.37f));
    float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693145752f));
    r = vfmsq_f32(r, n, vdupq_n_f32(1.42860677e-6f));
    float32x4_t p = vdupq_n_f32(1.0f / 720);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 120), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 24), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 6), p, r);
    p = vfmaq_f32(vdupq_n_f32(0.5f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    int32x4_t e = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    p = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), e));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(p), too_low));
}

static void rmsnorm(float *out, const float *x, const float *w, int n, float eps) {
    float32x4_t acc = vdupq_n_f32(0.0f);
    int i = 0;
    for (; i + 4 <= n; i += 4) acc = vfmaq_f32(acc, vld1q_f32(x + i), vld1q_f32(x + i));
    float ss = vaddvq_f32(acc);
    for (; i < n; i++) ss += x[i] * x[i];
    float r = 1.0f / sqrtf(ss / (float)n + eps);
    for (i = 0; i + 4 <= n; i += 4)
        vst1q_f32(out + i, vmulq_f32(vmulq_n_f32(vld1q_f32(x + i), r), vld1q_f32(w + i)));
    for (; i < n; i++) out[i] = x[i] * r * w[i];
}

static void add(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(x + i, vaddq_f32(vld1q_f32(x + i), vld1q_f32(y + i)));
    kernels_scalar.add(x + i, y + i, n - i);
}

static void scale(float *x, float a, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(x + i, vmulq_n_f32(vld1q_f32(x + i), a));
    kernels_scalar.scale(x + i, a, n - i);
}

// x / (1 + exp(-u)) * y
INLINE float32x4_t gate(float32x4_t x, float32x4_t u, float32x4_t y) {
    float32x4_t e = exp_lanes(vnegq_f32(u));
    return vmulq_f32(vdivq_f32(x, vaddq_f32(vdupq_n_f32(1.0f), e)), y);
}

static void delta_rule(const DeltaRule *d) { delta_rule_lanes(d); }

static void silu_mul(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t v = vld1q_f32(x + i);
        vst1q_f32(x + i, gate(v, v, vld1q_f32(y + i)));
    }
    kernels_scalar.silu_mul(x + i, y + i, n - i);
}

static void gelu_mul(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t v = vld1q_f32(x + i), v3 = vmulq_f32(vmulq_f32(v, v), v);
        float32x4_t u = vmulq_n_f32(vfmaq_n_f32(v, v3, GELU_B), GELU_A);
        vst1q_f32(x + i, gate(v, u, vld1q_f32(y + i)));
    }
    kernels_scalar.gelu_mul(x + i, y + i, n - i);
}

// ---- scores ----

static void max_rows(float *max, const float *s, int n) {
    for (int i = 0; i < n; i++, s += PAGE) {
        float32x4_t m = vld1q_f32(s);
        for (int j = 4; j < PAGE; j += 4) m = vmaxnmq_f32(m, vld1q_f32(s + j));
        max[i] = vmaxnmvq_f32(m);
    }
}

static float exp64(float *s, float m) {
    float32x4_t sum = vdupq_n_f32(0.0f);
    for (int i = 0; i < PAGE; i += 4) {
        float32x4_t e = exp_lanes(vsubq_f32(vld1q_f32(s + i), vdupq_n_f32(m)));
        vst1q_f32(s + i, e);
        sum = vaddq_f32(sum, e);
    }
    return vaddvq_f32(sum);
}

static void max_into(float *run, const float *s, float b) {
    for (int i = 0; i < PAGE; i += 4) {
        float32x4_t v = vaddq_f32(vld1q_f32(s + i), vdupq_n_f32(b));
        vst1q_f32(run + i, vmaxnmq_f32(v, vld1q_f32(run + i)));
    }
}

// ---- inputs in 8 bits ----

INLINE float abs_max(const float *x) {
    float32x4_t m = vdupq_n_f32(0.0f);
    for (int i = 0; i < QGROUP; i += 4) m = vmaxq_f32(m, vabsq_f32(vld1q_f32(x + i)));
    return vmaxvq_f32(m);
}

static void quantize_row(const Activations *a, int t) {
    const size_t first = (size_t)t * a->stride, end = first + a->stride;
    float max = 0.0f;
    for (size_t at = first; at < end; at += QGROUP) {
        a->scale[at / QGROUP] = abs_max(a->x + at);
        max = max_of(max, a->scale[at / QGROUP]);
    }
    for (size_t at = first; at < end; at += QGROUP) {
        float scale = group_scale(max, a->scale[at / QGROUP]), inv = group_inverse(max, scale);
        int32x4_t total = vdupq_n_s32(0);
        for (int i = 0; i < QGROUP; i += 8) {
            int32x4_t q0 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(a->x + at + i), inv));
            int32x4_t q1 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(a->x + at + i + 4), inv));
            total = vaddq_s32(total, vaddq_s32(q0, q1));
            vst1_s8(a->q + at + i, vmovn_s16(vcombine_s16(vmovn_s32(q0), vmovn_s32(q1))));
        }
        store_group(a, at / QGROUP, scale, vaddvq_s32(total));
    }
    a->unit[t] = row_unit(max);
}

static void quantize(const Activations *a, int t0, int t1) {
    for (int t = t0; t < t1; t++) quantize_row(a, t);
}

// ---- products of floats ----

INLINE float32x4_t load4(const void *b, size_t i, const bool half) {
    if (half) return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)b + i)));
    return vld1q_f32((const float *)b + i);
}

// As in avx2.c: R * C + C + 1 <= 32.
INLINE void gemm_tile(const Gemm *g, int i, int j, const int R, const int C, const bool half) {
    const size_t ldb = (size_t)g->cols;
    float *c = g->c + (size_t)i * g->ldc + j;
    const float *a = (const float *)g->a + (size_t)i * g->lda;
    float32x4_t acc[5][4];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) acc[r][v] =
            g->add ? vld1q_f32(c + r * g->ldc + 4 * v) : vdupq_n_f32(0.0f);
    }
    for (int k = 0; k < g->inner; k++) {
        if (half) __builtin_prefetch((const uint16_t *)g->ahead + k * ldb + j, 0, 1);
        float32x4_t b[4];
        UNROLL for (int v = 0; v < C; v++) b[v] = load4(g->b, k * ldb + (size_t)(j + 4 * v), half);
        UNROLL for (int r = 0; r < R; r++) {
            UNROLL for (int v = 0; v < C; v++) acc[r][v] =
                vfmaq_n_f32(acc[r][v], b[v], a[r * g->lda + k]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) vst1q_f32(c + r * g->ldc + 4 * v, acc[r][v]);
    }
}

INLINE void gemm_rows(const Gemm *g, int i, const int R, const bool half) {
    int j = 0;
    for (; j + 16 <= g->cols; j += 16) gemm_tile(g, i, j, R, 4, half);
    for (; j < g->cols; j += 4) gemm_tile(g, i, j, R, 1, half);
}

// A copy, as in avx2.c.
INLINE void gemm(const Gemm g, const bool half) {
    int i = 0;
    for (; i + 5 <= g.n; i += 5) gemm_rows(&g, i, 5, half);
    for (; i + 3 <= g.n; i += 3) gemm_rows(&g, i, 3, half);
    for (; i < g.n; i++) gemm_rows(&g, i, 1, half);
}

static void gemm_f32(const Gemm *g) {
    if (g->cols % 4)
        kernels_scalar.gemm_f32(g);
    else
        gemm(*g, false);
}

static void gemm_f16(const Gemm *g) {
    if (g->cols % 4)
        kernels_scalar.gemm_f16(g);
    else
        gemm(*g, true);
}

static void pack_f16(void *packed, const uint16_t *b, int inner, int cols) {
    f16_to_f32(packed, b, (size_t)inner * cols);
}

// ---- codes ----

// acc += w . a for 4 rows of 4 columns; a holds one quad of activations four times. The instruction
// is written out because compilers want a whole function to be for machines that have it.
INLINE int32x4_t dot_quads(int32x4_t acc, int8x16_t w, int8x16_t a, const bool sdot) {
    if (sdot) {
        __asm__(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b"
                : "+w"(acc)
                : "w"(w), "w"(a));
        return acc;
    }
    int16x8_t lo = vmull_s8(vget_low_s8(w), vget_low_s8(a)), hi = vmull_high_s8(w, a);
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi)));
}

// As in avx2.c, but of each eight integers the high bytes come before the low ones.
static void fold(Folded *f, int r, const float *a, const Codes *b) {
    float x[CODE_ROWS];
    float32x4_t max = vdupq_n_f32(0.0f), bias = max;
    int32x4_t sum = vdupq_n_s32(0);
    for (int k = 0; k < b->rows; k += 4) {
        float32x4_t v = vld1q_f32(a + k), s = vmulq_f32(v, load4(b->scale, (size_t)k, true));
        float32x4_t min = b->min ? load4(b->min, (size_t)k, true) : vdupq_n_f32(0.0f);
        bias = vfmaq_f32(bias, v, min);
        max = vmaxq_f32(max, vabsq_f32(s));
        vst1q_f32(x + k, s);
    }
    float most = vmaxvq_f32(max), inv = most > 0.0f ? FOLD_MOST / most : 0.0f;
    uint8_t *out = f->q + (size_t)r * b->rows * 2;
    for (int k = 0; k < b->rows; k += 8, out += 16) {
        int32x4_t q0 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + k), inv));
        int32x4_t q1 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + k + 4), inv));
        int16x8_t w = vcombine_s16(vqmovn_s32(q0), vqmovn_s32(q1));
        int8x8_t low = vmovn_s16(w);
        vst1_s8((int8_t *)out, vmovn_s16(vshrq_n_s16(vsubq_s16(w, vmovl_s8(low)), 8)));
        vst1_s8((int8_t *)out + 8, low);
        sum = vaddq_s32(sum, vpaddlq_s16(w));  // garbage does not overflow
    }
    f->scale[r] = most / FOLD_MOST;
    f->bias[r] = vaddvq_f32(bias);
    int signed_by = b->type == C_U8 ? 128 : 0;  // in load_codes
    f->center[r] = (code_center(b) - signed_by) * vaddvq_s32(sum);
}

// Codes of 4 columns, the fours' number n in their block, by 4 rows, as signed bytes.
INLINE int8x16_t load_codes(const uint8_t *block, int n, const CodeType type) {
    const int lines = 8 >> type;  // of 16 bytes in a block
    uint8x16_t v = vld1q_u8(block + 16 * (n % lines));
    if (type == C_U8) return vreinterpretq_s8_u8(veorq_u8(v, vdupq_n_u8(128)));
    v = vshlq_u8(v, vdupq_n_s8((int8_t)(-n / lines * (8 >> type))));
    return vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(type == C_U4 ? 15 : 3)));
}

// As in avx512.c: R rows by C fours of columns.
INLINE void codes_tile(const FoldedGemm *g, int i, int j, const int R, const int C,
                       const CodeType type) {
    const size_t block = CODE_LINE >> type, rows = (size_t)g->b->rows;
    size_t step = code_blocks(g->b) * block;
    const uint8_t *at = g->b->data + j / CODE_COLS * block, *q = g->a->q + i * rows * 2;
    int32x4_t high[3][4], low[3][4];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) high[r][v] = low[r][v] = vdupq_n_s32(0);
    }
    for (size_t k = 0; k < rows; k += 8, q += 16) {
        UNROLL for (int four = 0; four < 8; four += 4, at += step) {
            int8x16_t b[4];
            UNROLL for (int v = 0; v < C; v++) b[v] = load_codes(at, j % CODE_COLS / 4 + v, type);
            UNROLL for (int r = 0; r < R; r++) {
                int a[2];
                memcpy(a, q + r * rows * 2 + four, 4);
                memcpy(a + 1, q + r * rows * 2 + four + 8, 4);
                int8x16_t a_high = vreinterpretq_s8_s32(vdupq_n_s32(a[0]));
                int8x16_t a_low = vreinterpretq_s8_s32(vdupq_n_s32(a[1]));
                UNROLL for (int v = 0; v < C; v++) {
                    high[r][v] = dot_quads(high[r][v], b[v], a_high, g->sdot);
                    low[r][v] = dot_quads(low[r][v], b[v], a_low, g->sdot);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) {
            float *c = g->c + (i + r) * g->ldc + j + 4 * v;
            int32x4_t sum = vaddq_s32(vshlq_n_s32(high[r][v], 8), low[r][v]);
            sum = vsubq_s32(sum, vdupq_n_s32(g->a->center[i + r]));
            float32x4_t bias = vdupq_n_f32(g->a->bias[i + r]);
            if (g->add) bias = vaddq_f32(bias, vld1q_f32(c));
            vst1q_f32(c, vfmaq_n_f32(bias, vcvtq_f32_s32(sum), g->a->scale[i + r]));
        }
    }
}

INLINE void codes_rows(const FoldedGemm *g, int i, const int R, const CodeType type) {
    int j = 0;
    for (; j + 16 <= g->b->cols; j += 16) codes_tile(g, i, j, R, 4, type);
    for (; j < g->b->cols; j += 4) codes_tile(g, i, j, R, 1, type);
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

INLINE void fold_and_multiply(const CodeGemm *g, const bool sdot) {
    const Codes *b = g->b;
    Folded f;
    if (b->cols % 4) {
        kernels_scalar.gemm_codes(g);
        return;
    }
    for (int i = 0; i < g->n; i += FOLD_ROWS) {
        FoldedGemm part = folded_rows(g, &f, i);
        part.sdot = sdot;
        for (int r = 0; r < part.n; r++) fold(&f, r, g->a + (i + r) * g->lda, b);
        if (b->type == C_U8)
            codes_gemm(&part, C_U8);
        else if (b->type == C_U4)
            codes_gemm(&part, C_U4);
        else
            codes_gemm(&part, C_U2);
    }
}

static void gemm_codes(const CodeGemm *g) { fold_and_multiply(g, false); }
static void gemm_codes_sdot(const CodeGemm *g) { fold_and_multiply(g, true); }

static void unpack_codes(float *out, size_t ld, const Codes *b) {
    const int bits = 8 >> b->type, lines = 8 >> b->type;  // lines of 16 bytes in a block
    if (b->cols % 4) {
        kernels_scalar.unpack_codes(out, ld, b);
        return;
    }
    for (int r = 0; r < b->rows; r++, out += ld) {
        float scale = f16_f32(b->scale[r]);
        float32x4_t min = vdupq_n_f32(b->min ? f16_f32(b->min[r]) : 0.0f);
        for (int c = 0; c < b->cols; c += 4) {
            size_t block = r / 4 * code_blocks(b) + c / CODE_COLS;
            int n = c % CODE_COLS / 4, shift = n / lines * bits + r % 4 * 8;
            const uint8_t *at = b->data + block * code_block(b) + 16 * (n % lines);
            uint32x4_t v = vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(at)), vdupq_n_s32(-shift));
            float32x4_t x = vcvtq_f32_u32(vandq_u32(v, vdupq_n_u32((1u << bits) - 1)));
            x = vsubq_f32(x, vdupq_n_f32((float)code_center(b)));
            vst1q_f32(out + c, vfmaq_n_f32(min, x, scale));
        }
    }
}

// ---- weights in floats ----

// Eight rows of a line [16 rows][2 columns]: the load parts the columns.
static void unpack_halves(float *out, const Matrix *w, int panel, int c0, int cols) {
    const uint16_t *in = (const uint16_t *)w->data + ((size_t)panel * w->cols_padded + c0) * PANEL;
    for (int i = 0; i < cols * PANEL; i += 16) {
        uint16x8x2_t v = vld2q_u16(in + i);
        float *to = out + i / 32 * 32 + i % 32 / 2;
        for (int c = 0; c < 2; c++, to += PANEL) {
            uint16x4_t lo = vget_low_u16(v.val[c]), hi = vget_high_u16(v.val[c]);
            bool bf16 = w->type == W_BF16;
            vst1q_f32(to, bf16 ? vreinterpretq_f32_u32(vshll_n_u16(lo, 16))
                               : vcvt_f32_f16(vreinterpret_f16_u16(lo)));
            vst1q_f32(to + 4, bf16 ? vreinterpretq_f32_u32(vshll_n_u16(hi, 16))
                                   : vcvt_f32_f16(vreinterpret_f16_u16(hi)));
        }
    }
}

static void matmul_float(const PanelProduct *p) {
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

// Weights of 4 columns by 4 rows of a quad as signed bytes. A q4 line holds two quads.
INLINE int8x16_t load_rows(const uint8_t *line, int quad, int r, const bool q4, const bool offset) {
    if (!q4) return vreinterpretq_s8_u8(vld1q_u8(line + 64 * quad + 16 * r));
    uint8x16_t v = vld1q_u8(line + 64 * (quad / 2) + 16 * r);
    v = quad % 2 ? vshrq_n_u8(v, 4) : vandq_u8(v, vdupq_n_u8(15));
    int8x16_t s = vreinterpretq_s8_u8(v);
    return offset ? s : vsubq_s8(s, vdupq_n_s8(8));
}

// T tokens against a whole panel, straight from the file. The same integers as everywhere.
INLINE void int_tile(const IntPanel *p, int t, const bool q4, const bool offset, const bool sdot,
                     const int T) {
    const Activations *x = p->x;
    float sum[4][PANEL] = {{0}};
    for (int g = 0; g < p->groups; g++) {
        const uint8_t *line = p->line + (size_t)g * QGROUP * PANEL / (q4 ? 2 : 1);
        int32x4_t acc[4][4];
        UNROLL for (int i = 0; i < T; i++) {
            UNROLL for (int r = 0; r < 4; r++) acc[i][r] = vdupq_n_s32(0);
        }
        UNROLL for (int quad = 0; quad < QGROUP / 4; quad++) {
            int8x16_t rows[4];
            UNROLL for (int r = 0; r < 4; r++) rows[r] = load_rows(line, quad, r, q4, offset);
            UNROLL for (int i = 0; i < T; i++) {
                const int8_t *q = x->q + (size_t)(t + i) * x->stride + g * QGROUP;
                int a;
                memcpy(&a, q + 4 * quad, 4);
                int8x16_t quads = vreinterpretq_s8_s32(vdupq_n_s32(a));
                UNROLL for (int r = 0; r < 4; r++) acc[i][r] =
                    dot_quads(acc[i][r], rows[r], quads, sdot);
            }
        }
        UNROLL for (int i = 0; i < T; i++) {
            size_t at = (size_t)(t + i) * x->stride / QGROUP + g;
            UNROLL for (int r = 0; r < 4; r++) {
                float32x4_t s = load4(p->scale, (size_t)g * PANEL + 4 * r, true);
                float32x4_t v = vld1q_f32(sum[i] + 4 * r);
                v = vfmaq_f32(v, vcvtq_f32_s32(acc[i][r]), vmulq_n_f32(s, x->scale[at]));
                if (offset) {
                    float32x4_t o = load4(p->offset, (size_t)g * PANEL + 4 * r, true);
                    v = vfmaq_n_f32(v, o, x->sum[at]);
                }
                vst1q_f32(sum[i] + 4 * r, v);
            }
        }
    }
    for (int i = 0; i < T; i++) {
        float *out = p->out + (t + i) * p->ld;
        UNROLL for (int r = 0; r < PANEL; r += 4)
            vst1q_f32(out + r, vmulq_n_f32(vld1q_f32(sum[i] + r), x->unit[t + i]));
    }
}

INLINE void matmul_int(const PanelProduct *p, const bool q4, const bool offset, const bool sdot) {
    const IntPanel ip = int_panel(p, 0);
    int t = p->t0, t1 = p->t1;
    for (; t + 4 <= t1; t += 4) int_tile(&ip, t, q4, offset, sdot, 4);
    for (; t < t1; t++) int_tile(&ip, t, q4, offset, sdot, 1);
}

INLINE void matmul_nibbles(const PanelProduct *p, const bool sdot) {
    if (p->w->offset)
        matmul_int(p, true, true, sdot);
    else
        matmul_int(p, true, false, sdot);
}

static void matmul_q8(const PanelProduct *p) { matmul_int(p, false, false, false); }
static void matmul_q4(const PanelProduct *p) { matmul_nibbles(p, false); }
static void matmul_q8_sdot(const PanelProduct *p) { matmul_int(p, false, false, true); }
static void matmul_q4_sdot(const PanelProduct *p) { matmul_nibbles(p, true); }

// ---- peaks ----

static float peak_f32(int rounds) {
    float32x4_t acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = vdupq_n_f32((float)i);
    for (int r = 0; r < rounds; r++) {  // a product of the sums stays finite: 0.5 x + y < 2 y
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            vfmaq_f32(vdupq_n_f32(1.0f), acc[i], vdupq_n_f32(0.5f));
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = vaddq_f32(acc[0], acc[i]);
    return vaddvq_f32(acc[0]);
}

INLINE float peak_int(int rounds, const bool sdot) {
    int32x4_t acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = vdupq_n_s32(i);
    for (int r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            dot_quads(acc[i], vreinterpretq_s8_s32(acc[i]), vdupq_n_s8(3), sdot);
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = vaddq_s32(acc[0], acc[i]);
    return (float)vaddvq_s32(acc[0]);
}

static float peak_mull(int rounds) { return peak_int(rounds, false); }
static float peak_sdot(int rounds) { return peak_int(rounds, true); }

static const Peak f32_peak = {2 * 4 * CHAINS, peak_f32};
static const Peak mull_peak = {2 * 16 * CHAINS, peak_mull};
static const Peak sdot_peak = {2 * 16 * CHAINS, peak_sdot};

// ---- the table ----

const Kernels kernels_neon = {
    .matmul = {matmul_float, matmul_float, matmul_float, matmul_q8, matmul_q4},
    .quantize = quantize,
    .gemm_f32 = gemm_f32,
    .gemm_f16 = gemm_f16,
    .pack_f16 = pack_f16,
    .packed_bytes = packed_bytes_f32,
    .pack_rows = rows_as_they_are,
    .gemm_packed = gemm_f32,
    .peak = {&f32_peak, &f32_peak, &f32_peak, &mull_peak, &mull_peak},
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

// What differs on machines with the dot product.
void adapt_neon(Kernels *k, const Features *f) {
    if (!f->dotprod) return;
    k->matmul[W_Q8] = matmul_q8_sdot;
    k->matmul[W_Q4] = matmul_q4_sdot;
    k->peak[W_Q8] = k->peak[W_Q4] = &sdot_peak;
    k->gemm_codes = gemm_codes_sdot;
}
#endif
