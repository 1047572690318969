// kernels.c: the arithmetic, once as plain C and once per instruction set, and the thread pool.
//
// The scalar function is the definition; each variant stands under it, and tests hold the two
// against each other for every tail length. Everything heavy is one of two products. Weights in
// 16-bit and 32-bit floats are unpacked, some columns at a time, to f32 [columns][16 rows] and
// multiplied like any small matrix; q8 and q4 are unpacked to 16-bit integers [columns/2][16
// rows][2] and multiplied with activations that were rounded to 8 bits in groups of 32 (see
// Activations). The unpacked block stays in the first-level cache while all tokens of the call pass
// over it. The fact that must stay true: the sum for one output runs over the columns in order,
// whatever the tile, so any batch and any thread count give the same bits.
#define _POSIX_C_SOURCE 200809L
#define _DARWIN_C_SOURCE
#include "kernels/kernels.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

Kernels kern;

// ---- half precision ----

static inline uint32_t bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

float f16_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = h >> 10 & 31, man = h & 0x3ff;
    if (exp == 0) return from_bits(sign | bits((float)man * 0x1p-24f));
    if (exp == 31) return from_bits(sign | 0x7f800000 | man << 13);
    return from_bits(sign | (exp + 112) << 23 | man << 13);
}

uint16_t f32_f16(float f) {
    uint32_t u = bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);   // NaN
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to infinity
    if (a < 0x38800000) {                                   // subnormal: let the adder round
        return (uint16_t)(sign | (bits(from_bits(a) + 0.5f) - bits(0.5f)));
    }
    uint32_t odd = a >> 13 & 1;
    return (uint16_t)(sign | (a - 0x38000000 + 0xfff + odd) >> 13);
}

static void f16_to_f32_scalar(float *out, const uint16_t *in, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = f16_f32(in[i]);
}

static void f32_to_f16_scalar(uint16_t *out, const float *in, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = f32_f16(in[i]);
}

// ---- scalar: vectors ----

static void rmsnorm_scalar(float *out, const float *x, const float *w, int n, float eps) {
    float ss = 0.0f;
    for (int i = 0; i < n; i++) ss += x[i] * x[i];
    float r = 1.0f / sqrtf(ss / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = x[i] * r * w[i];
}

static void add_scalar(float *x, const float *y, int n) {
    for (int i = 0; i < n; i++) x[i] += y[i];
}

static void scale_scalar(float *x, float a, int n) {
    for (int i = 0; i < n; i++) x[i] *= a;
}

static void silu_mul_scalar(float *x, const float *y, int n) {
    for (int i = 0; i < n; i++) x[i] = x[i] / (1.0f + expf(-x[i])) * y[i];
}

// 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3); arXiv 1606.08415
#define GELU_A 1.5957691216057308f  // 2 sqrt(2/pi)
#define GELU_B 0.044715f

static void gelu_mul_scalar(float *x, const float *y, int n) {
    for (int i = 0; i < n; i++) {
        float u = GELU_A * (x[i] + GELU_B * x[i] * x[i] * x[i]);
        x[i] = x[i] / (1.0f + expf(-u)) * y[i];
    }
}

static void max_rows_scalar(float *max, const float *s, int n) {
    for (int i = 0; i < n; i++, s += PAGE) {
        max[i] = s[0];
        for (int j = 1; j < PAGE; j++) max[i] = s[j] > max[i] ? s[j] : max[i];
    }
}

static float exp64_scalar(float *s, float m) {
    float sum = 0.0f;
    for (int i = 0; i < PAGE; i++) sum += s[i] = expf(s[i] - m);
    return sum;
}

static void max_into_scalar(float *run, const float *s, float b) {
    for (int i = 0; i < PAGE; i++) run[i] = s[i] + b > run[i] ? s[i] + b : run[i];
}

// 2^n for n in -126..127.
static inline float exp2_int(int n) { return from_bits((uint32_t)(n + 127) << 23); }

// How x is rounded, a row's and its groups' largest numbers being known: see Activations.
static inline float row_unit(float row_max) { return row_max / 127.0f * exp2_int(-UNIT_STEPS); }

static inline float group_scale(float row_max, float group_max) {
    // How often group_max can be doubled before it passes row_max: the difference of their bits is
    // that of the exponents, one less where the mantissa of group_max is larger.
    uint32_t n = (bits(row_max) - bits(group_max)) >> 23;
    if (n >= UNIT_STEPS) return 1.0f;
    float scale = exp2_int(UNIT_STEPS - (int)n);
    return group_max * exp2_int((int)n) > 0.75f * row_max ? scale : 0.75f * scale;
}

static inline float group_inverse(float row_max, float scale) {
    return row_max > 0.0f ? 127.0f / row_max * (exp2_int(UNIT_STEPS) / scale) : 0.0f;
}

static inline void store_group(const Activations *a, size_t group, float scale, int sum) {
    a->scale[group] = scale;
    a->sum[group] = scale * (float)sum;
    a->shift[group] = -128 * sum;
}

// A row of q16 has the unit row_max / WIDE: sums of 32 products with 8-bit weights fit 32 bits.
enum { WIDE = 32767 };

static inline float wide_inverse(float row_max) { return row_max > 1e-30f ? WIDE / row_max : 0.0f; }

static void quantize_scalar(const Activations *a, int t0, int t1) {
    for (int t = t0; t < t1; t++) {
        const size_t first = (size_t)t * a->stride;
        float max = 0.0f;
        for (int i = 0; i < a->stride; i++) max = fmaxf(max, fabsf(a->x[first + i]));
        for (int i = 0; i < a->stride; i++)
            a->q16[first + i] = (int16_t)lrintf(a->x[first + i] * wide_inverse(max));
        a->unit16[t] = max / WIDE;
        for (size_t at = first; at < first + a->stride; at += QGROUP) {
            float group_max = 0.0f;
            for (int i = 0; i < QGROUP; i++) group_max = fmaxf(group_max, fabsf(a->x[at + i]));
            float scale = group_scale(max, group_max), inv = group_inverse(max, scale);
            int sum = 0;
            for (int i = 0; i < QGROUP; i++)
                sum += a->q[at + i] = (int8_t)lrintf(a->x[at + i] * inv);
            store_group(a, at / QGROUP, scale, sum);
        }
        a->unit[t] = row_unit(max);
    }
}

// ---- scalar: products ----

static void gemm_f32_scalar(float *c, size_t ldc, const float *a, size_t lda, const void *b, int n,
                            int inner, int cols, bool add) {
    const float *bf = b;
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < cols; j++) {
            float sum = add ? c[i * ldc + j] : 0.0f;
            for (int k = 0; k < inner; k++) sum += a[i * lda + k] * bf[(size_t)k * cols + j];
            c[i * ldc + j] = sum;
        }
    }
}

static void gemm_f16_scalar(float *c, size_t ldc, const void *rows, const void *b,
                            const void *ahead, int n, int inner, int cols, bool add) {
    const float *a = rows;
    const uint16_t *bh = b;
    (void)ahead;
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < cols; j++) {
            float sum = add ? c[i * ldc + j] : 0.0f;
            for (int k = 0; k < inner; k++)
                sum += a[i * inner + k] * f16_f32(bh[(size_t)k * cols + j]);
            c[i * ldc + j] = sum;
        }
    }
}

static void pack_f16_scalar(void *packed, const uint16_t *b, int inner, int cols) {
    f16_to_f32_scalar(packed, b, (size_t)inner * cols);
}

static void pack_f32_scalar(void *packed, const float *b, int inner, int cols) {
    memcpy(packed, b, (size_t)inner * cols * sizeof *b);
}

static size_t packed_bytes_f32(int inner, int cols) { return (size_t)inner * cols * sizeof(float); }

static const void *rows_as_they_are(uint16_t *room, const float *a, int n, int inner, int cols) {
    (void)room, (void)n, (void)inner, (void)cols;
    return a;
}

static void gemm_packed_scalar(float *c, size_t ldc, const void *rows, const void *packed, int n,
                               int inner, int cols, bool add) {
    gemm_f32_scalar(c, ldc, rows, (size_t)inner, packed, n, inner, cols, add);
}

// ---- scalar: codes ----

static inline size_t code_block(const Codes *b) { return (size_t)CODE_LINE >> b->type; }
static inline size_t code_blocks(const Codes *b) {  // of four rows
    return (size_t)((b->cols + CODE_COLS - 1) / CODE_COLS);
}

static inline int code_at(const Codes *b, int r, int c) {
    const uint8_t *block = b->data + (r / 4 * code_blocks(b) + c / CODE_COLS) * code_block(b);
    int run = CODE_COLS >> b->type, i = c % CODE_COLS;  // columns that lie one after another
    return block[4 * (i % run) + r % 4] >> (i / run * (8 >> b->type)) &
           ((256 >> (8 - (8 >> b->type))) - 1);
}

// The code that stands for 0, where there is no minimum.
static inline int code_center(const Codes *b) { return b->min ? 0 : 128; }

static void unpack_codes_scalar(float *out, size_t ld, const Codes *b) {
    for (int r = 0; r < b->rows; r++) {
        float scale = f16_f32(b->scale[r]), min = b->min ? f16_f32(b->min[r]) : 0.0f;
        for (int c = 0; c < b->cols; c++)
            out[r * ld + c] = scale * (float)(code_at(b, r, c) - code_center(b)) + min;
    }
}

static void gemm_codes_scalar(float *c, size_t ldc, const float *a, size_t lda, const Codes *b,
                              int n, bool add) {
    for (int i = 0; !add && i < n; i++) memset(c + i * ldc, 0, (size_t)b->cols * sizeof *c);
    for (int k = 0; k < b->rows; k++) {
        float scale = f16_f32(b->scale[k]), min = b->min ? f16_f32(b->min[k]) : 0.0f;
        for (int j = 0; j < b->cols; j++) {
            float v = scale * (float)(code_at(b, k, j) - code_center(b)) + min;
            for (int i = 0; i < n; i++) c[i * ldc + j] += a[i * lda + k] * v;
        }
    }
}

// Comparisons, not fminf and fmaxf, which are calls.
static inline float min_of(float a, float b) { return a < b ? a : b; }
static inline float max_of(float a, float b) { return a > b ? a : b; }

// Row r becomes codes, one a byte, and its scale and minimum.
static void round_codes(uint8_t *codes, const Codes *to, int r, const float *x) {
    float most = to->type == C_U8 ? 255.0f : to->type == C_U4 ? 15.0f : 3.0f;
    float low = x[0], high = x[0], least = to->min ? 0.0f : 1.0f;
    for (int c = 1; c < to->cols; c++) low = min_of(x[c], low), high = max_of(x[c], high);
    to->scale[r] = f32_f16(to->min ? (high - low) / most : max_of(-low, high) / 127.0f);
    if (to->min) to->min[r] = f32_f16(low);
    float scale = f16_f32(to->scale[r]), inv = scale > 0.0f ? 1.0f / scale : 0.0f;
    low = to->min ? f16_f32(to->min[r]) : -128.0f * scale;
    for (int c = 0; c < to->cols; c++) {
        float q = min_of(max_of((x[c] - low) * inv, least), most);
        codes[c] = (uint8_t)(int)(q + 0.5f);
    }
}

void codes_round(const Codes *to, const float *x, size_t ld) {
    int run = CODE_COLS >> to->type, bits = 8 >> to->type;
    size_t step = code_blocks(to) * code_block(to);
    uint8_t codes[CODE_ROWS + CODE_COLS] = {0};
    memset(to->data, 0, code_bytes(to->type, to->rows, to->cols));
    for (int r = 0; r < to->rows; r++, x += ld) {
        uint8_t *block = to->data + r / 4 * step + r % 4;
        round_codes(codes, to, r, x);
        for (int c = 0; c < to->cols; c += CODE_COLS, block += code_block(to)) {
            for (int i = 0; i < CODE_COLS; i += run) {
                for (int n = 0; n < run; n++) block[4 * n] |= codes[c + i + n] << (i / run * bits);
            }
        }
    }
}

// Columns unpacked at a time: 16 rows x 256 columns of f32 are 16 KB, half of a first-level cache.
enum { BLOCK = 256 };

// A block of a panel as f32 [cols][16], columns c0 .. c0 + cols.
static void unpack_float_scalar(float *out, const Matrix *w, int panel, int c0, int cols) {
    size_t at = ((size_t)panel * w->cols_padded + c0) * PANEL;
    if (w->type == W_F32) {
        memcpy(out, (const float *)w->data + at, (size_t)cols * PANEL * sizeof(float));
        return;
    }
    const uint16_t *in = (const uint16_t *)w->data + at;
    for (int c = 0; c < cols; c++) {
        for (int r = 0; r < PANEL; r++) {
            uint16_t h = in[(c / 2 * PANEL + r) * 2 + c % 2];
            out[c * PANEL + r] = w->type == W_F16 ? f16_f32(h) : from_bits((uint32_t)h << 16);
        }
    }
}

