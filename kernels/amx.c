// amx.c: AVX-512 with AMX: Intel's servers from Sapphire Rapids (2023) on.
//
// One instruction multiplies 16 tokens by 16 rows of weights over 32 columns of bf16, in a clock
// four times as many as vpdpbusd. Weights of 16, 8 and 4 bits become bf16 a block at a time, in the
// first-level cache, for all tokens of a call: their scales are in them, so that nothing but tiles
// is left inside. Unpacking has to pay, so only the rows of long runs (Activations.tiled) are
// multiplied like this, and their pages; all else is that of AVX-512. What must stay true: a sum
// runs over blocks of 32 columns in order, whatever the rows beside it.
//
//   tiles    0 1      tokens 0 to 15 times panels 0 and 1        4   tokens 0 to 15      6 7 panels
//            2 3      tokens 16 to 31                            5   tokens 16 to 31
//
// Where the instructions are missing those of tiles.h stand in for them (amx-emulated), in plain C
// and very slowly: every machine tests what only some run.
#include "kernels/matmul.h"
#include "kernels/simd.h"
#include "kernels/tiles.h"
#include "kernels/x86.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    STEP = 32,         // columns of a tile
    TILE_BLOCK = 512,  // columns of weights unpacked at a time: 16 KB a panel
};

// ---- tiles ----

// Each of these is an instruction, or its definition where there are tiles e in memory. Assembly,
// because the headers of gcc 12 do not say how much memory the instructions read: it may drop the
// stores to a configuration that is loaded next.
#if defined __x86_64__ && (defined __clang__ ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define TILE_OF(n, CASE) \
    switch (n) {         \
        CASE(0)          \
        CASE(1)          \
        CASE(2)          \
        CASE(3)          \
        CASE(4)          \
        CASE(5)          \
        CASE(6)          \
        CASE(7)          \
    }
