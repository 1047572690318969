// simd.h: what the files of the instruction sets share, private to kernels/.
//
// Small functions that all of them need, which each compiles into its own loops, and how a set
// offers itself to choose.c.
#ifndef SIMD_H
#define SIMD_H
#include "kernels/kernels.h"
#include "util.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

// What the processor can do and the operating system lets programs use; choose.c finds it.
typedef struct {
    bool avx2;        // with FMA and F16C
    bool avx_vnni;    // vpdpbusd as AVX2 encodes it (VEX)
    bool avx512vnni;  // AVX-512 F, BW, DQ, VL and vpdpbusd as it is encoded there (EVEX)
    bool avx512bf16;  // all that and vdpbf16ps
    bool amx;         // all that and tiles of bf16
    bool dotprod;     // sdot, of ARMv8.2
} Features;

// The sets that stand alone, and what puts into such a table the functions that more features
// allow.
extern const Kernels kernels_avx2, kernels_neon;
void adapt_avx2vnni(Kernels *k, const Features *f);      // of kernels_avx2
void adapt_avx512(Kernels *k, const Features *f);        // of kernels_avx2
void adapt_avx512bf16(Kernels *k, const Features *f);    // of kernels_avx2
void adapt_amx(Kernels *k, const Features *f);           // of kernels_avx2
bool amx_multiplies(void);  // whether its tiles give what whole numbers give, where they may be used
void adapt_amx_emulated(Kernels *k, const Features *f);  // of kernels_scalar
void adapt_neon(Kernels *k, const Features *f);          // of kernels_neon

// Loops over registers.
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3); arXiv 1606.08415
#define GELU_A 1.5957691216057308f  // 2 sqrt(2/pi)
#define GELU_B 0.044715f

// ---- inputs in 8 and 16 bits ----

// Comparisons, not fminf and fmaxf, which are calls.
static inline float min_of(float a, float b) { return a < b ? a : b; }
static inline float max_of(float a, float b) { return a > b ? a : b; }

// 2^n for n in -126..127.
static inline float exp2_int(int n) { return bits_float((uint32_t)(n + 127) << 23); }

// How x is rounded, a row's and its groups' largest numbers being known: see Activations.
static inline float row_unit(float row_max) { return row_max / 127.0f * exp2_int(-UNIT_STEPS); }

// How often group_max can be doubled before it passes row_max is the difference of their exponents,
// one less where the mantissa of group_max is larger: the bits of a float, as an integer, subtract
// to just that.
static inline float group_scale(float row_max, float group_max) {
    uint32_t n = (float_bits(row_max) - float_bits(group_max)) >> 23;
    if (n >= UNIT_STEPS) return 1.0f;
    float scale = exp2_int(UNIT_STEPS - (int)n);
    return group_max * exp2_int((int)n) > 0.75f * row_max ? scale : 0.75f * scale;
}

// What x is multiplied with before it is rounded: 1 / (unit * scale).
static inline float group_inverse(float row_max, float scale) {
    return row_max > 0.0f ? 127.0f / row_max * (exp2_int(UNIT_STEPS) / scale) : 0.0f;
}

// What belongs to a group, its q being rounded and summed.
static inline void store_group(const Activations *a, size_t group, float scale, int sum) {
    a->scale[group] = scale;
    a->sum[group] = scale * (float)sum;
    a->shift[group] = -128 * sum;
}

// A row of q16 has the unit row_max / WIDE: sums of 32 products with 8-bit weights fit 32 bits.
enum { WIDE = 32767 };

static inline float wide_inverse(float row_max) { return row_max > 1e-30f ? WIDE / row_max : 0.0f; }

// ---- products of floats ----

// Where nothing is better packed: rows stay as they are, b becomes f32.
static inline size_t packed_bytes_f32(int inner, int cols) {
    return (size_t)inner * cols * sizeof(float);
}

static inline const void *rows_as_they_are(uint16_t *room, const float *a, int n, int inner,
                                           int cols) {
    (void)room, (void)n, (void)inner, (void)cols;
    return a;
}

static inline void pack_f32(void *packed, const float *b, int inner, int cols) {
    memcpy(packed, b, (size_t)inner * cols * sizeof *b);
}

void gemm_packed_bf16(const Gemm *g);  // that of avx512bf16, for shapes that fit no tile
// ---- recurrence ----

// Columns of S that one register holds, DELTA_BYTES wide as the file of the set says.
#ifndef DELTA_BYTES
#define DELTA_BYTES 16
#endif
typedef float DeltaLane __attribute__((vector_size(DELTA_BYTES), aligned(4), may_alias));
enum { DELTA_LANE = DELTA_BYTES / sizeof(float), DELTA_PARTS = DELTA_COLS / DELTA_LANE };

