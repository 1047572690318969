// linear.h: the little linear algebra that fitting needs: Gram matrices, Cholesky factors, solving.
// All matrices are f32, row by row, of 64 by 64 blocks: sizes are multiples of 64.
#ifndef LINEAR_H
#define LINEAR_H
#include "kernels/kernels.h"

enum { BLOCK = 64 };

static inline int whole_blocks(int n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// to [cols][rows] = X^T, X [rows][cols]
void transpose(float *to, const float *x, int rows, int cols);

// to [cols / 64][rows][64]: 64 columns of X [rows][cols] after the other.
void split_columns(float *to, const float *x, int rows, int cols);

// The lower blocks of G [n][n] = X^T X, X [rows][n]; xt [n][rows] is X transposed and xb
// [n / 64][rows][64] is X split.
void gram(float *g, const float *xt, const float *xb, int rows, int n);

// L L^T = A in place of the lower half of A [n][n], symmetric and positive definite; pivots below
// `least` are raised to it. inverse [n / 64][64][64] receives L^-1 of the blocks on the diagonal.
// (Golub, Van Loan: Matrix Computations, 4.2.6.)
void cholesky(float *a, float *inverse, int n, float least);

// b [n][cols] = (L L^T)^-1 b; room [64][cols].
void cholesky_solve(const float *l, const float *inverse, float *b, int n, int cols, float *room);
#endif
