// temperature.c: queries that grow with their position (arXiv 2501.19399).
//
// The softmax over more pairs is flatter, because each of them takes its part of the sum. A model
// that is to read further than its training makes up for that: a query's scores count for more the
// further back it has to look. Llama 4 does so in the layers that do not rotate, Ministral 3 in
// all. What must stay true: the position is the token's own, whatever has been evicted before it.
#include <math.h>

#include "layers.h"

int temperature_open(Config *c, const TensorFile *f, char *err) {
    Temperature *t = &c->temperature;
    if (!tensors_meta(f, "query_growth")) return 0;
    if (tensors_meta_float(f, "query_growth", 0.0, 1e3, &t->growth, err) != 0 ||
        tensors_meta_int(f, "query_first", 0, 1, &t->first, err) != 0 ||
        tensors_meta_int(f, "query_step", 1, 1 << 24, &t->step, err) != 0)
        return -1;
    return open_list(&t->layers, f, "layer.query_grows", c->n_layers, err);
}

void temperature_apply(const Model *m, int l, int pos, float *q) {
    const Temperature *t = &m->config.temperature;
    if (t->growth == 0.0f || (t->layers && !t->layers[l])) return;
    int steps = (pos + t->first) / t->step;
    if (steps > 0) kern.scale(q, 1.0f + t->growth * logf(1.0f + (float)steps), m->layers[l].q_dim);
}