// One token and the columns from `first` on, whose rows s [k_dim] stand DELTA_PARTS apart.
static inline __attribute__((always_inline)) void delta_lane(const DeltaRule *d, DeltaLane *s,
                                                             int t, int first) {
    enum { P = DELTA_PARTS };
    const float *q = d->q + t * d->ld, *k = d->k + t * d->ld;
    size_t bytes = (size_t)min_int(DELTA_LANE, d->v_dim - first) * sizeof(float);
    float decay = d->decay[t * d->ld_gate], beta = d->beta[t * d->ld_gate];
    DeltaLane v = {0}, a = {0}, b = {0}, c = {0}, e = {0}, *r = s;
    memcpy(&v, d->v + t * d->ld + first, bytes);
    for (int i = 0; i < d->k_dim; i += 4, r += 4 * P) {
        r[0] *= decay, r[P] *= decay, r[2 * P] *= decay, r[3 * P] *= decay;
        a += k[i] * r[0], b += k[i + 1] * r[P];
        c += k[i + 2] * r[2 * P], e += k[i + 3] * r[3 * P];
    }
    DeltaLane change = beta * (v - ((a + b) + (c + e)));
    a = b = c = e = (DeltaLane){0}, r = s;
    for (int i = 0; i < d->k_dim; i += 4, r += 4 * P) {
        r[0] += k[i] * change, r[P] += k[i + 1] * change;
        r[2 * P] += k[i + 2] * change, r[3 * P] += k[i + 3] * change;
        a += q[i] * r[0], b += q[i + 1] * r[P];
        c += q[i + 2] * r[2 * P], e += q[i + 3] * r[3 * P];
    }
    DeltaLane out = (a + b) + (c + e);
    memcpy(d->out + t * d->ld_out + first, &out, bytes);
}

// As in scalar.c, of many columns at once.
static inline __attribute__((always_inline)) void delta_rule_lanes(const DeltaRule *d) {
    for (int j = 0; j < d->v_dim; j += DELTA_LANE) {
        size_t block = (size_t)(j / DELTA_COLS) * d->k_dim * DELTA_COLS;
        DeltaLane *s = (DeltaLane *)(d->s + block + j % DELTA_COLS);
        for (int t = 0; t < d->n; t++) delta_lane(d, s, t, j);
    }
}

// ---- codes ----

// Bytes of a block, and blocks of four rows.
static inline size_t code_block(const Codes *b) { return (size_t)CODE_LINE >> b->type; }
static inline size_t code_blocks(const Codes *b) {
    return (size_t)((b->cols + CODE_COLS - 1) / CODE_COLS);
}

// The code that stands for 0, where there is no minimum.
static inline int code_center(const Codes *b) { return b->min ? 0 : 128; }

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
    bool sdot;  // NEON: by that instruction
} FoldedGemm;

// FOLD_ROWS of g's rows from row i on, or those that are left.
static inline FoldedGemm folded_rows(const CodeGemm *g, const Folded *f, int i) {
    return (FoldedGemm){.c = g->c + i * g->ldc,
                        .ldc = g->ldc,
                        .a = f,
                        .b = g->b,
                        .n = min_int(FOLD_ROWS, g->n - i),
                        .add = g->add};
}

static const float FOLD_MOST = 32512.0f;  // 127 * 256: two signed bytes hold it

// How many of `left` rows to multiply at once: threes, and twos where a single one would be left.
static inline int fold_step(int left) { return left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1; }

// ---- weights ----

// Columns unpacked at a time: 16 rows x 256 columns of f32 are 16 KB, half of a first-level cache.
enum { BLOCK = 256 };

// A block of a quantized panel: w [cols/2][16][2], and per group of 32 columns scale [16] and
// offset [16].
typedef struct {
    int16_t w[BLOCK * PANEL];
    float scale[BLOCK / QGROUP * PANEL], offset[BLOCK / QGROUP * PANEL];
    int c0, cols;  // which columns of the panel
} IntBlock;

// The product of a block of a panel's columns, as floats, with those columns of the tokens.
static inline Gemm float_block(const PanelProduct *p, const float *b, int c0, int cols) {
    const Activations *x = p->x;
    return (Gemm){.c = p->out + p->t0 * p->ld,
                  .ldc = p->ld,
                  .a = x->x + (size_t)p->t0 * x->stride + c0,
                  .lda = (size_t)x->stride,
                  .b = b,
                  .n = p->t1 - p->t0,
                  .inner = cols,
                  .cols = PANEL,
                  .add = c0 > 0};
}

// A q8 or q4 panel, where its scales and offsets are, what it is multiplied with and where to.
typedef struct {
    const uint8_t *line;
    const uint16_t *scale, *offset;
    int groups;
    const Activations *x;
    float *out;
    size_t ld;
} IntPanel;

// The nth panel from that of the product on.
static inline IntPanel int_panel(const PanelProduct *p, int n) {
    const Matrix *w = p->w;
    int groups = w->cols_padded / QGROUP;
    size_t first = (size_t)(p->panel + n) * groups;
    return (IntPanel){.line = w->data + first * QGROUP * PANEL / (w->type == W_Q4 ? 2 : 1),
                      .scale = w->scale + first * PANEL,
                      .offset = w->offset ? w->offset + first * PANEL : NULL,
                      .groups = groups,
                      .x = p->x,
                      .out = p->out + n * PANEL,
                      .ld = p->ld};
}

// ---- peaks ----

enum { CHAINS = 12 };  // sums that do not wait for each other, enough to hide an instruction's time

#endif
