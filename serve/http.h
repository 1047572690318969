// http.h: requests of HTTP/1.1 as they arrive, a few bytes at a time (RFC 9110, RFC 9112).
//
// A request is its head, up to an empty line, and a body that has a length or comes in chunks.
// Memory is taken as bytes arrive, never because a client says how many will come: the head has a
// fixed room, the body grows up to a limit. What two readers could take for different things is
// refused: a length beside chunks, two lengths, bare line feeds, folded lines.
#ifndef HTTP_H
#define HTTP_H
#include <stdbool.h>
#include <stddef.h>

#include "util.h"

enum { HTTP_HEAD = 16384, HTTP_HEADERS = 64 };  // bytes and lines of a head, at most

typedef enum {
    HTTP_MORE,  // bytes are missing
    HTTP_READY,
    HTTP_BAD  // status and problem say why; the connection is of no use any more
} HttpState;

typedef enum {
    HTTP_IN_HEAD,
    HTTP_IN_BODY,       // of a known length
    HTTP_IN_SIZE,       // of a chunk
    HTTP_IN_CHUNK,      // its data
    HTTP_BEHIND_CHUNK,  // the line end behind it
    HTTP_IN_TRAILER     // lines behind the last chunk, which are not looked at
} HttpPart;

// A request on its way. Zeroed but for body_most at the start; pointers lead into head.
typedef struct {
    size_t body_most;           // bytes of a body
    const char *method, *path;  // path: percent-decoded
    const char *query;          // what follows a '?', as it came; "" where there is none
    int minor;                  // of HTTP/1.x
    bool keep_alive;            // whether another request may follow
    bool wants_continue;        // the client waits for "100 Continue" before it sends the body
    Buffer body;

    int status;           // HTTP_BAD: of the answer
    const char *problem;  // and a sentence

    HttpPart part;
    char head[HTTP_HEAD + 1];  // [n_head] as it came; cut into texts once it is whole
    size_t n_head;
    const char *name[HTTP_HEADERS], *value[HTTP_HEADERS];  // [n_headers]
    int n_headers;
    size_t left;                 // bytes of the body or of the chunk that are missing
    size_t n_line;               // bytes of the chunk's size line or of the trailer so far
    bool cr, digits, extension;  // what was seen of that line
} Http;

// Takes bytes s [n], *used of them: up to the end of the request, so that one that follows is left.
HttpState http_feed(Http *h, const char *s, size_t n, size_t *used);

// Whether any byte of the request has come.
bool http_begun(const Http *h);

// The value of a header, without white space around it; the first of that name, NULL: none.
const char *http_header(const Http *h, const char *name);

// The value of a query's key, percent-decoded, '+' as a space. Returns malloc'ed text; NULL: it is
// not there, or no memory.
char *http_query(const Http *h, const char *key);

// Ready for the next request; the body is freed.
void http_reset(Http *h);

// What stands beside a status: "Not Found".
const char *http_reason(int status);
#endif
