// Every instruction set against the scalar definition, for every tail length and odd shape.
#include "kernels/kernels.h"
#include "kernels/blas.h"
#include "test.h"

static uint32_t seed = 1;

static float rnd(void) {  // uniform in [-1, 1)
    seed = seed * 1664525u + 1013904223u;
    return (float)(int32_t)seed / 2147483648.0f;
}

static void fill(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = rnd();
}

// Products as the table takes them; a's rows, of a packed or half product, lie inner apart.
static Gemm product(float *c, size_t ldc, const void *a, const void *b, int inner, int cols) {
    return (Gemm){.c = c,
                  .ldc = ldc,
                  .a = a,
                  .lda = (size_t)inner,
                  .b = b,
                  .n = 1,
                  .inner = inner,
                  .cols = cols,
                  .ahead = b};
}

// ---- half precision ----

// The largest difference, NaN when there is one.
static double far(const float *a, const float *b, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (!(d <= worst)) worst = d;
    }
    return worst;
}

static void test_half(void) {
    static uint16_t all[65536], back[65536];
    static float wide[65536];
    int wrong = 0;
    for (int h = 0; h < 65536; h++) all[h] = (uint16_t)h;
    kern.f16_to_f32(wide, all, 65536);
    kern.f32_to_f16(back, wide, 65536);
    for (int h = 0; h < 65536; h++) {
        float f = f16_f32((uint16_t)h);
        bool same = f == wide[h] && back[h] == h && f32_f16(f) == h;
        wrong += isnan(f) ? !isnan(wide[h]) || !isnan(f16_f32(back[h])) : !same;
    }
    CHECK(wrong == 0);
    CHECK(f32_f16(65520.0f) == 0x7c00);         // rounds up to infinity
    CHECK(f32_f16(65519.0f) == 0x7bff);         // the largest finite one
    CHECK(f32_f16(1.0f + 0x1p-11f) == 0x3c00);  // tie to even
    CHECK(f32_f16(1.0f + 3 * 0x1p-11f) == 0x3c02);
    float x[37];
    uint16_t fast[37], slow[37];
    for (int n = 0; n <= 37; n++) {
        fill(x, 37);
        kern.f32_to_f16(fast, x, (size_t)n);
        kernels_scalar.f32_to_f16(slow, x, (size_t)n);
        CHECK(memcmp(fast, slow, (size_t)n * 2) == 0);
    }
}

// ---- vectors ----

