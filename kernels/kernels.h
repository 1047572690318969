// kernels.h: the arithmetic, as one table of functions that each instruction set fills.
//
// Everything heavy is one of two products: weights times tokens (matmul), and rows times a page of
// keys or values (gemm). scalar.c is their definition; the other files have the same functions
// under the same names, each for its own instructions, and choose.c picks the set. The fact that
// must stay true: the sum for one output runs over the columns in order, whatever the tile, so that
// any batch and any number of threads give the same bits (batch invariance).
#ifndef KERNELS_H
#define KERNELS_H
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/half.h"
#include "kernels/threads.h"

enum {
    PANEL = 16,   // rows of a matrix that lie together
    QGROUP = 32,  // columns that share a scale
    PAGE = 64,    // pairs of a page of the cache
};

// ---- matrices ----

typedef enum { W_F32, W_F16, W_BF16, W_Q8, W_Q4, W_TYPES } WType;

// Weights in panels of 16 rows. A line of a panel is 64 bytes, 4 of each row, which hold k columns:
//
//           row 0               row 1                    row 15
//   f32   | c0                | c0                | .. |   k = 1
//   16    | c0      c1        | c0      c1        | .. |   k = 2, f16 and bf16
//   q8    | c0   c1   c2   c3 | c0   c1   c2   c3 | .. |   k = 4
//   q4    | c4c0 c5c1 c6c2 c7c3 ..                | .. |   k = 8, a byte's high half written first
//
// So one load of 512 bits, two of 256 or four of 128 take a line, and no instruction set needs a
// horizontal sum. w = scale * q8, or scale * nibble + offset for q4, whose offset is -8 * scale
// when the file has none. Scales and offsets are for one row and 32 columns.
typedef struct {
    WType type;
    int rows, cols;  // as the model means them
    // ceil(rows/16); cols rounded up to 32 (q8, q4) or k, padding is zero
    int panels, cols_padded;
    const uint8_t *data;     // [panels][cols_padded/k][16][k]
    const uint16_t *scale;   // f16 [panels][cols_padded/32][16], q8 and q4
    const uint16_t *offset;  // f16, same shape, q4 only, may be NULL
} Matrix;

// Columns of a line of a panel: k.
static inline int wtype_k(WType t) { return t == W_F32 ? 1 : t == W_Q8 ? 4 : t == W_Q4 ? 8 : 2; }

// Whether products with the type are of integers and read the rounded input.
static inline bool wtype_ints(WType t) { return t == W_Q8 || t == W_Q4; }

// The input of a matrix product, n rows. f32 and 16-bit weights read x, q8 and q4 weights read q,
// or, q8 where the table says wide, q16. Rows that are tiled are read by tiles of bf16 instead,
// where the table has such products.
//
// In q each group of 32 columns has a scale of its own, which is one of few: the group with the
// row's largest number R uses all 8 bits, the others the smallest scale that their own largest
// number G fits.
//
//   G / R            .. 1/4]      (1/4, 3/8]     (3/8, 1/2]   (1/2, 3/4]     (3/4, 1]
//   scale            ..           3/4 * 2^14     2^14         3/4 * 2^15     2^15
//
//   scale as f32     0 | eeeeeeee | h000 .. 0    h = 0: 2^n, n = e - 127
//                  sign  exponent   bit 22       h = 1: 1.5 * 2^n, which is 3/4 * 2^(n + 1)
//
// So a weight's scale times such a scale is an addition of exponents, once the weight's scale times
// 1.5 is known too. With 2^n alone, or one scale for a row, rounding costs perplexity.
typedef struct {
    int cols;
    int stride;  // elements from row to row of x, q and q16; a multiple of 32, zero after cols
    float *x;    // [n][stride]
    // Which weights will read it.
    bool for_q8, for_q4, for_halves;
    const bool *tiled;  // [n] rows whose products are of tiles; NULL: none
    int8_t *q;          // [n][stride]     round(x / (unit * scale)) in -127..127
    float *unit;        // [n]             of a row: R / 127 / 2^UNIT_STEPS
    float *scale;       // [n][stride/32]  of 32 columns: 2^n or 1.5 * 2^n, from 1 to 2^UNIT_STEPS
    float *sum;         // [n][stride/32]  scale * sum of the group's q, for the offsets of q4
    int *shift;         // [n][stride/32]  -128 * sum of the group's q, for weights made unsigned
    union {
        int16_t *q16;    // [n][stride]  round(x / unit16) in -32767..32767
        uint16_t *bf16;  // [n][stride]  x, of rows that are tiled
    };
    float *unit16;  // [n]
} Activations;

enum { UNIT_STEPS = 15 };  // how often the largest scale can be halved

// ---- codes ----

