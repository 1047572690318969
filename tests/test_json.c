// test_json.c: the reader refuses what is not JSON and reads nothing past the end; what is written
// reads back as it was.
#define _POSIX_C_SOURCE 200809L
#include "json.h"

#include <stdint.h>

#include "test.h"
#include "tree.h"
#include "util.h"

enum { NODES = 4096 };
static JsonNode node[NODES];
static char err[ERR_LEN];
static char *text;     // the document at hand, in memory of exactly its size
static char *written;  // what the last writing gave
static size_t n_written;

static const JsonNode *read_bytes(const char *s, size_t n, size_t cap) {
    free(text);
    text = malloc(n + 1);
    memcpy(text, s, n);
    err[0] = 0;
    const JsonNode *v = json_read(node, cap, text, n, err);
    CHECK((v == NULL) == (err[0] != 0));
    return v;
}

static const JsonNode *read_text(const char *s) { return read_bytes(s, strlen(s), NODES); }

// A file whose bytes are in `written` after close_written.
static FILE *open_written(void) {
    free(written);
    written = NULL;
    return open_memstream(&written, &n_written);
}

static const char *close_written(FILE *f) {
    CHECK(!ferror(f) && fclose(f) == 0);
    return written;
}

static const char *string_of(const char *s, size_t n) {
    FILE *f = open_written();
    json_put_string(f, s, n);
    return close_written(f);
}

static const char *tree_of(const JsonNode *v) {
    FILE *f = open_written();
    tree_put(f, v);
    return close_written(f);
}

// ---- reading ----

static void test_tree(void) {
    static const char doc[] =
        " {\"a\" : [1, -2.5e+3, [], "
        "{}],\n\t\"b\":{\"c\":null,\"d\":true,\"e\":false},\r\"f\":\"\"} ";
    const JsonNode *v = read_text(doc);
    CHECK(v && v->kind == JSON_OBJECT && v->n == 3 && v->key == NULL && v->next == NULL);
    CHECK_STR(tree_of(v),
              "{\"a\":[1,-2.5e+3,[],{}],\"b\":{\"c\":null,\"d\":true,\"e\":false},\"f\":\"\"}");
    const JsonNode *a = json_member(v, "a"), *b = json_member(v, "b");
    CHECK(a && a->kind == JSON_LIST && a->n == 4 && b && b->kind == JSON_OBJECT && b->n == 3);
    CHECK(json_number(a->child) == 1 && json_number(a->child->next) == -2500);
    CHECK(a->child->next->next->child == NULL && a->child->key == NULL);
    CHECK(json_member(b, "c") == NULL && json_member(b, "absent") == NULL);
    CHECK(json_member(b, "d")->n == 1 && json_member(b, "e")->n == 0);
    CHECK(read_text("7")->kind == JSON_NUMBER && json_number(&node[0]) == 7);
    CHECK_STR(json_member(read_text("{\"a\":\"first\",\"a\":2}"), "a")->text, "first");
}

// Every cut of a document is an error; nothing is read past the end, as a sanitizer would tell.
static void test_cuts(void) {
    static const char doc[] =
        "{\"text\":\"a\\n\\u00e9\\ud83d\\ude00 \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80\","
        "\"list\":[true,false,null,-12.5e-3,{\"deep\":[[]]}]}";
    for (size_t n = 0; n < sizeof doc - 1; n++)
        if (!CHECK(read_bytes(doc, n, NODES) == NULL)) printf("  accepted %zu bytes\n", n);
    CHECK(read_bytes(doc, sizeof doc - 1, NODES) != NULL);
}