static void test_vectors(void) {
    const Kernels *ref = &kernels_scalar;
    float x[70], y[70], a[70], b[70];
    for (int n = 1; n < 68; n++) {
        fill(x, 70), fill(y, 70);
        for (int i = 0; i < n; i++) x[i] *= 8.0f;
        kern.rmsnorm(a, x + 1, y, n, 1e-5f), ref->rmsnorm(b, x + 1, y, n, 1e-5f);
        CHECK_NEAR(far(a, b, (size_t)n), 0, 1e-5);
        void (*const ops[][2])(float *, const float *, int) = {
            {kern.add, ref->add}, {kern.silu_mul, ref->silu_mul}, {kern.gelu_mul, ref->gelu_mul}};
        for (int op = 0; op < 3; op++) {
            memcpy(a, x, sizeof a), memcpy(b, x, sizeof b);
            ops[op][0](a + 1, y, n), ops[op][1](b + 1, y, n);
            CHECK_NEAR(far(a, b, 70), 0, 3e-6 * 8);
        }
        memcpy(a, x, sizeof a);
        kern.scale(a + 1, 0.3f, n);
        for (int i = 1; i <= n; i++) x[i] *= 0.3f;
        CHECK(memcmp(a, x, sizeof a) == 0);
    }
    float extreme[8] = {-1e30f, -200, -88, -0.0f, 0.0f, 88, 200, 1e30f},
          one[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    kern.silu_mul(extreme, one, 8);
    CHECK_NEAR(extreme[1], 0, 1e-30);
    CHECK(extreme[6] == 200 && extreme[7] == 1e30f && extreme[3] == 0);
}

static void test_exp(void) {
    double worst = 0;
    for (int i = 0; i < 2000; i++) {
        float s[PAGE], in[PAGE], m = 3.0f;
        for (int j = 0; j < PAGE; j++)
            s[j] = in[j] = j == 5 ? -INFINITY : m - 87.0f * (0.5f + 0.5f * rnd());
        double sum = 0, want = 0;
        float got = kern.exp64(s, m);
        if (s[5] != 0.0f) worst = 1;
        for (int j = 0; j < PAGE; j++) {
            double e = exp((double)(in[j] - m));
            sum += s[j], want += e;
            if (j != 5) worst = fmax(worst, fabs(s[j] - e) / e);
        }
        if (!(fabs(got - sum) <= 1e-6 * want)) worst = 1;
    }
    CHECK(worst < 2.4e-7);  // 2 ulp
    float s[PAGE] = {[7] = 2.0f}, nan[PAGE] = {[3] = NAN};
    CHECK(isnan(kern.exp64(nan, 0.0f)));  // a NaN must be seen
    float run[PAGE] = {[0] = 5};
    kern.max_into(run, s, -1.0f);
    CHECK(run[0] == 5 && run[7] == 1 && run[1] == 0);
}

static void test_max_rows(void) {
    float s[37 * PAGE], max[37], want[37];
    for (int n = 1; n <= 37; n++) {
        fill(s, n * PAGE);
        for (int j = 0; j < PAGE; j++) s[(n - 1) * PAGE + j] = -INFINITY;
        kern.max_rows(max, s, n), kernels_scalar.max_rows(want, s, n);
        CHECK(memcmp(max, want, (size_t)n * sizeof *max) == 0);
    }
}

// Weights of a product's rows: exp64 and pack_rows in one, less exact. A row is the same in any
// company.
static void check_exp_packed(int n, int cols) {
    float s[9 * PAGE], in[9 * PAGE], max[9], sum[9], c[9 * 80], v[PAGE * 80];
    uint16_t room[9 * PAGE];
    uint8_t packed[PAGE * 80 * sizeof(float)];
    for (int i = 0; i < n * PAGE; i++) s[i] = in[i] = i % 7 == 5 ? -INFINITY : 30.0f * rnd();
    for (int i = 0; i < n; i++) sum[i] = 0.5f;
    kern.max_rows(max, s, n);
    for (int j = 0; j < PAGE; j++) in[j] = s[j] = -INFINITY;
    max[0] = -INFINITY;
    fill(v, PAGE * cols);
    kern.pack_f32(packed, v, PAGE, cols);
    const void *rows = kern.exp_packed(room, s, max, sum, n, cols);
    Gemm g = product(c, (size_t)cols, rows, packed, PAGE, cols);
    g.n = n;
    kern.gemm_packed(&g);
    for (int i = 0; i < n; i++) {
        double want = 0.5;
        for (int j = 0; j < PAGE && i > 0; j++) want += exp(in[i * PAGE + j] - max[i]);
        CHECK_NEAR(sum[i], want, 8e-5 * want);
        for (int k = 0; k < cols; k++) {
            double o = 0.0, size = 0.0;
            for (int j = 0; j < PAGE && i > 0; j++) {
                double w = exp(in[i * PAGE + j] - max[i]);
                o += w * v[j * cols + k], size += w * fabs(v[j * cols + k]);
            }
            CHECK_NEAR(c[i * cols + k], o, 2.1 * kern.packed_error * size + 1e-5);
        }
    }
    float alone[PAGE * 80], one = 0.5f;
    memcpy(s, in, sizeof s);
    rows = kern.exp_packed(room, s + (n - 1) * PAGE, max + n - 1, &one, 1, cols);
    g = product(alone, (size_t)cols, rows, packed, PAGE, cols);
    kern.gemm_packed(&g);
    CHECK(one == sum[n - 1] && memcmp(alone, c + (n - 1) * cols, (size_t)cols * 4) == 0);
}

static void test_exp_packed(void) {
    if (!kern.exp_packed) return;
    for (int n = 2; n <= 9; n++) {
        check_exp_packed(n, 64), check_exp_packed(n, 80);
        check_exp_packed(n, 40);  // which no packing fits
    }
    float s[PAGE] = {[3] = NAN}, max = 0.0f, sum = 0.0f;
    uint16_t room[PAGE];
    kern.exp_packed(room, s, &max, &sum, 1, 64);
    CHECK(isnan(sum));
}

// ---- products ----

// Rows as gemm_f16 takes them, and what it makes of a factor.
static const void *half_rows(uint16_t *room, const float *a, int n, int inner, int cols) {
    return kern.halves_packed ? kern.pack_rows(room, a, n, inner, cols) : a;
}

static double half_error(void) { return kern.halves_packed ? (double)kern.packed_error : 0.0; }

static void test_gemm(void) {
    const Kernels *ref = &kernels_scalar;
    enum { N = 14, K = 70, C = 80, LDC = C + 5 };
    static float a[N * (K + 3)], b[K * C], c1[N * LDC], c2[N * LDC];
    static uint16_t bh[K * C], room[N * K];
    fill(a, sizeof a / 4), fill(b, sizeof b / 4);
    kern.f32_to_f16(bh, b, K * C);
    for (int n = 1; n <= N; n++) {
        for (int inner = 1; inner <= K; inner += 23) {
            for (int cols = 1; cols <= C; cols += cols < 9 ? 1 : 7) {
                bool add = (n + cols) % 2;
                fill(c1, N * LDC), memcpy(c2, c1, sizeof c1);
                Gemm g = product(c1, LDC, a, b, inner, cols), slow;
                g.n = n, g.add = add, slow = g, slow.c = c2;
                g.lda = slow.lda = K + 3;
                kern.gemm_f32(&g), ref->gemm_f32(&slow);
                CHECK_NEAR(far(c1, c2, N * LDC), 0, 1e-4);
                g.a = half_rows(room, a, n, inner, cols);
                g.lda = slow.lda = (size_t)inner;
                g.b = g.ahead = slow.b = slow.ahead = bh;
                kern.gemm_f16(&g), ref->gemm_f16(&slow);
                CHECK_NEAR(far(c1, c2, N * LDC), 0, 1e-4 + 2.0 * sqrt(inner) * half_error());
            }
        }
    }
}

// Every finite half, times one and times the largest row there may be.
static void test_halves(void) {
    enum { COLS = 64, FINITE = 0x7c00 };
    uint16_t b[2 * COLS] = {0}, packed_row[2][2];
    const float rows[2][2] = {{1.0f, 0.0f}, {65000.0f, 0.0f}};
    float c[COLS];
    for (int first = 0; first < 2 * FINITE; first += COLS) {
        for (int j = 0; j < COLS; j++)
            b[j] = (uint16_t)(first < FINITE ? first + j : 0x8000 + first - FINITE + j);
        for (int r = 0; r < 2; r++) {
            const void *row = half_rows(packed_row[r], rows[r], 1, 2, COLS);
            Gemm g = product(c, COLS, row, b, 2, COLS);
            kern.gemm_f16(&g);
            for (int j = 0; j < COLS; j++) {
                double h = f16_f32(b[j]), small = half_error() > 0.0 ? 0x1p-14 : 0.0;
                double error = fabs(h) < small ? 1.0 : 2.0 * half_error() + 2e-7;
                CHECK_NEAR(c[j] / rows[r][0], h, error * fabs(h));
            }
        }
    }
}

// A row's bits must not depend on how many rows go with it.
static void test_gemm_batch(void) {
    enum { N = 17, K = 37, C = 48 };
    static float a[N * K], b[K * C], all[N * C], one[C];
    fill(a, sizeof a / 4), fill(b, sizeof b / 4);
    Gemm g = product(all, C, a, b, K, C);
    g.n = N;
    kern.gemm_f32(&g);
    for (int i = 0; i < N; i++) {
        g = product(one, C, a + i * K, b, K, C);
        kern.gemm_f32(&g);
        CHECK(memcmp(one, all + i * C, sizeof one) == 0);
    }
    static uint16_t half[K * C], room[N * K];
    kern.f32_to_f16(half, b, K * C);
    for (int inner = K - 1; inner <= K; inner++) {
        g = product(all, C, half_rows(room, a, N, inner, C), half, inner, C);
        g.n = N;
        kern.gemm_f16(&g);
        for (int i = 0; i < N; i++) {
            const void *row = half_rows(room, a + i * inner, 1, inner, C);
            g = product(one, C, row, half, inner, C);
            kern.gemm_f16(&g);
            CHECK(memcmp(one, all + i * C, sizeof one) == 0);
        }
    }
}

// ---- codes ----

static Codes alloc_codes(CodeType type, bool min, int rows, int cols) {
    Codes b = {type, rows, cols, malloc(code_bytes(type, rows, cols)), NULL, NULL, NULL};
    b.ahead = b.data;
    b.scale = malloc((size_t)rows * 2);
    if (min) b.min = malloc((size_t)rows * 2);
    return b;
}

static void free_codes(Codes *b) { free(b->data), free(b->scale), free(b->min); }

// Random codes, every bit pattern and the padding's among them.
static void random_codes(const Codes *b) {
    for (size_t i = 0; i < code_bytes(b->type, b->rows, b->cols); i++)
        b->data[i] = (uint8_t)(int)(rnd() * 1000);
    for (int r = 0; r < b->rows; r++) b->scale[r] = f32_f16(rnd() * 0.1f);
    for (int r = 0; b->min && r < b->rows; r++) b->min[r] = f32_f16(rnd());
}

// Products with codes equal those with the numbers they stand for, and any batch has the same bits.
static void test_codes(CodeType type, bool min, int inner, int cols) {
    enum { N = 14, LD = 80 + 5, LDA = CODE_ROWS + 3 };
    static float a[N * LDA], c1[N * LD], c2[N * LD], c3[N * LD], b1[CODE_ROWS * LD],
        b2[CODE_ROWS * LD];
    static double want[LD];
    Codes b = alloc_codes(type, min, inner, cols);
    random_codes(&b), fill(a, N * LDA);
    fill(b1, CODE_ROWS * LD), memcpy(b2, b1, sizeof b1);
    kern.unpack_codes(b1, LD, &b), kernels_scalar.unpack_codes(b2, LD, &b);
    CHECK(memcmp(b1, b2, sizeof b1) == 0);
    for (int n = 1; n <= N; n += n < 7 ? 1 : 3) {
        bool add = (n + cols) % 2;
        fill(c1, N * LD), memcpy(c2, c1, sizeof c1), memcpy(c3, c1, sizeof c1);
        CodeGemm g = {.c = c1, .ldc = LD, .a = a, .lda = LDA, .b = &b, .n = n, .add = add};
        kern.gemm_codes(&g);
        g.c = c2, kernels_scalar.gemm_codes(&g);
        g.n = 1;
        for (int i = 0; i < n; i++) {
            g.c = c3 + i * LD, g.a = a + i * LDA;
            kern.gemm_codes(&g);
        }
        CHECK(memcmp(c1, c3, sizeof c1) == 0);
        const double most[] = {255, 15, 3};  // half a step of a is at most 0.1 / 65024
        double tol = 1e-5 * (10 + inner) + inner * 0.1 / 65024 * most[type];
        CHECK_NEAR(far(c1, c2, N * LD), 0, tol);
        for (int j = 0; j < cols && !add; j++) {
            want[j] = 0;
            for (int k = 0; k < inner; k++)
                want[j] += (double)a[(n - 1) * LDA + k] * b1[k * LD + j];
            CHECK_NEAR(c1[(n - 1) * LD + j], want[j], tol);
        }
    }
    free_codes(&b);
}

// A number is off by half a step at most, and by what half precision does to the row's minimum and
// scale; rows of one value, of zeros and of tiny numbers included.
static void test_codes_round(CodeType type, bool min, int cols) {
    enum { R = 16, LD = 70 };
    float x[R * LD], y[R * LD];
    Codes b = alloc_codes(type, min, R, cols);
    fill(x, R * LD);
    for (int c = 0; c < cols; c++) {
        x[0 * LD + c] = 0.0f, x[1 * LD + c] = 3.3f, x[2 * LD + c] *= 1e-7f;
        x[3 * LD + c] += 100.0f, x[4 * LD + c] *= 1e4f, x[5 * LD + c] -= 2.0f;
    }
    codes_round(&b, x, LD);
    kern.unpack_codes(y, LD, &b);
    const int steps = type == C_U8 ? (min ? 255 : 254) : type == C_U4 ? 15 : 3;
    for (int r = 0; r < R; r++) {
        float low = x[r * LD], high = low;
        for (int c = 0; c < cols; c++)
            low = fminf(low, x[r * LD + c]), high = fmaxf(high, x[r * LD + c]);
        double most = fmax(fabs(low), fabs(high)), range = min ? high - low : 2 * most;
        CHECK_NEAR(f16_f32(b.scale[r]), range / steps, range / steps * 0x1p-11 + 0x1p-25);
        double allowed = f16_f32(b.scale[r]) * 0.5 + most * 0x1p-10 + 0x1p-17;
        CHECK_NEAR(far(x + r * LD, y + r * LD, (size_t)cols), 0, allowed);
    }
    free_codes(&b);
}

static void test_all_codes(void) {
    const int inner[] = {8, 24, 64, 80, 256},
              cols[] = {1, 4, 5, 8, 12, 16, 24, 31, 32, 33, 40, 48, 56, 64, 72, 80};
    for (int kind = 0; kind < 4; kind++) {
        CodeType type = (CodeType)(kind < 2 ? C_U8 : kind - 1);
        for (size_t i = 0; i < sizeof inner / sizeof *inner; i++) {
            for (size_t j = 0; j < sizeof cols / sizeof *cols; j++)
                test_codes(type, kind > 0, inner[i], cols[j]);
        }
        for (int n = 1; n <= 70; n += n % 8 ? 1 : 3) test_codes_round(type, kind > 0, n);
    }
}

// Packing from f32 gives what packing the same numbers from f16 gives.
static void test_pack(void) {
    enum { K = 64, C = 80 };
    static float wide[K * C], packed[2][K * C];
    static uint16_t half[K * C];
    for (int inner = 1; inner <= K; inner += 21) {
        for (int cols = 8; cols <= C; cols += 8) {
            fill(wide, K * C);
            kern.f32_to_f16(half, wide, K * C), kern.f16_to_f32(wide, half, K * C);
            kern.pack_f16(packed[0], half, inner, cols);
            kern.pack_f32(packed[1], wide, inner, cols);
            size_t bytes = kern.packed_bytes(inner, cols);
            CHECK(memcmp(packed[0], packed[1], bytes) == 0);
        }
    }
}

// A random matrix of any type, and its entries as floats.
static Matrix random_matrix(WType type, int rows, int cols, bool offset, float *dense) {
    int k = wtype_k(type), unit = type == W_Q8 || type == W_Q4 ? QGROUP : k;
    Matrix m = {.type = type, .rows = rows, .cols = cols, .panels = (rows + 15) / 16};
    m.cols_padded = (cols + unit - 1) / unit * unit;
    size_t lines = (size_t)m.panels * m.cols_padded / k,
           groups = (size_t)m.panels * m.cols_padded / QGROUP * PANEL;
    uint8_t *data = aligned_alloc(64, lines * 64);
    uint16_t *scale = malloc(groups * 2), *off = malloc(groups * 2);
    for (size_t i = 0; i < lines * 64; i++) data[i] = (uint8_t)(int)(rnd() * 1000);
    for (size_t i = 0; i < groups; i++)
        scale[i] = i % PANEL == 3   ? (uint16_t)(i / PANEL % 2 * 0x8000)
                   : i % PANEL == 4 ? (uint16_t)(i % 7)  // subnormal
                                    : f32_f16(rnd() * 0.01f),
        off[i] = f32_f16(rnd() * 0.1f);
    m.data = data;
    if (unit == QGROUP) m.scale = scale;
    if (offset) m.offset = off;
    for (int r = 0; r < m.panels * PANEL; r++) {
        for (int c = 0; c < m.cols_padded; c++) {
            size_t at = (((size_t)(r / 16) * m.cols_padded / k + c / k) * PANEL + r % 16);
            size_t g = ((size_t)(r / 16) * (m.cols_padded / QGROUP) + c / QGROUP) * PANEL + r % 16;
            bool pad = c >= cols;
            float v = pad ? 0.0f : rnd(), *d = &dense[(size_t)r * m.cols_padded + c];
            if (type == W_F32) ((float *)data)[at] = *d = v;
            if (type == W_F16)
                ((uint16_t *)data)[at * 2 + c % 2] = f32_f16(v), *d = f16_f32(f32_f16(v));
            if (type == W_BF16) {
                uint32_t u;
                memcpy(&u, &v, 4);
                ((uint16_t *)data)[at * 2 + c % 2] = (uint16_t)(u >> 16);
                u &= 0xffff0000;
                memcpy(d, &u, 4);
            }
            if (type == W_Q8) *d = f16_f32(scale[g]) * (float)((int8_t *)data)[at * 4 + c % 4];
            if (type == W_Q4) {
                int byte = data[at * 4 + c % 4], nibble = c % 8 < 4 ? byte & 15 : byte >> 4;
                *d = offset ? f16_f32(scale[g]) * (float)nibble + f16_f32(off[g])
                            : f16_f32(scale[g]) * (float)(nibble - 8);
            }
        }
    }
    if (!m.scale) free(scale);
    if (!m.offset) free(off);
    return m;
}

static Activations random_acts(int n, int cols) {
    Activations a = {.cols = cols, .stride = (cols + 31) / 32 * 32, .for_q8 = true, .for_q4 = true};
    size_t size = (size_t)n * a.stride;
    a.x = calloc(size, 4), a.q = calloc(size, 1), a.q16 = calloc(size, 2),
    a.scale = calloc(size / 32, 4), a.unit = calloc((size_t)n, 4), a.sum = calloc(size / 32, 4);
    a.shift = calloc(size / 32, 4), a.unit16 = calloc((size_t)n, 4);
    for (int t = 0; t < n; t++) {
        float *x = a.x + (size_t)t * a.stride;
        fill(x, (size_t)cols);
        for (int i = 0; i < cols; i++) x[i] *= ldexpf(1.0f, -(i / QGROUP * 5 % 19));
    }
    for (int i = 0; i < 32 && i < cols; i++) a.x[i] = 0.0f;  // a group of zeros
    return a;
}

// No number is further from what stands for it than half a step, and no step is larger than the
// group needs: 2/3 of the range are used, or the scale is the smallest that there is.
static void check_rounding(const Activations *a, int n) {
    int far_off = 0, coarse = 0;
    for (size_t g = 0; g < (size_t)n * a->stride / QGROUP; g++) {
        float step = a->unit[g * QGROUP / a->stride] * a->scale[g];
        int most = 0;
        for (size_t i = g * QGROUP; i < (g + 1) * QGROUP; i++) {
            far_off += !(fabsf(a->x[i] - step * a->q[i]) <= 0.5001f * step);
            most = abs(a->q[i]) > most ? abs(a->q[i]) : most;
        }
        coarse += most > 0 && most < 84 && a->scale[g] > 1.0f;
    }
    for (size_t i = 0; kern.wide && i < (size_t)n * a->stride; i++) {
        float unit = a->unit16[i / (size_t)a->stride];
        far_off += !(fabsf(a->x[i] - unit * a->q16[i]) <= 0.505f * unit);
    }
    CHECK(far_off == 0);
    CHECK(coarse == 0);
}

static void free_acts(Activations *a) {
    free(a->x), free(a->q), free(a->q16), free(a->unit), free(a->scale), free(a->sum),
        free(a->shift), free(a->unit16);
}

static void test_matmul(WType type, int rows, int cols, int n, bool offset) {
    const Kernels *ref = &kernels_scalar;
    bool ints = type == W_Q8 || type == W_Q4, wide = type == W_Q8 && kern.wide;
    float *dense = malloc((size_t)(rows + 15) / 16 * 16 * (size_t)(cols + 32) * 4);
    Matrix w = random_matrix(type, rows, cols, offset, dense);
    Activations x = random_acts(n, cols), y = random_acts(n, cols);
    memcpy(y.x, x.x, (size_t)n * x.stride * 4);
    size_t ld = (size_t)w.panels * 16;
    float *out = calloc(ld * n, 4), *slow = calloc(ld * n, 4), *one = calloc(ld * n, 4);
    kern.quantize(&x, 0, n), ref->quantize(&y, 0, n);
    CHECK(memcmp(x.q, y.q, (size_t)n * x.stride) == 0);
    CHECK(memcmp(x.shift, y.shift, (size_t)n * x.stride / 32 * sizeof *x.shift) == 0);
    CHECK(memcmp(x.scale, y.scale, (size_t)n * x.stride / 32 * sizeof *x.scale) == 0);
    CHECK(memcmp(x.sum, y.sum, (size_t)n * x.stride / 32 * sizeof *x.sum) == 0);
    CHECK(memcmp(x.unit, y.unit, (size_t)n * sizeof *x.unit) == 0);
    if (kern.wide) {
        CHECK(memcmp(x.q16, y.q16, (size_t)n * x.stride * sizeof *x.q16) == 0);
        CHECK(memcmp(x.unit16, y.unit16, (size_t)n * sizeof *x.unit16) == 0);
    }
    check_rounding(&x, n);
    for (int p = 0; p < w.panels; p++) {
        PanelProduct job = {out + p * 16, ld, &w, p, &x, 0, n};
        kern.matmul[type](&job);
        job.out = slow + p * 16, job.x = &y;
        (wide ? matmul_wide_scalar : ref->matmul[type])(&job);
        job.out = one + p * 16, job.x = &x;
        for (int t = 0; t < n; t++) {
            job.t0 = t, job.t1 = t + 1;
            kern.matmul[type](&job);
        }
    }
    CHECK(memcmp(out, one, ld * n * 4) == 0);  // a batch gives the bits of one token at a time
    for (int p = 0; p + 2 <= w.panels && kern.matmul_pair[type]; p += 2) {
        for (int t = 0; t < n; t++) memset(out + t * ld + p * 16, 0, 32 * sizeof *out);
        kern.matmul_pair[type](&(PanelProduct){out + p * 16, ld, &w, p, &x, 0, n});
    }
    CHECK(memcmp(out, one, ld * n * 4) == 0);
    int wrong = 0;
    for (int t = 0; t < n; t++) {
        for (size_t r = 0; r < ld; r++) {
            double sum = 0, size = 0;
            for (int c = 0; c < cols; c++) {
                size_t at = (size_t)t * x.stride + c;
                double v = (double)dense[r * w.cols_padded + c] *
                           (wide   ? y.q16[at] * y.unit16[t]
                            : ints ? y.q[at] * y.scale[at / 32] * y.unit[t]
                                   : x.x[at]);
                sum += v, size += fabs(v);
            }
            wrong += !(fabs(out[t * ld + r] - sum) <= 1e-6 * size + 1e-6);
            wrong += !(fabs(slow[t * ld + r] - sum) <= 1e-6 * size + 1e-6);
        }
    }
    CHECK(wrong == 0);
    free(dense), free((void *)w.data), free((void *)w.scale), free((void *)w.offset);
    free_acts(&x), free_acts(&y);
    free(out), free(slow), free(one);
}

// Products of tiles are those of both factors rounded to bf16; a row has the same bits in any
// company, one panel those of two, and what pads the last panel is not written.
static void test_tiles(WType type, int rows, int cols, int n, bool offset) {
    enum { PAST = 7 };
    float *dense = malloc((size_t)(rows + 15) / 16 * 16 * (size_t)(cols + 32) * 4);
    Matrix w = random_matrix(type, rows, cols, offset, dense);
    Activations x = random_acts(n, cols);
    size_t ld = (size_t)rows + PAST;
    float *out = calloc(ld * n, 4), *one = calloc(ld * n, 4);
    kern.round_tiles(&x, 0, n);
    for (int p = 0; p < w.panels; p += 2) {
        kern.matmul_tiles[type](&(PanelProduct){out + p * 16, ld, &w, p, &x, 0, n},
                                w.panels - p < 2 ? 1 : 2);
    }
    for (int p = 0; p < w.panels; p++) {
        for (int t = 0, step = 1; t < n; t += step, step = n - t < 3 ? n - t : 3)
            kern.matmul_tiles[type](&(PanelProduct){one + p * 16, ld, &w, p, &x, t, t + step}, 1);
    }
    CHECK(memcmp(out, one, ld * n * 4) == 0);
    int wrong = 0;
    for (int t = 0; t < n; t++) {
        for (int r = 0; r < rows; r++) {
            double sum = 0, size = 0;
            for (int c = 0; c < cols; c++) {
                double v = (double)bf16_f32(f32_bf16(dense[(size_t)r * w.cols_padded + c])) *
                           bf16_f32(f32_bf16(x.x[(size_t)t * x.stride + c]));
                sum += v, size += fabs(v);
            }
            wrong += !(fabs(out[t * ld + r] - sum) <= 1e-6 * size + 1e-6);
        }
        for (int r = rows; r < rows + PAST; r++) wrong += out[t * ld + r] != 0.0f;
    }
    CHECK(wrong == 0);
    free(dense), free((void *)w.data), free((void *)w.scale), free((void *)w.offset);
    free_acts(&x), free(out), free(one);
}

static void test_all_tiles(void) {
    const int cols[] = {1, 2, 31, 32, 33, 48, 255, 512, 513, 544, 1100},
              tokens[] = {1, 2, 15, 16, 17, 31, 32, 33, 50, 90};
    for (int type = W_F32; type < W_TYPES && kern.round_tiles; type++) {
        if (!kern.matmul_tiles[type]) continue;
        for (size_t i = 0; i < sizeof cols / sizeof *cols; i++)
            for (int offset = 0; offset < (type == W_Q4 ? 2 : 1); offset++)
                test_tiles((WType)type, 21 + 16 * (i % 3), cols[i], 5, offset);
        for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++)
            test_tiles((WType)type, 48, 96, tokens[i], false);
    }
}

