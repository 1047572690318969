// How text of others is shown: what a terminal obeys never leaves the program.
#include "text.h"

#include "json.h"
#include "test.h"
#include "util.h"

static char got[4096];

// Reads back what was written to f, which is closed.
static const char *written(FILE *f) {
    rewind(f);
    got[fread(got, 1, sizeof got - 1, f)] = '\0';
    fclose(f);
    return got;
}

static const char *print(const char *fmt, ...) {
    va_list args;
    FILE *f = tmpfile();
    va_start(args, fmt);
    text_print(f, fmt, args);
    va_end(args);
    return written(f);
}

static const char *put(const char *s) {
    FILE *f = tmpfile();
    text_put(f, s, strlen(s));
    return written(f);
}

static void test_shown(void) {
    CHECK_STR(put("a\x1b[2J\x07z"), "a\\x1b[2J\\x07z");
    CHECK_STR(put("two\nlines\tand\r\nthree\n"), "two\nlines\tand\r\nthree\n");
    CHECK_STR(put("gone\rhere\r"), "gone\\rhere\\r");
    CHECK_STR(put("\x7f|\xc2\x80|\xc2\x9b"
                  "31m|\xc2\xa0"),
              "\\x7f|\\u0080|\\u009b31m|\xc2\xa0");
    CHECK_STR(put("\xe2\x80\xae|\xe2\x81\xa6|\xe2\x80\xa8|\xe2\x80\x8d"),
              "\\u202e|\\u2066|\\u2028|\xe2\x80\x8d");  // a joiner, which emoji need, stays
    CHECK_STR(put("\xef\xbf\xbe \xef\xbf\xbf"), "\\ufffe \\uffff");
    CHECK_STR(put("caf\xe9 \xf0\x9f\x98 \xc3"), "caf\xef\xbf\xbd \xef\xbf\xbd \xef\xbf\xbd");
    CHECK_STR(put("\xc3\xa9 \xe6\x97\xa5 \xf0\x9f\x98\x80 \\n"),
              "\xc3\xa9 \xe6\x97\xa5 \xf0\x9f\x98\x80 \\n");
}

static void test_format(void) {
    CHECK_STR(print("%s:\n%s|\n", "x\ny", "\x1b"),
              "x\\ny:\n\\x1b|\n");  // the format's lines are ours
    CHECK_STR(print("%-6s|%6s|%3s", "\xc3\xa9\n", "\xc3\xa9", "abcd"),
              "\xc3\xa9\\n   |     \xc3\xa9|abcd");
    CHECK_STR(print("%.3s|%.*s|%-4.1s|", "ab\xc3\xa9", 2, "xyz", "pq"), "ab\xef\xbf\xbd|xy|p   |");
    CHECK_STR(print("%d %5d|%-5d|%05d", -7, 42, 42, 42), "-7    42|42   |00042");
    CHECK_STR(print("%ld %lld %zu %u %llx", -5L, 1LL << 40, SIZE_MAX, 7u, 255ull),
              "-5 1099511627776 18446744073709551615 7 ff");
    CHECK_STR(print("%g %.6g %5.1f %3.0f%% %.10g", 0.5, 1e9, 2.25, 50.0, 1e-6),
              "0.5 1e+09   2.2  50% 1e-06");
    CHECK_STR(print("%c%s", 'a', (const char *)NULL), "a(null)");
    char want[400];
    snprintf(want, sizeof want, "%f", 1.7e308);
    CHECK_STR(print("%f", 1.7e308), want);
    char *text = malloc(3000);  // longer than what is written at once
    memset(text, 'a', 2999), text[2999] = '\0';
    CHECK_STR(print("%s", text), text);
    free(text);
}

static void test_json(void) {
    FILE *f = tmpfile();
    json_print(f, "%s", "\x1b\xc2\x9b\xe2\x80\xae\x7f\xe9");
    CHECK_STR(written(f), "\"\\u001b\\u009b\\u202e\\u007f\xef\xbf\xbd\"");
}

static void test_cut(void) {
    char err[ERR_LEN], name[ERR_LEN + 8];
    CHECK(utf8_whole("a\xc3\xa9", 3) == 3 && utf8_whole("a\xc3\xa9", 2) == 1);
    CHECK(utf8_whole("\xf0\x9f\x98\x80", 3) == 0 && utf8_whole("", 0) == 0);
    CHECK(utf8_whole("\x80\x80", 2) == 2);  // no character was cut here
    for (int pad = 0; pad < 4; pad++) {
        for (int i = 0; i < ERR_LEN; i++) name[i] = "\xe6\x97\xa5"[i % 3];
        name[ERR_LEN] = '\0';
        fail(err, "%.*s%s", pad, "abc", name);
        size_t n = strlen(err);
        CHECK(n >= ERR_LEN - 4 && utf8_whole(err, n) == n);
    }
}

// Columns of letters, marks and wide characters, as wcwidth of glibc and musl has them.
static void test_columns(void) {
    static const uint32_t one[] = {'a', 0xe9, 0x3b1, 0x5d0, 0x20ac, 0x21b5, 0x303f, 0xff61, 0xfffd},
                          two[] = {0x1100, 0x3042, 0x6f22, 0xac00, 0xff21, 0x1f600, 0x20000},
                          none[] = {0x301, 0x200d, 0x20d7, 0xfe0f};
    for (size_t i = 0; i < sizeof one / sizeof *one; i++) CHECK(text_columns(one[i]) == 1);
    for (size_t i = 0; i < sizeof two / sizeof *two; i++) CHECK(text_columns(two[i]) == 2);
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) CHECK(text_columns(none[i]) == 0);
}

int main(void) {
    test_columns();
    test_shown();
    test_format();
    test_json();
    test_cut();
    return test_end("test_text");
}
