// fuzz_json.c: any bytes are read or refused; what is read and written again stays as it is.
#include "fuzz.h"

#include "tree.h"
#include "util.h"

enum { NODES = 1024 };

// Reads s [n] and writes it again; NULL when it is refused. The result is malloc'ed.
static char *rewritten(const void *s, size_t n, size_t *n_out) {
    static JsonNode node[NODES];
    char err[ERR_LEN], *out = NULL, *text = malloc(n + 1);
    if (n > 0) memcpy(text, s, n);
    const JsonNode *v = json_read(node, NODES, text, n, err);
    if (v) {
        FILE *f = open_memstream(&out, n_out);
        tree_put(f, v);
        fclose(f);
    }
    free(text);
    return out;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    size_t n_once, n_twice;
    char *once = rewritten(data, n, &n_once);
    if (!once) return 0;
    char *twice = rewritten(once, n_once, &n_twice);
    MUST(twice && n_once == n_twice && memcmp(once, twice, n_once) == 0);
    free(once);
    free(twice);
    return 0;
}