// A block of a quantized panel: w [cols/2][16][2], and per group of 32 columns scale [16] and
// offset [16].
typedef struct {
    int16_t w[BLOCK * PANEL];
    float scale[BLOCK / QGROUP * PANEL], offset[BLOCK / QGROUP * PANEL];
} IntBlock;

static void unpack_int_scalar(IntBlock *b, const Matrix *w, int panel, int c0, int cols) {
    const uint8_t *line =
        w->data + ((size_t)panel * w->cols_padded + c0) * PANEL / (w->type == W_Q4 ? 2 : 1);
    size_t group = ((size_t)panel * w->cols_padded + c0) / QGROUP * PANEL;
    for (int i = 0; i < cols / QGROUP * PANEL; i++) {
        b->scale[i] = f16_f32(w->scale[group + i]);
        if (w->offset) b->offset[i] = f16_f32(w->offset[group + i]);
    }
    for (int c = 0; c < cols; c++) {
        for (int r = 0; r < PANEL; r++) {
            int v;
            if (w->type == W_Q8) {
                v = (int8_t)line[(c / 4 * PANEL + r) * 4 + c % 4];
            } else {
                int byte = line[(c / 8 * PANEL + r) * 4 + c % 4];
                v = (c % 8 < 4 ? byte & 15 : byte >> 4) - (w->offset ? 0 : 8);
            }
            b->w[(c / 2 * PANEL + r) * 2 + c % 2] = (int16_t)v;
        }
    }
}

static void matmul_float_scalar(float *out, size_t ld, const Matrix *w, int panel,
                                const Activations *x, int t0, int t1) {
    float b[BLOCK * PANEL];
    for (int c0 = 0; c0 < w->cols_padded; c0 += BLOCK) {
        int cols = w->cols_padded - c0 < BLOCK ? w->cols_padded - c0 : BLOCK;
        unpack_float_scalar(b, w, panel, c0, cols);
        gemm_f32_scalar(out + t0 * ld, ld, x->x + (size_t)t0 * x->stride + c0, x->stride, b,
                        t1 - t0, cols, PANEL, c0 > 0);
    }
}

static int dot_group(const IntBlock *b, int r, const Activations *x, size_t at, int c0, bool wide) {
    int dot = 0;
    for (int c = c0; c < c0 + QGROUP; c++)
        dot += b->w[(c / 2 * PANEL + r) * 2 + c % 2] * (wide ? x->q16[at + c] : x->q[at + c]);
    return dot;
}

static inline void matmul_int(float *out, size_t ld, const Matrix *w, int panel,
                              const Activations *x, int t0, int t1, bool wide) {
    IntBlock b;
    for (int c0 = 0; c0 < w->cols_padded; c0 += BLOCK) {
        int cols = w->cols_padded - c0 < BLOCK ? w->cols_padded - c0 : BLOCK;
        unpack_int_scalar(&b, w, panel, c0, cols);
        for (int t = t0; t < t1; t++) {
            size_t at = (size_t)t * x->stride + c0;
            float unit = c0 + cols < w->cols_padded ? 1.0f : wide ? x->unit16[t] : x->unit[t];
            for (int r = 0; r < PANEL; r++) {
                float sum = c0 > 0 ? out[t * ld + r] : 0.0f;
                for (int g = 0; g < cols / QGROUP; g++) {
                    size_t group = at / QGROUP + g;
                    float scale = b.scale[g * PANEL + r] * (wide ? 1.0f : x->scale[group]);
                    sum += (float)dot_group(&b, r, x, at, g * QGROUP, wide) * scale;
                    if (w->offset) sum += b.offset[g * PANEL + r] * x->sum[group];
                }
                out[t * ld + r] = sum * unit;
            }
        }
    }
}

static void matmul_int_scalar(float *out, size_t ld, const Matrix *w, int panel,
                              const Activations *x, int t0, int t1) {
    matmul_int(out, ld, w, panel, x, t0, t1, false);
}

void matmul_wide_scalar(float *out, size_t ld, const Matrix *w, int panel, const Activations *x,
                        int t0, int t1) {
    matmul_int(out, ld, w, panel, x, t0, t1, true);
}

// ---- scalar: peaks ----

enum { CHAINS = 12 };  // sums that do not wait for each other, enough to hide an instruction's time

static float peak_f32_scalar(int rounds) {
    float acc[CHAINS], sum = 0.0f;
    for (int i = 0; i < CHAINS; i++) acc[i] = (float)i;
    for (int r = 0; r < rounds; r++) {
        for (int i = 0; i < CHAINS; i++) acc[i] = acc[i] * 0.5f + 1.0f;
    }
    for (int i = 0; i < CHAINS; i++) sum += acc[i];
    return sum;
}

static float peak_int_scalar(int rounds) {
    uint32_t acc[CHAINS], sum = 0;
    for (int i = 0; i < CHAINS; i++) acc[i] = (uint32_t)i;
    for (int r = 0; r < rounds; r++) {
        for (int i = 0; i < CHAINS; i++) acc[i] = acc[i] * 3 + 1;
    }
    for (int i = 0; i < CHAINS; i++) sum += acc[i];
    return (float)sum;
}

static const Peak f32_scalar = {2 * CHAINS, peak_f32_scalar};
static const Peak int_scalar = {2 * CHAINS, peak_int_scalar};

static const Kernels scalar_kernels = {
    .name = "scalar",
    .matmul = {matmul_float_scalar, matmul_float_scalar, matmul_float_scalar, matmul_int_scalar,
               matmul_int_scalar},
    .quantize = quantize_scalar,
    .gemm_f32 = gemm_f32_scalar,
    .gemm_f16 = gemm_f16_scalar,
    .pack_f16 = pack_f16_scalar,
    .packed_bytes = packed_bytes_f32,
    .pack_rows = rows_as_they_are,
    .gemm_packed = gemm_packed_scalar,
    .peak = {&f32_scalar, &f32_scalar, &f32_scalar, &int_scalar, &int_scalar},
    .peak_packed = &f32_scalar,
    .pack_f32 = pack_f32_scalar,
    .gemm_codes = gemm_codes_scalar,
    .unpack_codes = unpack_codes_scalar,
    .rmsnorm = rmsnorm_scalar,
    .add = add_scalar,
    .scale = scale_scalar,
    .silu_mul = silu_mul_scalar,
    .gelu_mul = gelu_mul_scalar,
    .max_rows = max_rows_scalar,
    .exp64 = exp64_scalar,
    .max_into = max_into_scalar,
    .f16_to_f32 = f16_to_f32_scalar,
    .f32_to_f16 = f32_to_f16_scalar,
};

// ---- what all instruction sets share ----

// Loops over registers.
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// c [n][cols] (+)= a [n][inner] b [inner][cols].
typedef struct {
    float *c;
    const float *a;
    const void *b;
    size_t ldc, lda, ldb;
    int n, inner, cols;
    bool add;
    const uint16_t *ahead;  // of b in half precision
} Gemm;

enum { FOLD_ROWS = 12 };  // rows of a that are folded at a time

// Rows of a, times the scales of b's rows and rounded to 16 bits, so that the product with codes is
// one of integers: a . b[][j] = scale * (sum of q * code - center) + bias.
typedef struct {
    uint8_t q[FOLD_ROWS * CODE_ROWS * 2];  // [FOLD_ROWS][rows], in the order the set reads them
    float scale[FOLD_ROWS], bias[FOLD_ROWS];
    int center[FOLD_ROWS];  // sum of q times the code that stands for 0
} Folded;

// c [n][b's cols] (+)= the folded rows times b, n <= FOLD_ROWS.
typedef struct {
    float *c;
    size_t ldc;
    const Folded *a;
    const Codes *b;
    int n;
    bool add;
} CodeGemm;

static const float FOLD_MOST = 32512.0f;  // 127 * 256: two signed bytes hold it

// How many of `left` rows to multiply at once: threes, and twos where a single one would be left.
static inline int fold_step(int left) { return left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1; }

// ---- AVX2 with FMA and F16C: x86-64 since Haswell (2013) ----

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

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

// exp(x) = 2^n exp(r), |r| <= ln2 / 2, a polynomial of degree 6 for exp(r). Within 2 ulp (tests
// measure 1.1) of the true value; below -87.3 the result is 0, above 88.3 it stays at exp(88.3).
AVX2_INLINE __m256 exp_avx2(__m256 x) {
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

AVX2 static void f16_to_f32_avx2(float *out, const uint16_t *in, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(in + i))));
    f16_to_f32_scalar(out + i, in + i, n - i);
}

AVX2 static void f32_to_f16_avx2(uint16_t *out, const float *in, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm_storeu_si128((void *)(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
    }
    f32_to_f16_scalar(out + i, in + i, n - i);
}

AVX2 static void rmsnorm_avx2(float *out, const float *x, const float *w, int n, float eps) {
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

AVX2 static void add_avx2(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    add_scalar(x + i, y + i, n - i);
}

AVX2 static void scale_avx2(float *x, float a, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(a)));
    scale_scalar(x + i, a, n - i);
}

// x / (1 + exp(-u)) * y
AVX2_INLINE __m256 gate_avx2(__m256 x, __m256 u, __m256 y) {
    __m256 e = exp_avx2(_mm256_sub_ps(_mm256_setzero_ps(), u));
    return _mm256_mul_ps(_mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), e)), y);
}

AVX2 static void silu_mul_avx2(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        _mm256_storeu_ps(x + i, gate_avx2(v, v, _mm256_loadu_ps(y + i)));
    }
    silu_mul_scalar(x + i, y + i, n - i);
}

AVX2 static void gelu_mul_avx2(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i), v2 = _mm256_mul_ps(v, v);
        __m256 u = _mm256_fmadd_ps(_mm256_mul_ps(v2, v), _mm256_set1_ps(GELU_B), v);
        u = _mm256_mul_ps(u, _mm256_set1_ps(GELU_A));
        _mm256_storeu_ps(x + i, gate_avx2(v, u, _mm256_loadu_ps(y + i)));
    }
    gelu_mul_scalar(x + i, y + i, n - i);
}

AVX2 static void max_rows_avx2(float *max, const float *s, int n) {
    for (int i = 0; i < n; i++, s += PAGE) {
        __m256 m = _mm256_loadu_ps(s);
        for (int j = 8; j < PAGE; j += 8) m = _mm256_max_ps(m, _mm256_loadu_ps(s + j));
        max[i] = hmax(m);
    }
}

AVX2 static float exp64_avx2(float *s, float m) {
    __m256 sum = _mm256_setzero_ps();
    for (int i = 0; i < PAGE; i += 8) {
        __m256 e = exp_avx2(_mm256_sub_ps(_mm256_loadu_ps(s + i), _mm256_set1_ps(m)));
        _mm256_storeu_ps(s + i, e);
        sum = _mm256_add_ps(sum, e);
    }
    return hsum(sum);
}

AVX2 static void max_into_avx2(float *run, const float *s, float b) {
    for (int i = 0; i < PAGE; i += 8) {
        __m256 v = _mm256_add_ps(_mm256_loadu_ps(s + i), _mm256_set1_ps(b));
        _mm256_storeu_ps(run + i, _mm256_max_ps(v, _mm256_loadu_ps(run + i)));
    }
}

