// test_tokenizer.c: ids are the reference's, texts come back, and no input makes it slow or crash.
//
// The fixtures' ids and texts come from the libraries tokenizers and transformers. What they don't
// reach is tried on vocabularies made up here: merges in any order, against the plain definition.
#include "tokenizer.h"

#include <time.h>

#include "test.h"
#include "unicode.h"
#include "vocab.h"

static char err[ERR_LEN];
static const char *const families[] = {"smol", "llama", "qwen2", "qwen3", "gemma3", "mistral"};
enum { N_FAMILIES = sizeof families / sizeof *families };

typedef struct {
    const char *name;
    TensorFile model, want;
    Tokenizer *tok;
} Fixture;

static bool fixture_open(Fixture *f, const char *name) {
    char path[256];
    *f = (Fixture){.name = name};
    snprintf(path, sizeof path, "tests/fixtures/%s.kvz", name);
    bool ok = tensors_open(&f->model, path, err) == 0;
    snprintf(path, sizeof path, "tests/fixtures/%s/expected.safetensors", name);
    ok = ok && tensors_open(&f->want, path, err) == 0;
    ok = ok && (f->tok = tokenizer_open(&f->model, err)) != NULL;
    if (!ok) printf("%s: %s\n", name, err);
    return CHECK(ok);
}

static void fixture_close(Fixture *f) {
    tokenizer_close(f->tok);
    tensors_close(&f->model);
    tensors_close(&f->want);
}

// Row i of a ragged tensor: values NAME, row ends NAME_offsets. Sets n, returns the number of rows.
static int row(const Fixture *f, const char *name, int i, const void **data, int *n) {
    char offsets[80];
    snprintf(offsets, sizeof offsets, "%s_offsets", name);
    if (strcmp(name, "vocab.bytes") == 0) strcpy(offsets, "vocab.offsets");
    const Tensor *v = tensors_find(&f->want, name), *o = tensors_find(&f->want, offsets);
    if (v == NULL || o == NULL) printf("%s: no %s\n", f->name, name), exit(1);
    const int32_t *at = o->data;
    *data = (const char *)v->data + (size_t)at[i] * dtype_size(v->dtype);
    *n = at[i + 1] - at[i];
    return (int)o->shape[0] - 1;
}

static bool same_ids(const Ids *ids, const int32_t *want, int n) {
    return ids->n == n && (n == 0 || memcmp(ids->id, want, (size_t)n * sizeof *want) == 0);
}

// ---- against the reference ----

static void check_ids(const Fixture *f, const char *what, int i, const char *text, int n,
                      unsigned flags) {
    Ids ids = {0};
    const void *want;
    int n_want;
    row(f, what, i, &want, &n_want);
    CHECK(tokenizer_encode(f->tok, text, (size_t)n, flags, &ids) == 0);
    if (!CHECK(same_ids(&ids, want, n_want))) {
        printf("%s: %s of case %d, \"%.*s\":", f->name, what, i, n, text);
        for (int j = 0; j < ids.n; j++) printf(" %d", ids.id[j]);
        printf("\n");
    }
    ids_free(&ids);
}

// What the ids print one by one, the bytes held back at the end included.
static void check_stream(const Fixture *f, const int *ids, int n, const char *want, size_t bytes) {
    char *text = malloc((size_t)(n + 1) * TOK_STREAM_MAX);
    size_t at = 0;
    TokStream s = {0};
    for (int i = 0; i <= n; i++) {
        int k = tokenizer_stream(f->tok, &s, i < n ? ids[i] : -1, text + at);
        CHECK(k >= 0 && k <= TOK_STREAM_MAX);
        at += (size_t)k;
    }
    CHECK(at == bytes && memcmp(text, want, bytes) == 0);
    free(text);
}

static void test_cases(const Fixture *f) {
    const void *text, *ids, *decoded;
    int n, n_ids, n_decoded, cases = row(f, "tok.text", 0, &text, &n);
    CHECK(cases > 90);
    for (int i = 0; i < cases; i++) {
        row(f, "tok.text", i, &text, &n);
        check_ids(f, "tok.ids", i, text, n, TOK_SPECIAL);
        check_ids(f, "tok.ids_special", i, text, n, TOK_SPECIAL | TOK_BOS);
        check_ids(f, "tok.ids_plain", i, text, n, 0);
        row(f, "tok.ids", i, &ids, &n_ids);
        row(f, "tok.decoded", i, &decoded, &n_decoded);
        size_t bytes;
        char *got = tokenizer_decode(f->tok, ids, n_ids, &bytes);
        CHECK(got != NULL && bytes == (size_t)n_decoded && memcmp(got, decoded, bytes) == 0);
        check_stream(f, ids, n_ids, got, bytes);
        free(got);
    }
}

