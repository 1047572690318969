// Requests of HTTP: whole, cut at every byte, one behind the other, in chunks, too large, and wrong
// in every way that two readers could take differently.
#include "serve/http.h"

#include "test.h"

enum { BODY = 64 };

static Http h;

// Feeds s [n] in pieces of `piece` bytes; *used counts what was taken.
static HttpState feed(const char *s, size_t n, size_t piece, size_t *used) {
    HttpState state = HTTP_MORE;
    for (*used = 0; *used < n && state == HTTP_MORE;) {
        size_t taken, some = n - *used < piece ? n - *used : piece;
        state = http_feed(&h, s + *used, some, &taken);
        if (!CHECK(taken > 0 && taken <= some)) break;
        *used += taken;
    }
    return state;
}

static HttpState feed_text(const char *s) {
    size_t used;
    http_reset(&h);
    h.body_most = BODY;
    return feed(s, strlen(s), strlen(s), &used);
}

static void refuse(const char *s, int status) {
    for (size_t piece = 1; piece < 40; piece += 38) {
        size_t used;
        http_reset(&h);
        h.body_most = BODY;
        HttpState state = feed(s, strlen(s), piece, &used);
        if (!CHECK(state == HTTP_BAD && h.status == status && h.problem))
            printf("%d %d: %.80s\n", (int)state, h.status, s);
    }
}

static const char two[] =
    "\r\nPOST /v1/a%20b?name=x+y&z=%41 HTTP/1.1\r\nHost: a\r\nContent-Length:  5 "
    "\r\nX-Api-Key:k\r\n\r\n"
    "helloGET / HTTP/1.1\r\nhost: b\r\nConnection: close\r\n\r\n";

// Whole and cut into pieces of any size the two requests are the same.
static void test_pieces(void) {
    for (size_t piece = 1; piece < sizeof two; piece++) {
        size_t used, more;
        http_reset(&h);
        h.body_most = BODY;
        CHECK(feed(two, sizeof two - 1, piece, &used) == HTTP_READY);
        CHECK_STR(h.method, "POST"), CHECK_STR(h.path, "/v1/a b");
        CHECK_STR(http_header(&h, "x-api-key"), "k"), CHECK_STR(http_header(&h, "HOST"), "a");
        CHECK_STR(http_header(&h, "content-length"), "5");
        CHECK(http_header(&h, "x-api") == NULL && h.keep_alive && h.minor == 1);
        CHECK(h.body.n == 5 && memcmp(h.body.s, "hello", 5) == 0);
        char *name = http_query(&h, "name"), *z = http_query(&h, "z");
        CHECK_STR(name, "x y"), CHECK_STR(z, "A"), CHECK(http_query(&h, "nam") == NULL);
        free(name), free(z);
        http_reset(&h);
        CHECK(!http_begun(&h));
        CHECK(feed(two + used, sizeof two - 1 - used, piece, &more) == HTTP_READY);
        CHECK(used + more == sizeof two - 1 && !h.keep_alive && h.body.n == 0);
        CHECK_STR(h.method, "GET"), CHECK_STR(h.path, "/");
    }
}

static void test_chunks(void) {
    static const char chunks[] =
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        "5\r\nhello\r\n0007;x=\"y\"\r\n, world\r\n0\r\nA: b\r\nC: d\r\n\r\nG";
    for (size_t piece = 1; piece < sizeof chunks; piece++) {
        size_t used;
        http_reset(&h);
        h.body_most = BODY;
        CHECK(feed(chunks, sizeof chunks - 1, piece, &used) == HTTP_READY);
        CHECK(used == sizeof chunks - 2);  // the next request's byte stays
        CHECK(h.body.n == 12 && memcmp(h.body.s, "hello, world", 12) == 0);
    }
#define CHUNKED "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    refuse(CHUNKED "5\r\nhelloo\r\n", 400);
    refuse(CHUNKED "\r\nhello", 400);
    refuse(CHUNKED ";x\r\nhello", 400);
    refuse(CHUNKED "-5\r\nhello", 400);
    refuse(CHUNKED "5\nhello", 400);
    refuse(CHUNKED "5\rhello", 400);
    refuse(CHUNKED "41\r\n", 413);
    refuse(CHUNKED "ffffffffffffffffffffffffffffffff\r\n", 413);
    refuse(CHUNKED "3f\r\n...............................................................\r\n2\r\n",
           413);
    refuse(CHUNKED "0\r\nA: b\n\r\n", 400);
}