// Largest |x[i]| of n, a multiple of 8.
AVX2_INLINE float abs_max256(const float *x, int n) {
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

AVX2_INLINE void quantize_words(const Activations *a, int t) {
    const float *x = a->x + (size_t)t * a->stride;
    float max = abs_max256(x, a->stride);
    __m256 inv = _mm256_set1_ps(wide_inverse(max));
    int16_t *q = a->q16 + (size_t)t * a->stride;
    for (int i = 0; i < a->stride; i += 16)
        _mm256_storeu_si256((void *)(q + i), round16(x + i, inv));
    a->unit16[t] = max / WIDE;
}

// The groups' maxima rest where their scales will be.
AVX2_INLINE void quantize_bytes(const Activations *a, int t) {
    const size_t first = (size_t)t * a->stride / QGROUP, end = first + a->stride / QGROUP;
    float max = 0.0f;
    for (size_t g = first; g < end; g++) {
        a->scale[g] = abs_max256(a->x + g * QGROUP, QGROUP);
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

AVX2 static void quantize_avx2(const Activations *a, int t0, int t1) {
    for (int t = t0; t < t1; t++) {
        if (a->for_q8) quantize_words(a, t);
        if (a->for_q4) quantize_bytes(a, t);
    }
}

AVX2_INLINE __m256 load8(const void *b, size_t i, const bool half) {
    if (half) return _mm256_cvtph_ps(_mm_loadu_si128((const void *)((const uint16_t *)b + i)));
    return _mm256_loadu_ps((const float *)b + i);
}

// R rows by C vectors of c, from row i and column j, stay in registers while all of inner passes:
// R * C + C + 1 <= 16.
AVX2_INLINE void gemm_tile(const Gemm *g, int i, int j, const int R, const int C, const bool half) {
    float *c = g->c + (size_t)i * g->ldc + j;
    const float *a = g->a + (size_t)i * g->lda;
    __m256 acc[6][4];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) {
            acc[r][v] = g->add ? _mm256_loadu_ps(c + r * g->ldc + 8 * v) : _mm256_setzero_ps();
        }
    }
    for (int k = 0; k < g->inner; k++) {
        if (half) __builtin_prefetch(g->ahead + k * g->ldb + j, 0, 1);
        __m256 b[4];
        UNROLL for (int v = 0; v < C; v++) b[v] =
            load8(g->b, k * g->ldb + (size_t)(j + 8 * v), half);
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
AVX2_INLINE void gemm_rows(const Gemm *g, int i, const int R, const int C, const bool half) {
    int j = 0;
    for (; j + 8 * C <= g->cols; j += 8 * C) gemm_tile(g, i, j, R, C, half);
    for (; j < g->cols; j += 8) gemm_tile(g, i, j, R, 1, half);
}

AVX2_INLINE void gemm_avx2(const Gemm *g, const bool half) {
    int i = 0;
    for (; i + 6 <= g->n; i += 6) gemm_rows(g, i, 6, 2, half);
    for (; i + 3 <= g->n; i += 3) gemm_rows(g, i, 3, 4, half);
    for (; i < g->n; i++) gemm_rows(g, i, 1, 4, half);
}

AVX2 static void gemm_f32_avx2(float *c, size_t ldc, const float *a, size_t lda, const void *b,
                               int n, int inner, int cols, bool add) {
    if (cols % 8) {
        gemm_f32_scalar(c, ldc, a, lda, b, n, inner, cols, add);
        return;
    }
    gemm_avx2(&(Gemm){c, a, b, ldc, lda, (size_t)cols, n, inner, cols, add, NULL}, false);
}

AVX2 static void gemm_f16_avx2(float *c, size_t ldc, const void *rows, const void *b,
                               const void *ahead, int n, int inner, int cols, bool add) {
    size_t lda = (size_t)inner;
    if (cols % 8)
        gemm_f16_scalar(c, ldc, rows, b, ahead, n, inner, cols, add);
    else
        gemm_avx2(&(Gemm){c, rows, b, ldc, lda, (size_t)cols, n, inner, cols, add, ahead}, true);
}

// Row r of f = a * scales, as 16-bit integers, each four of them in the order 0, 2, 1, 3; a . min
// is the bias.
AVX2 static void fold_avx2(Folded *f, int r, const float *a, const Codes *b) {
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
        sum = _mm256_add_epi32(sum, q);
    }
    f->scale[r] = most / FOLD_MOST;
    f->bias[r] = hsum(bias);
    f->center[r] = code_center(b) * (int)hsum(_mm256_cvtepi32_ps(sum));
}

// Codes of 8 columns, the eights' number n in their block, by 4 rows: even rows and odd rows.
AVX2_INLINE void codes8(const uint8_t *block, const int n, const CodeType type, __m256i *even,
                        __m256i *odd) {
    const __m256i mask = _mm256_set1_epi16(type == C_U8 ? 255 : type == C_U4 ? 15 : 3);
    int line = type == C_U8 ? n : type == C_U4 ? n % 2 : 0;
    int shift = type == C_U8 ? 0 : type == C_U4 ? n / 2 * 4 : n * 2;
    __m256i v = _mm256_loadu_si256((const void *)(block + 32 * line));
    *even = _mm256_and_si256(_mm256_srl_epi16(v, _mm_cvtsi32_si128(shift)), mask);
    *odd = _mm256_and_si256(_mm256_srl_epi16(v, _mm_cvtsi32_si128(shift + 8)), mask);
}

// R rows by C eights of columns; C = 4 is a whole block. Folding keeps the core from running ahead
// to the next codes, so these are fetched, into the second-level cache: into the first, they would
// wait for its few fill buffers (q8 pages at depth 8192: 15% slower than f16 instead of faster).
AVX2_INLINE void codes_tile(const CodeGemm *g, int i, int j, const int R, const int C,
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
            codes8(at, C == 4 ? v : j % CODE_COLS / 8 + v, type, &even, &odd);
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

AVX2_INLINE void codes_rows(const CodeGemm *g, int i, const int R, const CodeType type) {
    int j = 0;
    for (; R < 3 && j + 32 <= g->b->cols; j += 32) codes_tile(g, i, j, R, 4, type);
    for (; j + 16 <= g->b->cols; j += 16) codes_tile(g, i, j, R, 2, type);
    for (; j < g->b->cols; j += 8) codes_tile(g, i, j, R, 1, type);
}

AVX2_INLINE void codes_avx2(const CodeGemm *g, const CodeType type) {
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

AVX2 static void gemm_codes_avx2(float *c, size_t ldc, const float *a, size_t lda, const Codes *b,
                                 int n, bool add) {
    Folded f;
    if (b->cols % 8) {
        gemm_codes_scalar(c, ldc, a, lda, b, n, add);
        return;
    }
    for (int i = 0; i < n; i += FOLD_ROWS) {
        CodeGemm g = {c + i * ldc, ldc, &f, b, n - i < FOLD_ROWS ? n - i : FOLD_ROWS, add};
        for (int r = 0; r < g.n; r++) fold_avx2(&f, r, a + (i + r) * lda, b);
        if (b->type == C_U8)
            codes_avx2(&g, C_U8);
        else if (b->type == C_U4)
            codes_avx2(&g, C_U4);
        else
            codes_avx2(&g, C_U2);
    }
}

// Four rows by 8 columns, the eights' number n in their block, as floats.
AVX2_INLINE void unpack8(float *out, size_t ld, const Codes *b, int r, const uint8_t *block, int n,
                         const CodeType type) {
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

AVX2 static void unpack_codes_avx2(float *out, size_t ld, const Codes *b) {
    if (b->cols % 8) {
        unpack_codes_scalar(out, ld, b);
        return;
    }
    for (int r = 0; r < b->rows; r += 4, out += 4 * ld) {
        for (int c = 0; c < b->cols; c += 8) {
            size_t block = r / 4 * code_blocks(b) + c / CODE_COLS;
            const uint8_t *at = b->data + block * code_block(b);
            int n = c % CODE_COLS / 8;
            if (b->type == C_U8)
                unpack8(out + c, ld, b, r, at, n, C_U8);
            else if (b->type == C_U4)
                unpack8(out + c, ld, b, r, at, n, C_U4);
            else
                unpack8(out + c, ld, b, r, at, n, C_U2);
        }
    }
}

AVX2 static void pack_f16_avx2(void *packed, const uint16_t *b, int inner, int cols) {
    f16_to_f32_avx2(packed, b, (size_t)inner * cols);
}

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

AVX2 static void unpack_16bit_avx2(float *out, const Matrix *w, int panel, int c0, int cols) {
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
AVX2 static bool few_halves(float *out, size_t ld, const Matrix *w, int panel, const Activations *x,
                            int t0, int t1) {
    if (t1 - t0 > 2 || w->type == W_F32) return false;
    for (int t = t0; t < t1; t++) {
        const float *row = x->x + (size_t)t * x->stride;
        if (w->type == W_BF16)
            half_row(out + t * ld, w, panel, row, true);
        else
            half_row(out + t * ld, w, panel, row, false);
    }
    return true;
}

AVX2 static void matmul_float_avx2(float *out, size_t ld, const Matrix *w, int panel,
                                   const Activations *x, int t0, int t1) {
    if (few_halves(out, ld, w, panel, x, t0, t1)) return;
    float block[BLOCK * PANEL];
    for (int c0 = 0; c0 < w->cols_padded; c0 += BLOCK) {
        int cols = w->cols_padded - c0 < BLOCK ? w->cols_padded - c0 : BLOCK;
        const float *b = block;
        if (w->type == W_F32)
            b = (const float *)w->data + ((size_t)panel * w->cols_padded + c0) * PANEL;
        else
            unpack_16bit_avx2(block, w, panel, c0, cols);
        gemm_f32_avx2(out + t0 * ld, ld, x->x + (size_t)t0 * x->stride + c0, x->stride, b, t1 - t0,
                      cols, PANEL, c0 > 0);
    }
}

// 64 bytes [16 rows][4 columns] to 16-bit integers [2][16 rows][2]. Within eight rows the two
// halves of a register interleave, so rows come out in the order 0 1 4 5 2 3 6 7; scales and sums
// follow it.
AVX2_INLINE void widen_line(int16_t *out, __m256i rows0_7, __m256i rows8_15) {
    for (int half = 0; half < 2; half++) {
        __m256i v = half ? rows8_15 : rows0_7;
        __m256 lo = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(v)));
        __m256 hi = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(v, 1)));
        _mm256_storeu_ps((float *)(out + 16 * half), _mm256_shuffle_ps(lo, hi, 0x88));
        _mm256_storeu_ps((float *)(out + 32 + 16 * half), _mm256_shuffle_ps(lo, hi, 0xdd));
    }
}

AVX2_INLINE __m256 swap_rows(__m256 v) {  // 0 1 2 3 4 5 6 7 <-> 0 1 4 5 2 3 6 7
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}

AVX2 static void unpack_q8_avx2(IntBlock *b, const Matrix *w, int panel, int c0, int cols) {
    size_t first = (size_t)panel * w->cols_padded + c0;
    const uint16_t *scale = w->scale + first / QGROUP * PANEL;
    const uint8_t *line = w->data + first * PANEL;
    for (int i = 0; i < cols / QGROUP * PANEL; i += 8)
        _mm256_storeu_ps(b->scale + i, swap_rows(load8(scale, (size_t)i, true)));
    for (int c = 0; c < cols; c += 4, line += 64) {
        widen_line(b->w + c * PANEL, _mm256_loadu_si256((const void *)line),
                   _mm256_loadu_si256((const void *)(line + 32)));
    }
}

// Adds without letting the compiler reorder a chain of sums, which would cost registers.
AVX2_INLINE __m256i add_in_order(__m256i a, __m256i b) {
    a = _mm256_add_epi32(a, b);
    __asm__("" : "+x"(a));
    return a;
}

// T tokens against one block: 16-bit products of column pairs are summed over a group of 32 columns
// in 32-bit integers, then scaled. sum [T][16] are the running results.
AVX2_INLINE void q8_tile(float (*sum)[PANEL], const IntBlock *b, const Activations *x, int t,
                         int c0, int cols, const int T) {
    const int16_t *q = x->q16 + (size_t)t * x->stride + c0;
    for (int g = 0; g < cols / QGROUP; g++) {
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
AVX2_INLINE void q8_tokens(float *out, size_t ld, const IntBlock *b, const Activations *x, int t,
                           int c0, int cols, const int T) {
    float sum[4][PANEL];
    for (int i = 0; i < T; i++) {
        for (int h = 0; h < PANEL; h += 8) {
            __m256 v =
                c0 ? swap_rows(_mm256_loadu_ps(out + (t + i) * ld + h)) : _mm256_setzero_ps();
            _mm256_storeu_ps(sum[i] + h, v);
        }
    }
    q8_tile(sum, b, x, t, c0, cols, T);
    for (int i = 0; i < T; i++) {
        __m256 unit = _mm256_set1_ps(c0 + cols < x->stride ? 1.0f : x->unit16[t + i]);
        for (int h = 0; h < PANEL; h += 8) {
            __m256 v = _mm256_mul_ps(swap_rows(_mm256_loadu_ps(sum[i] + h)), unit);
            _mm256_storeu_ps(out + (t + i) * ld + h, v);
        }
    }
}

// 16 bytes, 4 rows by 4 columns, against 4 activations: two partial sums for each row.
AVX2_INLINE __m256i madd_quad(__m256i acc, __m128i w, __m256i a) {
    return add_in_order(acc, _mm256_madd_epi16(_mm256_cvtepi8_epi16(w), a));
}

AVX2_INLINE __m256i load_quad(const int16_t *q) {
    long long quad;
    memcpy(&quad, q, 8);
    return _mm256_set1_epi64x(quad);
}

// Partial sums of rows 0..3 and 4..7 to the sums of rows 0..7.
AVX2_INLINE __m256 join_pairs(__m256i a, __m256i b) {
    __m256 fa = _mm256_castsi256_ps(a), fb = _mm256_castsi256_ps(b);
    __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(fa, fb, 0x88));
    __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(fa, fb, 0xdd));
    return swap_rows(_mm256_cvtepi32_ps(_mm256_add_epi32(even, odd)));
}

// One token, straight from the file: nothing is unpacked to memory, and the same integers come out.
AVX2_INLINE void q8_row(float *out, const Matrix *w, int panel, const Activations *x, int t) {
    int groups = w->cols_padded / QGROUP;
    const uint8_t *line = w->data + (size_t)panel * groups * QGROUP * PANEL;
    const uint16_t *scale = w->scale + (size_t)panel * groups * PANEL;
    const int16_t *q = x->q16 + (size_t)t * x->stride;
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int g = 0; g < groups; g++) {
        __m256i acc[4];  // four rows each
        UNROLL for (int r = 0; r < 4; r++) acc[r] = _mm256_setzero_si256();
        UNROLL for (int c = 0; c < QGROUP; c += 4, line += 64) {
            __m256i a = load_quad(q + g * QGROUP + c);
            UNROLL for (int r = 0; r < 4; r++) acc[r] =
                madd_quad(acc[r], _mm_loadu_si128((const void *)(line + 16 * r)), a);
        }
        UNROLL for (int h = 0; h < 2; h++) {
            __m256 s = load8(scale, (size_t)g * PANEL + 8 * h, true);
            sum[h] = _mm256_fmadd_ps(join_pairs(acc[2 * h], acc[2 * h + 1]), s, sum[h]);
        }
    }
    __m256 unit = _mm256_set1_ps(x->unit16[t]);
    _mm256_storeu_ps(out, _mm256_mul_ps(sum[0], unit));
    _mm256_storeu_ps(out + 8, _mm256_mul_ps(sum[1], unit));
}

// Unpacking a block pays from four tokens on.
AVX2 static void matmul_q8_avx2(float *out, size_t ld, const Matrix *w, int panel,
                                const Activations *x, int t0, int t1) {
    if (t1 - t0 < 4) {
        for (int t = t0; t < t1; t++) q8_row(out + t * ld, w, panel, x, t);
        return;
    }
    IntBlock b;
    for (int c0 = 0; c0 < w->cols_padded; c0 += BLOCK) {
        int cols = w->cols_padded - c0 < BLOCK ? w->cols_padded - c0 : BLOCK, t = t0;
        unpack_q8_avx2(&b, w, panel, c0, cols);
        for (; t + 4 <= t1; t += 4) q8_tokens(out, ld, &b, x, t, c0, cols, 4);
        for (; t < t1; t++) q8_tokens(out, ld, &b, x, t, c0, cols, 1);
    }
}

// A q8 or q4 panel and where its scales and offsets are.
typedef struct {
    const uint8_t *line;
    const uint16_t *scale, *offset;
    const Activations *x;
    int groups;
} IntPanel;

static IntPanel int_panel(const Matrix *w, int panel, const Activations *x) {
    int groups = w->cols_padded / QGROUP;
    size_t first = (size_t)panel * groups;
    return (IntPanel){w->data + first * QGROUP * PANEL / (w->type == W_Q4 ? 2 : 1),
                      w->scale + first * PANEL, w->offset ? w->offset + first * PANEL : NULL, x,
                      groups};
}

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
#define VPDPBUSD_VEX ""  // never reached: has_vnni_vex is false
#endif

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
AVX2_INLINE void byte_tile(float *out, size_t ld, const IntPanel *p, int t, const bool q4,
                           const bool offset, const ByteDot dot, const int T) {
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
        memcpy(out + (t + i) * ld, sum[i], sizeof sum[i]);
        scale_avx2(out + (t + i) * ld, x->unit[t + i], PANEL);
    }
}