static void test_pieces(const Fixture *f) {
    const void *want;
    int n, bytes, ids = row(f, "vocab.bytes", 0, &want, &n);
    CHECK(tokenizer_n_vocab(f->tok) >= ids);
    for (int id = 0; id < ids; id++) {
        row(f, "vocab.bytes", id, &want, &n);
        const char *piece = tokenizer_piece(f->tok, id, &bytes);
        CHECK(bytes == n && memcmp(piece, want, (size_t)n) == 0);
    }
    tokenizer_piece(f->tok, -1, &bytes);
    CHECK(bytes == 0);
    tokenizer_piece(f->tok, tokenizer_n_vocab(f->tok), &bytes);
    CHECK(bytes == 0);
}

// The conversations of make_fixtures.py.
static const struct {
    char role;
    const char *text;
} talks[][4] = {
    {{'u', "What is the code for the north gate?"}},
    {{'s', "You answer in one word."}, {'u', "Is 17 prime?\nAnswer yes or no."}},
    {{'s', "You answer in one word."},
     {'u', "Où est l'hôtel? 😀"},
     {'a', "Près du théâtre."},
     {'u', "Again,\n\n  in 3 words: 今天"}},
};

static bool ends_with(const char *text, int n, const char *end) {
    int k = (int)strlen(end);
    return k <= n && memcmp(text + n - k, end, (size_t)k) == 0;
}

// Cases come in the order of the talks, each with and without what invites the answer; which talk
// it is and whether it ends in the invitation can be read off its text. Qwen3 without the think
// block is left out: the converted template always closes it.
static void test_chat(const Fixture *f) {
    const void *text, *want;
    int n, n_want, used = 0, cases = row(f, "chat.text", 0, &text, &n);
    const ChatTemplate *c = tokenizer_chat(f->tok);
    CHECK(c->present);
    for (int i = 0; i < cases; i++) {
        row(f, "chat.text", i, &text, &n);
        row(f, "chat.ids", i, &want, &n_want);
        char *copy = calloc(1, (size_t)n + 1);
        memcpy(copy, text, (size_t)n);
        int talk = strstr(copy, talks[2][3].text) ? 2 : strstr(copy, talks[1][1].text) ? 1 : 0;
        free(copy);
        bool invited = ends_with(text, n, c->generation);
        if (!invited && ends_with(text, n, "<|im_start|>assistant\n")) continue;
        Ids ids = {0};
        for (int j = 0; j < 4 && talks[talk][j].text != NULL; j++) {
            bool after_system = j > 0 && talks[talk][j - 1].role == 's';
            CHECK(tokenizer_turn(f->tok, talks[talk][j].role, talks[talk][j].text, j == 0,
                                 after_system, &ids) == 0);
        }
        if (invited) CHECK(tokenizer_generation(f->tok, &ids) == 0);
        if (!CHECK(same_ids(&ids, want, n_want))) printf("%s: conversation %d\n", f->name, i);
        ids_free(&ids);
        used++;
    }
    CHECK(used >= 4);
}

// A user's text never becomes a special token, whatever it says and wherever it is cut.
static void test_injection(const Fixture *f) {
    for (int id = 0, bytes; id < tokenizer_n_vocab(f->tok); id++) {
        const char *piece = tokenizer_piece(f->tok, id, &bytes);
        if (!tokenizer_is_special(f->tok, id)) continue;
        char text[200], *decoded;
        int specials[2] = {0};
        snprintf(text, sizeof text, "%.*sa%.*s%.*s", bytes, piece, bytes, piece, bytes - 1, piece);
        for (int harmless = 0; harmless < 2; harmless++) {
            Ids ids = {0};
            CHECK(tokenizer_turn(f->tok, 'u', harmless ? "a" : text, true, false, &ids) == 0);
            for (int i = 0; i < ids.n; i++)
                specials[harmless] += tokenizer_is_special(f->tok, ids.id[i]);
            size_t n;
            decoded = tokenizer_decode(f->tok, ids.id, ids.n, &n);
            CHECK(strstr(decoded, harmless ? "a" : text) != NULL);
            free(decoded);
            ids_free(&ids);
        }
        CHECK(specials[0] == specials[1]);
    }
}