static void test_refused(void) {
    char large[HTTP_HEAD + 100];
    refuse("GET /\r\nHost: a\r\n\r\n", 400);
    refuse("GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505);
    refuse("GET / HTTP/1.10\r\nHost: a\r\n\r\n", 505);
    refuse("GET / SPDY/1.1\r\nHost: a\r\n\r\n", 400);
    refuse("G(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    refuse(" / HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    refuse("GET v1 HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    refuse("GET /%0 HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    refuse("GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    refuse("GET / HTTP/1.1\r\n\r\n", 400);
    refuse("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400);
    refuse("GET / HTTP/1.1\r\nHost: a\r\nA : b\r\n\r\n", 400);
    refuse("GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400);
    refuse("GET / HTTP/1.1\r\nHost: a\r\nA: \x01\r\n\r\n", 400);
    refuse("GET / HTTP/1.1\r\nHost: a\rA: b\r\n\r\n", 400);
    refuse("GET / HTTP/1.1\nHost: a\r\n\r\n", 400);
    refuse("GET / HTTP/1.1\r\nHost: a\n\n", 400);
    refuse("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 65\r\n\r\n", 413);
    refuse("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n", 413);
    refuse("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n", 400);
    refuse("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n", 400);
    refuse("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400);
    refuse("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
           400);
    refuse("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501);
    refuse("POST / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n", 417);
    memset(large, 'a', sizeof large - 1), large[sizeof large - 1] = '\0';
    refuse(large, 431);
    int n = snprintf(large, sizeof large, "GET / HTTP/1.1\r\nHost: a\r\n");
    for (int i = 0; i < HTTP_HEADERS; i++)
        n += snprintf(large + n, sizeof large - (size_t)n, "a:b\r\n");
    snprintf(large + n, sizeof large - (size_t)n, "\r\n");
    refuse(large, 431);
}

static void test_zero(void) {
    static const char zero[] = "GET / HTTP/1.1\r\nHost: a\0\r\n\r\n";
    size_t used;
    http_reset(&h);
    CHECK(feed(zero, sizeof zero - 1, 1, &used) == HTTP_BAD && h.status == 400);
}

static void test_connection(void) {
    CHECK(feed_text("GET / HTTP/1.0\r\n\r\n") == HTTP_READY && !h.keep_alive && h.minor == 0);
    CHECK(feed_text("GET / HTTP/1.0\r\nConnection: x, Keep-Alive\r\n\r\n") == HTTP_READY);
    CHECK(h.keep_alive);
    CHECK(feed_text("GET http://a/b HTTP/1.1\r\nHost: a\r\n\r\n") == HTTP_READY);
    CHECK_STR(h.path, "/b");
    CHECK(feed_text("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n") == HTTP_READY);
    CHECK(feed_text(
              "PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 3\r\n\r\n") ==
          HTTP_MORE);
    CHECK(h.wants_continue);
    CHECK(feed_text("GET / HTTP/1.1\r\nHost: a\r\n") == HTTP_MORE && http_begun(&h));
    CHECK_STR(http_reason(404), "Not Found");
}

// Requests with bytes changed, cut and doubled: whatever comes of it, nothing is read beyond them.
static void test_mutants(void) {
    char copy[2 * sizeof two];
    uint64_t random = 7;
    int ready = 0;
    for (int i = 0; i < 20000; i++) {
        size_t n = sizeof two - 1, used = 0, taken;
        memcpy(copy, two, n);
        for (int k = (int)(random_next(&random) % 4); k >= 0; k--)
            copy[random_next(&random) % n] = (char)random_next(&random);
        if (i % 3 == 0) n = random_next(&random) % n;
        http_reset(&h);
        while (used < n &&
               feed(copy + used, n - used, 1 + random_next(&random) % 9, &taken) == HTTP_READY) {
            used += taken, ready++;
            http_reset(&h);
        }
    }
    CHECK(ready > 1000);
}

int main(void) {
    h.body_most = BODY;
    test_pieces();
    test_chunks();
    test_refused();
    test_zero();
    test_connection();
    test_mutants();
    http_reset(&h);
    return test_end("test_http");
}
