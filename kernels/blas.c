// blas.c: float weights by OpenBLAS, when built with BLAS=1.
//
// Panels are unpacked, some columns at a time, to the row-major matrix that sgemm reads. The pool
// shares the panels, so OpenBLAS must make no threads of its own.
#include "kernels/blas.h"
#include "kernels/simd.h"
#include "util.h"

#ifdef BLAS
#include <cblas.h>
void openblas_set_num_threads(int n);  // in OpenBLAS's own cblas.h, not in others

void blas_init(void) { openblas_set_num_threads(1); }

// Columns c0 .. c0 + cols of a panel as f32 [cols][ld], 16 of ld filled.
static void unpack_columns(float *out, size_t ld, const Matrix *w, int panel, int c0, int cols) {
    const uint8_t *line = w->data + ((size_t)panel * w->cols_padded + c0) / wtype_k(w->type) * 64;
    for (int c = 0; c < cols; c += wtype_k(w->type), line += 64, out += wtype_k(w->type) * ld) {
        const uint16_t *in = (const uint16_t *)line;
        float pair[2 * PANEL];
        if (w->type == W_F32) {
            memcpy(out, line, PANEL * sizeof *out);
            continue;
        }
        if (w->type == W_F16)
            kern.f16_to_f32(pair, in, 2 * PANEL);
        else
            for (int i = 0; i < 2 * PANEL; i++) pair[i] = bits_float((uint32_t)in[i] << 16);
        for (int r = 0; r < PANEL; r++) out[r] = pair[2 * r], out[ld + r] = pair[2 * r + 1];
    }
}

void matmul_blas(const PanelProduct *p) {
    enum { ROWS = BLAS_PANELS * PANEL };
    const Matrix *w = p->w;
    const Activations *x = p->x;
    float b[BLOCK * ROWS];
    int rows = min_int(ROWS, w->rows - p->panel * PANEL);
    for (int c0 = 0; c0 < w->cols_padded; c0 += BLOCK) {
        int cols = min_int(BLOCK, w->cols_padded - c0);
        for (int r = 0; r < rows; r += PANEL)
            unpack_columns(b + r, ROWS, w, p->panel + r / PANEL, c0, cols);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, p->t1 - p->t0, rows, cols, 1.0f,
                    x->x + (size_t)p->t0 * x->stride + c0, x->stride, b, ROWS, c0 > 0 ? 1.0f : 0.0f,
                    p->out + p->t0 * p->ld, (int)p->ld);
    }
}
#else
void blas_init(void) {}

void matmul_blas(const PanelProduct *p) { (void)p; }
#endif