AVX2_INLINE void matmul_bytes(float *out, size_t ld, const IntPanel *p, int t0, int t1,
                              const bool q4, const bool offset, const ByteDot dot) {
    int t = t0;
    for (; t + 4 <= t1; t += 4) byte_tile(out, ld, p, t, q4, offset, dot, 4);
    for (; t < t1; t++) byte_tile(out, ld, p, t, q4, offset, dot, 1);
}

AVX2_INLINE void matmul_nibbles(float *out, size_t ld, const IntPanel *p, int t0, int t1,
                                const ByteDot dot) {
    if (p->offset)
        matmul_bytes(out, ld, p, t0, t1, true, true, dot);
    else
        matmul_bytes(out, ld, p, t0, t1, true, false, dot);
}

AVX2 static void matmul_q4_avx2(float *out, size_t ld, const Matrix *w, int panel,
                                const Activations *x, int t0, int t1) {
    IntPanel p = int_panel(w, panel, x);
    matmul_nibbles(out, ld, &p, t0, t1, MADDUBS);
}

AVX2 static float peak_f32_avx2(int rounds) {
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
AVX2 static float peak_q8_avx2(int rounds) {
    __m256i acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = _mm256_set1_epi32(i);
    for (int r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            add_in_order(acc[i], _mm256_madd_epi16(acc[i], _mm256_set1_epi16(3)));
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm256_add_epi32(acc[0], acc[i]);
    return hsum(_mm256_cvtepi32_ps(acc[0]));
}

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

AVX2 static float peak_maddubs(int rounds) { return peak_bytes(rounds, MADDUBS); }

static const Peak f32_avx2 = {2 * 8 * CHAINS, peak_f32_avx2};
static const Peak q8_avx2 = {2 * 16 * CHAINS, peak_q8_avx2};
static const Peak q4_avx2 = {2 * 32 * CHAINS, peak_maddubs};

AVX2 static void gemm_packed_avx2(float *c, size_t ldc, const void *rows, const void *packed, int n,
                                  int inner, int cols, bool add) {
    gemm_f32_avx2(c, ldc, rows, (size_t)inner, packed, n, inner, cols, add);
}

static const Kernels avx2_kernels = {
    .matmul = {matmul_float_avx2, matmul_float_avx2, matmul_float_avx2, matmul_q8_avx2,
               matmul_q4_avx2},
    .wide = true,
    .quantize = quantize_avx2,
    .gemm_f32 = gemm_f32_avx2,
    .gemm_f16 = gemm_f16_avx2,
    .pack_f16 = pack_f16_avx2,
    .packed_bytes = packed_bytes_f32,
    .pack_rows = rows_as_they_are,
    .gemm_packed = gemm_packed_avx2,
    .peak = {&f32_avx2, &f32_avx2, &f32_avx2, &q8_avx2, &q4_avx2},
    .peak_packed = &f32_avx2,
    .pack_f32 = pack_f32_scalar,
    .gemm_codes = gemm_codes_avx2,
    .unpack_codes = unpack_codes_avx2,
    .rmsnorm = rmsnorm_avx2,
    .add = add_avx2,
    .scale = scale_avx2,
    .silu_mul = silu_mul_avx2,
    .gelu_mul = gelu_mul_avx2,
    .max_rows = max_rows_avx2,
    .exp64 = exp64_avx2,
    .max_into = max_into_avx2,
    .f16_to_f32 = f16_to_f32_avx2,
    .f32_to_f16 = f32_to_f16_avx2,
};

static bool has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma");  // F16C came before both
}

// ---- AVX2 with VNNI: laptops without AVX-512, from Alder Lake (2021) on ----

AVX2 static void quantize_avx2vnni(const Activations *a, int t0, int t1) {
    for (int t = t0; t < t1; t++) quantize_bytes(a, t);
}

AVX2 static void matmul_q8_evex(float *out, size_t ld, const Matrix *w, int panel,
                                const Activations *x, int t0, int t1) {
    IntPanel p = int_panel(w, panel, x);
    matmul_bytes(out, ld, &p, t0, t1, false, false, VNNI_EVEX);
}

AVX2 static void matmul_q4_evex(float *out, size_t ld, const Matrix *w, int panel,
                                const Activations *x, int t0, int t1) {
    IntPanel p = int_panel(w, panel, x);
    matmul_nibbles(out, ld, &p, t0, t1, VNNI_EVEX);
}

AVX2 static void matmul_q8_vex(float *out, size_t ld, const Matrix *w, int panel,
                               const Activations *x, int t0, int t1) {
    IntPanel p = int_panel(w, panel, x);
    matmul_bytes(out, ld, &p, t0, t1, false, false, VNNI_VEX);
}

AVX2 static void matmul_q4_vex(float *out, size_t ld, const Matrix *w, int panel,
                               const Activations *x, int t0, int t1) {
    IntPanel p = int_panel(w, panel, x);
    matmul_nibbles(out, ld, &p, t0, t1, VNNI_VEX);
}

AVX2 static float peak_evex(int rounds) { return peak_bytes(rounds, VNNI_EVEX); }
AVX2 static float peak_vex(int rounds) { return peak_bytes(rounds, VNNI_VEX); }

static const Peak int_evex = {2 * 32 * CHAINS, peak_evex}, int_vex = {2 * 32 * CHAINS, peak_vex};

static bool has_vnni_evex(void) {
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

static bool has_vnni_vex(void) {  // AVX-VNNI: leaf 7, subleaf 1, bit 4 of EAX
    unsigned eax = 0, ebx, ecx, edx;
    return KNOWS_VEX && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 4 & 1;
}

static bool has_avx2vnni(void) { return has_avx2() && (has_vnni_evex() || has_vnni_vex()); }

// What differs from AVX2's table.
static void adapt_avx2vnni(Kernels *k) {
    bool evex = has_vnni_evex();
    k->matmul[W_Q8] = evex ? matmul_q8_evex : matmul_q8_vex;
    k->matmul[W_Q4] = evex ? matmul_q4_evex : matmul_q4_vex;
    k->wide = false;
    k->quantize = quantize_avx2vnni;
    k->peak[W_Q8] = k->peak[W_Q4] = evex ? &int_evex : &int_vex;
}

// ---- AVX-512 with VNNI: x86-64 servers, and laptops from Ice Lake (2019) and Zen 4 (2022) on ----

#define AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define AVX512_INLINE             \
    static inline __attribute__(( \
        always_inline, target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

// As exp_avx2; the power of two is one instruction.
AVX512_INLINE __m512 exp_avx512(__m512 x) {
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

AVX512_INLINE __m512 gate_avx512(__m512 x, __m512 u, __m512 y) {
    __m512 e = exp_avx512(_mm512_sub_ps(_mm512_setzero_ps(), u));
    return _mm512_mul_ps(_mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e)), y);
}

AVX512 static void silu_mul_avx512(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        _mm512_storeu_ps(x + i, gate_avx512(v, v, _mm512_loadu_ps(y + i)));
    }
    silu_mul_avx2(x + i, y + i, n - i);
}

AVX512 static void gelu_mul_avx512(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i), v2 = _mm512_mul_ps(v, v);
        __m512 u = _mm512_fmadd_ps(_mm512_mul_ps(v2, v), _mm512_set1_ps(GELU_B), v);
        u = _mm512_mul_ps(u, _mm512_set1_ps(GELU_A));
        _mm512_storeu_ps(x + i, gate_avx512(v, u, _mm512_loadu_ps(y + i)));
    }
    gelu_mul_avx2(x + i, y + i, n - i);
}

AVX512 static float exp64_avx512(float *s, float m) {
    __m512 e[4];
    UNROLL for (int i = 0; i < 4; i++) {
        e[i] = exp_avx512(_mm512_sub_ps(_mm512_loadu_ps(s + 16 * i), _mm512_set1_ps(m)));
        _mm512_storeu_ps(s + 16 * i, e[i]);
    }
    return _mm512_reduce_add_ps(
        _mm512_add_ps(_mm512_add_ps(e[0], e[1]), _mm512_add_ps(e[2], e[3])));
}

AVX512 static void max_into_avx512(float *run, const float *s, float b) {
    for (int i = 0; i < PAGE; i += 16) {
        __m512 v = _mm512_add_ps(_mm512_loadu_ps(s + i), _mm512_set1_ps(b));
        _mm512_storeu_ps(run + i, _mm512_max_ps(v, _mm512_loadu_ps(run + i)));
    }
}