static void test_matmuls(void) {
    const int cols[] = {1, 2, 31, 32, 33, 48, 96, 255, 256, 257, 544},
              tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 13, 29, 29};  // q4: every other one with offsets
    for (int type = 0; type < W_TYPES; type++) {
        for (size_t i = 0; i < sizeof cols / sizeof *cols; i++) {
            test_matmul((WType)type, 16, cols[i], 3, false);
            if (type == W_Q4) test_matmul(W_Q4, 35, cols[i], 5, true);
        }
        for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++)
            test_matmul((WType)type, 40, 288, tokens[i], type == W_Q4 && i % 2);
    }
}

#ifdef BLAS
// Groups of panels with a short one at the end, whose padded rows must not be written.
static void test_blas(WType type, int rows, int cols, int n) {
    float *dense = malloc((size_t)(rows + 15) / 16 * 16 * (size_t)(cols + 32) * 4);
    Matrix w = random_matrix(type, rows, cols, false, dense);
    Activations x = random_acts(n, cols);
    float *out = calloc((size_t)n * rows, 4);
    for (int p = 0; p < w.panels; p += BLAS_PANELS)
        matmul_blas(&(PanelProduct){out + p * PANEL, (size_t)rows, &w, p, &x, 0, n});
    int wrong = 0;
    for (int i = 0; i < n * rows; i++) {
        double sum = 0, size = 0;
        for (int c = 0; c < cols; c++) {
            double v = (double)dense[(size_t)(i % rows) * w.cols_padded + c] *
                       x.x[(size_t)(i / rows) * x.stride + c];
            sum += v, size += fabs(v);
        }
        wrong += !(fabs(out[i] - sum) <= 1e-6 * size + 1e-6);
    }
    CHECK(wrong == 0);
    free(dense), free((void *)w.data), free_acts(&x), free(out);
}

