// Forms of answers: what may come is what the definition says, byte by byte; JSON's grammar at its
// edges; what is not supported is refused by name and place; replies end where the value does.
//
// `test_constrain answers SEED` is the other half of tests/test_answers.py: each line of stdin is a
// schema, for which random logits write answers, or a schema, a tab and a value that it must take,
// with \1 for line breaks.
#include "constrain.h"

#include "answer.h"
#include "fixture.h"
#include "json.h"

static Fixture f;
static Pieces *pieces;
static int byte_id[256];  // the token that prints just this byte

static Schema *open_schema(const char *text) {
    Schema *s = schema_open(text, text ? strlen(text) : 0, pieces, err);
    if (!CHECK(s != NULL)) printf("%s: %s\n", text, err);
    return s;
}

static bool may(const Form *form, int id) {
    const uint64_t *mask = form_allowed(form, err);
    return CHECK(mask != NULL) && (mask[id / 64] >> (id % 64) & 1);
}

// Whether text [n] may be written, byte by byte, and be the whole answer; *at: bytes that went in.
static bool takes(Schema *s, const char *text, size_t n, size_t *at) {
    Form form = {0};
    bool ok = form_begin(&form, s, err) == 0;
    for (*at = 0; ok && *at < n; *at += ok) {
        int id = byte_id[(uint8_t)text[*at]];
        ok = may(&form, id);
        CHECK((form_take(&form, id, err) == 0) == ok);
    }
    ok = ok && form_may_end(&form);
    form_free(&form);
    return ok;
}

static bool valid(const char *schema, const char *text) {
    Schema *s = open_schema(schema);
    size_t at;
    bool ok = s && takes(s, text, strlen(text), &at);
    schema_close(s);
    return ok;
}

// ---- the mask ----

// The mask says of every token what feeding its bytes one by one says, wherever the text stands.
static void test_mask(const char *schema, const char *text) {
    Schema *s = open_schema(schema);
    int vocab = f.model.config.vocab_size, wrong = 0;
    for (size_t n = 0; s && n <= strlen(text); n++) {
        for (int id = 0; id < vocab; id++) {
            int bytes;
            const char *piece = tokenizer_piece(f.tok, id, &bytes);
            Form form = {0};
            bool ok = form_begin(&form, s, err) == 0;
            for (size_t i = 0; i < n; i++)
                CHECK(form_take(&form, byte_id[(uint8_t)text[i]], err) == 0);
            bool said = may(&form, id), ends = form_may_end(&form);
            for (int i = 0; ok && i < bytes; i++)
                ok = form_take(&form, byte_id[(uint8_t)piece[i]], err) == 0;
            if (tokenizer_is_special(f.tok, id) || tokenizer_is_stop(f.tok, id))
                ok = ends && tokenizer_is_stop(f.tok, id);
            wrong += said != ok;
            form_free(&form);
        }
    }
    CHECK(wrong == 0);
    schema_close(s);
}

// ---- JSON ----