AVX512_INLINE __m512 max_or_sum(__m512 a, __m512 b, const bool sum) {
    if (!sum) return _mm512_max_ps(a, b);
    __m512i s = _mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b));
    return _mm512_castsi512_ps(s);
}

// Lane i: the largest number of v[i], or the sum of its 16 integers. 15 steps of three
// instructions; one by one the vectors would take 8 each.
AVX512_INLINE __m512 reduce16(__m512 *v, const bool sum) {
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

AVX512_INLINE __m512 max_columns(const float *s) {
    __m512 a = _mm512_max_ps(_mm512_loadu_ps(s), _mm512_loadu_ps(s + 16));
    __m512 b = _mm512_max_ps(_mm512_loadu_ps(s + 32), _mm512_loadu_ps(s + 48));
    return _mm512_max_ps(a, b);
}

AVX512 static void max_rows_avx512(float *max, const float *s, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 v[16];
        UNROLL for (int r = 0; r < 16; r++) v[r] = max_columns(s + (i + r) * PAGE);
        _mm512_storeu_ps(max + i, reduce16(v, false));
    }
    for (; i < n; i++) max[i] = _mm512_reduce_max_ps(max_columns(s + i * PAGE));
}

// group_scale of 16 groups.
AVX512_INLINE __m512 group_scales(float row_max, __m512 group_max) {
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

// Up to 16 groups of a row. The quotients pass through memory that no mask touches: what was stored
// under one reaches no load until it is in the cache.
AVX512_INLINE void quantize_groups(const Activations *a, size_t group, int n, float row_max) {
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

AVX512 static void quantize_avx512(const Activations *a, int t0, int t1) {
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

AVX512_INLINE __m512 load16(const void *b, size_t i, const bool half) {
    if (half) return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)((const uint16_t *)b + i)));
    return _mm512_loadu_ps((const float *)b + i);
}

// As gemm_tile: R * C + C + 1 <= 32.
AVX512_INLINE void gemm_tile512(const Gemm *g, int i, int j, const int R, const int C,
                                const bool half) {
    float *c = g->c + (size_t)i * g->ldc + j;
    const float *a = g->a + (size_t)i * g->lda;
    __m512 acc[12][4];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) {
            acc[r][v] = g->add ? _mm512_loadu_ps(c + r * g->ldc + 16 * v) : _mm512_setzero_ps();
        }
    }
    for (int k = 0; k < g->inner; k++) {
        for (int v = 0; half && v < C; v += 2)
            __builtin_prefetch(g->ahead + k * g->ldb + j + 16 * v, 0, 1);
        __m512 b[4];
        UNROLL for (int v = 0; v < C; v++) b[v] =
            load16(g->b, k * g->ldb + (size_t)(j + 16 * v), half);
        UNROLL for (int r = 0; r < R; r++) {
            __m512 ar = _mm512_set1_ps(a[r * g->lda + k]);
            UNROLL for (int v = 0; v < C; v++) acc[r][v] = _mm512_fmadd_ps(ar, b[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) _mm512_storeu_ps(c + r * g->ldc + 16 * v, acc[r][v]);
    }
}

AVX512_INLINE void gemm_rows512(const Gemm *g, int i, const int R, const int C, const bool half) {
    int j = 0;
    for (; j + 16 * C <= g->cols; j += 16 * C) gemm_tile512(g, i, j, R, C, half);
    for (; j < g->cols; j += 16) gemm_tile512(g, i, j, R, 1, half);
}

AVX512_INLINE void gemm_avx512(const Gemm *g, const bool half) {
    int i = 0;
    if (g->cols < 64) {
        for (; i + 12 <= g->n; i += 12) gemm_rows512(g, i, 12, 1, half);
    }
    for (; i + 6 <= g->n; i += 6) gemm_rows512(g, i, 6, 4, half);
    for (; i + 3 <= g->n; i += 3) gemm_rows512(g, i, 3, 4, half);
    for (; i < g->n; i++) gemm_rows512(g, i, 1, 4, half);
}

AVX512 static void gemm_f32_avx512(float *c, size_t ldc, const float *a, size_t lda, const void *b,
                                   int n, int inner, int cols, bool add) {
    if (cols % 16)
        gemm_f32_avx2(c, ldc, a, lda, b, n, inner, cols, add);
    else
        gemm_avx512(&(Gemm){c, a, b, ldc, lda, (size_t)cols, n, inner, cols, add, NULL}, false);
}

AVX512 static void gemm_f16_avx512(float *c, size_t ldc, const void *rows, const void *b,
                                   const void *ahead, int n, int inner, int cols, bool add) {
    size_t lda = (size_t)inner;
    if (cols % 16)
        gemm_f16_avx2(c, ldc, rows, b, ahead, n, inner, cols, add);
    else
        gemm_avx512(&(Gemm){c, rows, b, ldc, lda, (size_t)cols, n, inner, cols, add, ahead}, true);
}

// As fold_avx2, but of each eight integers the high bytes come before the low ones. No masks: what
// was stored under one reaches no load until it is in the cache.
AVX512_INLINE void fold_avx512(Folded *f, int r, const float *a, const Codes *b) {
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
        sum = _mm512_add_epi32(sum, q);
    }
    f->scale[r] = most / FOLD_MOST;
    f->bias[r] = _mm512_reduce_add_ps(bias);
    f->center[r] = code_center(b) * _mm512_reduce_add_epi32(sum);
}