static void test_blases(void) {
    const int cols[] = {1, 33, 256, 544};
    for (int type = W_F32; type <= W_BF16; type++) {
        for (size_t i = 0; i < sizeof cols / sizeof *cols; i++)
            test_blas((WType)type, 16 * BLAS_PANELS + 3, cols[i], 37);
        test_blas((WType)type, 40, 288, 1);
    }
}
#else
static void test_blases(void) {}
#endif

// ---- recurrence ----

// Its definition in double precision, token by token: S [k_dim][v_dim].
static void delta_exactly(const DeltaRule *d, double *s, double *out) {
    for (int t = 0; t < d->n; t++) {
        const float *q = d->q + t * d->ld, *k = d->k + t * d->ld, *v = d->v + t * d->ld;
        for (int j = 0; j < d->v_dim; j++) {
            double at_k = 0, at_q = 0;
            for (int i = 0; i < d->k_dim; i++)
                at_k += k[i] * (s[i * d->v_dim + j] *= d->decay[t * d->ld_gate]);
            for (int i = 0; i < d->k_dim; i++) {
                s[i * d->v_dim + j] += k[i] * d->beta[t * d->ld_gate] * (v[j] - at_k);
                at_q += q[i] * s[i * d->v_dim + j];
            }
            out[t * d->v_dim + j] = at_q;
        }
    }
}