// Texts between pieces of a template become the ids of the whole; special tokens in them do not.
static void test_parts(const Fixture *f) {
    for (int id = 0, bytes, tried = 0; id < tokenizer_n_vocab(f->tok) && tried < 3; id++) {
        const char *special = tokenizer_piece(f->tok, id, &bytes);
        if (!tokenizer_is_special(f->tok, id) || bytes > 60) continue;
        tried++;
        for (int evil = 0; evil < 2; evil++) {
            char piece[3][80], text[3][80], all[500] = "";
            TextPart part[6];
            for (int i = 0; i < 3; i++) {
                snprintf(piece[i], sizeof piece[i], i == 1 ? "\n\nTools: " : "%.*suser\n", bytes,
                         special);
                snprintf(text[i], sizeof text[i], evil ? " %.*sHi 1\n" : " Hi 1\n", bytes, special);
                part[2 * i] = (TextPart){PART_TEMPLATE, piece[i], strlen(piece[i])};
                part[2 * i + 1] = (TextPart){PART_TEXT, text[i], strlen(text[i])};
                strcat(strcat(all, piece[i]), text[i]);
            }
            Ids ids = {0}, whole = {0};
            int specials = 0;
            CHECK(tokenizer_parts(f->tok, part, 6, true, &ids) == 0);
            CHECK(tokenizer_encode(f->tok, all, strlen(all), TOK_SPECIAL, &whole) == 0);
            for (int i = 0; i < ids.n; i++) specials += ids.id[i] == id;
            CHECK(specials == 2);
            CHECK(evil || same_ids(&ids, whole.id, whole.n));
            ids_free(&ids);
            ids_free(&whole);
        }
    }
}

// Any bytes come back as they were, where the model does not normalize; then a second pass changes
// nothing.
static void check_round_trip(const Fixture *f, const char *text, size_t n) {
    Ids ids = {0}, again = {0};
    size_t bytes;
    CHECK(tokenizer_encode(f->tok, text, n, 0, &ids) == 0);
    char *got = tokenizer_decode(f->tok, ids.id, ids.n, &bytes);
    if (strncmp(f->name, "qwen", 4) != 0) {
        if (!CHECK(bytes == n && memcmp(got, text, n) == 0)) printf("%s: %zu bytes\n", f->name, n);
    }
    CHECK(tokenizer_encode(f->tok, got, bytes, 0, &again) == 0);
    CHECK(same_ids(&again, ids.id, ids.n));
    free(got);
    ids_free(&ids);
    ids_free(&again);
}

static void test_invalid(const Fixture *f) {
    static const struct {
        const char *bytes;
        size_t n;
    } invalid[] = {{"\x80", 1},
                   {"\xc3", 1},
                   {"\xc3(", 2},
                   {"\xe2\x82", 2},
                   {"\xe2\x82(", 3},
                   {"\xf0\x9f\x98", 3},
                   {"\xf8\xa1\xa1\xa1", 4},
                   {"\xed\xa0\x80", 3},
                   {"\xc0\xaf", 2},
                   {"a\xff\x62", 3},
                   {"\xf4\x90\x80\x80", 4},
                   {"\xe0\x80\xaf", 3},
                   {"e\xcc\x81\xff\xcc\x81", 6},
                   {"\xff\xcc\x81", 3},
                   {"\0\xc2\0", 3}};
    for (size_t i = 0; i < sizeof invalid / sizeof *invalid; i++)
        check_round_trip(f, invalid[i].bytes, invalid[i].n);
    static const char few[] =
        "\xe2\x96\xcc\x81 aZ9\n\xf0\x9f\x98\x80\xe1\x84\x92";  // so that characters come about
    srand(1);
    for (int i = 0; i < 200; i++) {
        char text[300];
        int n = rand() % 300, narrow = i % 2;
        for (int j = 0; j < n; j++)
            text[j] = (char)(narrow ? few[(size_t)rand() % sizeof few] : rand());
        for (int j = 0; j + 2 < n;
             j++)  // a U+2581 is a space to SentencePiece models and comes back as one
            if (memcmp(text + j, "\xe2\x96\x81", 3) == 0) text[j] = 'x';
        check_round_trip(f, text, (size_t)n);
    }
}

// ---- vocabularies made up here ----

// Merges of random tokens into longer ones. shuffled: ranks do not follow lengths, so that a merge
// may bring up a pair that has to go before it.
static void random_merges(Vocab *v, int letters, int merges, bool shuffled) {
    for (int tries = 0; v->n_merges < merges && tries < 20 * merges; tries++) {
        int side[2];
        uint8_t text[32];
        for (int i = 0; i < 2; i++) {
            int pick = rand() % (letters + v->n - 256);
            side[i] = pick < letters ? 'a' + pick : 256 + pick - letters;
        }
        int a = v->offsets[side[0] + 1] - v->offsets[side[0]],
            b = v->offsets[side[1] + 1] - v->offsets[side[1]];
        if (a + b > 12) continue;
        memcpy(text, v->bytes + v->offsets[side[0]], (size_t)a);
        memcpy(text + a, v->bytes + v->offsets[side[1]], (size_t)b);
        if (memchr(text + 1, ' ', (size_t)(a + b - 1)) != NULL) continue;  // words stay apart
        int result = find_token(v, text, a + b);
        if (result < 0) result = add_token(v, (char *)text, a + b, 0);
        bool known = false;
        for (int r = 0; r < v->n_merges; r++)
            known = known || (v->merges[r][0] == side[0] && v->merges[r][1] == side[1]);
        if (known) continue;
        memcpy(v->merges[v->n_merges++], (int32_t[3]){side[0], side[1], result},
               sizeof v->merges[0]);
    }
    for (int r = v->n_merges - 1; shuffled && r > 0; r--) {
        int other = rand() % (r + 1);
        int32_t swap[3];
        memcpy(swap, v->merges[r], sizeof swap);
        memcpy(v->merges[r], v->merges[other], sizeof swap);
        memcpy(v->merges[other], swap, sizeof swap);
    }
}

