// matmul.h: products of matrices with the rows of a batch, shared among threads.
#ifndef MATMUL_H
#define MATMUL_H
#include "kernels/kernels.h"
#include "kernels/threads.h"

// out [n][ld] = x [n][cols] times w [rows][cols], transposed.
typedef struct {
    const Matrix *w;
    float *out;
    int ld;
} Product;

// Products of n rows of the same input make one job.
typedef struct {
    const Activations *x;  // rounded already (activations_round) where a type of weights wants that
    int n;
    const Product *p;  // [n_products]
    int n_products;
    // With `up`, of the shape of the only product's w: out = act(W x, Up up_x), as in a gated
    // feed-forward (arXiv 2002.05202); NULL: out = W x.
    const Matrix *up;
    const Activations *up_x;
    void (*act)(float *x, const float *y, int n);  // x = act(x, y), n numbers
} Products;

// Computes them all on the pool's threads, NULL for one, and adds how many operations they take (a
// multiplication and an addition are two) to ops [W_TYPES], by the type of the weights. A row's
// bits depend neither on n nor on the number of threads, except where OpenBLAS multiplies.
void matmul(ThreadPool *pool, double *ops, const Products *j);

// Many jobs at once, so that the threads meet once for all of them: n_jobs up to MAX_JOBS.
enum { MAX_JOBS = 1025 };
void matmul_all(ThreadPool *pool, double *ops, const Products *jobs, int n_jobs);

// The same input without the rows before `first`.
Activations activations_from(const Activations *a, int first);

// Whether a product of the set reads more of x than the numbers in f32, and what it reads of row t:
// bf16 of a row that is tiled, else the integers.
bool activations_rounded(const Activations *x);
void activations_round(const Activations *x, int t);

// One entry of a matrix as a number: for embeddings, and for what policies look up.
float matrix_at(const Matrix *w, int r, int c);
#endif
