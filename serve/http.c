// http.c: requests of HTTP/1.1 as they arrive.
//
// The head is collected until its empty line is there and then cut into lines where it stands; the
// body is taken by a small machine that may be interrupted at every byte. Nothing here knows of
// sockets.
#include "serve/http.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { SIZE_LINE = 256, TRAILER = 4096 };  // bytes of a chunk's size line, of a trailer

static HttpState bad(Http *h, int status, const char *problem) {
    h->status = status, h->problem = problem;
    return HTTP_BAD;
}

// ---- characters ----

// What names of methods and headers are made of (RFC 9110, 5.6.2).
static bool is_token(char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c && strchr("!#$%&'*+-.^_`|~", c));
}

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    char low = (char)(c | 0x20);
    return low >= 'a' && low <= 'f' ? low - 'a' + 10 : -1;
}

// Decodes %XX in s [n] to out, which may be s; returns how many bytes, -1: a broken or zero one.
static long decode(char *out, const char *s, size_t n, bool plus) {
    size_t m = 0;
    for (size_t i = 0; i < n; i++) {
        char c = s[i];
        if (c == '%') {
            int high = i + 2 < n ? hex_digit(s[i + 1]) : -1,
                low = high < 0 ? -1 : hex_digit(s[i + 2]);
            if (low < 0 || high + low == 0) return -1;
            c = (char)(high * 16 + low);
            i += 2;
        } else if (c == '+' && plus) {
            c = ' ';
        }
        out[m++] = c;
    }
    return (long)m;
}

// ---- the head ----

// "POST /v1/models?x=1 HTTP/1.1"
static HttpState read_request_line(Http *h, char *line) {
    char *target = strchr(line, ' '), *version = target ? strchr(target + 1, ' ') : NULL;
    if (!version) return bad(h, 400, "the request line is not METHOD TARGET HTTP/1.1");
    *target++ = '\0', *version++ = '\0';
    for (const char *p = line; *p; p++)
        if (!is_token(*p)) return bad(h, 400, "the method has a character that none has");
    if (!line[0]) return bad(h, 400, "the method is missing");
    if (strncmp(version, "HTTP/1.", 7) != 0 || (version[7] != '0' && version[7] != '1') ||
        version[8])
        return bad(h, strncmp(version, "HTTP/", 5) == 0 ? 505 : 400,
                   "only HTTP/1.0 and HTTP/1.1 are spoken here");
    h->method = line;
    h->minor = version[7] - '0';
    h->keep_alive = h->minor == 1;
    if (strncmp(target, "http://", 7) == 0) {  // as proxies ask
        char *slash = strchr(target + 7, '/');
        target = slash ? slash : target + strlen(target);
        if (!slash) return bad(h, 400, "the target has no path");
    }
    if (target[0] != '/' && strcmp(target, "*") != 0)
        return bad(h, 400, "the target does not begin with /");
    char *query = strchr(target, '?');
    h->query = query ? query + 1 : "";
    if (query) *query = '\0';
    long n = decode(target, target, strlen(target), false);
    if (n < 0) return bad(h, 400, "the target has a broken %XX");
    target[n] = '\0';
    h->path = target;
    return HTTP_READY;
}

// A header line: NAME: VALUE, white space around the value.
static HttpState read_header(Http *h, char *line) {
    char *p = line;
    while (is_token(*p)) p++;
    if (p == line || *p != ':') return bad(h, 400, "a header line is not NAME: VALUE");
    for (const char *c = p; *c; c++)
        if (((unsigned char)*c < 0x20 && *c != '\t') || *c == 0x7f)
            return bad(h, 400, "a header has a control character");
    if (h->n_headers == HTTP_HEADERS) return bad(h, 431, "the request has too many headers");
    *p++ = '\0';
    p += strspn(p, " \t");
    for (size_t n = strlen(p); n > 0 && (p[n - 1] == ' ' || p[n - 1] == '\t');) p[--n] = '\0';
    h->name[h->n_headers] = line, h->value[h->n_headers++] = p;
    return HTTP_READY;
}

// How many headers have this name; *value becomes the first one's, NULL: there is none.
static int find_header(const Http *h, const char *name, const char **value) {
    int n = 0;
    *value = NULL;
    for (int i = 0; i < h->n_headers; i++)
        if (strcasecmp(h->name[i], name) == 0 && n++ == 0) *value = h->value[i];
    return n;
}

const char *http_header(const Http *h, const char *name) {
    const char *value;
    find_header(h, name, &value);
    return value;
}

