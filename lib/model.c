// model.c: the library's models: opening them, texts and ids, logits.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "lib/handles.h"
#include "text.h"

_Static_assert((int)KVZIP_ERR == (int)ERR_LEN, "err of callers has room for every sentence");

int kvzip_version(void) { return KVZIP_VERSION; }

// ---- models ----

void model_drop(kvzip_model *m) {
    if (--m->refs > 0) return;
    answer_close(&m->answerer);
    pieces_close(m->pieces);
    state_close(&m->state);
    tokenizer_close(m->tok);
    model_close(&m->model);
    pool_close(m->pool);
    free(m);
}

void kvzip_close(kvzip_model *m) {
    if (m) model_drop(m);
}

// The table of kernels is filled by the first model of the process.
static int choose_kernels(const char *isa, char *err) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    int rc = 0;
    pthread_mutex_lock(&mutex);
    if (!kern.name && kernels_init(isa) != 0)
        rc = fail(err, "isa %s: this machine or this library has no such set", isa);
    else if (isa && strcmp(isa, kern.name) != 0)
        rc = fail(err, "isa %s: this process already uses %s", isa, kern.name);
    pthread_mutex_unlock(&mutex);
    return rc;
}

static int open_parts(kvzip_model *m, const char *path, int threads, char *err) {
    if (model_open(&m->model, path, err) != 0) return -1;
    if (!(m->tok = tokenizer_open(&m->model.file, err))) return -1;
    if (!(m->pool = pool_open(threads > 0 ? min_int(threads, cores_allowed()) : cores_default())))
        return fail(err, "the threads cannot be made");
    if (state_open(&m->state, &m->model, m->pool, MAX_ROWS, LOGITS_BLOCK, err) != 0) return -1;
    return answer_open(&m->answerer, &m->state, NULL, m->tok, err);
}

kvzip_model *kvzip_open(const char *path, int threads, const char *isa, char *err) {
    char why[ERR_LEN];
    kvzip_model *m = NULL;
    if (choose_kernels(isa, err) != 0) return NULL;
    if (!(m = calloc(1, sizeof *m))) return fail(err, "out of memory"), NULL;
    m->refs = 1;
    if (open_parts(m, path, threads, why) == 0) return m;
    fail(err, "%s: %s", path, why);
    model_drop(m);
    return NULL;
}

void kvzip_model_info(const kvzip_model *m, kvzip_model_facts *facts) {
    const Config *c = &m->model.config;
    KVShape shape = model_kv_shape(&m->model);
    *facts = (kvzip_model_facts){.name = m->model.name,
                                 .fingerprint = m->model.fingerprint,
                                 .isa = kern.name,
                                 .threads = pool_threads(m->pool),
                                 .n_layers = c->n_layers,
                                 .n_heads = c->n_heads,
                                 .n_kv_heads = c->n_kv_heads,
                                 .head_dim = c->head_dim,
                                 .vocab_size = c->vocab_size,
                                 .seq_len = c->seq_len,
                                 .n_scored = kvcache_scored_layers(&shape, NULL),
                                 .has_chat = tokenizer_chat(m->tok)->present};
}

void kvzip_scored(const kvzip_model *m, int *layers) {
    KVShape shape = model_kv_shape(&m->model);
    kvcache_scored_layers(&shape, layers);
}

// ---- texts and ids ----

int check_text(const char *name, const char **text, size_t *n, char *err) {
    char why[ERR_LEN];
    if (text_check(*text, *n, why) != TEXT_FINE) return fail(err, "%s: %s", name, why);
    size_t mark = text_mark(*text, *n);
    *text += mark, *n -= mark;
    return 0;
}

int check_string(const char *name, const char *text, char *err) {
    size_t n = text ? strlen(text) : 0;
    return text ? check_text(name, &text, &n, err) : 0;
}

int check_ids(const kvzip_model *m, const int *ids, int n, char *err) {
    int vocab = m->model.config.vocab_size;
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab)
            return fail(err, "%d is not a token id from 0 to %d", ids[i], vocab - 1);
    return 0;
}

long kvzip_tokenize(const kvzip_model *m, const char *text, size_t n, int special, int bos,
                    int *ids, long room, char *err) {
    Ids found = {0};
    unsigned how = (special ? TOK_SPECIAL : 0) | (bos ? TOK_BOS : 0);
    long count = tokenizer_encode(m->tok, text, n, how, &found) == 0 ? found.n : -1;
    if (count < 0) fail(err, "out of memory");
    if (count > 0 && count <= room) memcpy(ids, found.id, (size_t)count * sizeof *ids);
    ids_free(&found);
    return count;
}

long kvzip_detokenize(const kvzip_model *m, const int *ids, int n, char *text, long room,
                      char *err) {
    size_t bytes;
    if (check_ids(m, ids, n, err) != 0) return -1;
    char *found = tokenizer_decode(m->tok, ids, n, &bytes);
    if (!found) return fail(err, "out of memory");
    if ((long)bytes <= room) memcpy(text, found, bytes);
    free(found);
    return (long)bytes;
}

// ---- logits ----

static int compute_logits(Store *s, int seq, const int *ids, int n, const kvzip_computing *how,
                          float *out, char *err) {
    RunState *state = &s->model->state;
    Row rows[LOGITS_BLOCK];
    size_t vocab = (size_t)s->model->model.config.vocab_size;
    for (int done = 0; done < n;) {
        int m = min_int(n - done, LOGITS_BLOCK);
        for (int i = 0; i < m; i++) rows[i] = (Row){seq, ids[done + i], true};
        if (forward(state, &s->kv, rows, m, err) != 0) return -1;
        memcpy(out + (size_t)done * vocab, state->logits, (size_t)m * vocab * sizeof *out);
        done += m;
        if (how->progress && how->progress(how->arg, "logits", done, n) != 0)
            return fail(err, "interrupted");
    }
    return 0;
}

int kvzip_logits(kvzip_model *m, const int *ids, int n, const kvzip_computing *how, float *out,
                 char *err) {
    int seq = -1;
    if (check_ids(m, ids, n, err) != 0) return -1;
    Store *s = how->after ? how->after->store : store_new(m, err);
    if (!s) return -1;
    if (how->after)
        seq = kvcache_fork(&s->kv, how->after->seq, err);
    else if (store_open(s, how->kv, err) == 0)
        seq = kvcache_new(&s->kv, err);
    int rc = seq < 0 ? -1 : compute_logits(s, seq, ids, n, how, out, err);
    if (how->after && seq >= 0) kvcache_drop(&s->kv, seq);
    if (!how->after) store_drop(s);
    return rc;
}