#define ZERO(n)                                      \
    case n:                                          \
        __asm__ volatile("tilezero %%tmm" #n : : :); \
        break;
#define LOAD(n)                                                                                  \
    case n:                                                                                      \
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #n : : "r"(from), "r"(stride) : "memory"); \
        break;
#define STORE(n)                                                                                   \
    case n:                                                                                        \
        __asm__ volatile("tilestored %%tmm" #n ", (%0,%1,1)" : : "r"(to), "r"(stride) : "memory"); \
        break;
#define DOT(c, a, b) __asm__ volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #c)
#define CONFIGURE(c) __asm__ volatile("ldtilecfg %0" : : "m"(*(c)) : "memory")
#define RELEASE() __asm__ volatile("tilerelease")
#else  // never reached: choose.c asks KNOWS_VEX
#define TILE_OF(n, CASE) (void)n
#define DOT(c, a, b) (void)0
#define CONFIGURE(c) (void)c
#define RELEASE() (void)0
#endif

INLINE void zero(Tiles *e, const int n) {
    if (e)
        tiles_zero(e, n);
    else
        TILE_OF(n, ZERO);
}

INLINE void load(Tiles *e, const int n, const void *from, size_t stride) {
    if (e)
        tiles_load(e, n, from, stride);
    else
        TILE_OF(n, LOAD);
}

INLINE void store(Tiles *e, const int n, void *to, size_t stride) {
    if (e)
        tiles_store(e, n, to, stride);
    else
        TILE_OF(n, STORE);
}

// Tile 2 t + p += tile 4 + t times tile 6 + p.
INLINE void dot(Tiles *e, const int t, const int p) {
    if (e)
        tiles_dot(e, 2 * t + p, 4 + t, 6 + p);
    else if (t == 0 && p == 0)
        DOT(0, 4, 6);
    else if (t == 0)
        DOT(1, 4, 7);
    else if (p == 0)
        DOT(2, 5, 6);
    else
        DOT(3, 5, 7);
}

// Tiles for `rows` tokens; of the last of P panels only `last` rows of weights.
INLINE void configure(Tiles *e, int rows, const int P, int last) {
    TileConfig c = {.palette = 1};
    for (int n = 0; n < TILES; n++) {
        bool tokens = n < 6, cut = n != 4 && n != 5 && n % 2 == P - 1;
        c.rows[n] = (uint8_t)(tokens ? rows : TILE_HEIGHT);
        c.bytes[n] = (uint16_t)(cut ? 4 * last : TILE_WIDTH);
    }
    if (e)
        tiles_configure(e, &c);
    else
        CONFIGURE(&c);
}

INLINE void release(Tiles *e) {
    if (e)
        tiles_release(e);
    else
        RELEASE();
}

// ---- products of tiles ----

// c [n][16 or 32] (+)= a [n][inner] b [inner][16 or 32]. Strides of a and b are in bytes.
typedef struct {
    const uint8_t *a;
    size_t lda;
    // [steps][16][..][2][2]: the tiles of two panels, whose rows lie ldb apart and which follow
    // each other, along inner, a step on.
    const uint8_t *b[2];
    size_t ldb, step;
    int steps;  // of 32 along inner
    float *c;
    size_t ldc;
    bool add;
} TileProduct;

// T times 16 rows of c from row i on, by P panels, stay in tiles while all of inner passes.
INLINE void tile_block(Tiles *e, const TileProduct *p, int i, const int T, const int P) {
    float *c = p->c + (size_t)i * p->ldc;
    const uint8_t *a = p->a + (size_t)i * p->lda;
    const size_t ldc = p->ldc * sizeof *c;
    UNROLL for (int t = 0; t < T; t++) {
        UNROLL for (int v = 0; v < P; v++) {
            if (p->add)
                load(e, 2 * t + v, c + (size_t)t * TILE_HEIGHT * p->ldc + v * PANEL, ldc);
            else
                zero(e, 2 * t + v);
        }
    }
    for (int k = 0; k < p->steps; k++, a += TILE_WIDTH) {
        UNROLL for (int t = 0; t < T; t++) load(e, 4 + t, a + t * TILE_HEIGHT * p->lda, p->lda);
        UNROLL for (int v = 0; v < P; v++) load(e, 6 + v, p->b[v] + k * p->step, p->ldb);
        UNROLL for (int t = 0; t < T; t++) { UNROLL for (int v = 0; v < P; v++) dot(e, t, v); }
    }
    UNROLL for (int t = 0; t < T; t++) {
        UNROLL for (int v = 0; v < P; v++)
            store(e, 2 * t + v, c + (size_t)t * TILE_HEIGHT * p->ldc + v * PANEL, ldc);
    }
}

// Rows i to n; fewer than 16 are what the tiles are configured for.
INLINE void tile_rows(Tiles *e, const TileProduct *p, int i, int n, const int P) {
    for (; i + 2 * TILE_HEIGHT <= n; i += 2 * TILE_HEIGHT) tile_block(e, p, i, 2, P);
    for (; i < n; i += TILE_HEIGHT) tile_block(e, p, i, 1, P);
}

// ---- weights ----

// A block of a panel, columns c0 to c0 + cols, as tiles of bf16: [cols/32][16][16 rows][2], with
// zeros where the last one is not full.
typedef void Unpack(uint16_t *to, const Matrix *w, int panel, int c0, int cols);

// P panels times the tokens, a block of columns at a time. Rows that pad the last panel are not
// written.
INLINE void multiply(Tiles *e, const PanelProduct *p, Unpack *unpack, const int P) {
    const Matrix *w = p->w;
    const Activations *x = p->x;
    int n = p->t1 - p->t0, whole = n - n % TILE_HEIGHT;
    int last = min_int(PANEL, w->rows - (p->panel + P - 1) * PANEL);
    _Alignas(64) uint16_t b[2][TILE_BLOCK * PANEL];
    for (int c0 = 0; c0 < w->cols_padded; c0 += TILE_BLOCK) {
        int cols = min_int(TILE_BLOCK, w->cols_padded - c0);
        for (int v = 0; v < P; v++) unpack(b[v], w, p->panel + v, c0, cols);
        const TileProduct t = {.a = (const void *)(x->bf16 + (size_t)p->t0 * x->stride + c0),
                               .lda = x->stride * sizeof *x->bf16,
                               .b = {(const void *)b[0], (const void *)b[1]},
                               .ldb = TILE_WIDTH,
                               .step = TILE_HEIGHT * TILE_WIDTH,
                               .steps = (cols + STEP - 1) / STEP,
                               .c = p->out + p->t0 * p->ld,
                               .ldc = p->ld,
                               .add = c0 > 0};
        if (whole > 0) {
            configure(e, TILE_HEIGHT, P, last);
            tile_rows(e, &t, 0, whole, P);
        }
        if (whole < n) {
            configure(e, n - whole, P, last);
            tile_rows(e, &t, whole, n, P);
        }
    }
    release(e);
}

INLINE void multiply_panels(Tiles *e, const PanelProduct *p, Unpack *unpack, int panels) {
    if (panels == 2)
        multiply(e, p, unpack, 2);
    else
        multiply(e, p, unpack, 1);
}

static void unpack_plain(uint16_t *to, const Matrix *w, int panel, int c0, int cols) {
    for (int c = 0; c < (cols + STEP - 1) / STEP * STEP; c++) {
        for (int r = 0; r < PANEL; r++)
            to[(c / 2 * PANEL + r) * 2 + c % 2] =
                c < cols ? f32_bf16(matrix_at(w, panel * PANEL + r, c0 + c)) : 0;
    }
}

static void round_plain(const Activations *x, int t0, int t1) {
    for (size_t i = (size_t)t0 * x->stride; i < (size_t)t1 * x->stride; i++)
        x->bf16[i] = f32_bf16(x->x[i]);
}

static void matmul_plain(const PanelProduct *p, int panels) {
    Tiles e;
    multiply_panels(&e, p, unpack_plain, panels);
}

static void set_products(Kernels *k, void (*product)(const PanelProduct *p, int panels)) {
    k->matmul_tiles[W_F16] = k->matmul_tiles[W_BF16] = product;
    k->matmul_tiles[W_Q8] = k->matmul_tiles[W_Q4] = product;
}

#ifndef __x86_64__
void adapt_amx_emulated(Kernels *k, const Features *f) {
    (void)f;
    set_products(k, matmul_plain);
    k->round_tiles = round_plain;
}
#else

// ---- weights, by AVX-512 ----

// Two columns of 16 rows.
BF16_INLINE void store_pairs(uint16_t *to, __m512 even, __m512 odd) {
    _mm512_storeu_si512(to, alternate((__m512i)_mm512_cvtne2ps_pbh(odd, even)));
}

BF16_INLINE __m512 load_halves(const uint16_t *h) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)h));
}

