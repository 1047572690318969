// 5_vector.c: the products of a page with AVX2, eight columns at once, beside the scalar
// definition.
//
// Scores are a product [4 query heads][64 channels] . [64 channels][64 pairs], the weighted sum is
// one of [4][64 pairs] . [64 pairs][64 channels]: one function does both, because keys lie
// transposed. The results in a row of c are next to each other, so a vector of eight of them grows
// side by side, and no sum runs across the numbers of a vector.
#include "tutorial.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

enum { PAGE = 64, PAGES = 256, PAIRS = PAGES * PAGE, GROUP = 4, COLS = 64, ROUNDS = 5 };

typedef struct {
    float k[HEAD_DIM * PAGE];  // [HEAD_DIM][PAGE]
    float v[PAGE * HEAD_DIM];  // [PAGE][HEAD_DIM]
} Page;

// c += a b; c and a [GROUP][COLS], b [COLS][COLS]: here pages have as many pairs as channels.
typedef void Product(float *c, const float *a, const float *b);

static void product_scalar(float *c, const float *a, const float *b) {
    for (int r = 0; r < GROUP; r++) {
        for (int col = 0; col < COLS; col++) {
            float sum = c[r * COLS + col];
            for (int i = 0; i < COLS; i++) sum += a[r * COLS + i] * b[i * COLS + col];
            c[r * COLS + col] = sum;
        }
    }
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) static void product_avx2(float *c, const float *a,
                                                             const float *b) {
    for (int col = 0; col < COLS; col += 8) {
        __m256 sum[GROUP];
        for (int r = 0; r < GROUP; r++) sum[r] = _mm256_loadu_ps(c + r * COLS + col);
        for (int i = 0; i < COLS; i++) {
            __m256 row = _mm256_loadu_ps(b + i * COLS + col);
            for (int r = 0; r < GROUP; r++)
                sum[r] = _mm256_fmadd_ps(_mm256_set1_ps(a[r * COLS + i]), row, sum[r]);
        }
        for (int r = 0; r < GROUP; r++) _mm256_storeu_ps(c + r * COLS + col, sum[r]);
    }
}

// The best product that this machine has, chosen while the program runs; NULL if only the scalar.
static Product *product_vector(void) {
    bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return has ? product_avx2 : NULL;
}
#else
static Product *product_vector(void) { return NULL; }
#endif

static Page page[PAGES];
static float q[GROUP * HEAD_DIM], k[PAIRS * HEAD_DIM], v[PAIRS * HEAD_DIM];

// One row of scores becomes weights; sum and o [HEAD_DIM] shrink when the maximum rises (step 4).
static void weigh(float *s, float *max, float *sum, float *o) {
    float top = *max;
    for (int c = 0; c < PAGE; c++) top = fmaxf(top, s[c]);
    float shrink = expf(*max - top);
    *sum *= shrink;
    for (int i = 0; i < HEAD_DIM; i++) o[i] *= shrink;
    for (int c = 0; c < PAGE; c++) *sum += s[c] = expf(s[c] - top);
    *max = top;
}

// out [GROUP][HEAD_DIM] of all pages. Query rows are scaled once, before the first of them.
static void attend(float *out, Product *product) {
    float scaled[GROUP * HEAD_DIM], max[GROUP], sum[GROUP] = {0.0f};
    for (int i = 0; i < GROUP * HEAD_DIM; i++) scaled[i] = q[i] / sqrtf(HEAD_DIM);
    for (int r = 0; r < GROUP; r++) max[r] = -INFINITY;
    memset(out, 0, sizeof scaled);
    for (int p = 0; p < PAGES; p++) {
        float s[GROUP * PAGE] = {0.0f};
        product(s, scaled, page[p].k);
        for (int r = 0; r < GROUP; r++) weigh(s + r * PAGE, &max[r], &sum[r], out + r * HEAD_DIM);
        product(out, s, page[p].v);
    }
    for (int i = 0; i < GROUP * HEAD_DIM; i++) out[i] /= sum[i / HEAD_DIM];
}

// Seconds of both products of all pages, the best of a few rounds.
static double product_time(Product *product) {
    float s[GROUP * PAGE] = {0.0f}, o[GROUP * HEAD_DIM] = {0.0f};
    double best = INFINITY;
    for (int round = 0; round < ROUNDS; round++) {
        double start = seconds();
        for (int p = 0; p < PAGES; p++) {
            product(s, q, page[p].k);
            product(o, q, page[p].v);
        }
        best = fmin(best, seconds() - start);
    }
    require(isfinite(s[0] + o[0]), "finite products");  // so that they are not optimized away
    return best;
}

static double report(const char *name, Product *product, const float *want) {
    float out[GROUP * HEAD_DIM];
    attend(out, product);
    check(name, out, want, GROUP * HEAD_DIM, 1e-5);
    double time = product_time(product);
    printf("%s: %d pages in %.2f ms, %.1f GB/s of keys and values\n", name, PAGES, 1e3 * time,
           1e-9 * sizeof page / time);
    return time;
}

int main(void) {
    static float want[GROUP * HEAD_DIM];
    random_fill(q, GROUP * HEAD_DIM);
    random_fill(k, PAIRS * HEAD_DIM);
    random_fill(v, PAIRS * HEAD_DIM);
    for (int t = 0; t < PAIRS; t++) {
        for (int i = 0; i < HEAD_DIM; i++)
            page[t / PAGE].k[i * PAGE + t % PAGE] = k[t * HEAD_DIM + i];
        memcpy(page[t / PAGE].v + t % PAGE * HEAD_DIM, v + t * HEAD_DIM, HEAD_DIM * sizeof *v);
    }
    for (int r = 0; r < GROUP; r++)
        definition(want + r * HEAD_DIM, q + r * HEAD_DIM, k, v, PAIRS, NULL);

    double scalar = report("scalar", product_scalar, want);
    Product *vector = product_vector();
    if (vector)
        printf("AVX2 is %.1f times as fast\n", scalar / report("AVX2", vector, want));
    else
        printf("this machine has no AVX2\n");
    return 0;
}
