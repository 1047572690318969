// fuzz_http.c: requests that come in pieces are those that come whole, one behind the other, and a
// body is as long as it may be at most.
//
// The first byte is where the numbers begin that say how many bytes come at once.
#include "fuzz.h"

#include "serve/http.h"

enum { BODY = 1000 };

static Http whole, cut;

static bool same(const char *a, const char *b) { return a && b ? strcmp(a, b) == 0 : a == b; }

// Feeds s [n] in pieces until a request ends; *used counts what was taken.
static HttpState feed_pieces(const char *s, size_t n, uint32_t *random, size_t *used) {
    HttpState state = HTTP_MORE;
    for (*used = 0; *used < n && state == HTTP_MORE;) {
        *random = *random * 1664525u + 1013904223u;
        size_t taken, most = *random >> 31 ? 3 : 300, piece = 1 + (*random >> 8) % most;
        if (piece > n - *used) piece = n - *used;
        char *copy = malloc(piece);  // of its own, so that nothing behind it is read
        memcpy(copy, s + *used, piece);
        state = http_feed(&cut, copy, piece, &taken);
        free(copy);
        MUST(taken > 0 && taken <= piece && (taken == piece || state != HTTP_MORE));
        *used += taken;
    }
    return state;
}

static void must_be_same(void) {
    MUST(whole.minor == cut.minor && whole.keep_alive == cut.keep_alive);
    MUST(same(whole.method, cut.method) && same(whole.path, cut.path));
    MUST(same(whole.query, cut.query) && whole.n_headers == cut.n_headers);
    for (int i = 0; i < whole.n_headers; i++)
        MUST(same(whole.name[i], cut.name[i]) && same(whole.value[i], cut.value[i]));
    MUST(whole.body.n == cut.body.n && whole.body.n <= BODY);
    MUST(whole.body.n == 0 || memcmp(whole.body.s, cut.body.s, whole.body.n) == 0);
}

// What is asked of a request that is whole.
static void ask(const Http *h) {
    MUST(h->method && h->path && h->query);
    MUST(h->path[0] == '/' || strcmp(h->path, "*") == 0);
    MUST(http_header(h, "host") || h->minor == 0);
    char *name = http_query(h, "name"), *text = http_query(h, "a");
    MUST(!name || strlen(name) <= strlen(h->query));
    free(name), free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (n < 1) return 0;
    uint32_t random = data[0];
    const char *s = (const char *)data + 1, *end = s + n - 1;
    HttpState state = HTTP_READY;
    while (s < end && state == HTTP_READY) {
        size_t used, used_cut;
        http_reset(&whole), http_reset(&cut);
        whole.body_most = cut.body_most = BODY;
        state = http_feed(&whole, s, (size_t)(end - s), &used);
        MUST(state != HTTP_MORE || used == (size_t)(end - s));
        MUST(feed_pieces(s, (size_t)(end - s), &random, &used_cut) == state && used == used_cut);
        MUST(whole.status == cut.status && whole.problem == cut.problem);
        MUST((state == HTTP_BAD) == (whole.status >= 400 && whole.problem));
        if (state == HTTP_READY) must_be_same(), ask(&whole);
        s += used;
    }
    http_reset(&whole), http_reset(&cut);
    return 0;
}