// Against that, with the bits of scalar.c, in one call and cut in two.
static void test_delta(int k_dim, int v_dim) {
    enum { N = 37, LD = 400, GATE = 3 };
    static float x[N * LD], gates[2][N * GATE], out[3][N * LD];
    static float s[3][128 * 128];
    static double exact_s[128 * 128], exact[N * 128];
    for (int i = 0; i < N * LD; i++) x[i] = rnd() / sqrtf((float)k_dim);
    for (int i = 0; i < N * GATE; i++)
        gates[0][i] = 0.9f + 0.1f * rnd(), gates[1][i] = 0.5f + 0.5f * rnd();
    memset(s, 0, sizeof s), memset(exact_s, 0, sizeof exact_s);
    DeltaRule d = {.s = s[0],
                   .n = N,
                   .k_dim = k_dim,
                   .v_dim = v_dim,
                   .q = x,
                   .k = x + 128,
                   .v = x + 256,
                   .decay = gates[0],
                   .beta = gates[1],
                   .out = out[0],
                   .ld = LD,
                   .ld_gate = GATE,
                   .ld_out = LD};
    delta_exactly(&d, exact_s, exact);
    kern.delta_rule(&d);
    d.s = s[1], d.out = out[1];
    kernels_scalar.delta_rule(&d);
    CHECK(memcmp(out[0], out[1], sizeof out[0]) == 0 && memcmp(s[0], s[1], sizeof s[0]) == 0);
    d.s = s[2], d.out = out[2], d.n = 5;
    kern.delta_rule(&d);
    d.q += 5 * LD, d.k += 5 * LD, d.v += 5 * LD, d.out += 5 * LD, d.decay += 5 * GATE,
        d.beta += 5 * GATE, d.n = N - 5;
    kern.delta_rule(&d);
    CHECK(memcmp(out[0], out[2], sizeof out[0]) == 0 && memcmp(s[0], s[2], sizeof s[0]) == 0);
    double worst = 0;
    for (int t = 0; t < N; t++)
        for (int j = 0; j < v_dim; j++)
            worst = fmax(worst, fabs(out[0][t * LD + j] - exact[t * v_dim + j]));
    CHECK_NEAR(worst, 0, 1e-5);
}

