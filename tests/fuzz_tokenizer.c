// fuzz_tokenizer.c: the first byte picks what the rest is: a text for one of the fixtures'
// vocabularies, which has to come back; merges and a text, whose ids have to be those of the plain
// definition; or a damaged vocabulary, which has to be refused or to work.
#include "fuzz.h"

#include "vocab.h"

static const char *const families[] = {"smol", "llama", "qwen2", "qwen3", "gemma3", "mistral"};
enum { N_FAMILIES = sizeof families / sizeof *families, QWEN2 = 2, QWEN3, GEMMA3, MISTRAL };

static char err[ERR_LEN];
static Tokenizer *fixture[N_FAMILIES];

static void open_fixtures(void) {
    static TensorFile files[N_FAMILIES];
    for (int i = 0; i < N_FAMILIES && fixture[N_FAMILIES - 1] == NULL; i++) {
        char path[64];
        snprintf(path, sizeof path, "tests/fixtures/%s.kvz", families[i]);
        MUST(tensors_open(&files[i], path, err) == 0);
        MUST((fixture[i] = tokenizer_open(&files[i], err)) != NULL);
    }
}

// What is printed one id at a time is the decoded text.
static void check_stream(const Tokenizer *t, const Ids *ids, const char *text, size_t bytes) {
    char out[TOK_STREAM_MAX];
    TokStream s = {0};
    size_t at = 0;
    for (int i = 0; i <= ids->n; i++) {
        size_t n = (size_t)tokenizer_stream(t, &s, i < ids->n ? ids->id[i] : -1, out);
        MUST(at + n <= bytes && memcmp(text + at, out, n) == 0);
        at += n;
    }
    MUST(at == bytes);
}

// Text in, text out: byte for byte where nothing is normalized. U+2581 is a space to SentencePiece.
static void fuzz_text(int which, unsigned flags, const char *text, size_t n) {
    const Tokenizer *t = fixture[which];
    Ids ids = {0};
    size_t bytes;
    MUST(tokenizer_encode(t, text, n, flags, &ids) == 0);
    for (int i = 0; i < ids.n; i++) {
        MUST(ids.id[i] >= 0 && ids.id[i] < tokenizer_n_vocab(t));
        MUST(flags || !tokenizer_is_special(t, ids.id[i]));
    }
    char *got = tokenizer_decode(t, ids.id, ids.n, &bytes);
    bool exact = which != QWEN2 && which != QWEN3 && which != GEMMA3 && flags == 0;
    for (size_t i = 0; which == MISTRAL && i + 2 < n; i++)
        exact = exact && memcmp(text + i, "\xe2\x96\x81", 3) != 0;
    MUST(!exact || (bytes == n && memcmp(got, text, n) == 0));
    check_stream(t, &ids, got, bytes);
    free(got);
    ids_free(&ids);
    if (which >= GEMMA3 || memchr(text, 0, n) != NULL) return;
    char *message = calloc(1, n + 1);
    memcpy(message, text, n);
    int specials[2] = {0};
    for (int i = 0; i < 2; i++, ids_free(&ids)) {
        MUST(tokenizer_turn(t, 'u', i ? "a" : message, true, false, &ids) == 0);
        for (int j = 0; j < ids.n; j++) specials[i] += tokenizer_is_special(t, ids.id[j]);
    }
    MUST(specials[0] == specials[1]);
    free(message);
}