// Whether a comma-separated list of words has this one.
static bool has_word(const char *list, const char *word) {
    size_t n = strlen(word);
    while (list && *list) {
        list += strspn(list, " \t,");
        size_t len = strcspn(list, " \t,");
        if (len == n && strncasecmp(list, word, n) == 0) return true;
        list += len;
    }
    return false;
}

static HttpState read_length(Http *h, const char *text) {
    size_t n = strspn(text, "0123456789");
    if (n == 0 || text[n]) return bad(h, 400, "Content-Length is not a number");
    h->left = n > 18 ? SIZE_MAX : 0;
    for (size_t i = 0; i < n && h->left < SIZE_MAX; i++)
        h->left = h->left * 10 + (size_t)(text[i] - '0');
    if (h->left > h->body_most) return bad(h, 413, "the body is longer than this server takes");
    return HTTP_READY;
}

// What the headers say of the body and of the connection.
static HttpState read_meaning(Http *h) {
    const char *length, *coding, *host;
    const char *connection = http_header(h, "connection"), *expect = http_header(h, "expect");
    int lengths = find_header(h, "content-length", &length);
    int codings = find_header(h, "transfer-encoding", &coding);
    int hosts = find_header(h, "host", &host);
    if (hosts > 1 || (hosts == 0 && h->minor == 1))
        return bad(h, 400, "HTTP/1.1 needs one Host header");
    if (lengths > 1 || (length && coding)) return bad(h, 400, "the body's length is given twice");
    if (coding && (strcasecmp(coding, "chunked") != 0 || codings > 1))
        return bad(h, 501, "the only Transfer-Encoding known here is chunked");
    if (has_word(connection, "close")) h->keep_alive = false;
    if (h->minor == 0 && has_word(connection, "keep-alive")) h->keep_alive = true;
    h->part = coding ? HTTP_IN_SIZE : HTTP_IN_BODY;
    if (length && read_length(h, length) == HTTP_BAD) return HTTP_BAD;
    if (expect && strcasecmp(expect, "100-continue") != 0)
        return bad(h, 417, "the only expectation known here is 100-continue");
    h->wants_continue = expect && h->minor == 1 && (coding || h->left > 0);
    return coding || h->left > 0 ? HTTP_MORE : HTTP_READY;
}

// The head is whole: cuts it into lines and reads them.
static HttpState read_head(Http *h) {
    char *line = h->head, *end = h->head + h->n_head;
    if (memchr(h->head, '\0', h->n_head)) return bad(h, 400, "the head holds a zero byte");
    for (char *p = h->head; p < end; p++) {
        if (*p == '\n') return bad(h, 400, "a line ends without a carriage return");
        if (*p != '\r') continue;
        if (p[1] != '\n') return bad(h, 400, "a carriage return without a line feed");
        *p++ = '\0';
        if (*line && (h->method ? read_header(h, line) : read_request_line(h, line)) == HTTP_BAD)
            return HTTP_BAD;
        line = p + 1;
    }
    return read_meaning(h);
}

// Takes one byte of the head. Empty lines before it are left out (RFC 9112, 2.2).
static HttpState take_head(Http *h, char c) {
    if (h->n_head == 0 && (c == '\r' || c == '\n')) return HTTP_MORE;
    if (h->n_head == HTTP_HEAD) return bad(h, 431, "the head is longer than 16384 bytes");
    h->head[h->n_head++] = c;
    if (c != '\n') return HTTP_MORE;
    const char *end = h->head + h->n_head;
    if (h->n_head >= 2 && end[-2] == '\n')
        return bad(h, 400, "a line ends without a carriage return");
    bool whole = h->n_head >= 4 && memcmp(end - 4, "\r\n\r\n", 4) == 0;
    return whole ? read_head(h) : HTTP_MORE;
}

// ---- the body ----

// Takes up to left bytes of s [n]; *used of them.
static HttpState take_data(Http *h, const char *s, size_t n, size_t *used) {
    *used = n < h->left ? n : h->left;
    if (buffer_add(&h->body, s, *used) != 0) return bad(h, 503, "out of memory for the body");
    h->left -= *used;
    if (h->left > 0) return HTTP_MORE;
    if (h->part == HTTP_IN_BODY) return HTTP_READY;
    h->part = HTTP_BEHIND_CHUNK;
    return HTTP_MORE;
}

// The end of a chunk's size line: the last chunk is empty.
static HttpState end_size(Http *h) {
    if (!h->digits) return bad(h, 400, "a chunk without a size");
    if (h->left > h->body_most - h->body.n)
        return bad(h, 413, "the body is longer than this server takes");
    h->part = h->left > 0 ? HTTP_IN_CHUNK : HTTP_IN_TRAILER;
    h->n_line = 0, h->cr = false;
    return HTTP_MORE;
}