// Codes of 16 columns, the first or second half of a block, by 4 rows.
AVX512_INLINE __m512i codes16(const uint8_t *block, const int half, const CodeType type) {
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
AVX512_INLINE void codes_tile512(const CodeGemm *g, int i, int j, const int R, const int C,
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
                codes16(at + v / 2 * block, C > 1 ? v % 2 : j % CODE_COLS / 16, type);
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

AVX512_INLINE void codes_rows512(const CodeGemm *g, int i, const int R, const CodeType type) {
    int j = 0;
    for (; j + 64 <= g->b->cols; j += 64) codes_tile512(g, i, j, R, 4, type);
    for (; j + 32 <= g->b->cols; j += 32) codes_tile512(g, i, j, R, 2, type);
    for (; j < g->b->cols; j += 16) codes_tile512(g, i, j, R, 1, type);
}

AVX512_INLINE void codes_avx512(const CodeGemm *g, const CodeType type) {
    for (int i = 0, step; i < g->n; i += step) {
        step = fold_step(g->n - i);
        if (step == 3)
            codes_rows512(g, i, 3, type);
        else if (step == 2)
            codes_rows512(g, i, 2, type);
        else
            codes_rows512(g, i, 1, type);
    }
}

AVX512 static void gemm_codes_avx512(float *c, size_t ldc, const float *a, size_t lda,
                                     const Codes *b, int n, bool add) {
    Folded f;
    if (b->cols % 16 || b->rows % 16) {
        gemm_codes_avx2(c, ldc, a, lda, b, n, add);
        return;
    }
    for (int i = 0; i < n; i += FOLD_ROWS) {
        CodeGemm g = {c + i * ldc, ldc, &f, b, n - i < FOLD_ROWS ? n - i : FOLD_ROWS, add};
        for (int r = 0; r < g.n; r++) fold_avx512(&f, r, a + (i + r) * lda, b);
        if (b->type == C_U8)
            codes_avx512(&g, C_U8);
        else if (b->type == C_U4)
            codes_avx512(&g, C_U4);
        else
            codes_avx512(&g, C_U2);
    }
}

AVX512 static void matmul_float_avx512(float *out, size_t ld, const Matrix *w, int panel,
                                       const Activations *x, int t0, int t1) {
    if (few_halves(out, ld, w, panel, x, t0, t1)) return;
    float block[BLOCK * PANEL];
    for (int c0 = 0; c0 < w->cols_padded; c0 += BLOCK) {
        int cols = w->cols_padded - c0 < BLOCK ? w->cols_padded - c0 : BLOCK;
        const float *b = block;
        if (w->type == W_F32)
            b = (const float *)w->data + ((size_t)panel * w->cols_padded + c0) * PANEL;
        else
            unpack_16bit_avx2(block, w, panel, c0, cols);
        gemm_f32_avx512(out + t0 * ld, ld, x->x + (size_t)t0 * x->stride + c0, x->stride, b,
                        t1 - t0, cols, PANEL, c0 > 0);
    }
}

// Weights of 4 columns by 16 rows as unsigned bytes, 128 more than they are (q4 with offsets: as
// they are). A q4 line holds two such quads.
AVX512_INLINE __m512i load_quads(const uint8_t *line, int quad, const bool q4, const bool offset) {
    if (!q4)
        return _mm512_xor_si512(_mm512_loadu_si512(line + 64 * quad), _mm512_set1_epi8((char)0x80));
    __m512i v = _mm512_loadu_si512(line + 64 * (quad / 2));
    if (quad % 2) v = _mm512_srli_epi16(v, 4);
    v = _mm512_and_si512(v, _mm512_set1_epi8(15));
    return offset ? v : _mm512_add_epi8(v, _mm512_set1_epi8(120));
}

// A scale of 0 counts as 2^-100, so that what follows is a multiplication to the last bit.
AVX512_INLINE __m512 load_scales(const uint16_t *scale) {
    enum { LARGER_MAGNITUDE = 7 };
    return _mm512_range_ps(load16(scale, 0, true), _mm512_set1_ps(0x1p-100f), LARGER_MAGNITUDE);
}

// Weights' scales, ready to be multiplied by many of activations, 2^n or 1.5 * 2^n, which bit 22
// tells: both factors have been multiplied, and have been taken out of the exponents to be added.
enum { ONE_BITS = 0x3f800000, HALF_BIT = 0x00400000 };

AVX512_INLINE void scale_table(__m512i *table, __m512 scale) {
    table[0] = _mm512_sub_epi32(_mm512_castps_si512(scale), _mm512_set1_epi32(ONE_BITS));
    scale = _mm512_mul_ps(scale, _mm512_set1_ps(1.5f));
    table[1] = _mm512_sub_epi32(_mm512_castps_si512(scale), _mm512_set1_epi32(ONE_BITS + HALF_BIT));
}

AVX512_INLINE __m512 table_product(const __m512i *table, float scale) {
    __m512i s = table[bits(scale) / HALF_BIT % 2];
    return _mm512_castsi512_ps(_mm512_add_epi32(s, _mm512_set1_epi32((int)bits(scale))));
}

// Bytes of weights that a few tokens' products fetch ahead, into the second-level cache: reading
// and multiplying take equally long then, and each waited for the other. 1.1 to 1.2 times as fast.
enum { AHEAD = 16384 };

// T tokens against P panels, straight from the file. vpdpbusd multiplies unsigned by signed bytes,
// so weights are made unsigned and each sum starts at -128 * sum(q). The same integers as
// everywhere. For many tokens P is 2: 12 products of a quad of columns take 8 loads then instead of
// 13, and vpdpbusd does not wait for the scales' products, which are additions. Hot it reaches 83%
// of vpdpbusd's peak, where one panel and multiplications reach 74%.
AVX512_INLINE void vnni_tile(float *out, size_t ld, const IntPanel *p, int t, const bool q4,
                             const bool offset, const int T, const int P) {
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
AVX512_INLINE void vnni_panels(float *out, size_t ld, const Matrix *w, int panel,
                               const Activations *x, int t0, int t1, const bool q4,
                               const bool offset, const int P) {
    IntPanel p[2];
    int t = t0;
    for (int v = 0; v < P; v++) p[v] = int_panel(w, panel + v, x);
    if (P == 2) {
        for (; t + 6 <= t1; t += 6) vnni_tile(out, ld, p, t, q4, offset, 6, P);
        for (; t + 2 <= t1; t += 2) vnni_tile(out, ld, p, t, q4, offset, 2, P);
    } else {
        for (; t + 8 <= t1; t += 8) vnni_tile(out, ld, p, t, q4, offset, 8, P);
        for (; t + 4 <= t1; t += 4) vnni_tile(out, ld, p, t, q4, offset, 4, P);
    }
    for (; t < t1; t++) vnni_tile(out, ld, p, t, q4, offset, 1, P);
}

AVX512_INLINE void matmul_vnni(float *out, size_t ld, const Matrix *w, int panel,
                               const Activations *x, int t0, int t1, const bool q4, const int P) {
    if (q4 && w->offset)
        vnni_panels(out, ld, w, panel, x, t0, t1, q4, true, P);
    else
        vnni_panels(out, ld, w, panel, x, t0, t1, q4, false, P);
}

AVX512 static void matmul_q8_avx512(float *out, size_t ld, const Matrix *w, int panel,
                                    const Activations *x, int t0, int t1) {
    matmul_vnni(out, ld, w, panel, x, t0, t1, false, 1);
}

AVX512 static void matmul_q4_avx512(float *out, size_t ld, const Matrix *w, int panel,
                                    const Activations *x, int t0, int t1) {
    matmul_vnni(out, ld, w, panel, x, t0, t1, true, 1);
}

AVX512 static void matmul_pair_q8_avx512(float *out, size_t ld, const Matrix *w, int panel,
                                         const Activations *x, int t0, int t1) {
    matmul_vnni(out, ld, w, panel, x, t0, t1, false, 2);
}

AVX512 static void matmul_pair_q4_avx512(float *out, size_t ld, const Matrix *w, int panel,
                                         const Activations *x, int t0, int t1) {
    matmul_vnni(out, ld, w, panel, x, t0, t1, true, 2);
}

AVX512 static float peak_f32_avx512(int rounds) {
    __m512 acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_set1_ps((float)i);
    for (int r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            _mm512_fmadd_ps(acc[i], _mm512_set1_ps(0.5f), _mm512_set1_ps(1.0f));
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    return _mm512_reduce_add_ps(acc[0]);
}

AVX512 static float peak_int_avx512(int rounds) {
    __m512i acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_set1_epi32(i);
    for (int r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            _mm512_dpbusd_epi32(acc[i], acc[i], _mm512_set1_epi8(3));
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm512_add_epi32(acc[0], acc[i]);
    return _mm512_reduce_add_ps(_mm512_cvtepi32_ps(acc[0]));
}

static const Peak f32_avx512 = {2 * 16 * CHAINS, peak_f32_avx512};
static const Peak int_avx512 = {2 * 64 * CHAINS, peak_int_avx512};

AVX512 static void gemm_packed_avx512(float *c, size_t ldc, const void *rows, const void *packed,
                                      int n, int inner, int cols, bool add) {
    gemm_f32_avx512(c, ldc, rows, (size_t)inner, packed, n, inner, cols, add);
}

static const Kernels avx512_kernels = {
    .matmul = {matmul_float_avx512, matmul_float_avx512, matmul_float_avx512, matmul_q8_avx512,
               matmul_q4_avx512},
    .matmul_pair = {[W_Q8] = matmul_pair_q8_avx512, [W_Q4] = matmul_pair_q4_avx512},
    .quantize = quantize_avx512,
    .gemm_f32 = gemm_f32_avx512,
    .gemm_f16 = gemm_f16_avx512,
    .pack_f16 = pack_f16_avx2,
    .packed_bytes = packed_bytes_f32,
    .pack_rows = rows_as_they_are,
    .gemm_packed = gemm_packed_avx512,
    .peak = {&f32_avx512, &f32_avx512, &f32_avx512, &int_avx512, &int_avx512},
    .peak_packed = &f32_avx512,
    .pack_f32 = pack_f32_scalar,
    .gemm_codes = gemm_codes_avx512,
    .unpack_codes = unpack_codes_avx2,
    .rmsnorm = rmsnorm_avx2,
    .add = add_avx2,
    .scale = scale_avx2,
    .silu_mul = silu_mul_avx512,
    .gelu_mul = gelu_mul_avx512,
    .max_rows = max_rows_avx512,
    .exp64 = exp64_avx512,
    .max_into = max_into_avx512,
    .f16_to_f32 = f16_to_f32_avx2,
    .f32_to_f16 = f32_to_f16_avx2,
};

// ---- AVX-512 with BF16: attention of many rows, twice as fast as in f32 ----

#define BF16_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c"
#define BF16 __attribute__((target(BF16_TARGET)))
#define BF16_INLINE static inline __attribute__((always_inline, target(BF16_TARGET)))

// Shapes that the tiles below cover; all others stay in f32.
static bool fits_bf16(int inner, int cols) {
    return inner % 2 == 0 && cols % 16 == 0 && inner <= 256;
}

static size_t packed_bytes_bf16(int inner, int cols) {
    return packed_bytes_f32(inner, cols) / (fits_bf16(inner, cols) ? 2 : 1);
}

// Sixteen numbers of a row and sixteen of the next one, to pairs.
static const uint16_t alternate[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// bf16 has the exponents of f32, 112 = 127 - 15 above those of half precision, and three bits less
// after the point: the bits of a half, three to the right, are 2^-112 of it in bf16. So pages are
// multiplied as they come out of that shift, by rows 2^112 times as large, which like halves stay
// below 2^16. Multiplying by 2^12 and keeping the high half is the shift and rounds, ties upward;
// the sign, which it repeats, is cut out. Halves below 2^-14 become 0. Of a page the keys or
// values times 3 rows take 180 ns where the way by f32 took 255, times 12 rows 550 for 650.
static const float ROWS_BY = 0x1p112f;

BF16_INLINE __m512i halves_to_bf16(__m512i h) {
    h = _mm512_mulhrs_epi16(h, _mm512_set1_epi16(1 << 12));
    return _mm512_and_si512(h, _mm512_set1_epi16((short)0x8fff));
}

BF16_INLINE __m256i load_halves(const void *b, size_t at, const bool half) {
    if (half) return _mm256_loadu_si256((const void *)((const uint16_t *)b + at));
    return _mm512_cvtps_ph(_mm512_loadu_ps((const float *)b + at), _MM_FROUND_TO_NEAREST_INT);
}

// Rows 2k and 2k + 1 of b [..][ldb], columns j to j + 15, as pairs of bf16.
BF16_INLINE __m512i load_pairs(const void *b, size_t ldb, int k, int j, const bool half) {
    size_t at = (size_t)k * ldb + j;
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(load_halves(b, at, half)),
                                      load_halves(b, at + ldb, half), 1);
    return halves_to_bf16(_mm512_permutexvar_epi16(_mm512_loadu_si512(alternate), both));
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
        pack_f16_avx2(packed, b, inner, cols);
}

BF16 static void pack_f32_bf16(void *packed, const float *b, int inner, int cols) {
    if (fits_bf16(inner, cols))
        pack_bf16(packed, b, inner, cols, false);
    else
        pack_f32_scalar(packed, b, inner, cols);
}

// As gemm_tile512, on pairs of the inner dimension: a [R][inner] bf16, b packed or, for so few rows
// that packing it would not pay, in half precision as it lies. Such pages lie far apart, and the
// hardware fetches ahead only within 4 KB, so that each product fetches the lines of the page that
// follows, into the second-level cache: decoding at depth 8192 is 1.36 times as fast. Into the
// first-level cache it is slower than without, and so are all lines at once.
BF16_INLINE void bf16_tile(const Gemm *g, const uint16_t *a, int i, int j, const int R, const int C,
                           const bool half) {
    float *c = g->c + (size_t)i * g->ldc + j;
    const uint8_t *b = (const uint8_t *)g->b + (size_t)j * 4;
    __m512 acc[12][4];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) {
            acc[r][v] = g->add ? _mm512_loadu_ps(c + r * g->ldc + 16 * v) : _mm512_setzero_ps();
        }
    }
    for (int k = 0; k < g->inner; k += 2, b += g->ldb * 4) {
        for (int v = 0; half && v < C; v += 2) {
            __builtin_prefetch(g->ahead + k * g->ldb + j + 16 * v, 0, 1);
            __builtin_prefetch(g->ahead + (k + 1) * g->ldb + j + 16 * v, 0, 1);
        }
        __m512i w[4];
        UNROLL for (int v = 0; v < C; v++) w[v] =
            half ? load_pairs(g->b, g->ldb, k, j + 16 * v, true) : _mm512_loadu_si512(b + 64 * v);
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

BF16_INLINE void bf16_rows(const Gemm *g, const uint16_t *a, int i, const int R, const int C,
                           const bool half) {
    int j = 0;
    a += (size_t)i * g->inner;
    for (; j + 16 * C <= g->cols; j += 16 * C) bf16_tile(g, a, i, j, R, C, half);
    for (; j < g->cols; j += 16) bf16_tile(g, a, i, j, R, 1, half);
}

// Halves are read, and turned into bf16, once for as many rows as registers hold.
BF16_INLINE void gemm_bf16(const Gemm *g, const uint16_t *rows, const bool half) {
    int i = 0;
    for (; half && i + 12 <= g->n; i += 12) bf16_rows(g, rows, i, 12, 2, half);
    for (; i + 6 <= g->n; i += 6) bf16_rows(g, rows, i, 6, 4, half);
    for (; i + 3 <= g->n; i += 3) bf16_rows(g, rows, i, 3, 4, half);
    for (; i < g->n; i++) bf16_rows(g, rows, i, 1, 4, half);
}

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

BF16 static void gemm_packed_bf16(float *c, size_t ldc, const void *rows, const void *packed, int n,
                                  int inner, int cols, bool add) {
    if (!fits_bf16(inner, cols)) {
        gemm_f32_avx512(c, ldc, rows, (size_t)inner, packed, n, inner, cols, add);
        return;
    }
    Gemm g = {c, NULL, packed, ldc, 0, (size_t)cols, n, inner, cols, add, NULL};
    gemm_bf16(&g, rows, false);
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

// Half the time of exp64 and pack_rows: the weights do not pass through memory in between. 2^112
// is a term of the exponent.
BF16 static const void *exp_packed_bf16(uint16_t *room, float *s, const float *max, float *sum,
                                        int n, int cols) {
    if (!fits_bf16(PAGE, cols)) {
        for (int i = 0; i < n; i++) sum[i] += exp64_avx512(s + i * PAGE, softmax_shift(max[i]));
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

static const Peak bf16_avx512 = {2 * 32 * CHAINS, peak_bf16};

// Twelve sequences' rows, or the query heads of one, over a page: 1.65 and 1.4 times as fast as in
// f32.
BF16 static void gemm_f16_bf16(float *c, size_t ldc, const void *rows, const void *b,
                               const void *ahead, int n, int inner, int cols, bool add) {
    if (!fits_bf16(inner, cols)) {
        gemm_f16_avx512(c, ldc, rows, b, ahead, n, inner, cols, add);
        return;
    }
    Gemm g = {c, NULL, b, ldc, 0, (size_t)cols, n, inner, cols, add, ahead};
    gemm_bf16(&g, rows, true);
}

static bool has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

static void adapt_avx512(Kernels *k) {
    if (!__builtin_cpu_supports("avx512bf16")) return;
    k->pack_f16 = pack_f16_bf16;
    k->pack_f32 = pack_f32_bf16;
    k->packed_bytes = packed_bytes_bf16;
    k->pack_rows = pack_rows_bf16;
    k->gemm_packed = gemm_packed_bf16;
    k->exp_packed = exp_packed_bf16;
    k->gemm_f16 = gemm_f16_bf16;
    k->packed_error = 0x1p-8f;
    k->peak_packed = &bf16_avx512;
}
#endif

// ---- NEON: every AArch64; q8 and q4 with the dot product (ARMv8.2) where the machine has it ----

#ifdef __aarch64__
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#define NEON_INLINE static inline __attribute__((always_inline))

static void f16_to_f32_neon(float *out, const uint16_t *in, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(in + i))));
    f16_to_f32_scalar(out + i, in + i, n - i);
}

static void f32_to_f16_neon(uint16_t *out, const float *in, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + i))));
    f32_to_f16_scalar(out + i, in + i, n - i);
}

// As exp_avx2.
NEON_INLINE float32x4_t exp_neon(float32x4_t x) {
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

static void rmsnorm_neon(float *out, const float *x, const float *w, int n, float eps) {
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

static void add_neon(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(x + i, vaddq_f32(vld1q_f32(x + i), vld1q_f32(y + i)));
    add_scalar(x + i, y + i, n - i);
}

static void scale_neon(float *x, float a, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(x + i, vmulq_n_f32(vld1q_f32(x + i), a));
    scale_scalar(x + i, a, n - i);
}

// x / (1 + exp(-u)) * y
NEON_INLINE float32x4_t gate_neon(float32x4_t x, float32x4_t u, float32x4_t y) {
    float32x4_t e = exp_neon(vnegq_f32(u));
    return vmulq_f32(vdivq_f32(x, vaddq_f32(vdupq_n_f32(1.0f), e)), y);
}

static void silu_mul_neon(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t v = vld1q_f32(x + i);
        vst1q_f32(x + i, gate_neon(v, v, vld1q_f32(y + i)));
    }
    silu_mul_scalar(x + i, y + i, n - i);
}

static void gelu_mul_neon(float *x, const float *y, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t v = vld1q_f32(x + i), v3 = vmulq_f32(vmulq_f32(v, v), v);
        float32x4_t u = vmulq_n_f32(vfmaq_n_f32(v, v3, GELU_B), GELU_A);
        vst1q_f32(x + i, gate_neon(v, u, vld1q_f32(y + i)));
    }
    gelu_mul_scalar(x + i, y + i, n - i);
}

static void max_rows_neon(float *max, const float *s, int n) {
    for (int i = 0; i < n; i++, s += PAGE) {
        float32x4_t m = vld1q_f32(s);
        for (int j = 4; j < PAGE; j += 4) m = vmaxnmq_f32(m, vld1q_f32(s + j));
        max[i] = vmaxnmvq_f32(m);
    }
}

static float exp64_neon(float *s, float m) {
    float32x4_t sum = vdupq_n_f32(0.0f);
    for (int i = 0; i < PAGE; i += 4) {
        float32x4_t e = exp_neon(vsubq_f32(vld1q_f32(s + i), vdupq_n_f32(m)));
        vst1q_f32(s + i, e);
        sum = vaddq_f32(sum, e);
    }
    return vaddvq_f32(sum);
}

static void max_into_neon(float *run, const float *s, float b) {
    for (int i = 0; i < PAGE; i += 4) {
        float32x4_t v = vaddq_f32(vld1q_f32(s + i), vdupq_n_f32(b));
        vst1q_f32(run + i, vmaxnmq_f32(v, vld1q_f32(run + i)));
    }
}

NEON_INLINE float group_max_neon(const float *x) {
    float32x4_t m = vdupq_n_f32(0.0f);
    for (int i = 0; i < QGROUP; i += 4) m = vmaxq_f32(m, vabsq_f32(vld1q_f32(x + i)));
    return vmaxvq_f32(m);
}

static void quantize_row_neon(const Activations *a, int t) {
    const size_t first = (size_t)t * a->stride, end = first + a->stride;
    float max = 0.0f;
    for (size_t at = first; at < end; at += QGROUP) {
        a->scale[at / QGROUP] = group_max_neon(a->x + at);
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

static void quantize_neon(const Activations *a, int t0, int t1) {
    for (int t = t0; t < t1; t++) quantize_row_neon(a, t);
}

NEON_INLINE float32x4_t load4(const void *b, size_t i, const bool half) {
    if (half) return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)b + i)));
    return vld1q_f32((const float *)b + i);
}