// Windows, seams, rounds and the queue are invisible: the ids are those of the plain definition.
static void test_merging(void) {
    enum { LONGEST = 1500 };
    static char text[LONGEST];
    static int want[LONGEST];
    srand(2);
    for (int i = 0; i < 300; i++) {
        Vocab *v = vocab_new("bpe", "none");
        int letters = 1 + rand() % 4;
        random_merges(v, letters, 1 + rand() % 60, i % 3 == 0);
        Tokenizer *t = vocab_open(v, err);
        if (!CHECK(t != NULL)) return;
        for (int k = 0; k < 6; k++) {
            int n = 1 + rand() % (k < 4 ? 200 : LONGEST), period = k % 2 ? 1 + rand() % 9 : n;
            for (int j = 0; j < n; j++)
                text[j] = (char)(j < period ? 'a' + rand() % letters : text[j - period]);
            for (int j = 0; j < n; j++) want[j] = text[j];
            Ids ids = {0};
            int n_want = merge_plainly(v, want, n);
            CHECK(tokenizer_encode(t, text, (size_t)n, 0, &ids) == 0);
            if (!CHECK(same_ids(&ids, want, n_want)))
                printf("vocabulary %d, text %d: %.*s\n", i, k, n, text);
            ids_free(&ids);
        }
        tokenizer_close(t);
        free(v);
    }
}

// A text of words that come again, each merged by itself: what is remembered of them is right.
// Words have up to 20 letters, so that some are too long to be remembered, and some end up as many
// tokens.
static void test_words(void) {
    enum { N = 30000 };
    static char text[N + 64];
    static int want[N + 64];
    srand(3);
    for (int i = 0; i < 20; i++) {
        bool spm = i % 2;
        Vocab *v = vocab_new(spm ? "spm" : "bpe", spm ? "none" : "gpt2");
        for (int c = 'a'; spm && c <= 'd'; c++) add_token(v, (char[]){(char)c}, 1, 0);
        if (spm) add_token(v, " ", 1, 0);
        random_merges(v, spm ? 0 : 4, 40, false);
        Tokenizer *t = vocab_open(v, err);
        int n = 0, n_want = 0;
        while (n < N) {
            int from = n, letters = rand() % 4 == 0 ? 1 + rand() % 20 : 1 + rand() % 4;
            if (n > 0) text[n++] = ' ';
            for (int j = 0; j < letters; j++) text[n++] = (char)('a' + rand() % 4);
            for (int j = from; j < n; j++)
                want[n_want + j - from] = !spm             ? text[j]
                                          : text[j] == ' ' ? 260
                                                           : 256 + text[j] - 'a';
            n_want += merge_plainly(v, want + n_want, n - from);
        }
        Ids ids = {0};
        CHECK(tokenizer_encode(t, text, (size_t)n, 0, &ids) == 0 && same_ids(&ids, want, n_want));
        ids_free(&ids);
        tokenizer_close(t);
        free(v);
    }
}

// Tokens as long as two windows, made one byte at a time: the windows have to grow, and the rounds
// to give way to the queue.
static void test_long_chains(void) {
    enum { CHAIN = 150, N = 2000 };
    static char text[N];
    static int want[N];
    Vocab *v = vocab_new("bpe", "none");
    int last = 'A';
    for (int i = 1; i < CHAIN; i++) {
        uint8_t piece[CHAIN];
        for (int j = 0; j <= i; j++) piece[j] = (uint8_t)('A' + j % 50);
        int id = add_token(v, (char *)piece, i + 1, 0);
        memcpy(v->merges[v->n_merges++], (int32_t[3]){last, 'A' + i % 50, id}, sizeof v->merges[0]);
        last = id;
    }
    Tokenizer *t = vocab_open(v, err);
    for (int cut = 0; cut < 3; cut++) {
        for (int i = 0; i < N; i++) text[i] = (char)('A' + (i + cut * (i / 700)) % 50);
        for (int i = 0; i < N; i++) want[i] = text[i];
        Ids ids = {0};
        int n_want = merge_plainly(v, want, N);
        CHECK(tokenizer_encode(t, text, N, 0, &ids) == 0 && same_ids(&ids, want, n_want));
        ids_free(&ids);
    }
    tokenizer_close(t);
    free(v);
}