// A matrix of small integers: entry [r][c] is scale[r] * code + min[r], or, for C_U8 without
// minima, scale[r] * (code - 128). Four rows by 32 columns make a block, which integer products
// that add four neighbours read as it lies. Byte by byte, r0 being row 0, c8 column 8:
//
//   C_U8, 128 bytes   r0c0  r1c0  r2c0  r3c0  r0c1  r1c1 .. r3c31
//   C_U4,  64 bytes   r0c0  r1c0 ..  r3c15 in the low halves, r0c16 .. r3c31 in the high halves
//   C_U2,  32 bytes   bits 76      54      32     10
//          byte 0        r0c24   r0c16   r0c8   r0c0
//          byte 1        r1c24   r1c16   r1c8   r1c0
//          byte 31       r3c31   r3c23   r3c15  r3c7
typedef enum { C_U8, C_U4, C_U2 } CodeType;

enum {
    CODE_COLS = 32,   // columns of a block
    CODE_LINE = 128,  // bytes of a C_U8 block
    CODE_ROWS = 512,  // most rows of a matrix
};

typedef struct {
    CodeType type;
    int rows, cols;   // rows a multiple of 8, at most CODE_ROWS
    uint8_t *data;    // [rows/4][ceil(cols/32)] blocks
    uint16_t *scale;  // f16 [rows]
    uint16_t *min;    // f16 [rows]; NULL is for C_U8 alone
    // As many bytes that will be read later, so that they are fetched meanwhile; or data itself.
    const uint8_t *ahead;
} Codes;

// Bytes of data of so many rows and columns.
static inline size_t code_bytes(CodeType t, int rows, int cols) {
    return (size_t)rows / 4 * ((cols + CODE_COLS - 1) / CODE_COLS) * (CODE_LINE >> t);
}

// Rounds x [rows][cols], its rows ld apart, to codes, scales and minima: each row gets the range it
// needs.
void codes_round(const Codes *to, const float *x, size_t ld);

// ---- products ----

// One panel of weights times some tokens: out[t * ld + r] = W[16 * panel + r] . x[t] for r < 16 and
// t0 <= t < t1.
typedef struct {
    float *out;
    size_t ld;
    const Matrix *w;
    int panel;
    const Activations *x;
    int t0, t1;
} PanelProduct;

// c [n][cols] (+)= a [n][inner] b [inner][cols].
typedef struct {
    float *c;  // rows ldc apart
    size_t ldc;
    const void *a;  // f32, rows lda apart; or as pack_rows returned them, and lda is inner
    size_t lda;
    const void *b;  // f32, half precision or packed, as the function says
    int n, inner, cols;
    bool add;  // to c as it is; else c is overwritten
    // gemm_f16: as many bytes as b that will be read later and are fetched meanwhile, or b.
    const void *ahead;
} Gemm;

// c [n][b's cols] (+)= a [n][b's rows] b.
typedef struct {
    float *c;  // rows ldc apart
    size_t ldc;
    const float *a;  // rows lda apart
    size_t lda;
    const Codes *b;
    int n;
    bool add;
} CodeGemm;

// ---- recurrence ----

// The gated delta rule (arXiv 2412.06464) over n tokens of one head. For each of them, in order:
//
//   S = decay S,  d = beta (v - S^T k),  S = S + k d^T,  out = S^T q
//
// S [k_dim][v_dim] lies in blocks of DELTA_COLS columns, [blocks][k_dim][DELTA_COLS], whose columns
// after v_dim are zero: a column of S depends on no other, and a block stays in the first-level
// cache for all tokens.
typedef struct {
    float *s;
    int n, k_dim, v_dim;        // k_dim a multiple of 4
    const float *q, *k, *v;     // rows ld apart
    const float *decay, *beta;  // numbers ld_gate apart
    float *out;                 // rows ld_out apart
    size_t ld, ld_gate, ld_out;
} DeltaRule;

enum { DELTA_COLS = 16 };

// ---- the table ----

// The instructions of a product alone, in registers: how fast this machine could multiply. run
// repeats them and does ops operations a round (a multiplication and an addition are two); its
// result is for nobody, but keeps the work from being optimized away.
typedef struct {
    int ops;
    float (*run)(int rounds);
} Peak;