// A byte changed anywhere: an error, or a document that is still one when it is written again.
static void test_changes(void) {
    static const char doc[] = "{\"a\\u0041\":[1.5,\"\\\\ \xc3\xa9\",true],\"b\":{\"c\":-0e1}}";
    char changed[sizeof doc], again[256];
    for (size_t i = 0; i < sizeof doc - 1; i++)
        for (int c = 0; c < 256; c++) {
            memcpy(changed, doc, sizeof doc);
            changed[i] = (char)c;
            const JsonNode *v = read_bytes(changed, sizeof doc - 1, NODES);
            if (!v) continue;
            strcpy(again, tree_of(v));
            CHECK_STR(tree_of(read_text(again)), again);
        }
}

static void test_depth(void) {
    char deep[2 * JSON_DEPTH + 4];
    for (int depth = 1; depth <= JSON_DEPTH + 1; depth++) {
        memset(deep, '[', (size_t)depth);
        memset(deep + depth, ']', (size_t)depth);
        CHECK((read_bytes(deep, 2 * (size_t)depth, NODES) != NULL) == (depth <= JSON_DEPTH));
    }
    CHECK_STR(err, "byte 33: lists or objects nested too deep");
    char *many = malloc(1 << 20);  // no frame for each
    memset(many, '[', 1 << 20);
    CHECK(read_bytes(many, 1 << 20, NODES) == NULL);
    free(many);
}

static void test_room(void) {
    static const char doc[] = "{\"a\":[1,2,{}],\"b\":\"c\"}";  // six values
    for (size_t cap = 0; cap < 6; cap++) CHECK(read_bytes(doc, sizeof doc - 1, cap) == NULL);
    CHECK_STR(err, "byte 18: too many values");
    CHECK(read_bytes(doc, sizeof doc - 1, 6) != NULL);
}

static void test_broken(void) {
    static const struct {
        const char *doc, *err;
    } broken[] = {
        {"", "byte 0: expected a value"},
        {" \n", "byte 2: expected a value"},
        {"{", "byte 1: expected '\"'"},
        {"{a:1}", "byte 1: expected '\"'"},
        {"{\"a\" 1}", "byte 5: expected ':'"},
        {"{\"a\":}", "byte 5: expected a value"},
        {"{\"a\":1,}", "byte 7: expected '\"'"},
        {"{,}", "byte 1: expected '\"'"},
        {"[1,]", "byte 3: expected a value"},
        {"[,1]", "byte 1: expected a value"},
        {"[1 2]", "byte 3: expected ']'"},
        {"[1}", "byte 2: expected ']'"},
        {"{\"a\":1]", "byte 6: expected '}'"},
        {"{} x", "byte 3: something follows the value"},
        {"1 1", "byte 2: something follows the value"},
        {"nul", "byte 0: expected a value"},
        {"True", "byte 0: expected a value"},
        {"nullx", "byte 4: something follows the value"},
        {"NaN", "byte 0: expected a value"},
        {"\"", "byte 1: string without end"},
        {"\"a", "byte 2: string without end"},
        {"\"a\nb\"", "byte 2: control character in a string"},
        {"\"\\", "byte 2: cut escape"},
        {"\"\\x\"", "byte 2: unknown escape"},
        {"\"\\U0041\"", "byte 2: unknown escape"},
        {"\"\\u\"", "byte 3: \\u needs four hexadecimal digits"},
        {"\"\\u12G4\"", "byte 5: \\u needs four hexadecimal digits"},
        {"\"\\u004", "byte 6: \\u needs four hexadecimal digits"},
        {"\"\\u0000\"", "byte 7: a string holds a zero byte"},
        {"\"\xff\"", "byte 1: not UTF-8"},
        {"\"\xc3\"", "byte 1: not UTF-8"},
        {"\"\xe2\x82", "byte 1: not UTF-8"},
        {"\"\xc0\xaf\"", "byte 1: not UTF-8"},      // overlong
        {"\"\xed\xa0\x80\"", "byte 1: not UTF-8"},  // half a surrogate pair
        {"\"\xf4\x90\x80\x80\"", "byte 1: not UTF-8"},
        {"\xef\xbb\xbf{}", "byte 0: expected a value"},  // a byte order mark
    };
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        CHECK(read_text(broken[i].doc) == NULL);
        CHECK_STR(err, broken[i].err);
    }
    CHECK(read_bytes("[1]\0", 4, NODES) == NULL);  // a zero byte, wherever it is
    CHECK(read_bytes("\"a\0b\"", 5, NODES) == NULL);
    CHECK(read_bytes("{\0}", 3, NODES) == NULL);
}