// Encodes with the made-up vocabulary and gives the ids as text, "1 2 3".
static const char *ids_of(Vocab *v, const char *text, unsigned flags) {
    static char out[4096];
    Ids ids = {0};
    Tokenizer *t = vocab_open(v, err);
    int at = 0;
    out[0] = 0;
    if (!CHECK(t != NULL && tokenizer_encode(t, text, strlen(text), flags, &ids) == 0)) return err;
    for (int i = 0; i < ids.n; i++)
        at += snprintf(out + at, sizeof out - (size_t)at, i ? " %d" : "%d", ids.id[i]);
    ids_free(&ids);
    tokenizer_close(t);
    return out;
}

static void test_added_tokens(void) {
    Vocab *v = vocab_new("bpe", "none");
    add_token(v, "<a>", 3, 1);     // 256
    add_token(v, "<a>b", 4, 2);    // 257
    add_token(v, "<a>bcd", 6, 1);  // 258
    add_token(v, "x", 1, 2);       // 259
    add_token(v, "", 0, 1);        // 260: never found
    add_token(v, "<u>", 3, 4);     // 261: unused, never found
    set_meta(v, "tokenizer.bos_id", "256");
    CHECK_STR(ids_of(v, "<a>", 0), "60 97 62");
    CHECK_STR(ids_of(v, "<a>", TOK_SPECIAL), "256");
    CHECK_STR(ids_of(v, "<a>b", 0), "257");
    CHECK_STR(ids_of(v, "<a>bcd<a>bc", TOK_SPECIAL), "258 257 99");
    CHECK_STR(ids_of(v, "<a>bcd", 0),
              "257 99 100");  // the longest is not allowed, a shorter one is
    CHECK_STR(ids_of(v, "<<a><a>", TOK_SPECIAL), "60 256 256");
    CHECK_STR(ids_of(v, "yx<u>", TOK_SPECIAL), "121 259 60 117 62");
    CHECK_STR(ids_of(v, "y", TOK_BOS), "121");
    set_meta(v, "tokenizer.add_bos", "1");
    CHECK_STR(ids_of(v, "y", TOK_BOS), "256 121");
    CHECK_STR(ids_of(v, "y", TOK_SPECIAL), "121");
    int part = add_token(v, "<a", 2, 0);
    int32_t merges[2][3] = {{'<', 'a', part}, {part, '>', 256}};
    memcpy(v->merges, merges, sizeof merges);
    v->n_merges = 2;
    CHECK_STR(ids_of(v, "<a>", 0), "262 62");  // nothing merges to a special token
    free(v);
}

// SentencePiece: the leading space in its three manners, byte fallback, one token for unknown
// characters.
static void test_spaces_and_unknowns(void) {
    Vocab *v = vocab_new("spm", "none");
    int space = add_token(v, " ", 1, 0);  // 256
    int a = add_token(v, "a", 1, 0), spaced = add_token(v, " a", 2, 0);
    add_token(v, "<s>", 3, 1);  // 259
    memcpy(v->merges[v->n_merges++], (int32_t[3]){space, a, spaced}, sizeof v->merges[0]);
    CHECK_STR(ids_of(v,
                     "a a\xe2\x96\x81"
                     "a",
                     0),
              "257 258 258");
    CHECK_STR(ids_of(v, "é", 0), "195 169");
    set_meta(v, "tokenizer.space_prefix", "1");
    CHECK_STR(ids_of(v, "a a<s>a<s> a", TOK_SPECIAL), "258 258 259 258 259 256 258");
    CHECK_STR(ids_of(v, "", 0), "");
    set_meta(v, "tokenizer.space_prefix", "2");
    CHECK_STR(ids_of(v, "a a<s>a", TOK_SPECIAL), "258 258 259 257");
    CHECK_STR(ids_of(v, " a", 0), "258");
    set_meta(v, "tokenizer.space_prefix", "0");
    set_meta(v, "tokenizer.unk_id", "259");
    for (int b = 0; b < 256; b++) v->kind[b] = 4;
    CHECK_STR(ids_of(v,
                     "éü\xff"
                     "a é a",
                     0),
              "259 257 256 259 258");
    set_meta(v, "tokenizer.unk_id", "-1");
    CHECK_STR(ids_of(v, "éa", 0), "257");
    free(v);
}

