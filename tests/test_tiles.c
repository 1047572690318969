// Tiles: their definition in plain C (kernels/tiles.h), and the machine code of kernels/amx.c,
// which gives the same bits. Where the processor does not know the instructions, a handler of its
// refusal decodes and carries them out, so that what the compiler and the assembler made of them is
// tested on every machine with AVX-512: registers, strides, and whether a configuration was written
// before it is loaded.
#ifdef __linux__
#define _GNU_SOURCE  // REG_RIP
#endif
#include "kernels/tiles.h"
#include "kernels/simd.h"
#include "test.h"

static uint32_t seed = 1;

static float rnd(void) {  // uniform in [-1, 1)
    seed = seed * 1664525u + 1013904223u;
    return (float)(int32_t)seed / 2147483648.0f;
}

// ---- the definition ----

// bf16 numbers of a tile [rows][width]; f32 of c.
typedef struct {
    uint16_t a[16][32], b[16][32];  // b [k][n][2]
    float c[16][16];
} Numbers;

static Tiles tiles;

// c += a b by tiles 0, 1 and 2 of m, n and k.
static void product(Numbers *x, int m, int n, int k) {
    TileConfig c = {.palette = 1};
    for (int i = 0; i < 3; i++) {
        c.rows[i] = (uint8_t)(i < 2 ? m : k);
        c.bytes[i] = (uint16_t)(4 * (i == 1 ? k : n));
    }
    tiles_configure(&tiles, &c);
    tiles_load(&tiles, 0, x->c, sizeof x->c[0]);
    tiles_load(&tiles, 1, x->a, sizeof x->a[0]);
    tiles_load(&tiles, 2, x->b, sizeof x->b[0]);
    tiles_dot(&tiles, 0, 1, 2);
    tiles_store(&tiles, 0, x->c, sizeof x->c[0]);
}

static void test_shapes(void) {
    int wrong = 0;
    for (int i = 0; i < 300; i++) {
        Numbers x, y;
        int m = 1 + i % 16, n = 1 + i / 3 % 16, k = 1 + i / 7 % 16;
        for (int r = 0; r < 16; r++) {
            for (int c = 0; c < 32; c++) x.a[r][c] = f32_bf16(rnd()), x.b[r][c] = f32_bf16(rnd());
            for (int c = 0; c < 16; c++) x.c[r][c] = rnd();
        }
        y = x;
        product(&y, m, n, k);
        for (int r = 0; r < 16; r++) {
            for (int c = 0; c < 16; c++) {
                double sum = x.c[r][c];
                for (int j = 0; j < 2 * k && r < m && c < n; j++)
                    sum += (double)bf16_f32(x.a[r][j]) * bf16_f32(x.b[j / 2][2 * c + j % 2]);
                wrong += !(fabs(y.c[r][c] - sum) < 4e-6);
                if (r >= m || c >= n) wrong += y.c[r][c] != x.c[r][c];
            }
        }
    }
    CHECK(wrong == 0);
}

// c += a0 b0 + a1 b1 of one pair after the other; what is left of c.
static float sum_of(float c, int pairs, const float *a, const float *b) {
    Numbers x = {0};
    x.c[0][0] = c;
    for (int i = 0; i < 2 * pairs; i++)
        x.a[0][i] = f32_bf16(a[i]), x.b[i / 2][i % 2] = f32_bf16(b[i]);
    product(&x, 1, 1, pairs);
    return x.c[0][0];
}

#define SUM(c, ...) sum_of(c, (int)(sizeof(float[]){__VA_ARGS__} / 8), (float[]){__VA_ARGS__}, ones)

static void test_numbers(void) {
    const float ones[] = {1, 1, 1, 1, 1, 1};
    // First and second numbers have sums of their own: 2^24 + 1 - 2^24 is 0 in one and 1 in two.
    CHECK(SUM(0, 0x1p24f, 0, 1, 0, -0x1p24f, 0) == 0);
    CHECK(SUM(0, 0x1p24f, 1, -0x1p24f, 0) == 1);
    CHECK(SUM(0x1p24f, 1, 1) == 0x1p24f + 2);  // their sum is added to c
    CHECK(SUM(0x1p24f, 1, 0) == 0x1p24f);      // ties to even
    // Each product is added before it is rounded: (1 + 2^-7)^2 has 15 bits.
    const float a[] = {0x1p10f, 0, 1 + 0x1p-7f, 0}, b[] = {0x1p4f, 0, 1 + 0x1p-7f, 0};
    CHECK(sum_of(0, 2, a, b) == (float)(0x1p14 + (1 + 0x1p-7) * (1 + 0x1p-7)));
    // What is below 2^-126 is 0, of factors, products and sums.
    CHECK(SUM(0x1p-127f, 0, 0) == 0);
    const float half[] = {0x1p-63f, 0}, least[] = {0x1p-64f, 0}, fits[] = {0x1p-63f, 0};
    CHECK(sum_of(0, 1, half, least) == 0);
    CHECK(sum_of(0, 1, half, fits) == 0x1p-126f);
    CHECK(isnan(SUM(0, NAN, 0)) && isinf(SUM(0, INFINITY, 1)));
    CHECK(isnan(SUM(0, INFINITY, -INFINITY)));
}

