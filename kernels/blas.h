// blas.h: products of float weights by OpenBLAS, when built with BLAS=1.
#ifndef BLAS_H
#define BLAS_H
#include "kernels/kernels.h"

#ifdef BLAS
enum { HAS_BLAS = 1 };
#else
enum { HAS_BLAS = 0 };
#endif

enum {
    BLAS_PANELS = 8,  // panels of a call
    BLAS_FROM = 32,   // tokens; fewer are multiplied faster by this program's own functions
};

// Keeps OpenBLAS from making threads of its own.
void blas_init(void);

// out[t * ld + r] = W[16 * panel + r] . x[t] for the BLAS_PANELS panels from `panel` on, or those
// that there are, and t < n. The sum's order is OpenBLAS's own. Only where HAS_BLAS.
void matmul_blas(float *out, size_t ld, const Matrix *w, int panel, const Activations *x, int n);
#endif