static void test_nfc(void) {
    static const char *const cases[][2] = {{"plain", "plain"},
                                           {"e\u0301", "é"},
                                           {"é\u0323", "ẹ\u0301"},
                                           {"q\u0307\u0323", "q\u0323\u0307"},
                                           {"\u212b", "Å"},
                                           {"\u0958", "\u0915\u093c"},
                                           {"\u1112\u1161\u11ab", "한"},
                                           {"하\u11ab", "한"},
                                           {"\u11ab", "\u11ab"},
                                           {"\u0344", "\u0308\u0301"},
                                           {"\u0301", "\u0301"},
                                           {"a\u0300\u0301\u0302", "à\u0301\u0302"},
                                           {"\u1e9b\u0323", "\u1e9b\u0323"},
                                           {"\u0f71\u0f72\u0f74", "\u0f71\u0f72\u0f74"},
                                           {"\U0001d15e", "\U0001d157\U0001d165"},
                                           {"\U00011131\U00011127", "\U0001112e"},
                                           {"e\xff\u0301", "e\xff\u0301"},
                                           {"\xcc", "\xcc"},
                                           {"e\u0301\xcc", "é\xcc"},
                                           {"<e\u0301>", "<é>"}};
    Vocab *v = vocab_new("bpe", "none");
    set_meta(v, "tokenizer.nfc", "1");
    Tokenizer *t = vocab_open(v, err);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Ids ids = {0};
        size_t n;
        CHECK(tokenizer_encode(t, cases[i][0], strlen(cases[i][0]), 0, &ids) == 0);
        char *got = tokenizer_decode(t, ids.id, ids.n, &n);
        CHECK_STR(got, cases[i][1]);
        free(got);
        ids_free(&ids);
    }
    tokenizer_close(t);
    free(v);
}

// A character split over tokens shows when it is complete; the end of the answer shows what is
// left.
static int by_key(const void *a, const void *b) {
    return strcmp(((const Meta *)a)->key, ((const Meta *)b)->key);
}

// Tokens with flags: 1 looked for in the normalized text, 2 and 4 take the white space beside them.
// Ids as tokenizers 0.23.3 has them for such a vocabulary.
static void test_flags(void) {
    Vocab *v = vocab_new("spm", "none");
    int space = add_token(v, " ", 1, 0);  // 256
    int a = add_token(v, "a", 1, 0), spaced = add_token(v, " a", 2, 0);
    int t = add_token(v, "<T>", 3, 2), r = add_token(v, "<R>", 3, 1);  // 259, 260
    memcpy(v->merges[v->n_merges++], (int32_t[3]){space, a, spaced}, sizeof v->merges[0]);
    int n = add_token(v, " <T>", 4, 2);  // 261
    v->flags[n] = 1;
    v->kind[t] = 4;
    set_meta(v, "tokenizer.space_prefix", "1");
    CHECK_STR(ids_of(v, "<T>a", 0), "261 257");
    CHECK_STR(ids_of(v, "a<T>", 0), "258 60 84 62");
    CHECK_STR(ids_of(v, "a <T>\xe2\x96\x81<T> a", 0), "258 261 261 258");
    v->kind[t] = 2;
    v->kind[n] = 4;
    CHECK_STR(ids_of(v, "a <T> a", 0), "258 256 259 256 258");
    set_meta(v, "tokenizer.space_prefix", "3");
    CHECK_STR(ids_of(v, "a<T>a<T> a", 0), "258 259 258 259 258");
    v->flags[r] = 4;
    CHECK_STR(ids_of(v, "<R>\n a<R>", TOK_SPECIAL), "260 258 260");
    v->flags[r] = 6;
    CHECK_STR(ids_of(v, "a \n<R>\xc2\xa0<R> <T>a", TOK_SPECIAL), "258 260 260 259 258");
    set_meta(v, "tokenizer.split", "words");
    int twice = add_token(v, " a a", 4, 0);
    memcpy(v->merges[v->n_merges++], (int32_t[3]){spaced, spaced, twice}, sizeof v->merges[0]);
    CHECK_STR(ids_of(v, "a a", 0), "258 258");
    set_meta(v, "tokenizer.split", "none");
    CHECK_STR(ids_of(v, "a a", 0), "262");
    free(v);
}

// A marker in the user's text stays text when it is looked for after normalization too.
static void test_normalized_injection(void) {
    Vocab *v = vocab_new("bpe", "gpt2");
    int s = add_token(v, "<s>", 3, 1);
    v->flags[s] = 1;
    set_meta(v, "tokenizer.nfc", "1");
    v->meta[v->n_meta++] = (Meta){"chat.user_prefix", "e\xcc\x81<s>"};
    v->meta[v->n_meta++] = (Meta){"chat.user_suffix", "<s>e\xcc\x81"};
    qsort(v->meta, (size_t)v->n_meta, sizeof *v->meta, by_key);
    Tokenizer *t = vocab_open(v, err);
    if (!CHECK(t != NULL)) return;
    static const char *const texts[] = {"a<s>e\xcc\x81", "\xcc\xb8<s>", "<s",
                                        "e\xcc\x81<s>\xcc\xb8", ""};
    static const int want[] = {2, 1, 2, 2, 2};  // U+0338 makes another character of the prefix's >
    for (int i = 0; i < 5; i++) {
        Ids ids = {0};
        int found = 0;
        CHECK(tokenizer_turn(t, 'u', texts[i], false, false, &ids) == 0);
        for (int k = 0; k < ids.n; k++) found += ids.id[k] == s;
        if (!CHECK(found == want[i])) printf("%s: %d\n", texts[i], found);
        ids_free(&ids);
    }
    tokenizer_close(t);
    free(v);
}

