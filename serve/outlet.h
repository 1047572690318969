// outlet.h: the answer to one request, as bytes on their way to the client.
//
// The worker, which makes answers, and the network thread, which sends them, share nothing else. An
// answer is one piece, or begins, grows and ends: then it goes out in chunks as it grows. Whoever
// holds an outlet lets go of it once; the last one frees it.
#ifndef OUTLET_H
#define OUTLET_H
#include <pthread.h>
#include <stdbool.h>

#include "util.h"

typedef struct {
    pthread_mutex_t lock;
    int holders;
    int wake;          // a pipe: a byte in it wakes the network thread
    int minor;         // of HTTP/1.x, as the client speaks it
    bool keep_alive;   // another answer may follow
    const char *cors;  // header lines that every answer gets, or ""
    bool only_head;    // of HEAD: what the body would be is not sent
    // under the lock
    Buffer bytes;  // [bytes.n] made, of which sent went out
    size_t sent;
    bool begun, chunked, ended, gone;
} Outlet;

// Held twice: by the connection and by who answers. NULL: no memory.
Outlet *outlet_open(int wake, int minor, bool keep_alive, const char *cors);
void outlet_release(Outlet *o);  // NULL allowed

// The whole answer. Header lines may be "" or "Retry-After: 1\r\n", 1,000 bytes at most; without a
// Cache-Control among them nobody may keep the answer. Nothing happens if one has begun.
void outlet_send(Outlet *o, int status, const char *type, const char *headers, const char *body,
                 size_t n);

// An answer that grows. What does not fit into memory ends the connection.
void outlet_begin(Outlet *o, int status, const char *type);
void outlet_add(Outlet *o, const char *s, size_t n);
void outlet_end(Outlet *o);

bool outlet_begun(Outlet *o);
bool outlet_gone(Outlet *o);   // the client has left: nobody waits for the rest
void outlet_leave(Outlet *o);  // it has
#endif