// As gemm_tile: R * C + C + 1 <= 32.
NEON_INLINE void gemm_tile_neon(const Gemm *g, int i, int j, const int R, const int C,
                                const bool half) {
    float *c = g->c + (size_t)i * g->ldc + j;
    const float *a = g->a + (size_t)i * g->lda;
    float32x4_t acc[5][4];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) acc[r][v] =
            g->add ? vld1q_f32(c + r * g->ldc + 4 * v) : vdupq_n_f32(0.0f);
    }
    for (int k = 0; k < g->inner; k++) {
        if (half) __builtin_prefetch(g->ahead + k * g->ldb + j, 0, 1);
        float32x4_t b[4];
        UNROLL for (int v = 0; v < C; v++) b[v] =
            load4(g->b, k * g->ldb + (size_t)(j + 4 * v), half);
        UNROLL for (int r = 0; r < R; r++) {
            UNROLL for (int v = 0; v < C; v++) acc[r][v] =
                vfmaq_n_f32(acc[r][v], b[v], a[r * g->lda + k]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) vst1q_f32(c + r * g->ldc + 4 * v, acc[r][v]);
    }
}

NEON_INLINE void gemm_rows_neon(const Gemm *g, int i, const int R, const bool half) {
    int j = 0;
    for (; j + 16 <= g->cols; j += 16) gemm_tile_neon(g, i, j, R, 4, half);
    for (; j < g->cols; j += 4) gemm_tile_neon(g, i, j, R, 1, half);
}

NEON_INLINE void gemm_neon(const Gemm *g, const bool half) {
    int i = 0;
    for (; i + 5 <= g->n; i += 5) gemm_rows_neon(g, i, 5, half);
    for (; i + 3 <= g->n; i += 3) gemm_rows_neon(g, i, 3, half);
    for (; i < g->n; i++) gemm_rows_neon(g, i, 1, half);
}

static void gemm_f32_neon(float *c, size_t ldc, const float *a, size_t lda, const void *b, int n,
                          int inner, int cols, bool add) {
    if (cols % 4)
        gemm_f32_scalar(c, ldc, a, lda, b, n, inner, cols, add);
    else
        gemm_neon(&(Gemm){c, a, b, ldc, lda, (size_t)cols, n, inner, cols, add, NULL}, false);
}

static void gemm_f16_neon(float *c, size_t ldc, const void *rows, const void *b, const void *ahead,
                          int n, int inner, int cols, bool add) {
    size_t lda = (size_t)inner;
    if (cols % 4)
        gemm_f16_scalar(c, ldc, rows, b, ahead, n, inner, cols, add);
    else
        gemm_neon(&(Gemm){c, rows, b, ldc, lda, (size_t)cols, n, inner, cols, add, ahead}, true);
}

static void pack_f16_neon(void *packed, const uint16_t *b, int inner, int cols) {
    f16_to_f32_neon(packed, b, (size_t)inner * cols);
}

// Eight rows of a line [16 rows][2 columns]: the load parts the columns.
static void unpack_16bit_neon(float *out, const Matrix *w, int panel, int c0, int cols) {
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

static void matmul_float_neon(float *out, size_t ld, const Matrix *w, int panel,
                              const Activations *x, int t0, int t1) {
    float block[BLOCK * PANEL];
    for (int c0 = 0; c0 < w->cols_padded; c0 += BLOCK) {
        int cols = w->cols_padded - c0 < BLOCK ? w->cols_padded - c0 : BLOCK;
        const float *b = block;
        if (w->type == W_F32)
            b = (const float *)w->data + ((size_t)panel * w->cols_padded + c0) * PANEL;
        else
            unpack_16bit_neon(block, w, panel, c0, cols);
        gemm_f32_neon(out + t0 * ld, ld, x->x + (size_t)t0 * x->stride + c0, x->stride, b, t1 - t0,
                      cols, PANEL, c0 > 0);
    }
}

// acc += w . a for 4 rows of 4 columns; a holds one quad of activations four times. The instruction
// is written out because compilers want a whole function to be for machines that have it.
NEON_INLINE int32x4_t dot_quads(int32x4_t acc, int8x16_t w, int8x16_t a, const bool sdot) {
    if (sdot) {
        __asm__(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b"
                : "+w"(acc)
                : "w"(w), "w"(a));
        return acc;
    }
    int16x8_t lo = vmull_s8(vget_low_s8(w), vget_low_s8(a)), hi = vmull_high_s8(w, a);
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi)));
}

// Weights of 4 columns by 4 rows of a quad as signed bytes. A q4 line holds two quads.
NEON_INLINE int8x16_t load_rows(const uint8_t *line, int quad, int r, const bool q4,
                                const bool offset) {
    if (!q4) return vreinterpretq_s8_u8(vld1q_u8(line + 64 * quad + 16 * r));
    uint8x16_t v = vld1q_u8(line + 64 * (quad / 2) + 16 * r);
    v = quad % 2 ? vshrq_n_u8(v, 4) : vandq_u8(v, vdupq_n_u8(15));
    int8x16_t s = vreinterpretq_s8_u8(v);
    return offset ? s : vsubq_s8(s, vdupq_n_s8(8));
}

// T tokens against a whole panel, straight from the file. The same integers as everywhere.
NEON_INLINE void int_tile_neon(float *out, size_t ld, const Matrix *w, int panel,
                               const Activations *x, int t, const bool q4, const bool offset,
                               const bool sdot, const int T) {
    int groups = w->cols_padded / QGROUP;
    size_t first = (size_t)panel * groups;
    float sum[4][PANEL] = {{0}};
    for (int g = 0; g < groups; g++) {
        const uint8_t *line = w->data + (first + g) * QGROUP * PANEL / (q4 ? 2 : 1);
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
                float32x4_t s = load4(w->scale, (first + g) * PANEL + 4 * r, true);
                float32x4_t v = vld1q_f32(sum[i] + 4 * r);
                v = vfmaq_f32(v, vcvtq_f32_s32(acc[i][r]), vmulq_n_f32(s, x->scale[at]));
                if (offset) {
                    float32x4_t o = load4(w->offset, (first + g) * PANEL + 4 * r, true);
                    v = vfmaq_n_f32(v, o, x->sum[at]);
                }
                vst1q_f32(sum[i] + 4 * r, v);
            }
        }
    }
    for (int i = 0; i < T; i++) {
        memcpy(out + (t + i) * ld, sum[i], sizeof sum[i]);
        scale_neon(out + (t + i) * ld, x->unit[t + i], PANEL);
    }
}

NEON_INLINE void matmul_int_neon(float *out, size_t ld, const Matrix *w, int panel,
                                 const Activations *x, int t0, int t1, const bool q4,
                                 const bool offset, const bool sdot) {
    int t = t0;
    for (; t + 4 <= t1; t += 4) int_tile_neon(out, ld, w, panel, x, t, q4, offset, sdot, 4);
    for (; t < t1; t++) int_tile_neon(out, ld, w, panel, x, t, q4, offset, sdot, 1);
}

static void matmul_q8_neon(float *out, size_t ld, const Matrix *w, int panel, const Activations *x,
                           int t0, int t1) {
    matmul_int_neon(out, ld, w, panel, x, t0, t1, false, false, false);
}

static void matmul_q4_neon(float *out, size_t ld, const Matrix *w, int panel, const Activations *x,
                           int t0, int t1) {
    if (w->offset)
        matmul_int_neon(out, ld, w, panel, x, t0, t1, true, true, false);
    else
        matmul_int_neon(out, ld, w, panel, x, t0, t1, true, false, false);
}

static void matmul_q8_sdot(float *out, size_t ld, const Matrix *w, int panel, const Activations *x,
                           int t0, int t1) {
    matmul_int_neon(out, ld, w, panel, x, t0, t1, false, false, true);
}

static void matmul_q4_sdot(float *out, size_t ld, const Matrix *w, int panel, const Activations *x,
                           int t0, int t1) {
    if (w->offset)
        matmul_int_neon(out, ld, w, panel, x, t0, t1, true, true, true);
    else
        matmul_int_neon(out, ld, w, panel, x, t0, t1, true, false, true);
}

static float peak_f32_neon(int rounds) {
    float32x4_t acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = vdupq_n_f32((float)i);
    for (int r = 0; r < rounds; r++) {  // a product of the sums stays finite: 0.5 x + y < 2 y
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            vfmaq_f32(vdupq_n_f32(1.0f), acc[i], vdupq_n_f32(0.5f));
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = vaddq_f32(acc[0], acc[i]);
    return vaddvq_f32(acc[0]);
}

NEON_INLINE float peak_int_neon(int rounds, const bool sdot) {
    int32x4_t acc[CHAINS];
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = vdupq_n_s32(i);
    for (int r = 0; r < rounds; r++) {
        UNROLL for (int i = 0; i < CHAINS; i++) acc[i] =
            dot_quads(acc[i], vreinterpretq_s8_s32(acc[i]), vdupq_n_s8(3), sdot);
    }
    for (int i = 1; i < CHAINS; i++) acc[0] = vaddq_s32(acc[0], acc[i]);
    return (float)vaddvq_s32(acc[0]);
}

static float peak_mull(int rounds) { return peak_int_neon(rounds, false); }
static float peak_sdot(int rounds) { return peak_int_neon(rounds, true); }

static const Peak f32_neon = {2 * 4 * CHAINS, peak_f32_neon};
static const Peak int_neon = {2 * 16 * CHAINS, peak_mull};
static const Peak int_sdot = {2 * 16 * CHAINS, peak_sdot};

// As fold_avx2, but of each eight integers the high bytes come before the low ones.
static void fold_neon(Folded *f, int r, const float *a, const Codes *b) {
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
        sum = vaddq_s32(sum, vaddq_s32(q0, q1));
    }
    f->scale[r] = most / FOLD_MOST;
    f->bias[r] = vaddvq_f32(bias);
    int signed_by = b->type == C_U8 ? 128 : 0;  // in codes_neon
    f->center[r] = (code_center(b) - signed_by) * vaddvq_s32(sum);
}

// Codes of 4 columns, the fours' number n in their block, by 4 rows, as signed bytes.
NEON_INLINE int8x16_t codes_neon(const uint8_t *block, int n, const CodeType type) {
    const int lines = 8 >> type;  // of 16 bytes in a block
    uint8x16_t v = vld1q_u8(block + 16 * (n % lines));
    if (type == C_U8) return vreinterpretq_s8_u8(veorq_u8(v, vdupq_n_u8(128)));
    v = vshlq_u8(v, vdupq_n_s8((int8_t)(-n / lines * (8 >> type))));
    return vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(type == C_U4 ? 15 : 3)));
}

