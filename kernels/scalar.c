// scalar.c: the arithmetic in plain C: the definition of every function of the table.
//
// Read this file to know what is computed; the other sets compute the same with other instructions,
// under the same names and in the same order. Tests hold each of them against it for every tail
// length. Weights are unpacked, some columns at a time, and multiplied with all tokens of a call
// while they are in the first-level cache: floats to f32 [columns][16 rows], q8 and q4 to 16-bit
// integers [columns/2][16 rows][2], which meet inputs that were rounded to integers (Activations).
#include "kernels/simd.h"

// ---- half precision ----

static void f16_to_f32(float *out, const uint16_t *in, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = f16_f32(in[i]);
}

static void f32_to_f16(uint16_t *out, const float *in, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = f32_f16(in[i]);
}

// ---- vectors ----

static void rmsnorm(float *out, const float *x, const float *w, int n, float eps) {
    float ss = 0.0f;
    for (int i = 0; i < n; i++) ss += x[i] * x[i];
    float r = 1.0f / sqrtf(ss / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = x[i] * r * w[i];
}

static void add(float *x, const float *y, int n) {
    for (int i = 0; i < n; i++) x[i] += y[i];
}

static void scale(float *x, float a, int n) {
    for (int i = 0; i < n; i++) x[i] *= a;
}

static void silu_mul(float *x, const float *y, int n) {
    for (int i = 0; i < n; i++) x[i] = x[i] / (1.0f + expf(-x[i])) * y[i];
}

static void gelu_mul(float *x, const float *y, int n) {
    for (int i = 0; i < n; i++) {
        float u = GELU_A * (x[i] + GELU_B * x[i] * x[i] * x[i]);
        x[i] = x[i] / (1.0f + expf(-u)) * y[i];
    }
}

// ---- recurrence ----

// Sums over the rows of S run in four parts, of every fourth row.
static void delta_token(const DeltaRule *d, float *s, int t, int first) {
    const float *q = d->q + t * d->ld, *k = d->k + t * d->ld, *v = d->v + t * d->ld + first;
    float at_k[4][DELTA_COLS] = {{0}}, at_q[4][DELTA_COLS] = {{0}}, change[DELTA_COLS] = {0};
    float decay = d->decay[t * d->ld_gate], beta = d->beta[t * d->ld_gate];
    int cols = min_int(DELTA_COLS, d->v_dim - first);
    for (int i = 0; i < d->k_dim; i++)
        for (int j = 0; j < DELTA_COLS; j++)
            at_k[i % 4][j] += k[i] * (s[i * DELTA_COLS + j] *= decay);
    for (int j = 0; j < cols; j++)
        change[j] = beta * (v[j] - ((at_k[0][j] + at_k[1][j]) + (at_k[2][j] + at_k[3][j])));
    for (int i = 0; i < d->k_dim; i++)
        for (int j = 0; j < DELTA_COLS; j++)
            at_q[i % 4][j] += q[i] * (s[i * DELTA_COLS + j] += k[i] * change[j]);
    for (int j = 0; j < cols; j++)
        d->out[t * d->ld_out + first + j] = (at_q[0][j] + at_q[1][j]) + (at_q[2][j] + at_q[3][j]);
}

static void delta_rule(const DeltaRule *d) {
    float *s = d->s;
    for (int j = 0; j < d->v_dim; j += DELTA_COLS, s += (size_t)d->k_dim * DELTA_COLS)
        for (int t = 0; t < d->n; t++) delta_token(d, s, t, j);
}

// ---- scores ----

static void max_rows(float *max, const float *s, int n) {
    for (int i = 0; i < n; i++, s += PAGE) {
        max[i] = s[0];
        for (int j = 1; j < PAGE; j++) max[i] = s[j] > max[i] ? s[j] : max[i];
    }
}

static float exp64(float *s, float m) {
    float sum = 0.0f;
    for (int i = 0; i < PAGE; i++) sum += s[i] = expf(s[i] - m);
    return sum;
}

static void max_into(float *run, const float *s, float b) {
    for (int i = 0; i < PAGE; i++) run[i] = s[i] + b > run[i] ? s[i] + b : run[i];
}

// ---- inputs in 8 and 16 bits ----

static void quantize(const Activations *a, int t0, int t1) {
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

// ---- products of floats ----

// Number i of b, in f32 or half precision.
static float entry(const void *b, size_t i, bool half) {
    return half ? f16_f32(((const uint16_t *)b)[i]) : ((const float *)b)[i];
}

static inline void gemm(const Gemm *g, const bool half) {
    const float *a = g->a;
    for (int i = 0; i < g->n; i++) {
        for (int j = 0; j < g->cols; j++) {
            float sum = g->add ? g->c[i * g->ldc + j] : 0.0f;
            for (int k = 0; k < g->inner; k++)
                sum += a[i * g->lda + k] * entry(g->b, (size_t)k * g->cols + j, half);
            g->c[i * g->ldc + j] = sum;
        }
    }
}

static void gemm_f32(const Gemm *g) { gemm(g, false); }
static void gemm_f16(const Gemm *g) { gemm(g, true); }

static void pack_f16(void *packed, const uint16_t *b, int inner, int cols) {
    f16_to_f32(packed, b, (size_t)inner * cols);
}

// ---- codes ----

// The code of row r, column c; see Codes.
static inline int code_at(const Codes *b, int r, int c) {
    const uint8_t *block = b->data + (r / 4 * code_blocks(b) + c / CODE_COLS) * code_block(b);
    int run = CODE_COLS >> b->type, i = c % CODE_COLS;  // columns that lie one after another
    return block[4 * (i % run) + r % 4] >> (i / run * (8 >> b->type)) &
           ((256 >> (8 - (8 >> b->type))) - 1);
}

static void unpack_codes(float *out, size_t ld, const Codes *b) {
    for (int r = 0; r < b->rows; r++) {
        float scale = f16_f32(b->scale[r]), min = b->min ? f16_f32(b->min[r]) : 0.0f;
        for (int c = 0; c < b->cols; c++)
            out[r * ld + c] = scale * (float)(code_at(b, r, c) - code_center(b)) + min;
    }
}

static void gemm_codes(const CodeGemm *g) {
    const Codes *b = g->b;
    for (int i = 0; !g->add && i < g->n; i++)
        memset(g->c + i * g->ldc, 0, (size_t)b->cols * sizeof *g->c);
    for (int k = 0; k < b->rows; k++) {
        float scale = f16_f32(b->scale[k]), min = b->min ? f16_f32(b->min[k]) : 0.0f;
        for (int j = 0; j < b->cols; j++) {
            float v = scale * (float)(code_at(b, k, j) - code_center(b)) + min;
            for (int i = 0; i < g->n; i++) g->c[i * g->ldc + j] += g->a[i * g->lda + k] * v;
        }
    }
}

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

// ---- weights in floats ----

// A block of a panel as f32 [cols][16], columns c0 .. c0 + cols.
static void unpack_float(float *out, const Matrix *w, int panel, int c0, int cols) {
    size_t at = ((size_t)panel * w->cols_padded + c0) * PANEL;
    if (w->type == W_F32) {
        memcpy(out, (const float *)w->data + at, (size_t)cols * PANEL * sizeof(float));
        return;
    }
    const uint16_t *in = (const uint16_t *)w->data + at;
    for (int c = 0; c < cols; c++) {
        for (int r = 0; r < PANEL; r++) {
            uint16_t h = in[(c / 2 * PANEL + r) * 2 + c % 2];
            out[c * PANEL + r] = w->type == W_F16 ? f16_f32(h) : bits_float((uint32_t)h << 16);
        }
    }
}

static void matmul_float(const PanelProduct *p) {
    float b[BLOCK * PANEL];
    for (int c0 = 0; c0 < p->w->cols_padded; c0 += BLOCK) {
        int cols = min_int(BLOCK, p->w->cols_padded - c0);
        unpack_float(b, p->w, p->panel, c0, cols);
        Gemm g = float_block(p, b, c0, cols);
        gemm_f32(&g);
    }
}

// ---- weights in 8 and 4 bits ----

// A block of a panel as 16-bit integers, with its scales and offsets.
static void unpack_int(IntBlock *b, const Matrix *w, int panel, int c0, int cols) {
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

// Row r of a block times a token, over the 32 columns from c0 on.
static int dot_group(const IntBlock *b, int r, const Activations *x, size_t at, int c0, bool wide) {
    int dot = 0;
    for (int c = c0; c < c0 + QGROUP; c++)
        dot += b->w[(c / 2 * PANEL + r) * 2 + c % 2] * (wide ? x->q16[at + c] : x->q[at + c]);
    return dot;
}

// Integers are summed over 32 columns, then scaled: no group's sum depends on its order.
static inline void multiply_ints(const PanelProduct *p, bool wide) {
    const Matrix *w = p->w;
    const Activations *x = p->x;
    IntBlock b;
    for (int c0 = 0; c0 < w->cols_padded; c0 += BLOCK) {
        int cols = min_int(BLOCK, w->cols_padded - c0);
        unpack_int(&b, w, p->panel, c0, cols);
        for (int t = p->t0; t < p->t1; t++) {
            size_t at = (size_t)t * x->stride + c0;
            float unit = c0 + cols < w->cols_padded ? 1.0f : wide ? x->unit16[t] : x->unit[t];
            for (int r = 0; r < PANEL; r++) {
                float *out = p->out + t * p->ld + r, sum = c0 > 0 ? *out : 0.0f;
                for (int g = 0; g < cols / QGROUP; g++) {
                    size_t group = at / QGROUP + g;
                    float scale = b.scale[g * PANEL + r] * (wide ? 1.0f : x->scale[group]);
                    sum += (float)dot_group(&b, r, x, at, g * QGROUP, wide) * scale;
                    if (w->offset) sum += b.offset[g * PANEL + r] * x->sum[group];
                }
                *out = sum * unit;
            }
        }
    }
}

static void matmul_int(const PanelProduct *p) { multiply_ints(p, false); }
void matmul_wide_scalar(const PanelProduct *p) { multiply_ints(p, true); }

// ---- peaks ----

static float peak_f32(int rounds) {
    float acc[CHAINS], sum = 0.0f;
    for (int i = 0; i < CHAINS; i++) acc[i] = (float)i;
    for (int r = 0; r < rounds; r++) {
        for (int i = 0; i < CHAINS; i++) acc[i] = acc[i] * 0.5f + 1.0f;
    }
    for (int i = 0; i < CHAINS; i++) sum += acc[i];
    return sum;
}

static float peak_int(int rounds) {
    uint32_t acc[CHAINS], sum = 0;
    for (int i = 0; i < CHAINS; i++) acc[i] = (uint32_t)i;
    for (int r = 0; r < rounds; r++) {
        for (int i = 0; i < CHAINS; i++) acc[i] = acc[i] * 3 + 1;
    }
    for (int i = 0; i < CHAINS; i++) sum += acc[i];
    return (float)sum;
}

static const Peak f32_peak = {2 * CHAINS, peak_f32};
static const Peak int_peak = {2 * CHAINS, peak_int};

// ---- the table ----

const Kernels kernels_scalar = {
    .name = "scalar",
    .matmul = {matmul_float, matmul_float, matmul_float, matmul_int, matmul_int},
    .quantize = quantize,
    .gemm_f32 = gemm_f32,
    .gemm_f16 = gemm_f16,
    .pack_f16 = pack_f16,
    .packed_bytes = packed_bytes_f32,
    .pack_rows = rows_as_they_are,
    .gemm_packed = gemm_f32,
    .peak = {&f32_peak, &f32_peak, &f32_peak, &int_peak, &int_peak},
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