static void test_trim(void) {
    Vocab *v = vocab_new("bpe", "none");
    v->meta[v->n_meta++] = (Meta){"chat.trim", "0"};
    v->meta[v->n_meta++] = (Meta){"chat.trim_system", "1"};
    qsort(v->meta, (size_t)v->n_meta, sizeof *v->meta, by_key);
    Tokenizer *t = vocab_open(v, err);
    Ids ids = {0};
    CHECK(t != NULL && tokenizer_turn(t, 's', " a\n", true, false, &ids) == 0 && ids.n == 1);
    CHECK(tokenizer_turn(t, 'u', " a\n", false, true, &ids) == 0 && ids.n == 4);
    ids_free(&ids);
    tokenizer_close(t);
    free(v);
}

// What decoding takes away, and unknown characters in a row.
static void test_strip_and_fuse(void) {
    static const char *const want[] = {"  a a", " a a", "a a"};
    Vocab *v = vocab_new("spm", "none");
    int two = add_token(v, "  ", 2, 0), a = add_token(v, "a", 1, 0), u = add_token(v, "<u>", 3, 1);
    v->meta[v->n_meta++] = (Meta){"tokenizer.strip", "0"};
    v->meta[v->n_meta++] = (Meta){"tokenizer.fuse_unk", "0"};
    qsort(v->meta, (size_t)v->n_meta, sizeof *v->meta, by_key);
    for (int strip = 0; strip < 3; strip++) {
        set_meta(v, "tokenizer.strip", strip == 0 ? "0" : strip == 1 ? "1" : "2");
        Tokenizer *t = vocab_open(v, err);
        int ids[] = {two, a, ' ', a};
        size_t n;
        char *text = tokenizer_decode(t, ids, 4, &n), out[TOK_STREAM_MAX];
        CHECK_STR(text, want[strip]);
        TokStream s = {0};
        int first = tokenizer_stream(t, &s, two, out);
        CHECK(first == 2 - strip && tokenizer_stream(t, &s, ' ', out) == (strip < 3));
        free(text);
        tokenizer_close(t);
    }
    set_meta(v, "tokenizer.unk_id", "258");
    for (int b = 0; b < 256; b++) v->kind[b] = 4;
    CHECK(u == 258);
    CHECK_STR(ids_of(v, "éü", 0), "258 258");
    set_meta(v, "tokenizer.fuse_unk", "1");
    CHECK_STR(ids_of(v, "éü", 0), "258");
    static char text[6000];  // long enough that words are remembered
    for (int i = 0; i + 5 < 6000; i += 5)
        memcpy(text + i, i == 0 ? "\xc3\xa9\xc3\xbc|" : "a\xc3\xbc||", 5);
    Tokenizer *t = vocab_open(v, err);
    Ids ids = {0};
    CHECK(tokenizer_encode(t, text, strlen(text), 0, &ids) == 0);
    for (int i = 1; i + 1 < ids.n; i += 2) CHECK(ids.id[i] == a && ids.id[i + 1] == u);
    ids_free(&ids);
    tokenizer_close(t);
    free(v);
}

static unsigned characters(const UnicodeRange *range, size_t n) {
    unsigned sum = 0;
    for (; n > 0; n--, range++) sum += range->last - range->first + 1;
    return sum;
}

#define CHARACTERS(table) characters(table, sizeof(table) / sizeof *(table))

// The counts of Unicode 16 (and 17 for Digits), as tokenizers 0.23.3 answers code point by code
// point. U+31350 is a letter since Unicode 15, so that 's behind it is a piece of its own; U+11DE0
// is a digit since Unicode 17.
static void test_unicode(void) {
    CHECK(CHARACTERS(unicode_letters) == 141028 && CHARACTERS(unicode_numbers) == 1911);
    CHECK(CHARACTERS(unicode_later_numbers) == 13 && CHARACTERS(unicode_spaces) == 25);
    static const struct {
        const char *split, *text;
        int want;
    } cases[] = {{"llama3", "\xf0\xb1\x8d\x90's", 5},
                 {"digits+gpt2", "\xf0\x91\xb7\xa0's", 5},
                 {"gpt2", "\xf0\x91\xb7\xa0's", 6}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Vocab *v = vocab_new("bpe", cases[i].split);
        memcpy(v->merges[v->n_merges++], (int32_t[3]){'\'', 's', add_token(v, "'s", 2, 0)}, 12);
        Tokenizer *t = vocab_open(v, err);
        Ids ids = {0};
        CHECK(t != NULL && tokenizer_encode(t, cases[i].text, 6, 0, &ids) == 0);
        CHECK(ids.n == cases[i].want);
        ids_free(&ids);
        tokenizer_close(t);
        free(v);
    }
}

