// text.c: text that others wrote.
//
// Coming in: one reader for prompts, contexts, questions, tasks and samples, so that what is no
// text is named, not answered. Going out: a model's name, a token, a task or a file name may hold
// what a terminal obeys: an escape sequence that clears the screen or types into the shell, a
// carriage return that hides what stood there, a control that reorders a line. Such characters are
// shown, never sent: all that the program prints goes through text_show.
#define _POSIX_C_SOURCE 200809L
#include "text.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "kinds.h"

// ---- showing ----

bool text_steers(uint32_t c) {
    return c < 0x20 || (c >= 0x7f && c < 0xa0) || (c >= 0x2028 && c <= 0x202e) ||
           (c >= 0x2066 && c <= 0x2069) || c == 0xfffe || c == 0xffff;
}

int text_columns(uint32_t c) {
    // clang-format off: from, to, columns
    static const uint32_t special[][3] = {
        {0x300, 0x36f, 0},     {0x483, 0x489, 0},     {0x591, 0x5bd, 0},     {0x610, 0x61a, 0},
        {0x64b, 0x65f, 0},     {0x1100, 0x115f, 2},   {0x1ab0, 0x1aff, 0},   {0x1dc0, 0x1dff, 0},
        {0x200b, 0x200f, 0},   {0x20d0, 0x20f0, 0},   {0x2e80, 0x303e, 2},   {0x3041, 0xa4cf, 2},
        {0xa960, 0xa97f, 2},   {0xac00, 0xd7a3, 2},   {0xf900, 0xfaff, 2},   {0xfe00, 0xfe0f, 0},
        {0xfe20, 0xfe2f, 0},   {0xfe30, 0xfe6f, 2},   {0xff01, 0xff60, 2},   {0xffe0, 0xffe6, 2},
        {0x1f300, 0x1f64f, 2}, {0x1f680, 0x1f6ff, 2}, {0x1f900, 0x1faff, 2}, {0x20000, 0x3fffd, 2}};
    // clang-format on
    for (size_t i = 0; i < sizeof special / sizeof *special; i++)
        if (c >= special[i][0] && c <= special[i][1]) return (int)special[i][2];
    return 1;
}

// \n, \t, \r, \x1b, \u202e
static int put_escape(char out[TEXT_SHOWN], uint32_t c) {
    static const char digits[] = "0123456789abcdef";
    const char *name = c == '\n' ? "n" : c == '\t' ? "t" : c == '\r' ? "r" : NULL;
    int n_digits = c < 0x80 ? 2 : 4, n = 0;
    out[n++] = '\\';
    if (name) return out[n++] = *name, n;
    out[n++] = n_digits == 2 ? 'x' : 'u';
    for (int i = n_digits - 1; i >= 0; i--) out[n++] = digits[c >> 4 * i & 15];
    return n;
}

int text_show(char out[TEXT_SHOWN], const char **s, const char *end, bool lines) {
    const uint8_t *p = (const uint8_t *)*s, *behind = (const uint8_t *)end;
    uint32_t c;
    int n = utf8_get(p, behind, &c);
    *s += n > 0 ? n : utf8_broken(p, behind);
    if (n <= 0) return utf8_put((uint8_t *)out, 0xfffd);
    bool line = c == '\n' || c == '\t' || (c == '\r' && *s < end && **s == '\n');
    if (text_steers(c) && !(lines && line)) return put_escape(out, c);
    memcpy(out, p, (size_t)n);
    return n;
}

// Bytes on their way to a file, so that a message is one write however it is made.
typedef struct {
    FILE *f;
    size_t n;
    char text[1024];
} Printer;

static void flush(Printer *p) {
    fwrite(p->text, 1, p->n, p->f);
    p->n = 0;
}

static void put(Printer *p, const char *s, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (p->n == sizeof p->text) flush(p);
        p->text[p->n++] = s[i];
    }
}

// Returns how many characters s [n] is when it is shown.
static size_t put_shown(Printer *p, const char *s, size_t n, bool lines) {
    char shown[TEXT_SHOWN];
    const char *end = s + n;
    size_t width = 0;
    while (s < end) {
        int len = text_show(shown, &s, end, lines);
        for (int i = 0; i < len; i++) width += ((uint8_t)shown[i] & 0xc0) != 0x80;
        if (p) put(p, shown, (size_t)len);
    }
    return width;
}