// A line of four columns, byte by byte, times its rows' scales.
BF16_INLINE void unpack_q8(uint16_t *to, const uint8_t *line, __m512 scale) {
    __m512i v = _mm512_loadu_si512(line);
    __m512 c[4];
    UNROLL for (int i = 0; i < 4; i++) {
        __m512i byte = _mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * i), 24);
        c[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(byte), scale);
    }
    store_pairs(to, c[0], c[1]), store_pairs(to + 2 * PANEL, c[2], c[3]);
}

// A line of eight columns; value holds the sixteen nibbles' numbers.
BF16_INLINE void unpack_q4(uint16_t *to, const uint8_t *line, __m512 value, __m512 scale,
                           __m512 offset) {
    __m512i v = _mm512_loadu_si512(line);
    __m512 c[8];
    UNROLL for (int i = 0; i < 8; i++) {
        __m512i nibble = _mm512_srli_epi32(v, 8 * (i % 4) + i / 4 * 4);  // only 4 bits count
        c[i] = _mm512_fmadd_ps(_mm512_permutexvar_ps(nibble, value), scale, offset);
    }
    UNROLL for (int i = 0; i < 8; i += 2) store_pairs(to + i * PANEL, c[i], c[i + 1]);
}

BF16 static void unpack_ints(uint16_t *to, const Matrix *w, int panel, int c0, int cols) {
    const int bytes = w->type == W_Q4 ? QGROUP * PANEL / 2 : QGROUP * PANEL;  // of a group
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 value =
        _mm512_cvtepi32_ps(_mm512_sub_epi32(count, _mm512_set1_epi32(w->offset ? 0 : 8)));
    size_t group = ((size_t)panel * w->cols_padded + c0) / QGROUP;
    for (size_t end = group + (size_t)cols / QGROUP; group < end; group++) {
        const uint8_t *line = w->data + group * bytes;
        __m512 scale = load_halves(w->scale + group * PANEL);
        __m512 offset = w->offset ? load_halves(w->offset + group * PANEL) : _mm512_setzero_ps();
        for (int c = 0; c < QGROUP; c += w->type == W_Q4 ? 8 : 4, line += 64) {
            if (w->type == W_Q4)
                unpack_q4(to + c * PANEL, line, value, scale, offset);
            else
                unpack_q8(to + c * PANEL, line, scale);
        }
        to += QGROUP * PANEL;
    }
}