static void test_bf16(void) {
    CHECK(f32_bf16(1.0f) == 0x3f80 && f32_bf16(-2.0f) == 0xc000);
    CHECK(f32_bf16(1 + 0x1p-8f) == 0x3f80 && f32_bf16(1 + 3 * 0x1p-8f) == 0x3f82);  // ties to even
    CHECK(f32_bf16(1 + 0x1p-8f + 0x1p-20f) == 0x3f81);
    CHECK(f32_bf16(3.4e38f) == 0x7f80 && f32_bf16(-INFINITY) == 0xff80);
    CHECK(f32_bf16(-0x1p-127f) == 0x8000 && f32_bf16(0x1p-126f) == 0x0080);
    CHECK(isnan(bf16_f32(f32_bf16(NAN))) && isnan(bf16_f32(f32_bf16(bits_float(0x7f800001)))));
}

// ---- the machine code ----

#if defined __x86_64__ && defined __linux__
#include <signal.h>
#include <ucontext.h>

static int n_refused;

// An instruction as it is encoded: VEX in three bytes, opcode, ModRM, SIB, displacement (the manual
// of tiles.h, volume 2, chapter 2).
typedef struct {
    int prefix, map, opcode, mod, reg, rm, vvvv;  // reg, rm and vvvv name tiles
    int length;
    uint8_t *memory;
    size_t stride;
} Instruction;

static Instruction decode(const uint8_t *p, const greg_t *r) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};
    Instruction i = {.map = p[1] & 31,
                     .prefix = p[2] & 3,
                     .vvvv = ~p[2] >> 3 & 15,
                     .opcode = p[3],
                     .mod = p[4] >> 6,
                     .reg = p[4] >> 3 & 7,
                     .rm = p[4] & 7,
                     .length = 5};
    if (i.mod == 3) return i;
    int base = i.rm, far = ~p[1] & 0x20 ? 8 : 0;
    if (base == 4) {
        int sib = p[i.length++], index = (sib >> 3 & 7) + (~p[1] & 0x40 ? 8 : 0);
        base = sib & 7;
        if (index != 4) i.stride = (size_t)r[order[index]] << (sib >> 6);
    }
    bool no_base = i.mod == 0 && base == 5;
    int32_t wide = 0;
    if (i.mod == 1) wide = (int8_t)p[i.length++];
    if (i.mod == 2 || no_base) memcpy(&wide, p + i.length, 4), i.length += 4;
    size_t from = no_base ? (i.rm == 5 ? (size_t)p + i.length : 0) : (size_t)r[order[base + far]];
    i.memory = (uint8_t *)(from + (size_t)(intptr_t)wide);  // NOLINT
    return i;
}

enum { NONE = 0, X66 = 1, XF3 = 2, XF2 = 3, MAP_38 = 2 };

// Whether it was an instruction of tiles, which has been carried out.
static bool carry_out(const Instruction *i) {
    if (i->map != MAP_38) return false;
    if (i->opcode == 0x49 && i->prefix == NONE && i->mod != 3) {
        TileConfig c;
        memcpy(&c, i->memory, sizeof c);
        tiles_configure(&tiles, &c);
    } else if (i->opcode == 0x49 && i->prefix == NONE) {
        tiles_release(&tiles);
    } else if (i->opcode == 0x49 && i->prefix == XF2) {
        tiles_zero(&tiles, i->reg);
    } else if (i->opcode == 0x4b && i->prefix == XF2) {
        tiles_load(&tiles, i->reg, i->memory, i->stride);
    } else if (i->opcode == 0x4b && i->prefix == XF3) {
        tiles_store(&tiles, i->reg, i->memory, i->stride);
    } else if (i->opcode == 0x5c && i->prefix == XF3) {
        tiles_dot(&tiles, i->reg, i->rm, i->vvvv);
    } else {
        return false;
    }
    return true;
}

static void refused(int signal, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *p = (const uint8_t *)r[REG_RIP];  // NOLINT
    Instruction i = {0};
    if (p[0] == 0xc4) i = decode(p, r);
    (void)signal, (void)info;
    if (!carry_out(&i)) abort();
    n_refused++;
    r[REG_RIP] += i.length;
}