// Two bytes make a merge of letters or of tokens made so far; what follows a zero is the text.
static void fuzz_merges(const uint8_t *p, size_t n) {
    static int want[4096];
    Vocab *v = vocab_new("bpe", "none");
    for (; n > 2 && p[0] != 0 && v->n_merges < 100; p += 2, n -= 2) {
        int side[2], size = 0;
        char text[32];
        for (int i = 0; i < 2; i++)
            side[i] = p[i] < 128 ? 'a' + p[i] % 4 : 256 + (v->n > 256 ? p[i] % (v->n - 256) : 0);
        for (int i = 0; i < 2; i++) {
            int id = side[i] < v->n ? side[i] : 'a', k = v->offsets[id + 1] - v->offsets[id];
            side[i] = id;
            if (size + k > 32) continue;
            memcpy(text + size, v->bytes + v->offsets[id], (size_t)k);
            size += k;
        }
        if (size > 31 || size < 2) continue;
        int known = find_token(v, (uint8_t *)text, size);
        bool again = false;
        for (int r = 0; r < v->n_merges; r++)
            again = again || (v->merges[r][0] == side[0] && v->merges[r][1] == side[1]);
        if (again) continue;
        int32_t merge[3] = {side[0], side[1], known >= 0 ? known : add_token(v, text, size, 0)};
        memcpy(v->merges[v->n_merges++], merge, sizeof merge);
    }
    Ids ids = {0};
    Tokenizer *t = vocab_open(v, err);
    MUST(t != NULL);
    if (n > sizeof want / sizeof *want) n = sizeof want / sizeof *want;
    char *text = malloc(n + 1);
    for (size_t i = 0; i < n; i++) want[i] = text[i] = (char)('a' + p[i] % 4);
    int n_want = merge_plainly(v, want, (int)n);
    MUST(tokenizer_encode(t, text, n, 0, &ids) == 0);
    MUST(ids.n == n_want &&
         (n_want == 0 || memcmp(ids.id, want, (size_t)n_want * sizeof *want) == 0));
    ids_free(&ids);
    free(text);
    tokenizer_close(t);
    free(v);
}

// Bytes thrown over the tables of a vocabulary and over its metadata.
static void fuzz_damage(const uint8_t *p, size_t n) {
    static const char *const splits[] = {"none", "gpt2", "digits+gpt2", "llama3", "qwen2"};
    if (n < 8) return;
    Vocab *v = vocab_new(p[0] & 1 ? "spm" : "bpe", splits[p[1] % 5]);
    set_meta(v, "tokenizer.nfc", p[0] & 2 ? "1" : "0");
    set_meta(v, "tokenizer.ignore_merges", p[0] & 4 ? "1" : "0");
    set_meta(v, "tokenizer.space_prefix", p[0] & 8 ? "2" : p[0] & 16 ? "1" : "0");
    set_meta(v, "tokenizer.unk_id", p[0] & 32 ? "7" : "-1");
    add_token(v, "<a>", 3, p[2] % 6);
    add_token(v, "abc", 3, p[3] % 6);
    add_token(v, " ", 1, p[4] % 6);
    v->n_merges = p[5] % 8;
    size_t half = n / 2;
    for (size_t i = 6; i + 3 < half; i += 4) {
        int32_t value = (int8_t)p[i + 3] + (p[i + 2] & 1 ? 256 : 0);
        if (p[i] % 3 == 0) v->merges[p[i + 1] % 8][p[i + 2] % 3] = value;
        if (p[i] % 3 == 1) v->offsets[p[i + 1]] += (int8_t)p[i + 3];
        if (p[i] % 3 == 2) v->kind[p[i + 1]] = p[i + 3] % 6;
    }
    Ids ids = {0};
    Tokenizer *t = vocab_open(v, err);
    size_t bytes;
    if (t != NULL) {
        MUST(tokenizer_encode(t, (const char *)p + half, n - half, p[0] >> 6, &ids) == 0);
        char *text = tokenizer_decode(t, ids.id, ids.n, &bytes);
        check_stream(t, &ids, text, bytes);
        free(text);
    }
    ids_free(&ids);
    tokenizer_close(t);
    free(v);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    open_fixtures();
    if (size == 0) return 0;
    int mode = data[0] % 8;
    if (mode < N_FAMILIES)
        fuzz_text(mode, data[0] >> 6, (const char *)data + 1, size - 1);
    else if (mode == N_FAMILIES)
        fuzz_merges(data + 1, size - 1);
    else
        fuzz_damage(data + 1, size - 1);
    return 0;
}