static void test_streaming(void) {
    Vocab *v = vocab_new("bpe", "none");
    Tokenizer *t = vocab_open(v, err);
    char out[TOK_STREAM_MAX];
    TokStream s = {0};
    const char *smile = "😀";
    for (int i = 0; i < 3; i++) CHECK(tokenizer_stream(t, &s, (uint8_t)smile[i], out) == 0);
    CHECK(tokenizer_stream(t, &s, (uint8_t)smile[3], out) == 4 && memcmp(out, smile, 4) == 0);
    CHECK(tokenizer_stream(t, &s, 0xe2, out) == 0);
    CHECK(tokenizer_stream(t, &s, 'a', out) == 2 && memcmp(out,
                                                           "\xe2"
                                                           "a",
                                                           2) == 0);  // never becomes one
    CHECK(tokenizer_stream(t, &s, 0xff, out) == 1);
    CHECK(tokenizer_stream(t, &s, 0xf0, out) == 0);
    CHECK(tokenizer_stream(t, &s, -1, out) == 1 && (uint8_t)out[0] == 0xf0);
    CHECK(tokenizer_stream(t, &s, -1, out) == 0);
    CHECK(tokenizer_stream(t, &s, v->n, out) == 0);  // no such id
    tokenizer_close(t);
    free(v);
}

// ---- files that make no sense ----

static void refuse(Vocab *v, const char *reason) {
    err[0] = 0;
    Tokenizer *t = vocab_open(v, err);
    CHECK(t == NULL);
    if (!CHECK(strstr(err, reason) != NULL)) printf("\"%s\" does not say \"%s\"\n", err, reason);
    tokenizer_close(t);
    free(v);
}

static void test_bad_files(void) {
    static const char *const wrong[][3] = {{"tokenizer.model", "word", "tokenizer.model"},
                                           {"tokenizer.split", "gpt5", "gpt5"},
                                           {"tokenizer.nfc", "2", "tokenizer.nfc"},
                                           {"tokenizer.bos_id", "256", "tokenizer.bos_id"},
                                           {"tokenizer.unk_id", "x", "tokenizer.unk_id"},
                                           {"tokenizer.stop_ids", "1,256", "tokenizer.stop_ids"},
                                           {"tokenizer.stop_ids", "1 2", "tokenizer.stop_ids"},
                                           {"tokenizer.stop_ids", "1,,2", "tokenizer.stop_ids"}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        Vocab *v = vocab_new("bpe", "gpt2");
        set_meta(v, wrong[i][0], wrong[i][1]);
        refuse(v, wrong[i][2]);
    }
    for (int i = 0; i < 3; i++) {
        Vocab *v = vocab_new("bpe", "gpt2");
        v->n_merges = 2;
        v->merges[1][i] = i == 1 ? -1 : 256;
        refuse(v, "row 1");
    }
    Vocab *v = vocab_new("bpe", "gpt2");
    v->offsets[7] = 9;
    refuse(v, "tok.offsets");
    v = vocab_new("bpe", "gpt2");
    v->kind[3] = 5;
    refuse(v, "tok.kind");
    v = vocab_new("bpe", "gpt2");
    v->offsets[0] = -1;
    refuse(v, "tok.offsets");
    tokenizer_close(NULL);
}

// ---- time ----

// Inputs that something slow would choke on: each takes seconds at most under sanitizers, and a
// quadratic step would take minutes.
static void test_no_slow_input(const Fixture *f) {
    static const char *const units[] = {
        "a", " ", "\n", " \n",  "ab",   "\u0301", "a\u0323\u0307", "漢字",
        "1", "'", "<",  "<|im", "\xff", " a",     "\xe2\x96"};
    enum { N = 300 * 1000 };
    char *text = malloc(N);
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        size_t unit = strlen(units[i]);
        for (size_t j = 0; j < N; j++) text[j] = units[i][j % unit];
        Ids ids = {0};
        clock_t start = clock();
        CHECK(tokenizer_encode(f->tok, text, N, TOK_SPECIAL, &ids) == 0);
        CHECK_NEAR((double)(clock() - start) / CLOCKS_PER_SEC, 0, 3);
        ids_free(&ids);
    }
    free(text);
}

int main(void) {
    for (int i = 0; i < N_FAMILIES; i++) {
        Fixture f;
        if (fixture_open(&f, families[i])) {
            test_cases(&f);
            test_pieces(&f);
            test_chat(&f);
            test_injection(&f);
            test_parts(&f);
            test_invalid(&f);
            test_no_slow_input(&f);
        }
        fixture_close(&f);
    }
    test_merging();
    test_words();
    test_long_chains();
    test_added_tokens();
    test_spaces_and_unknowns();
    test_nfc();
    test_unicode();
    test_flags();
    test_normalized_injection();
    test_strip_and_fuse();
    test_trim();
    test_streaming();
    test_bad_files();
    return test_end("test_tokenizer");
}