typedef struct {
    const char *name;

    // Weights of each type times tokens, one panel.
    void (*matmul[W_TYPES])(const PanelProduct *p);
    // The same for panels panel and panel + 1 at once, 32 rows; NULL where nothing is gained.
    void (*matmul_pair[W_TYPES])(const PanelProduct *p);
    // q8 products read q16: where bytes are widened to 16 bits before they are multiplied, as many
    // bits of the input cost nothing, and then one unit a row is enough. The next token's
    // distribution is then as close to that of f32 weights as with inputs in f32.
    bool wide;
    // Of rows [t0, t1), from x, what products of this instruction set will read: q, unit, scale,
    // sum and shift, or q16 and unit16.
    void (*quantize)(const Activations *x, int t0, int t1);

    // By tiles of bf16 (AMX), for many rows at once, each of them tiled: one panel or panel and
    // panel + 1, without the rows that pad the last one. NULL where the set has no such products,
    // or none for the type. Weights are rounded to bf16 once their scales are in them.
    void (*matmul_tiles[W_TYPES])(const PanelProduct *p, int panels);
    // Of rows [t0, t1), from x, what these products read: bf16. NULL where there are none.
    void (*round_tiles)(const Activations *x, int t0, int t1);

    // b in f32. With b a page of transposed keys this is q . k, with a page of values it is p v.
    void (*gemm_f32)(const Gemm *g);

    // The same for pages in half precision. The rows of a, which lie inner apart, are first packed
    // the way this instruction set multiplies fastest: bf16 where the machine multiplies that, else
    // f32. What pack_rows returns, room [n][inner] or a itself, is the Gemm's a.
    const void *(*pack_rows)(uint16_t *room, const float *a, int n, int inner, int cols);
    // b as it lies in half precision, for few rows; a is packed where halves_packed says so, else
    // f32.
    void (*gemm_f16)(const Gemm *g);
    bool halves_packed;
    // b packed as well, for many rows; it comes from half precision or f32.
    size_t (*packed_bytes)(int inner, int cols);
    void (*pack_f16)(void *packed, const uint16_t *b, int inner, int cols);
    void (*pack_f32)(void *packed, const float *b, int inner, int cols);
    void (*gemm_packed)(const Gemm *g);
    // exp(s - softmax_shift(max)) of n rows of 64 scores, packed as rows for a product with cols
    // columns; their sums are added to sum. NULL where exp64 and pack_rows are as fast.
    const void *(*exp_packed)(uint16_t *room, float *s, const float *max, float *sum, int n,
                              int cols);
    // Of a factor in gemm_packed, and in gemm_f16 with halves_packed, relative: 2^-8 for bf16,
    // whose products also read halves below 2^-14 as 0, else 0.
    float packed_error;

    const Peak *peak[W_TYPES], *peak_packed;  // of matmul and of gemm_packed

    // The codes are read as they are: scales go into a, which is rounded to 16 bits of its row's
    // largest product with a scale.
    void (*gemm_codes)(const CodeGemm *g);
    // out = b, rows ld apart; the same bits from every instruction set.
    void (*unpack_codes)(float *out, size_t ld, const Codes *b);

    // out = x / sqrt(mean of x^2 + eps) * w; arXiv 1910.07467
    void (*rmsnorm)(float *out, const float *x, const float *w, int n, float eps);
    void (*add)(float *x, const float *y, int n);       // x += y
    void (*scale)(float *x, float a, int n);            // x *= a
    void (*silu_mul)(float *x, const float *y, int n);  // x = silu(x) * y
    void (*gelu_mul)(float *x, const float *y, int n);  // x = gelu_tanh(x) * y

    // The same bits from every instruction set, and however the tokens are cut into calls.
    void (*delta_rule)(const DeltaRule *d);

    // Rows of 64 scores: the maximum of each of n; s = exp(s - m) of one, which is 0 where s is
    // -inf, and its sum.
    void (*max_rows)(float *max, const float *s, int n);
    float (*exp64)(float *s, float m);
    // run[j] = max(run[j], s[j] + b) for 64 scores.
    void (*max_into)(float *run, const float *s, float b);

    void (*f16_to_f32)(float *out, const uint16_t *in, size_t n);
    void (*f32_to_f16)(uint16_t *out, const float *in, size_t n);  // round to nearest even
} Kernels;

// What is subtracted from a row's scores before exp: its maximum, or nothing when that is -inf and
// the row has seen no score yet, so that its weights are zeros.
static inline float softmax_shift(float max) { return max == -INFINITY ? 0.0f : max; }

// The table that is used: filled once by kernels_init, before threads start, then read only.
extern Kernels kern;

// isa: "scalar", "avx2", "avx2vnni", "avx512", "avx512bf16", "amx", "neon", "amx-emulated" (amx.c
// in plain C, for tests), or NULL for the fastest this machine has. Returns 0, or -1 when the
// machine (or this build) does not have it.
int kernels_init(const char *isa);

// The definition, for tests.
extern const Kernels kernels_scalar;

// The definition of q8 products that read q16 (Kernels.wide), for tests.
void matmul_wide_scalar(const PanelProduct *p);
#endif