static void test_deltas(void) {
    static const int dims[] = {4, 8, 16, 20, 24, 64, 128};
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
        test_delta(dims[i], 128), test_delta(dims[i], dims[6 - i] - 1), test_delta(128, dims[i]);
}

static void test_peaks(void) {
    for (int type = 0; type < W_TYPES; type++)
        CHECK(kern.peak[type]->ops > 0 && isfinite(kern.peak[type]->run(1000)));
    CHECK(kern.peak_packed->ops > 0 && isfinite(kern.peak_packed->run(1000)));
}

// ---- threads ----

static void count(void *ctx, int i) { ((int *)ctx)[i]++; }

static void test_threads(void) {
    static int hits[1000];
    for (int threads = 1; threads <= 4; threads++) {
        ThreadPool *p = pool_open(threads);
        if (!CHECK(p != NULL)) return;
        CHECK(pool_threads(p) == threads);
        for (int job = 0; job < 2000; job++) parallel_for(p, job % 1000, count, hits);
        pool_close(p);
    }
    parallel_for(NULL, 1000, count, hits);
    int wrong = 0;
    for (int i = 0; i < 1000; i++) wrong += hits[i] != 4 * 2 * (999 - i) + 1;
    CHECK(wrong == 0);
}

// What choose.c finds by asking the processor is what the compiler's library finds, where that
// works.
static void check_found(void) {
#if defined __x86_64__ && defined __GLIBC__
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512vnni");
    CHECK((kernels_init("avx2") == 0) == avx2);
    CHECK((kernels_init("avx512") == 0) == avx512);
#endif
}