// "1a3f;name=value", whose extensions mean nothing.
static HttpState take_size(Http *h, char c) {
    int digit = h->extension ? -1 : hex_digit(c);
    if (++h->n_line > SIZE_LINE) return bad(h, 400, "a chunk's size line is too long");
    if (h->cr)
        return c == '\n' ? end_size(h) : bad(h, 400, "a carriage return without a line feed");
    if (c == '\r') return h->cr = true, HTTP_MORE;
    if (c == '\n' || c == '\0') return bad(h, 400, "a chunk's size line is broken");
    if (h->extension) return HTTP_MORE;
    if (digit < 0 && (c == ';' || c == ' ' || c == '\t')) return h->extension = true, HTTP_MORE;
    if (digit < 0) return bad(h, 400, "a chunk's size is not hexadecimal");
    if (h->left > h->body_most) return bad(h, 413, "the body is longer than this server takes");
    h->left = h->left * 16 + (size_t)digit;
    h->digits = true;
    return HTTP_MORE;
}

static HttpState take_chunk_end(Http *h, char c) {
    if (!h->cr && c == '\r') return h->cr = true, HTTP_MORE;
    if (!h->cr || c != '\n') return bad(h, 400, "a chunk is longer than it says");
    h->part = HTTP_IN_SIZE;
    h->cr = h->digits = h->extension = false;
    h->n_line = 0;
    return HTTP_MORE;
}

// Lines up to an empty one. n_line counts bytes of all of them, `digits` whether this one has any.
static HttpState take_trailer(Http *h, char c) {
    if (++h->n_line > TRAILER) return bad(h, 431, "the trailer is too long");
    if (h->n_line == 1) h->digits = false;
    if (h->cr && c != '\n') return bad(h, 400, "a carriage return without a line feed");
    if (c == '\r') return h->cr = true, HTTP_MORE;
    if (c != '\n') return h->digits = true, HTTP_MORE;
    if (!h->cr) return bad(h, 400, "a line ends without a carriage return");
    h->cr = false;
    if (!h->digits) return HTTP_READY;
    h->digits = false;
    return HTTP_MORE;
}

HttpState http_feed(Http *h, const char *s, size_t n, size_t *used) {
    HttpState state = HTTP_MORE;
    for (*used = 0; *used < n && state == HTTP_MORE;) {
        size_t taken = 1;
        switch (h->part) {
        case HTTP_IN_HEAD:
            state = take_head(h, s[*used]);
            break;
        case HTTP_IN_BODY:
        case HTTP_IN_CHUNK:
            state = take_data(h, s + *used, n - *used, &taken);
            break;
        case HTTP_IN_SIZE:
            state = take_size(h, s[*used]);
            break;
        case HTTP_BEHIND_CHUNK:
            state = take_chunk_end(h, s[*used]);
            break;
        case HTTP_IN_TRAILER:
            state = take_trailer(h, s[*used]);
            break;
        }
        *used += taken;
    }
    return state;
}

bool http_begun(const Http *h) { return h->n_head > 0; }

void http_reset(Http *h) {
    size_t most = h->body_most;
    free(h->body.s);
    *h = (Http){.body_most = most};
}

// ---- queries and reasons ----

char *http_query(const Http *h, const char *key) {
    size_t n_key = strlen(key);
    for (const char *p = h->query; p && *p; p += *p == '&') {
        size_t n = strcspn(p, "&");
        if (n > n_key && p[n_key] == '=' && memcmp(p, key, n_key) == 0) {
            char *value = malloc(n - n_key);
            long length = value ? decode(value, p + n_key + 1, n - n_key - 1, true) : -1;
            if (length >= 0) return value[length] = '\0', value;
            free(value);
            return NULL;
        }
        p += n;
    }
    return NULL;
}

const char *http_reason(int status) {
    static const struct {
        int status;
        const char *reason;
    } reasons[] = {{200, "OK"},
                   {204, "No Content"},
                   {304, "Not Modified"},
                   {400, "Bad Request"},
                   {401, "Unauthorized"},
                   {403, "Forbidden"},
                   {404, "Not Found"},
                   {405, "Method Not Allowed"},
                   {408, "Request Timeout"},
                   {409, "Conflict"},
                   {413, "Content Too Large"},
                   {417, "Expectation Failed"},
                   {431, "Request Header Fields Too Large"},
                   {500, "Internal Server Error"},
                   {501, "Not Implemented"},
                   {503, "Service Unavailable"},
                   {505, "HTTP Version Not Supported"},
                   {507, "Insufficient Storage"}};
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (reasons[i].status == status) return reasons[i].reason;
    return "Status";
}