static void test_surrogates(void) {
    static const char *const halves[] = {
        "\"\\ud83d\"",        "\"\\ude00\"",        "\"\\ud83d\\u0041\"", "\"\\ud83dx\"",
        "\"\\ud83d\\ud83d\"", "\"\\ude00\\ud83d\"", "\"\\ud83d\\n\"",     "\"\\ud83d\\ude0\"",
    };
    for (size_t i = 0; i < sizeof halves / sizeof *halves; i++) CHECK(!read_text(halves[i]));
    CHECK_STR(read_text("\"\\ud83d\\ude00\"")->text, "\xf0\x9f\x98\x80");
    CHECK_STR(read_text("\"\\uD800\\uDC00\"")->text, "\xf0\x90\x80\x80");
    CHECK_STR(read_text("\"\\udbff\\udfff\"")->text, "\xf4\x8f\xbf\xbf");
    CHECK_STR(read_text("\"\\ud7ff\\ue000\"")->text, "\xed\x9f\xbf\xee\x80\x80");
}

static void test_numbers(void) {
    static const char *const good[] = {"0",   "-0",   "1",      "10",  "0.5",   "-12.25",
                                       "1e5", "1E+5", "1.5e-3", "0e0", "1e999", "123456789012"};
    static const char *const wrong[] = {"01",  "-01",  "+1",   ".5",  "1.", "-",        "--1", "1e",
                                        "1e+", "1.e1", "0x10", "1_0", "-a", "Infinity", "1,5"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        const JsonNode *v = read_text(good[i]);
        CHECK(v && v->kind == JSON_NUMBER && v->n == (int)strlen(good[i]));
        CHECK(v && json_number(v) == strtod(good[i], NULL));
    }
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        if (!CHECK(!read_text(wrong[i]))) printf("  accepted: %s\n", wrong[i]);
}

static void test_sizes(void) {
    static const char *const wrong[] = {"-1", "-0", "1.0", "1e2", "\"1\"", "[1]", "true"};
    char most[32];
    size_t n;
    CHECK(json_size(read_text("0"), &n) == 0 && n == 0);
    CHECK(json_size(read_text("4294967297"), &n) == 0 && n == (size_t)4294967297u);
    snprintf(most, sizeof most, "%zu", SIZE_MAX);
    CHECK(json_size(read_text(most), &n) == 0 && n == SIZE_MAX);
    most[strlen(most) - 1]++;
    CHECK(json_size(read_text(most), &n) != 0);
    CHECK(json_size(read_text("99999999999999999999"), &n) != 0);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        CHECK(json_size(read_text(wrong[i]), &n) != 0);
}

static void test_fields(void) {
    const JsonNode *v = read_text("{\"s\":\"text\",\"n\":3,\"none\":null,\"l\":[1]}");
    JsonFields f = {.object = v, .err = err};
    CHECK_STR(json_need_text(&f, "s"), "text");
    CHECK_STR(json_may_text(&f, "s"), "text");
    CHECK(json_number(json_need(&f, "n", JSON_NUMBER)) == 3);
    CHECK(json_may(&f, "absent", JSON_LIST) == NULL && json_may_text(&f, "none") == NULL);
    CHECK(json_need(&f, "l", JSON_LIST)->n == 1 && !f.failed);
    CHECK(json_need(&f, "none", JSON_NUMBER) == NULL && f.failed);
    CHECK_STR(err, "\"none\" is missing");
    CHECK(json_need_text(&f, "s") == NULL && json_may(&f, "n", JSON_STRING) == NULL);
    CHECK_STR(err, "\"none\" is missing");  // the first one stays
    f = (JsonFields){.object = v, .err = err};
    CHECK(json_may_text(&f, "l") == NULL && f.failed);
    CHECK_STR(err, "\"l\" is not a string");
}