static void test_json(void) {
    static const char string[] = "{\"type\":\"string\"}", number[] = "{\"type\":\"number\"}";
    static const struct {
        const char *schema, *text;
        bool ok;
    } cases[] = {
        {string, "\"\"", true},
        {string, "\"a\\\"\\\\\\/\\b\\f\\n\\r\\t\"", true},
        {string, "\"\\x\"", false},
        {string, "\"\x1f\"", false},
        {string, "\"\x7f\"", true},
        {string, "\"\\u00e9\\uFFFF\"", true},
        {string, "\"\\u0000\"", false},
        {string, "\"\\u00G0\"", false},
        {string, "\"\\u123\"", false},
        {string, "\"\\ud83d\\ude00\"", true},
        {string, "\"\\ud83d\"", false},
        {string, "\"\\ud83dx\"", false},
        {string, "\"\\ud83d\\n\"", false},
        {string, "\"\\ud83d\\u0041\"", false},
        {string, "\"\\ude00\"", false},
        {string, "\"\\ud83d\\ud83d\"", false},
        {string, "\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\"", true},
        {string, "\"\xc3\"", false},
        {string, "\"\xc0\xaf\"", false},
        {string, "\"\xe0\x9f\xbf\"", false},
        {string, "\"\xed\xa0\x80\"", false},
        {string, "\"\xf4\x90\x80\x80\"", false},
        {string, "\"\x80\"", false},
        {string, " \"a\"", false},
        {string, "\"a\" ", false},
        {number, "0", true},
        {number, "-0.5e+10", true},
        {number, "12E3", true},
        {number, "01", false},
        {number, "-", false},
        {number, "1.", false},
        {number, ".5", false},
        {number, "1e", false},
        {number, "1e100", false},
        {number, "+1", false},
        {number, "123456789012345678", true},
        {number, "1234567890123456789", false},
        {"{\"type\":\"integer\"}", "-17", true},
        {"{\"type\":\"integer\"}", "1.5", false},
        {"{\"type\":\"integer\"}", "1e3", false},
        {NULL, "{}", true},
        {NULL, "[]", false},
        {NULL, "{\"a\": [1, true, null, {\"b\": \"c\"}], \"d\": -2.5}", true},
        {NULL, "{\n    \"a\": [\n\t1,\n        2\n    ]\n}", true},
        {NULL, "{  \"a\": 1}", false},
        {NULL, "{\"a\" : 1}", false},
        {NULL, "{\"a\": 1,}", false},
        {NULL, "{\"a\": [1 2]}", false},
        {NULL, "{\"a\": tru}", false},
        {NULL, "{a: 1}", false},
        {"true", "[[], {}]", true},
        {"{\"enum\":[1,12,\"a\",null,{\"b\":[1,2]}]}", "12", true},
        {"{\"enum\":[1,12,\"a\",null,{\"b\":[1,2]}]}", "1", true},
        {"{\"enum\":[1,12,\"a\",null,{\"b\":[1,2]}]}", "{\"b\":[1,2]}", true},
        {"{\"enum\":[1,12,\"a\",null,{\"b\":[1,2]}]}", "2", false},
        {"{\"type\":\"string\",\"enum\":[1,\"a\"]}", "1", false},
        {"{\"const\":\"\\u00e9\\n\\\"\\u0001\"}", "\"\xc3\xa9\\n\\\"\\u0001\"", true},
        {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"\xc3\xa9\"", false},
        {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"\xc3\xa9\xc3\xa9\"", true},
        {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"a\\ud83d\\ude00\\n\"", true},
        {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"abcd\"", false},
        {"{\"type\":[\"string\",\"null\"]}", "null", true},
        {"{\"anyOf\":[{\"type\":\"integer\"},{\"type\":\"array\"}]}", "[\"x\"]", true},
        {"{\"type\":\"array\",\"items\":{\"type\":\"boolean\"},\"minItems\":1,\"maxItems\":2}",
         "[]", false},
        {"{\"type\":\"array\",\"items\":{\"type\":\"boolean\"},\"minItems\":1,\"maxItems\":2}",
         "[true, false]", true},
        {"{\"type\":\"array\",\"items\":{\"type\":\"boolean\"},\"minItems\":1,\"maxItems\":2}",
         "[true,true,true]", false},
        {"{\"properties\":{\"a\":{},\"b\":{\"const\":1},\"\":true},\"required\":[\"b\"]}",
         "{\"b\": 1}", true},
        {"{\"properties\":{\"a\":{},\"b\":{\"const\":1},\"\":true},\"required\":[\"b\"]}",
         "{\"a\": 0, \"b\": 1, \"\": 2}", true},
        {"{\"properties\":{\"a\":{},\"b\":{\"const\":1},\"\":true},\"required\":[\"b\"]}",
         "{\"a\": 0}", false},
        {"{\"properties\":{\"a\":{},\"b\":{\"const\":1},\"\":true},\"required\":[\"b\"]}",
         "{\"c\": 0}", false},
        {"{\"type\":\"object\",\"additionalProperties\":{\"type\":\"null\"}}",
         "{\"x\": null, \"y\":null}", true},
        {"{\"type\":\"object\",\"additionalProperties\":false}", "{\"x\": 1}", false},
        {"{\"type\":\"object\",\"properties\":{\"next\":{\"$ref\":\"#\"}}}",
         "{\"next\": {\"next\": {}}}", true},
        {"{\"$ref\":\"#/$defs/"
         "a\",\"$defs\":{\"a\":{\"anyOf\":[{\"type\":\"null\"},{\"type\":\"array\","
         "\"items\":{\"$ref\":\"#/$defs/a\"}}]}}}",
         "[null,[[]]]", true},
        {"{\"properties\":{\"a\":{\"$id\":\"a\",\"$ref\":\"#/$defs/"
         "x\",\"$defs\":{\"x\":{\"anyOf\":[{"
         "\"type\":\"null\"},{\"type\":\"array\",\"items\":{\"$ref\":\"#\"}}]}}},\"b\":{\"$ref\":"
         "\"#/$defs/"
         "x\"}},\"$defs\":{\"x\":{\"const\":1}}}",
         "{\"a\": [null,[]], \"b\": 1}", true},
        {"{\"properties\":{\"a\":{\"$id\":\"a\",\"$ref\":\"#/$defs/x\",\"$defs\":{\"x\":{\"type\":"
         "\"null\"}}}},\"$defs\":{\"x\":{\"const\":1}}}",
         "{\"a\": 1}", false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!CHECK(valid(cases[i].schema, cases[i].text) == cases[i].ok))
            printf("%s: %s\n", cases[i].schema, cases[i].text);
}

// No value nests deeper than the one JSON reader reads, and each is left in time.
static void test_depth(void) {
    enum { DEEP = JSON_DEPTH };
    char text[2 * DEEP + 3] = {0};
    for (int n = DEEP - 1; n <= DEEP + 1; n++) {
        memset(text, '[', (size_t)n), memset(text + n, ']', (size_t)n), text[2 * n] = 0;
        CHECK(valid("{}", text) == (n <= DEEP));
    }
    static const char list[] =
        "{\"type\":\"object\",\"properties\":{\"value\":{\"type\":\"integer\"},"
        "\"next\":{\"anyOf\":[{\"$ref\":\"#\"},{\"type\":\"null\"}]}},"
        "\"required\":[\"next\"]}";
    char next[DEEP * 12 + 32] = "";
    for (int i = 0; i < DEEP; i++) strcat(next, "{\"next\":");
    CHECK(!valid(list, next));
    Schema *s = open_schema(list);
    size_t at;
    CHECK(!takes(s, next, strlen(next), &at) && at == strlen(next));
    CHECK(!takes(s, strcat(next, "{"), strlen(next), &at) && at == strlen(next) - 1);
    next[strlen(next) - 1] = 0;
    strcat(next, "null");
    for (int i = 0; i < DEEP; i++) strcat(next, "}");
    CHECK(takes(s, next, strlen(next), &at));
    schema_close(s);
}

// ---- what is refused ----

static void test_refused(void) {
    static const char *const cases[][2] = {
        {"{\"properties\":{\"age\":{\"type\":\"integer\",\"minimum\":3}}}",
         "#/properties/age: \"minimum\" is not supported"},
        {"{\"anyOf\":[{},{\"items\":{\"pattern\":\"a\"}}]}",
         "#/anyOf/1/items: \"pattern\" is not supported"},
        {"{\"oneOf\":[{}]}", "#: \"oneOf\" is not supported"},
        {"{\"$ref\":\"#/$defs/a\",\"$defs\":{\"a\":{\"format\":\"date\"}}}",
         "#/$defs/a: \"format\" is"},
        {"{\"$ref\":\"#/$defs/b\",\"$defs\":{\"a\":{}}}", "#: \"$ref\": there is no \"#/$defs/b\""},
        {"{\"$ref\":\"http://a/b\"}", "there is no \"http://a/b\""},
        {"{\"type\":\"strin\"}", "#: there is no type \"strin\""},
        {"{\"type\":7}", "\"type\" is not"},
        {"{\"anyOf\":[]}", "#/anyOf: not a list of 1 to"},
        {"{\"anyOf\":[{}],\"type\":\"string\"}", "\"type\" beside \"anyOf\""},
        {"{\"enum\":[1],\"minLength\":2,\"type\":\"string\"}", "\"minLength\" beside \"enum\""},
        {"{\"enum\":[1],\"const\":1}", "\"const\" beside \"enum\""},
        {"{\"enum\":[]}", "#: no value is allowed"},
        {"{\"enum\":[1],\"type\":\"string\"}", "#: no value is allowed"},
        {"{\"type\":\"array\",\"items\":[{}]}", "#/items: not a schema"},
        {"{\"type\":\"array\",\"items\":false}", "#/items: false allows nothing"},
        {"{\"type\":\"array\",\"minItems\":2,\"maxItems\":1}",
         "\"minItems\" 2 is more than \"maxItems\" 1"},
        {"{\"type\":\"array\",\"minItems\":1.5}", "\"minItems\" needs a whole number"},
        {"{\"type\":\"string\",\"maxLength\":-1}", "\"maxLength\" needs a whole number"},
        {"{\"type\":\"object\",\"required\":[\"a\"]}",
         "\"required\" names \"a\", which \"properties\" lacks"},
        {"{\"type\":\"object\",\"properties\":{\"a\":{}},\"additionalProperties\":{}}",
         "\"additionalProperties\" as a schema beside"},
        {"{\"properties\":{\"a\":{},\"a\":{}}}", "#/properties: \"a\" is given twice"},
        {"{\"properties\":{\"a\":3}}", "#/properties/a: not a schema"},
        {"{\"minItems\":1,\"minLength\":1}", "#: \"type\" is missing"},
        {"{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#\"}},\"required\":[\"a\"]}",
         "#: no value nests"},
        {"{\"$ref\":\"#\"}", "#: no value nests"},
        {"{\"type\":\"array\",\"minItems\":1,\"items\":{\"$ref\":\"#\"}}", "#: no value nests"},
        {"{\"anyOf\":[{\"$ref\":\"#\"}]}", "#: no value nests"},
        {"[]", "#: not a schema"},
        {"false", "#: false allows nothing"},
        {"{\"type\":", "byte 8: expected a value"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK(schema_open(cases[i][0], strlen(cases[i][0]), pieces, err) == NULL);
        if (!CHECK(strstr(err, cases[i][1]) != NULL)) printf("%s\n%s\n", cases[i][0], err);
    }
}

// ---- replies ----

// The same alone and in company, over where the value is, cut where the limit is, no other token
// where the form says no.
static void test_replies(void) {
    enum { N = 6 };
    static const char schema[] =
        "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},"
        "\"b\":{\"enum\":[\"red\",\"green\"]}},\"required\":[\"a\",\"b\"]}";
    int prompt[] = {5, 9, 12, 7}, n_whole = 0;
    Answerer a;
    Schema *s = open_schema(schema);
    Reply r[2][N], *all[N];
    Sampling own[2][N];
    CHECK(answer_open(&a, &f.state, &f.kv, f.tok, err) == 0);
    for (int in = 0; in < 2; in++) {
        for (int i = 0; i < N; i++) {
            own[in][i] = sampling_nth(&(Sampling){.temp = 1.5, .top_p = 0.95, .random = 4}, i);
            r[in][i] = (Reply){.seq = kvcache_new(&f.kv, err),
                               .prompt = prompt,
                               .n_prompt = 4,
                               .limit = i == 1 ? 3 : 80,
                               .ignore_stop = i == 2,
                               .schema = s,
                               .sampling = i == 0 ? NULL : &own[in][i]};
            CHECK(reply_begin(&r[in][i], "", err) == 0);
            all[i] = &r[in][i];
            while (in == 0 && answer_step(&a, all + i, 1, err) > 0) continue;
        }
    }
    while (answer_step(&a, all, N, err) > 0) continue;
    for (int i = 0; i < N; i++) {
        Reply *x = &r[0][i], *y = &r[1][i];
        size_t at;
        CHECK(x->done && y->done && x->text.n == y->text.n &&
              memcmp(x->text.s, y->text.s, x->text.n) == 0);
        n_whole += !x->cut;
        CHECK(takes(s, x->text.s, x->text.n, &at) == !x->cut && at == x->text.n);
    }
    CHECK(n_whole >= 3 && r[0][1].cut);
    Reply forced = {.prompt = prompt, .n_prompt = 4, .limit = 9, .schema = s};
    CHECK(reply_begin(&forced, "", err) == 0 && reply_take(&a, &forced, byte_id['{'], err) == 0);
    CHECK(reply_take(&a, &forced, byte_id['{'], err) == -1 && strstr(err, "does not fit the form"));
    reply_free(&forced);
    for (int i = 0; i < 2 * N; i++)
        kvcache_drop(&f.kv, r[i / N][i % N].seq), reply_free(&r[i / N][i % N]);
    schema_close(s);
    answer_close(&a);
}

// ---- for tests/test_answers.py ----

// An answer of random logits, in which what ends something comes more often: its bytes in
// hexadecimal, and whether it is over.
static void write_answer(Schema *s, Sampling *how, Choice *scratch) {
    enum { LIMIT = 300 };
    static float logits[1 << 16];
    int vocab = f.model.config.vocab_size, i = 0;
    Form form = {0};
    CHECK(form_begin(&form, s, err) == 0);
    for (; i < LIMIT && !form_is_over(&form); i++) {
        for (int id = 0; id < vocab; id++)
            logits[id] = (float)((double)(random_next(&how->random) >> 11) * 0x1p-53 * 6);
        Draw d = {
            .logits = logits, .n = vocab, .allowed = form_allowed(&form, err), .scratch = scratch};
        int id = sampling_draw(how, &d), bytes;
        if (tokenizer_is_stop(f.tok, id) && CHECK(form_may_end(&form))) break;
        CHECK(form_take(&form, id, err) == 0);
        const char *piece = tokenizer_piece(f.tok, id, &bytes);
        for (int b = 0; b < bytes; b++) printf("%02x", (uint8_t)piece[b]);
    }
    printf(" %s\n", i < LIMIT ? "over" : "cut");
    form_free(&form);
}

static int serve(uint64_t seed) {
    enum { ANSWERS = 6 };
    static char line[1 << 16];
    static const char ends[] = "\"\"}}]]]";
    Choice *scratch = calloc((size_t)f.model.config.vocab_size, sizeof *scratch);
    Bias bias[sizeof ends - 1];
    for (size_t i = 0; i < sizeof ends - 1; i++) bias[i] = (Bias){byte_id[(uint8_t)ends[i]], 3};
    Sampling how = {.temp = 1, .top_p = 1, .random = seed, .bias = bias, .n_bias = sizeof ends - 1};
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        char *value = strchr(line, '\t');
        if (value) *value++ = 0;
        for (char *c = value; c && *c; c++)
            if (*c == 1) *c = '\n';
        size_t at;
        Schema *s = schema_open(line, strlen(line), pieces, err);
        if (!s)
            printf("refused %s\n", err);
        else if (value)
            printf("%s\n", takes(s, value, strlen(value), &at) ? "yes" : "no");
        for (int i = 0; s && !value && i < ANSWERS; i++) write_answer(s, &how, scratch);
        schema_close(s);
    }
    free(scratch);
    return test_failed > 0;
}

int main(int argc, char **argv) {
    bool serves = argc > 2 && strcmp(argv[1], "answers") == 0;
    if (kernels_init(!serves && argc > 1 ? argv[1] : NULL) != 0) return 1;
    if (!fixture_open(&f, "smol", "smol.kvz", KV_F32, 2)) return test_end("test_constrain");
    pieces = pieces_open(f.tok, f.model.config.vocab_size, err);
    if (!CHECK(pieces != NULL)) return printf("%s\n", err), test_end("test_constrain");
    for (int id = 0; id < f.model.config.vocab_size; id++) {
        int n;
        const char *piece = tokenizer_piece(f.tok, id, &n);
        if (n == 1 && !tokenizer_is_special(f.tok, id)) byte_id[(uint8_t)*piece] = id;
    }
    if (serves) return serve(strtoull(argv[2], NULL, 10));
    test_json();
    test_depth();
    test_refused();
    test_mask(NULL, "{\"a\\n\xc3\xa9\": [1.5, true]");
    test_mask(
        "{\"anyOf\":[{\"enum\":[\"the\",\"there\",12]},{\"type\":\"string\",\"maxLength\":4},"
        "{\"type\":\"integer\"}]}",
        "\"the");
    test_replies();
    pieces_close(pieces);
    fixture_close(&f);
    return test_end("test_constrain");
}