// As codes_tile512: R rows by C fours of columns.
NEON_INLINE void codes_tile_neon(const CodeGemm *g, int i, int j, const int R, const int C,
                                 const CodeType type, const bool sdot) {
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
            UNROLL for (int v = 0; v < C; v++) b[v] = codes_neon(at, j % CODE_COLS / 4 + v, type);
            UNROLL for (int r = 0; r < R; r++) {
                int a[2];
                memcpy(a, q + r * rows * 2 + four, 4);
                memcpy(a + 1, q + r * rows * 2 + four + 8, 4);
                int8x16_t a_high = vreinterpretq_s8_s32(vdupq_n_s32(a[0]));
                int8x16_t a_low = vreinterpretq_s8_s32(vdupq_n_s32(a[1]));
                UNROLL for (int v = 0; v < C; v++) {
                    high[r][v] = dot_quads(high[r][v], b[v], a_high, sdot);
                    low[r][v] = dot_quads(low[r][v], b[v], a_low, sdot);
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

NEON_INLINE void codes_rows_neon(const CodeGemm *g, int i, const int R, const CodeType type,
                                 const bool sdot) {
    int j = 0;
    for (; j + 16 <= g->b->cols; j += 16) codes_tile_neon(g, i, j, R, 4, type, sdot);
    for (; j < g->b->cols; j += 4) codes_tile_neon(g, i, j, R, 1, type, sdot);
}

NEON_INLINE void codes_gemm_neon(const CodeGemm *g, const CodeType type, const bool sdot) {
    for (int i = 0, step; i < g->n; i += step) {
        step = fold_step(g->n - i);
        if (step == 3)
            codes_rows_neon(g, i, 3, type, sdot);
        else if (step == 2)
            codes_rows_neon(g, i, 2, type, sdot);
        else
            codes_rows_neon(g, i, 1, type, sdot);
    }
}

NEON_INLINE void gemm_codes_arm(float *c, size_t ldc, const float *a, size_t lda, const Codes *b,
                                int n, bool add, const bool sdot) {
    Folded f;
    if (b->cols % 4) {
        gemm_codes_scalar(c, ldc, a, lda, b, n, add);
        return;
    }
    for (int i = 0; i < n; i += FOLD_ROWS) {
        CodeGemm g = {c + i * ldc, ldc, &f, b, n - i < FOLD_ROWS ? n - i : FOLD_ROWS, add};
        for (int r = 0; r < g.n; r++) fold_neon(&f, r, a + (i + r) * lda, b);
        if (b->type == C_U8)
            codes_gemm_neon(&g, C_U8, sdot);
        else if (b->type == C_U4)
            codes_gemm_neon(&g, C_U4, sdot);
        else
            codes_gemm_neon(&g, C_U2, sdot);
    }
}

static void gemm_codes_neon(float *c, size_t ldc, const float *a, size_t lda, const Codes *b, int n,
                            bool add) {
    gemm_codes_arm(c, ldc, a, lda, b, n, add, false);
}

static void gemm_codes_sdot(float *c, size_t ldc, const float *a, size_t lda, const Codes *b, int n,
                            bool add) {
    gemm_codes_arm(c, ldc, a, lda, b, n, add, true);
}

static void unpack_codes_neon(float *out, size_t ld, const Codes *b) {
    const int bits = 8 >> b->type, lines = 8 >> b->type;  // lines of 16 bytes in a block
    if (b->cols % 4) {
        unpack_codes_scalar(out, ld, b);
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

static void gemm_packed_neon(float *c, size_t ldc, const void *rows, const void *packed, int n,
                             int inner, int cols, bool add) {
    gemm_f32_neon(c, ldc, rows, (size_t)inner, packed, n, inner, cols, add);
}

static const Kernels neon_kernels = {
    .matmul = {matmul_float_neon, matmul_float_neon, matmul_float_neon, matmul_q8_neon,
               matmul_q4_neon},
    .quantize = quantize_neon,
    .gemm_f32 = gemm_f32_neon,
    .gemm_f16 = gemm_f16_neon,
    .pack_f16 = pack_f16_neon,
    .packed_bytes = packed_bytes_f32,
    .pack_rows = rows_as_they_are,
    .gemm_packed = gemm_packed_neon,
    .peak = {&f32_neon, &f32_neon, &f32_neon, &int_neon, &int_neon},
    .peak_packed = &f32_neon,
    .pack_f32 = pack_f32_scalar,
    .gemm_codes = gemm_codes_neon,
    .unpack_codes = unpack_codes_neon,
    .rmsnorm = rmsnorm_neon,
    .add = add_neon,
    .scale = scale_neon,
    .silu_mul = silu_mul_neon,
    .gelu_mul = gelu_mul_neon,
    .max_rows = max_rows_neon,
    .exp64 = exp64_neon,
    .max_into = max_into_neon,
    .f16_to_f32 = f16_to_f32_neon,
    .f32_to_f16 = f32_to_f16_neon,
};

static bool has_dotprod(void) {
#ifdef __linux__
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every Apple processor that runs macOS
#endif
}

static void adapt_neon(Kernels *k) {
    if (!has_dotprod()) return;
    k->matmul[W_Q8] = matmul_q8_sdot;
    k->matmul[W_Q4] = matmul_q4_sdot;
    k->peak[W_Q8] = k->peak[W_Q4] = &int_sdot;
    k->gemm_codes = gemm_codes_sdot;
}
#endif

// ---- OpenBLAS, when built with BLAS=1 ----

#ifdef BLAS
#include <cblas.h>
void openblas_set_num_threads(int n);  // in OpenBLAS's own cblas.h, not in others

static void blas_init(void) { openblas_set_num_threads(1); }  // the pool splits the panels

// Columns c0 .. c0 + cols of a panel as f32 [cols][ld], 16 of ld filled.
static void unpack_columns(float *out, size_t ld, const Matrix *w, int panel, int c0, int cols) {
    const uint8_t *line = w->data + ((size_t)panel * w->cols_padded + c0) / wtype_k(w->type) * 64;
    for (int c = 0; c < cols; c += wtype_k(w->type), line += 64, out += wtype_k(w->type) * ld) {
        const uint16_t *in = (const uint16_t *)line;
        float pair[2 * PANEL];
        if (w->type == W_F32) {
            memcpy(out, line, PANEL * sizeof *out);
            continue;
        }
        if (w->type == W_F16)
            kern.f16_to_f32(pair, in, 2 * PANEL);
        else
            for (int i = 0; i < 2 * PANEL; i++) pair[i] = from_bits((uint32_t)in[i] << 16);
        for (int r = 0; r < PANEL; r++) out[r] = pair[2 * r], out[ld + r] = pair[2 * r + 1];
    }
}

void matmul_blas(float *out, size_t ld, const Matrix *w, int panel, const Activations *x, int n) {
    enum { ROWS = BLAS_PANELS * PANEL };
    float b[BLOCK * ROWS];
    int rows = w->rows - panel * PANEL < ROWS ? w->rows - panel * PANEL : ROWS;
    for (int c0 = 0; c0 < w->cols_padded; c0 += BLOCK) {
        int cols = w->cols_padded - c0 < BLOCK ? w->cols_padded - c0 : BLOCK;
        for (int r = 0; r < rows; r += PANEL)
            unpack_columns(b + r, ROWS, w, panel + r / PANEL, c0, cols);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, rows, cols, 1.0f, x->x + c0,
                    x->stride, b, ROWS, c0 > 0 ? 1.0f : 0.0f, out, (int)ld);
    }
}
#else
static void blas_init(void) {}
#endif

// ---- choosing ----

// A set is a table and what is put in its place on machines that can do more, or NULL.
typedef struct {
    const char *name;
    const Kernels *set;
    bool (*usable)(void);
    void (*adapt)(Kernels *k);
} Isa;

static bool always(void) { return true; }

static const Isa isas[] = {
// best first
#ifdef __x86_64__
    {"avx512", &avx512_kernels, has_avx512, adapt_avx512},
    {"avx2vnni", &avx2_kernels, has_avx2vnni, adapt_avx2vnni},
    {"avx2", &avx2_kernels, has_avx2, NULL},
#endif
#ifdef __aarch64__
    {"neon", &neon_kernels, always, adapt_neon},
#endif
    {"scalar", &scalar_kernels, always, NULL},
};

int kernels_init(const char *isa) {
    for (const Isa *i = isas; i < isas + sizeof isas / sizeof *isas; i++) {
        if ((isa && strcmp(isa, i->name) != 0) || !i->usable()) continue;
        kern = *i->set;
        kern.name = i->name;
        if (i->adapt) i->adapt(&kern);
        blas_init();
        return 0;
    }
    return -1;
}

const Kernels *kernels_scalar(void) { return &scalar_kernels; }

// ---- threads ----

// A job is a function and a counter; whoever is free takes the next indices. Workers spin for a
// moment after a job, because the next one usually follows within microseconds, then sleep: an idle
// program costs nothing.
enum { SPINS = 20000 };

struct ThreadPool {
    int n_workers;
    pthread_t *workers;
    void (*fn)(void *ctx, int i);
    void *ctx;
    int n;
    atomic_int next;  // index to take
    atomic_int busy;  // workers that have not finished the current job
    atomic_uint job;  // counts jobs; a change wakes the workers
    atomic_bool closing;
    atomic_int sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
};

// A hint to the core that this is a waiting loop.
static inline void relax(int spin) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
    if (spin % 1024 == 1023) sched_yield();  // more threads than cores: let the others work
}

// Large shares first, single indices last: few meetings at the counter, long runs of memory, and
// all finish together.
static void take_work(ThreadPool *p) {
    int n = p->n, threads = p->n_workers + 1;
    for (;;) {
        int left = n - atomic_load_explicit(&p->next, memory_order_relaxed);
        int share = left / (2 * threads) + 1;
        int i = atomic_fetch_add_explicit(&p->next, share, memory_order_relaxed);
        if (i >= n) return;
        for (int end = i + share < n ? i + share : n; i < end; i++) p->fn(p->ctx, i);
    }
}

static void wait_for_job(ThreadPool *p, unsigned seen) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load_explicit(&p->job, memory_order_acquire) != seen) return;
        relax(spin);
    }
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->sleepers, 1);
    while (atomic_load(&p->job) == seen) pthread_cond_wait(&p->wake, &p->mutex);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->mutex);
}

static void *worker(void *arg) {
    ThreadPool *p = arg;
    for (unsigned seen = 0;; seen++) {
        wait_for_job(p, seen);
        if (atomic_load(&p->closing)) return NULL;
        take_work(p);
        atomic_fetch_sub_explicit(&p->busy, 1, memory_order_release);
    }
}

static void post_job(ThreadPool *p) {
    atomic_fetch_add(&p->job, 1);
    if (atomic_load(&p->sleepers) > 0) {
        pthread_mutex_lock(&p->mutex);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->mutex);
    }
}

ThreadPool *pool_open(int n_threads) {
    ThreadPool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->workers = calloc((size_t)n_threads, sizeof *p->workers);
    sigset_t all, old;  // signals are for the caller's thread, so that Ctrl-C interrupts its reads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (int i = 1; p->workers && i < n_threads; i++) {
        if (pthread_create(&p->workers[p->n_workers], NULL, worker, p) != 0) break;
        p->n_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (p->n_workers == n_threads - 1) return p;
    pool_close(p);
    return NULL;
}

void pool_close(ThreadPool *p) {
    if (!p) return;
    atomic_store(&p->closing, true);
    post_job(p);
    for (int i = 0; i < p->n_workers; i++) pthread_join(p->workers[i], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->mutex);
    free(p->workers);
    free(p);
}

int pool_threads(const ThreadPool *p) { return p ? p->n_workers + 1 : 1; }

void parallel_for(ThreadPool *p, int n, void (*fn)(void *ctx, int i), void *ctx) {
    if (!p || p->n_workers == 0 || n <= 1) {
        for (int i = 0; i < n; i++) fn(ctx, i);
        return;
    }
    p->fn = fn, p->ctx = ctx, p->n = n;
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    atomic_store_explicit(&p->busy, p->n_workers, memory_order_relaxed);
    post_job(p);
    take_work(p);
    for (int spin = 0; atomic_load_explicit(&p->busy, memory_order_acquire) > 0; spin++)
        relax(spin);
}

int cores_online(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > 256 ? 256 : (int)n;
}