static void test_lines(void) {
    char lines[] = "{\"a\":1}\n\n \t\r\n[{\"a\":[1,2]}]\n {\"a\":[1,2,3,4]}\r\n{\"a\":\n{}";
    JsonLines l = {.rest = lines};
    const JsonNode *top;
    CHECK(json_lines_next(&l, &top, err) == 0 && top && l.line == 1 && top->n == 1);
    CHECK(json_lines_next(&l, &top, err) != 0 && l.line == 4);
    CHECK_STR(err, "not a JSON object");
    CHECK(json_lines_next(&l, &top, err) == 0 && json_member(top, "a")->n == 4);
    CHECK(json_lines_next(&l, &top, err) != 0 && l.line == 6);
    CHECK_STR(err, "byte 5: expected a value");
    CHECK(json_lines_next(&l, &top, err) == 0 && top && top->n == 0 && l.line == 7);
    CHECK(json_lines_next(&l, &top, err) == 0 && !top);
    CHECK(json_lines_next(&l, &top, err) == 0 && !top);
    json_lines_close(&l);
    json_lines_close(&l);
}

// ---- writing ----

// Each character, and so each escape, reads back as it was, alone and beside others.
static void test_round_trip(void) {
    char s[8], doc[64];
    int wrong = 0;
    for (uint32_t c = 1; c < 0x110000; c += c < 0x3000 ? 1 : 97) {
        if (c >= 0xd800 && c < 0xe000) continue;
        s[0] = 'x';
        int n = 1 + utf8_put((uint8_t *)s + 1, c);
        s[n++] = 'y', s[n] = 0;
        strcpy(doc, string_of(s, (size_t)n));
        const JsonNode *v = read_text(doc);
        wrong += !v || v->n != n || memcmp(v->text, s, (size_t)n + 1) != 0;
        snprintf(doc, sizeof doc, "\"x\\u%04xy\"", (unsigned)c);  // as another program may write it
        if (c > 0xffff)
            snprintf(doc, sizeof doc, "\"x\\u%04X\\u%04Xy\"", (unsigned)(0xd7c0 + (c >> 10)),
                     (unsigned)(0xdc00 | (c & 0x3ff)));
        v = read_text(doc);
        wrong += !v || v->n != n || memcmp(v->text, s, (size_t)n + 1) != 0;
    }
    CHECK(wrong == 0);
    CHECK_STR(read_text("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"")->text, "\"\\/\b\f\n\r\t");
    CHECK_STR(string_of("\"\\/\b\f\n\r\t\x7f", 9),
              "\"\\\"\\\\/\\u0008\\u000c\\n\\u000d\\u0009\\u007f\"");
}

// One U+FFFD for each piece of a character: the table of Unicode 15, section 3.9, and cut ends.
static void test_broken_utf8(void) {
#define R "\xef\xbf\xbd"
    CHECK_STR(string_of("a\xff"
                        "b",
                        3),
              "\"a" R "b\"");
    CHECK_STR(string_of("\xc0\xaf\xe0\x80\xbf\xf0\x81\x82\x41", 9), "\"" R R R R R R R R "A\"");
    CHECK_STR(string_of("\xed\xa0\x80\xed\xbf\xbf\xed\xaf\x41", 9), "\"" R R R R R R R R "A\"");
    CHECK_STR(string_of("\xf4\x91\x92\x93\xff\x41\x80\xbf\x42", 9), "\"" R R R R R "A" R R "B\"");
    CHECK_STR(string_of("\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41", 9), "\"" R R R R "A\"");
    CHECK_STR(string_of("\xe2\x82", 2), "\"" R "\"");
    CHECK_STR(string_of("\xf0\x9f\x98", 3), "\"" R "\"");
    CHECK_STR(string_of("a\0b", 3), "\"a\\u0000b\"");
    CHECK_STR(string_of(NULL, 0), "\"\"");
#undef R
}

static void test_print(void) {
    const char *volatile none = NULL;
    FILE *f = open_written();
    json_print(f, "{'s': %s, 'cut': %.*s, 'none': %s, 'd': %d, 'l': %ld, 'z': %zu}", "a\"b", 2,
               "xyz", none, -3, 1234567890123L, SIZE_MAX);
    CHECK_STR(close_written(f),
              "{\"s\": \"a\\\"b\", \"cut\": \"xy\", \"none\": null, \"d\": -3, "
              "\"l\": 1234567890123, \"z\": 18446744073709551615}");
    f = open_written();
    json_print(f, "[%g, %g, %.17g, %g, %g, %.17g]", 0.1, 1e30, 0.1, NAN, INFINITY, -INFINITY);
    CHECK_STR(close_written(f), "[0.1, 1e+30, 0.10000000000000001, null, null, null]");
}

// As Python's json.dumps has it: dumps(v, ensure_ascii=False), with indent=2, and separators=(",",
// ":").
static void test_dump(void) {
    static const struct {
        const char *text, *line, *lines, *compact;
    } cases[] = {
        {"{}", "{}", "{}", "{}"},
        {"[ ]", "[]", "[]", "[]"},
        {"{\"a\":[1.50,-2e3,{}],\"b\":{\"c\":null}, \"d\":true}",
         "{\"a\": [1.50, -2e3, {}], \"b\": {\"c\": null}, \"d\": true}",
         "{\n  \"a\": [\n    1.50,\n    -2e3,\n    {}\n  ],\n  \"b\": {\n    \"c\": null\n  },\n"
         "  \"d\": true\n}",
         "{\"a\":[1.50,-2e3,{}],\"b\":{\"c\":null},\"d\":true}"},
        {"\"\\u0001\\n\\\"\\\\/\\u00e9\\u2028\\u007f<&'\"",
         "\"\\u0001\\n\\\"\\\\/\xc3\xa9\xe2\x80\xa8\x7f<&'\"",
         "\"\\u0001\\n\\\"\\\\/\xc3\xa9\xe2\x80\xa8\x7f<&'\"",
         "\"\\u0001\\n\\\"\\\\/\xc3\xa9\xe2\x80\xa8\x7f<&'\""},
    };
    static const int indents[] = {0, 2, JSON_COMPACT};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *wanted[] = {cases[i].line, cases[i].lines, cases[i].compact};
        for (int k = 0; k < 3; k++) {
            Buffer b = {0};
            CHECK(json_dump(&b, read_text(cases[i].text), indents[k]) == 0);
            CHECK_STR(b.s, wanted[k]);
            free(b.s);
        }
    }
}

// A number with 9 digits is the same float, with 17 the same double.
static void test_print_numbers(void) {
    uint64_t random = 1;
    int wrong = 0;
    for (int i = 0; i < 2000; i++) {
        double d = ldexp((double)random_next(&random), (int)(random_next(&random) % 200) - 160);
        FILE *f = open_written();
        json_print(f, "[%g,%.17g]", (float)d, d);
        const JsonNode *v = read_text(close_written(f));
        wrong += (float)json_number(v->child) != (float)d || json_number(v->child->next) != d;
    }
    CHECK(wrong == 0);
}

int main(void) {
    test_tree();
    test_cuts();
    test_changes();
    test_depth();
    test_room();
    test_broken();
    test_surrogates();
    test_numbers();
    test_sizes();
    test_fields();
    test_lines();
    test_round_trip();
    test_broken_utf8();
    test_print();
    test_dump();
    test_print_numbers();
    free(text);
    free(written);
    return test_end("test_json");
}