enum { ROWS = 48, COLS = 550, TOKENS = 50 };

// x and y [n], of size 30: bits that are carried out here are the definition's; what a processor
// does itself may round another way in its last digit.
static void check_same(const float *x, const float *y, size_t n) {
    bool same = memcmp(x, y, n * sizeof *x) == 0;
    if (n_refused > 0) CHECK(same);
    for (size_t i = 0; i < n && !same; i++) CHECK_NEAR(x[i], y[i], 1e-4);
    if (!same) printf("test_tiles: this processor rounds another way\n");
}

// Panels of random weights times random tokens.
static void check_products(const Kernels *real, WType type, int rows, int cols) {
    static uint8_t data[ROWS * (COLS + 32) * 2];
    static uint16_t scale[ROWS * (COLS + 32) / QGROUP], bf16[TOKENS * (COLS + 32)];
    static float out[2][TOKENS * ROWS];
    Matrix w = {.type = type, .rows = rows, .cols = cols, .panels = (rows + 15) / 16, .data = data};
    int unit = wtype_ints(type) ? QGROUP : 2;
    w.cols_padded = (cols + unit - 1) / unit * unit, w.scale = wtype_ints(type) ? scale : NULL;
    for (size_t i = 0; i < sizeof data / 2; i++) {
        uint16_t v = type == W_BF16 ? f32_bf16(rnd()) : f32_f16(rnd());
        memcpy(data + 2 * i, &v, sizeof v);
    }
    for (size_t i = 0; i < sizeof scale / 2; i++) scale[i] = f32_f16(rnd());
    for (size_t i = 0; i < sizeof bf16 / 2; i++) bf16[i] = f32_bf16(rnd());
    Activations x = {.cols = cols, .stride = (cols + 31) / 32 * 32, .bf16 = bf16};
    for (int n = 1; n <= TOKENS; n += 7) {
        memset(out, 0, sizeof out);
        for (int which = 0; which < 2; which++) {
            for (int p = 0; p < w.panels; p += 2) {
                const PanelProduct job = {out[which] + p * PANEL, (size_t)rows, &w, p, &x, 0, n};
                (which ? real : &kern)->matmul_tiles[type](&job, min_int(2, w.panels - p));
            }
        }
        check_same(out[0], out[1], TOKENS * ROWS);
    }
}

static void check_pages(const Kernels *real, int inner, int cols) {
    static uint16_t a[TOKENS * 256], b[256 * 256];
    static float c[2][TOKENS * 256];
    for (size_t i = 0; i < sizeof a / 2; i++) a[i] = f32_bf16(rnd());
    for (size_t i = 0; i < sizeof b / 2; i++) b[i] = f32_bf16(rnd());
    for (int n = 1; n <= TOKENS; n += 7) {
        for (size_t i = 0; i < sizeof c[0] / 4; i++) c[0][i] = c[1][i] = rnd();
        for (int which = 0; which < 2; which++) {
            Gemm g = {.c = c[which],
                      .ldc = 256,
                      .a = a,
                      .lda = (size_t)inner,
                      .b = b,
                      .n = n,
                      .inner = inner,
                      .cols = cols,
                      .add = n % 2,
                      .ahead = b};
            (which ? real : &kern)->gemm_packed(&g);
        }
        check_same(c[0], c[1], TOKENS * 256);
    }
}

static void test_machine_code(void) {
    const Features all = {.avx2 = true, .avx512vnni = true, .avx512bf16 = true, .amx = true};
    struct sigaction ours = {.sa_sigaction = refused, .sa_flags = SA_SIGINFO}, old;
    if (kernels_init("avx512bf16") != 0) {
        printf("test_tiles: no AVX-512 with BF16, so without the machine code\n");
        return;
    }
    Kernels real = kernels_avx2;
    adapt_amx(&real, &all);
    CHECK(kernels_init("amx-emulated") == 0);
    sigaction(SIGILL, &ours, &old);
    CHECK(amx_multiplies());
    for (int type = W_F16; type < W_TYPES; type++) {
        check_products(&real, (WType)type, ROWS, COLS);
        check_products(&real, (WType)type, ROWS - 11, 37);
    }
    check_pages(&real, 64, 64), check_pages(&real, 96, 80), check_pages(&real, 80, 64);
    CHECK(real.peak_packed->run(3) == 0.0f);
    sigaction(SIGILL, &old, NULL);
    printf("test_tiles: %d instructions carried out for the processor\n", n_refused);
}
#else
static void test_machine_code(void) {}
#endif

int main(void) {
    test_bf16();
    test_shapes();
    test_numbers();
    test_machine_code();
    return test_end("test_tiles");
}