// A conversion of a format: %-16s, %.*s, %5.1f, %zu.
typedef struct {
    char spec[32];          // flags, width and precision, with the %
    size_t n;               // of them
    bool left;              // flag -
    size_t width, most;     // most: bytes of a string; SIZE_MAX where nothing is said
    char size, conversion;  // size: 'l', 'L' (ll), 'z', 'j' or 0
} Conversion;

static size_t read_size(const char **s) {
    size_t n = 0;
    for (; **s >= '0' && **s <= '9'; (*s)++) n = 10 * n + (size_t)(**s - '0');
    return n;
}

// Reads the conversion at fmt, behind its %; returns what follows it.
static const char *read_conversion(Conversion *c, const char *fmt, va_list *args) {
    const char *s = fmt;
    *c = (Conversion){.spec = "%", .n = 1, .most = SIZE_MAX};
    for (; *s && strchr("-+ #0", *s); s++) c->left |= *s == '-';
    c->width = read_size(&s);
    if (*s == '.') {
        s++;
        int most = *s == '*' ? va_arg(*args, int) : 0;
        c->most = *s != '*' ? read_size(&s) : (s++, most < 0 ? SIZE_MAX : (size_t)most);
    }
    size_t n = (size_t)(s - fmt);
    assert(n + 4 < sizeof c->spec);
    memcpy(c->spec + 1, fmt, n);
    c->n += n;
    if (*s && strchr("lzj", *s)) c->size = *s++;
    if (c->size == 'l' && *s == 'l') c->size = 'L', s++;
    c->conversion = *s;
    return *s ? s + 1 : s;
}

static void put_string(Printer *p, const Conversion *c, const char *s) {
    if (!s) s = "(null)";
    size_t n = 0;
    while (n < c->most && s[n]) n++;
    size_t width = put_shown(NULL, s, n, false);
    if (!c->left)
        for (size_t i = width; i < c->width; i++) put(p, " ", 1);
    put_shown(p, s, n, false);
    if (c->left)
        for (size_t i = width; i < c->width; i++) put(p, " ", 1);
}

static long long read_signed(const Conversion *c, va_list *args) {
    if (c->size == 'L') return va_arg(*args, long long);
    if (c->size == 'l') return va_arg(*args, long);
    if (c->size == 'z') return (long long)va_arg(*args, size_t);
    if (c->size == 'j') return (long long)va_arg(*args, intmax_t);
    return va_arg(*args, int);
}

static unsigned long long read_unsigned(const Conversion *c, va_list *args) {
    if (c->size == 0) return va_arg(*args, unsigned);
    return (unsigned long long)read_signed(c, args);
}

static void put_number(Printer *p, Conversion *c, va_list *args) {
    enum { DIGITS = 400 };  // of the largest double, with a precision
    char text[DIGITS];
    char *end = c->spec + c->n;
    int n;
    if (strchr("dux", c->conversion)) memcpy(end, "ll", 2), end += 2;
    end[0] = c->conversion, end[1] = '\0';
    if (c->conversion == 'd')
        n = snprintf(text, sizeof text, c->spec, read_signed(c, args));
    else if (c->conversion == 'u' || c->conversion == 'x')
        n = snprintf(text, sizeof text, c->spec, read_unsigned(c, args));
    else
        n = snprintf(text, sizeof text, c->spec, va_arg(*args, double));
    if (n > 0) put(p, text, n < DIGITS ? (size_t)n : DIGITS - 1);
}

void text_print(FILE *f, const char *fmt, va_list args) {
    Printer p = {.f = f};
    Conversion c;
    va_list rest;
    va_copy(rest, args);
    while (*fmt) {
        size_t n = strcspn(fmt, "%");
        put(&p, fmt, n);
        fmt += n;
        if (*fmt == '\0') break;
        fmt = read_conversion(&c, fmt + 1, &rest);
        if (c.conversion == 's') {
            put_string(&p, &c, va_arg(rest, const char *));
        } else if (c.conversion == 'c') {
            char byte[2] = {(char)va_arg(rest, int)};
            put_string(&p, &c, byte);
        } else if (c.conversion == '%') {
            put(&p, "%", 1);
        } else {
            assert(c.conversion && strchr("duxfeg", c.conversion));
            put_number(&p, &c, &rest);
        }
    }
    va_end(rest);
    flush(&p);
}

