// fuzz_ids.c: what --ids reads: decimal numbers below the vocabulary's size and white space between
// them, as a plain loop reads them; all else is refused. Any ids print a text, the same one at a
// time as all together.
#include "fuzz.h"

#include <ctype.h>

#include "cli/input.h"

enum { FAMILIES = 3 };
static const char *const families[FAMILIES] = {"smol", "llama", "gemma3"};
static TensorFile files[FAMILIES];
static Tokenizer *tok[FAMILIES];

static void begin(void) {
    for (int i = 0; i < FAMILIES; i++) tok[i] = fuzz_tokenizer(families[i], &files[i]);
}

typedef struct {
    Buffer text;
    int vocab;
    Ids ids;
} Input;

static void parse(void *arg) {
    Input *in = arg;
    parse_ids(&in->text, "FILE", in->vocab, &in->ids);
}

// The definition; false: something is no id.
static bool parse_plainly(const Input *in, Ids *ids) {
    const char *s = in->text.s;
    for (size_t i = 0, n = in->text.n; i < n;) {
        double id = 0;
        size_t start = i;
        for (; i < n && isdigit((uint8_t)s[i]); i++) id = id * 10 + (s[i] - '0');
        if (i == start && isspace((uint8_t)s[i])) {
            i++;
            continue;
        }
        if (i == start || id >= in->vocab || (i < n && !isspace((uint8_t)s[i]))) return false;
        MUST(ids_push(ids, (int)id) == 0);
    }
    return true;
}

static void print(const Tokenizer *t, const Ids *ids) {
    char out[TOK_STREAM_MAX];
    TokStream s = {0};
    size_t bytes, at = 0;
    char *text = tokenizer_decode(t, ids->id, ids->n, &bytes);
    for (int i = 0; i <= ids->n; i++) {
        size_t n = (size_t)tokenizer_stream(t, &s, i < ids->n ? ids->id[i] : -1, out);
        MUST(at + n <= bytes && memcmp(text + at, out, n) == 0);
        at += n;
    }
    MUST(at == bytes && text[bytes] == '\0');
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (!tok[0]) begin();
    if (n == 0) return 0;
    const Tokenizer *t = tok[data[0] % FAMILIES];
    Input in = {.vocab = tokenizer_n_vocab(t)};
    Ids want = {0};
    MUST(buffer_add(&in.text, (const char *)data + 1, n - 1) == 0);
    bool fine = parse_plainly(&in, &want);
    MUST(fuzz_survives(parse, &in) == fine);
    if (fine) {
        MUST(in.ids.n == want.n);
        MUST(want.n == 0 || memcmp(in.ids.id, want.id, (size_t)want.n * sizeof *want.id) == 0);
        print(t, &in.ids);
    }
    ids_free(&in.ids);
    ids_free(&want);
    free(in.text.s);
    return 0;
}
