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

// The BLAS_PANELS panels from p's on, or those that there are, times p's tokens; rows that pad the
// last panel are not written. The order of a sum is OpenBLAS's own. Only where HAS_BLAS.
void matmul_blas(const PanelProduct *p);
#endif
