// linear.h: the little linear algebra that fitting needs: Gram matrices, Cholesky factors, solving.
// All matrices are f32, row by row, of 64 by 64 blocks: sizes are multiples of 64.
#ifndef LINEAR_H
#define LINEAR_H
#include "kernels/kernels.h"

enum { BLOCK = 64 };

static inline int whole_blocks(int n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// The lower blocks of G [n][n] = X^T X, X [rows][n]; xt [n][rows] and xb [n / 64][rows][64] are X
// as products read it (gram_spread).
void gram(float *g, const float *xt, const float *xb, int rows, int n);

// X [rows][n] as gram reads it.
void gram_spread(float *xt, float *xb, const float *x, int rows, int n);

// L L^T = A in place of the lower half of A [n][n], symmetric and positive definite; pivots below
// `least` are raised to it. (Golub, Van Loan: Matrix Computations, 4.2.6.)
void cholesky(float *a, int n, float least);

// b [n][cols] = (L L^T)^-1 b
void cholesky_solve(const float *l, float *b, int n, int cols);
#endif