void text_put(FILE *f, const char *s, size_t n) {
    Printer p = {.f = f};
    put_shown(&p, s, n, true);
    flush(&p);
}

// ---- reading ----

// What the bytes of a text from `at` on, where the first one is that is no UTF-8, look like.
static const char *encoding(const uint8_t *p, const uint8_t *at, const uint8_t *end) {
    size_t whole = 0, broken = 0, windows = 0;
    uint32_t c;
    for (int len; p < end; p += len) {
        len = utf8_get(p, end, &c);
        whole += len > 1;
        if (len > 0) continue;
        len = 1;
        broken++;
        windows += *p < 0xa0;
    }
    if (utf8_get(at, end, &c) < 0) return "the last character is cut off";
    if (whole > broken) return "damaged UTF-8 (iconv -c -f utf-8 -t utf-8 leaves such bytes out)";
    if (broken * 4 > (size_t)(end - at) + 8) return "another encoding (iconv -t utf-8 -f ITS_NAME)";
    if (windows > 0) return "Windows-1252, it seems (iconv -f windows-1252 -t utf-8)";
    return "Latin-1, it seems (iconv -f latin1 -t utf-8)";
}

// UTF-16 of mostly Latin letters has a zero in every other byte.
static const char *zeros(const char *s, size_t n) {
    size_t zero[2] = {0, 0};
    if (n > KIND_HEAD) n = KIND_HEAD;
    for (size_t i = 0; i < n; i++) zero[i % 2] += s[i] == '\0';
    if (zero[1] > n / 4 && zero[0] < n / 16 + 1) return ": UTF-16 (iconv -f utf-16le -t utf-8)?";
    if (zero[0] > n / 4 && zero[1] < n / 16 + 1) return ": UTF-16 (iconv -f utf-16be -t utf-8)?";
    return "";
}

TextKind text_check(const char *s, size_t n, char *err) {
    const FileKind *kind = file_kind(s, n);
    if (kind && kind->nature != PLAIN) return kind_fail(err, kind, "text"), TEXT_OTHER;
    const uint8_t *start = (const uint8_t *)s, *p = start, *end = p + n;
    size_t line = 1;
    uint32_t c;
    for (int len; p < end; p += len) {
        len = utf8_get(p, end, &c);
        line += c == '\n' && len == 1;
        if (len > 0 && c != 0) continue;
        size_t at = (size_t)(p - start);
        if (len > 0)
            fail(err, "a zero byte at byte %zu (line %zu), not text%s", at, line, zeros(s, n));
        else
            fail(err, "not UTF-8 at byte %zu (line %zu), 0x%02x: %s", at, line, *p,
                 encoding(start, p, end));
        return TEXT_BYTES;
    }
    return TEXT_FINE;
}

size_t text_mark(const char *s, size_t n) {
    return n >= 3 && memcmp(s, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
}

// Whether the file's first bytes are text's, so that what is none is not read to its end. A pipe
// has no second reader and is not asked.
static TextKind check_head(const char *path, char *err) {
    char head[KIND_HEAD];
    struct stat st;
    FILE *f = stat(path, &st) == 0 && S_ISREG(st.st_mode) ? fopen(path, "rb") : NULL;
    if (!f) return TEXT_FINE;
    size_t n = fread(head, 1, sizeof head, f);
    fclose(f);
    const FileKind *kind = file_kind(head, n);
    if (!kind || kind->nature == PLAIN) return TEXT_FINE;
    kind_fail(err, kind, "text");
    return TEXT_OTHER;
}

TextKind text_read(Buffer *b, const char *path, char *err) {
    *b = (Buffer){0};
    if (strcmp(path, "-") != 0 && check_head(path, err) != TEXT_FINE) return TEXT_OTHER;
    b->s = file_read(path, &b->n, err);
    if (!b->s) {
        if (strcmp(path, "-") != 0 && errno != EFBIG) path_fail(err, path, errno);
        return TEXT_FAILED;
    }
    b->cap = b->n + 1;
    TextKind kind = text_check(b->s, b->n, err);
    if (kind == TEXT_OTHER) free(b->s), *b = (Buffer){0};
    return kind;
}