// 16 bits: bf16 is there as tiles take it.
BF16 static void unpack_halves_bf16(uint16_t *to, const Matrix *w, int panel, int c0, int cols) {
    const uint16_t *in = (const uint16_t *)w->data + ((size_t)panel * w->cols_padded + c0) * PANEL;
    int c = 0, all = (cols + STEP - 1) / STEP * STEP;
    for (; c < cols; c += 2) {
        __m512i v = _mm512_loadu_si512(in + c * PANEL);
        if (w->type == W_BF16)
            _mm512_storeu_si512(to + c * PANEL, v);
        else
            store_pairs(to + c * PANEL, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)),
                        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16))));
    }
    memset(to + c * PANEL, 0, (size_t)(all - c) * PANEL * sizeof *to);
}

static void unpack_block(uint16_t *to, const Matrix *w, int panel, int c0, int cols) {
    (wtype_ints(w->type) ? unpack_ints : unpack_halves_bf16)(to, w, panel, c0, cols);
}

BF16 static void round_rows(const Activations *x, int t0, int t1) {
    for (size_t i = (size_t)t0 * x->stride; i < (size_t)t1 * x->stride; i += STEP) {
        __m512 lo = _mm512_loadu_ps(x->x + i), hi = _mm512_loadu_ps(x->x + i + 16);
        _mm512_storeu_si512(x->bf16 + i, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
    }
}

static void matmul_real(const PanelProduct *p, int panels) {
    multiply_panels(NULL, p, unpack_block, panels);
}

BF16 static void matmul_emulated(const PanelProduct *p, int panels) {
    Tiles e;
    multiply_panels(&e, p, unpack_block, panels);
}

// ---- attention ----

// Pages packed by pack_bf16 (avx512.c) are tiles already, whose rows are as long as b's.
INLINE void gemm_tiles(Tiles *e, const Gemm *g) {
    const uint8_t *b = g->b;
    TileProduct t = {.a = g->a,
                     .lda = (size_t)g->inner * 2,
                     .ldb = (size_t)g->cols * 4,
                     .step = (size_t)g->cols * 4 * TILE_HEIGHT,
                     .steps = g->inner / STEP,
                     .ldc = g->ldc,
                     .add = g->add};
    for (int i = 0, whole = g->n - g->n % TILE_HEIGHT; i < g->n; i = i < whole ? whole : g->n) {
        int end = i < whole ? whole : g->n, j = 0;
        configure(e, min_int(end - i, TILE_HEIGHT), 2, PANEL);
        for (; j < g->cols; j += 2 * PANEL) {
            t.b[0] = b + j * 4, t.b[1] = b + (j + PANEL) * 4, t.c = g->c + j;
            if (j + 2 * PANEL <= g->cols)
                tile_rows(e, &t, i, end, 2);
            else
                tile_rows(e, &t, i, end, 1);
        }
    }
    release(e);
}

static bool fits_tiles(const Gemm *g) {
    return g->inner % STEP == 0 && g->cols % PANEL == 0 && g->inner <= 256;
}

static void gemm_packed_real(const Gemm *g) {
    if (fits_tiles(g))
        gemm_tiles(NULL, g);
    else
        gemm_packed_bf16(g);
}

BF16 static void gemm_packed_emulated(const Gemm *g) {
    Tiles e;
    if (fits_tiles(g))
        gemm_tiles(&e, g);
    else
        gemm_packed_bf16(g);
}

// ---- trust ----

// Rows, columns and inner length that take whole tiles and parts of them.
enum { TRY_ROWS = 37, TRY_INNER = 64, TRY_COLS = 48 };

bool amx_multiplies(void) {
    static uint16_t a[TRY_ROWS * TRY_INNER], b[TRY_INNER * TRY_COLS];
    static float c[TRY_ROWS * TRY_COLS];
    bool right = true;
    for (int i = 0; i < TRY_ROWS * TRY_INNER; i++) a[i] = f32_bf16((float)(i * 7 % 31 - 15));
    for (int i = 0; i < TRY_INNER * TRY_COLS; i++) b[i] = f32_bf16((float)(i * 5 % 29 - 14));
    gemm_tiles(NULL, &(Gemm){.c = c,
                             .ldc = TRY_COLS,
                             .a = a,
                             .lda = TRY_INNER,
                             .b = b,
                             .n = TRY_ROWS,
                             .inner = TRY_INNER,
                             .cols = TRY_COLS});
    for (int i = 0; i < TRY_ROWS * TRY_COLS; i++) {
        const uint16_t *x = a + i / TRY_COLS * TRY_INNER, *y = b + i % TRY_COLS * 2;
        float sum = 0;
        for (int k = 0; k < TRY_INNER; k++)
            sum += bf16_f32(x[k]) * bf16_f32(y[k / 2 * TRY_COLS * 2 + k % 2]);
        right = right && c[i] == sum;
    }
    return right;
}

// ---- peaks ----

static float peak_tiles(int rounds) {
    float c[TILE_HEIGHT * PANEL];
    configure(NULL, TILE_HEIGHT, 2, PANEL);
    for (int n = 0; n < TILES; n++) zero(NULL, n);
    for (int i = 0; i < rounds; i++)
        dot(NULL, 0, 0), dot(NULL, 0, 1), dot(NULL, 1, 0), dot(NULL, 1, 1);
    store(NULL, 3, c, PANEL * sizeof *c);
    release(NULL);
    return c[0];
}

static const Peak tile_peak = {4 * 2 * TILE_HEIGHT * PANEL * STEP, peak_tiles};

// ---- the table ----

// Few rows read pages as f32: vdpbf16ps takes four times as long as a product of f32 here.
static void adapt_bf16(Kernels *k, const Features *f) {
    adapt_avx512(k, f);
    void (*gemm_f16)(const Gemm *) = k->gemm_f16;
    adapt_avx512bf16(k, f);
    k->gemm_f16 = gemm_f16, k->halves_packed = false;
    k->round_tiles = round_rows;
}

void adapt_amx(Kernels *k, const Features *f) {
    adapt_bf16(k, f);
    set_products(k, matmul_real);
    k->gemm_packed = gemm_packed_real;
    k->peak_packed = &tile_peak;
    for (int type = W_F16; type < W_TYPES; type++) k->peak[type] = &tile_peak;
}

void adapt_amx_emulated(Kernels *k, const Features *f) {
    if (!f->avx2 || !f->avx512bf16) {
        set_products(k, matmul_plain);
        k->round_tiles = round_plain;
        return;
    }
    *k = kernels_avx2;
    adapt_bf16(k, f);
    set_products(k, matmul_emulated);
    k->gemm_packed = gemm_packed_emulated;
}
#endif
