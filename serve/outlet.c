// outlet.c: the answer to one request, as bytes on their way to the client.
#define _POSIX_C_SOURCE 200809L
#include "serve/outlet.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "serve/http.h"

Outlet *outlet_open(int wake, int minor, bool keep_alive, const char *cors) {
    Outlet *o = calloc(1, sizeof *o);
    if (!o) return NULL;
    o->holders = 2, o->wake = wake;
    o->minor = minor, o->keep_alive = keep_alive, o->cors = cors;
    pthread_mutex_init(&o->lock, NULL);
    return o;
}

void outlet_release(Outlet *o) {
    if (!o) return;
    pthread_mutex_lock(&o->lock);
    int left = --o->holders;
    pthread_mutex_unlock(&o->lock);
    if (left > 0) return;
    pthread_mutex_destroy(&o->lock);
    free(o->bytes.s);
    free(o);
}

static void add(Outlet *o, const char *s, size_t n) {
    if (!o->gone && n > 0 && buffer_add(&o->bytes, s, n) != 0) o->gone = true;
}

// Unlocks, and wakes who sends. A full pipe has woken it already.
static void pass_on(Outlet *o) {
    pthread_mutex_unlock(&o->lock);
    if (write(o->wake, "", 1) < 0) return;
}

// length -1: it is not known yet.
static void add_head(Outlet *o, int status, const char *type, const char *headers, long length) {
    char head[2048];
    bool cached = strstr(headers, "Cache-Control:") != NULL,
         bodiless = status == 204 || status == 304;
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 %d %s\r\nServer: kvzip.c\r\n%s%s"
                     "%sX-Content-Type-Options: nosniff\r\nConnection: %s\r\n",
                     status, http_reason(status), o->cors, headers,
                     cached ? "" : "Cache-Control: no-store\r\n",
                     o->keep_alive ? "keep-alive" : "close");
    if (!bodiless) n += snprintf(head + n, sizeof head - (size_t)n, "Content-Type: %s\r\n", type);
    if (!bodiless && length >= 0)
        n += snprintf(head + n, sizeof head - (size_t)n, "Content-Length: %ld\r\n", length);
    if (o->chunked)
        n += snprintf(head + n, sizeof head - (size_t)n, "Transfer-Encoding: chunked\r\n");
    n += snprintf(head + n, sizeof head - (size_t)n, "\r\n");
    add(o, head, (size_t)n);
}

void outlet_send(Outlet *o, int status, const char *type, const char *headers, const char *body,
                 size_t n) {
    pthread_mutex_lock(&o->lock);
    if (!o->begun) {
        o->begun = o->ended = true;
        add_head(o, status, type, headers, (long)n);
        if (!o->only_head) add(o, body, n);
    }
    pass_on(o);
}

void outlet_begin(Outlet *o, int status, const char *type) {
    pthread_mutex_lock(&o->lock);
    o->begun = true;
    o->chunked = o->minor == 1;
    if (!o->chunked) o->keep_alive = false;  // the end of the connection is the end of the answer
    add_head(o, status, type, "", -1);
    pass_on(o);
}

void outlet_add(Outlet *o, const char *s, size_t n) {
    char size[32];
    if (n == 0) return;  // an empty chunk would be the last one
    pthread_mutex_lock(&o->lock);
    if (o->chunked) add(o, size, (size_t)snprintf(size, sizeof size, "%zx\r\n", n));
    add(o, s, n);
    if (o->chunked) add(o, "\r\n", 2);
    pass_on(o);
}

void outlet_end(Outlet *o) {
    pthread_mutex_lock(&o->lock);
    if (o->chunked && !o->ended) add(o, "0\r\n\r\n", 5);
    o->ended = true;
    pass_on(o);
}

bool outlet_begun(Outlet *o) {
    pthread_mutex_lock(&o->lock);
    bool begun = o->begun;
    pthread_mutex_unlock(&o->lock);
    return begun;
}

bool outlet_gone(Outlet *o) {
    pthread_mutex_lock(&o->lock);
    bool gone = o->gone;
    pthread_mutex_unlock(&o->lock);
    return gone;
}

void outlet_leave(Outlet *o) {
    pthread_mutex_lock(&o->lock);
    o->gone = true;
    pthread_mutex_unlock(&o->lock);
}