// A set is what its name says, with bf16 or without; the best one is the same whenever it is asked
// for, though instructions are timed to find it.
static void check_best(void) {
    char best[32];
    CHECK(kernels_init(NULL) == 0);
    snprintf(best, sizeof best, "%s", kern.name);
    for (int i = 0; i < 20; i++) CHECK(kernels_init(NULL) == 0 && strcmp(kern.name, best) == 0);
    if (kernels_init("avx512") == 0) CHECK(kern.packed_error == 0.0f);
    if (kernels_init("avx512bf16") == 0) CHECK(kern.packed_error > 0.0f);
    CHECK(kernels_init(best) == 0 && strcmp(kern.name, best) == 0);
}

int main(void) {
    static const char *const isas[] = {"scalar",     "avx2", "avx2vnni", "avx512",
                                       "avx512bf16", "amx",  "neon",     "amx-emulated"};
    CHECK(kernels_init("mmx") == -1);
    check_found();
    check_best();
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        // AMX in plain C takes long under valgrind and qemu, and runs without them.
        if (getenv("QUICK") && strcmp(isas[i], "amx-emulated") == 0) continue;
        if (kernels_init(isas[i]) != 0) continue;
        printf("test_kernels: %s\n", isas[i]);
        test_half();
        test_vectors();
        test_exp(), test_max_rows(), test_exp_packed(), test_halves();
        test_gemm();
        test_gemm_batch();
        test_all_codes();
        test_pack();
        test_matmuls();
        test_all_tiles();
        test_deltas();
        test_peaks();
        test_blases();
    }
    test_threads();
    pool_close(NULL);
    return test_end("test_kernels");
}
