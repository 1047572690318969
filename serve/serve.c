// serve.c: connections.
//
// One thread waits in poll for all sockets. A connection reads one request, waits for its answer
// and sends it, then reads the next, which may have come already. Everything that a client can make
// wait or grow has a bound: connections, heads, bodies, times. A client that leaves is noticed by
// reading, also while its answer is being made, and the outlet tells whoever makes it.
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE
#define _DARWIN_C_SOURCE
#include "serve/serve.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "json.h"

enum { INPUT = 65536, LISTENERS = 4, BACKLOG = 128 };

typedef struct {
    int fd;  // -1: this place is free
    Http request;
    char input[INPUT];  // [n_input] bytes of the requests that follow
    size_t n_input;
    Outlet *outlet;  // of the request that is being answered, or NULL
    double since;    // when the request's first byte came, or the last answer was sent
    double moved;    // when the last byte came or went
    bool closing;    // after this answer
    double lingers;  // since when it only waits for the client to close; 0: it does not
} Connection;

struct Server {
    ServeOptions o;
    int listener[LISTENERS], n_listeners;
    int wake[2];    // a pipe: [0] is read here
    Connection *c;  // [o.connections]
    pthread_t thread;
    bool started;
    volatile sig_atomic_t stopping;  // 1: no more requests; set by serve_close
    volatile int n_open;
};

int serve_connections(const Server *s) { return s->n_open; }

// ---- answers of our own ----

static void put_or_null(FILE *f, const char *text) {
    if (text)
        json_put_string(f, text, strlen(text));
    else
        fputs("null", f);
}

void serve_error(Outlet *o, int status, const char *message, const char *param, const char *code) {
    char *text = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&text, &n);
    const char *type = status == 401   ? "authentication_error"
                       : status == 404 ? "not_found_error"
                       : status == 503 ? "overloaded_error"
                       : status >= 500 ? "server_error"
                                       : "invalid_request_error";
    if (f) {
        json_print(f, "{'type': 'error', 'error': {'message': %s, 'type': %s, 'param': ", message,
                   type);
        put_or_null(f, param);
        fputs(", \"code\": ", f);
        put_or_null(f, code);
        fputs("}}\n", f);
        fclose(f);
    }
    const char *retry = status == 503   ? "Retry-After: 1\r\n"
                        : status == 401 ? "WWW-Authenticate: Bearer\r\n"
                                        : "";
    outlet_send(o, status, "application/json", retry, text ? text : "{}", text ? n : 2);
    outlet_release(o);
    free(text);
}

static const char no_key[] = "no key, or one that is not known";

// Whether a request shows a key that is known, in a time that does not tell how much of it is
// right.
static bool has_key(const Server *s, const Http *h) {
    const char *bearer = http_header(h, "authorization"), *given = http_header(h, "x-api-key");
    unsigned known = 0;
    if (!s->o.keys) return true;
    if (bearer && strncasecmp(bearer, "bearer ", 7) == 0) given = bearer + 7;
    if (!given) return false;
    size_t n = strlen(given);
    for (char **key = s->o.keys; *key; key++) {
        size_t n_key = strlen(*key);
        unsigned other = n ^ n_key ? 1 : 0;
        for (size_t i = 0; i < n; i++)
            other |= (unsigned char)given[i] ^ (unsigned char)(*key)[i % n_key];
        known |= other == 0;
    }
    return known;
}

// The name in "name:port" is this machine's, not one that a stranger's DNS makes so.
static bool is_local_name(const Server *s, const char *host) {
    size_t n = host[0] == '[' ? strcspn(host, "]") + 1 : strcspn(host, ":");
    if (host[0] == '[' || strspn(host, "0123456789.") == n) return true;
    if (n == strlen(s->o.host) && strncasecmp(host, s->o.host, n) == 0) return true;
    return n >= 9 && strncasecmp(host + n - 9, "localhost", 9) == 0 &&
           (n == 9 || host[n - 10] == '.');
}

// Without a key or --cors a page of another site must not reach us through its reader's browser.
static bool is_strange(const Server *s, const Http *h) {
    const char *origin = http_header(h, "origin"), *host = http_header(h, "host");
    const char *name = origin ? strstr(origin, "://") : NULL;
    if (s->o.cors || s->o.keys) return false;
    if (host && !is_local_name(s, host)) return true;
    return origin && strcmp(origin, "null") != 0 &&
           (!name || !host || strcasecmp(name + 3, host) != 0);
}

static const char preflight[] =
    "Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: *\r\n"
    "Access-Control-Allow-Methods: GET, POST, DELETE, OPTIONS\r\n"
    "Access-Control-Allow-Headers: authorization, content-type, x-api-key, anthropic-version, *\r\n"
    "Access-Control-Max-Age: 86400\r\n";

// ---- routes ----

static bool has_path(const Route *r, const char *path) {
    size_t n = strlen(r->path);
    if (n > 1 && r->path[n - 1] == '/') return strncmp(r->path, path, n) == 0;
    return strcmp(r->path, path) == 0;
}

// Whether everybody may ask for a path.
static bool is_open(const Server *s, const char *path) {
    for (const char *const *open = s->o.open; *open; open++)
        if (strcmp(*open, path) == 0) return true;
    return false;
}

static void answer(Server *s, Http *h, Outlet *o) {
    char message[256];
    bool known = false, head = strcmp(h->method, "HEAD") == 0;
    const char *method = head ? "GET" : h->method;
    o->only_head = head;
    if (strcmp(method, "OPTIONS") == 0) {
        outlet_send(o, 204, "", "", "", 0);
        outlet_release(o);
        return;
    }
    if (is_strange(s, h)) {
        serve_error(o, 403, "pages of other sites may ask only with --cors or a key", NULL, NULL);
        return;
    }
    if (!has_key(s, h) && !is_open(s, h->path)) {
        serve_error(o, 401, no_key, NULL, "invalid_api_key");
        return;
    }
    for (const Route *r = s->o.routes; r->path; r++) {
        if (!has_path(r, h->path)) continue;
        known = true;
        if (strcmp(r->method, method) != 0) continue;
        r->answer(s->o.arg, h, o);
        return;
    }
    snprintf(message, sizeof message, "%s %.100s: %s", method, h->path,
             known ? "not with this method" : "there is nothing here");
    serve_error(o, known ? 405 : 404, message, NULL, NULL);
}

// ---- connections ----

static void drop(Server *s, Connection *c) {
    if (c->fd < 0) return;
    close(c->fd);
    if (c->outlet) outlet_leave(c->outlet);
    outlet_release(c->outlet);
    http_reset(&c->request);
    c->fd = -1;
    c->outlet = NULL;
    s->n_open--;
}

static void begin_answer(Server *s, Connection *c, bool keep_alive) {
    const Http *h = &c->request;
    c->outlet = outlet_open(s->wake[1], h->minor, keep_alive, s->o.cors ? preflight : "");
    c->closing = !keep_alive;
    if (!c->outlet) drop(s, c);
}

// A body on its way takes memory: only from who has a key, and only so much of all of them
// together. Otherwise the request is answered now.
static bool may_send(Server *s, Connection *c) {
    size_t all = 0;
    bool known = has_key(s, &c->request);
    for (int i = 0; i < s->o.connections; i++) all += s->c[i].request.body.n;
    if (known && all <= 4 * s->o.body_most) return true;
    begin_answer(s, c, false);
    if (c->fd < 0) return false;
    if (known)
        serve_error(c->outlet, 503, "too many bodies are on their way: try again", NULL, NULL);
    else
        serve_error(c->outlet, 401, no_key, NULL, "invalid_api_key");
    free(c->request.body.s);
    c->request.body = (Buffer){0};
    return false;
}

// Takes what has come of the next request; answers it if it is whole.
static void take_input(Server *s, Connection *c) {
    size_t used;
    if (c->outlet || c->lingers > 0 || c->n_input == 0) return;
    bool waited = c->request.wants_continue;
    HttpState state = http_feed(&c->request, c->input, c->n_input, &used);
    c->n_input -= used;
    memmove(c->input, c->input + used, c->n_input);
    if (state == HTTP_MORE && c->request.part != HTTP_IN_HEAD && !may_send(s, c)) return;
    if (state == HTTP_MORE && c->request.wants_continue && !waited && c->n_input == 0) {
        static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
        if (send(c->fd, go_on, sizeof go_on - 1, 0) < 0) drop(s, c);
    }
    if (state == HTTP_MORE) return;
    begin_answer(s, c, state == HTTP_READY && c->request.keep_alive && !s->stopping);
    if (c->fd < 0) return;
    if (state == HTTP_BAD)
        serve_error(c->outlet, c->request.status, c->request.problem, NULL, NULL);
    else
        answer(s, &c->request, c->outlet);
    free(c->request.body.s);  // it may be large, and the answer slow
    c->request.body = (Buffer){0};
}

static void read_input(Server *s, Connection *c, int events) {
    char rest[4096];
    bool full = c->n_input == INPUT;
    if (full && events & (POLLHUP | POLLERR)) {  // it has left what it sent unread
        drop(s, c);
        return;
    }
    ssize_t n = c->lingers > 0 || full ? recv(c->fd, rest, sizeof rest, full ? MSG_PEEK : 0)
                                       : recv(c->fd, c->input + c->n_input, INPUT - c->n_input, 0);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) {
        drop(s, c);
        return;
    }
    if (n < 0 || c->lingers > 0 || full) return;
    if (!http_begun(&c->request) && c->n_input == 0 && !c->outlet) c->since = now();
    c->n_input += (size_t)n;
    c->moved = now();
}

// The answer is out: the connection waits for the next request, or for the client to close.
static void end_answer(Server *s, Connection *c, bool keep_alive) {
    outlet_release(c->outlet);
    c->outlet = NULL;
    http_reset(&c->request);
    c->since = c->moved = now();
    if (keep_alive && !c->closing && !s->stopping) return;
    shutdown(c->fd, SHUT_WR);
    c->lingers = now();
}

static void send_output(Server *s, Connection *c) {
    Outlet *o = c->outlet;
    if (!o) return;
    pthread_mutex_lock(&o->lock);
    size_t left = o->bytes.n - o->sent;
    ssize_t n = left > 0 ? send(c->fd, o->bytes.s + o->sent, left, 0) : 0;
    int error = n < 0 ? errno : 0;
    if (n > 0) o->sent += (size_t)n;
    if (o->sent == o->bytes.n) o->sent = o->bytes.n = 0;
    bool sent = o->ended && o->bytes.n == 0, keep_alive = o->keep_alive, gone = o->gone;
    pthread_mutex_unlock(&o->lock);
    if (n > 0) c->moved = now();
    if (gone || (error && error != EAGAIN && error != EWOULDBLOCK && error != EINTR))
        drop(s, c);
    else if (sent)
        end_answer(s, c, keep_alive);
}

// Bytes of an answer that wait to be sent.
static bool has_output(const Connection *c) {
    if (!c->outlet) return false;
    pthread_mutex_lock(&c->outlet->lock);
    bool has = c->outlet->bytes.n > c->outlet->sent || c->outlet->ended;
    pthread_mutex_unlock(&c->outlet->lock);
    return has;
}

// Ends what takes too long.
static void check_time(Server *s, Connection *c) {
    double t = now();
    bool begun = http_begun(&c->request), in_head = c->request.part == HTTP_IN_HEAD;
    if (c->lingers > 0) {
        if (t - c->lingers > 2) drop(s, c);
    } else if (c->outlet) {
        if (has_output(c) && t - c->moved > s->o.idle_s) drop(s, c);
    } else if (begun && (in_head ? t - c->since > s->o.head_s : t - c->moved > s->o.idle_s)) {
        begin_answer(s, c, false);
        if (c->fd >= 0)
            serve_error(c->outlet, 408, "the request takes too long to come", NULL, NULL);
    } else if (!begun && t - c->since > s->o.idle_s) {
        drop(s, c);
    }
}

static Connection *free_place(Server *s) {
    Connection *idle = NULL;
    for (Connection *c = s->c; c < s->c + s->o.connections; c++) {
        if (c->fd < 0) return c;
        bool waits = !c->outlet && !http_begun(&c->request);
        if (waits && (!idle || c->since < idle->since)) idle = c;
    }
    if (idle) drop(s, idle);  // the one that has been idle longest makes room
    return idle;
}

static int make_nonblocking(int fd) {
    int flags = fcntl(fd, F_GETFL);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    return flags < 0 ? -1 : fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

static void accept_one(Server *s, int listener) {
    Connection *c = free_place(s);
    int one = 1, fd = c ? accept(listener, NULL, NULL) : -1;
    if (fd < 0) {
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            poll(NULL, 0, 10);  // no descriptors: not at once
        return;
    }
    if (make_nonblocking(fd) != 0) {
        close(fd);
        return;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
#ifdef SO_NOSIGPIPE
    setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &one, sizeof one);
#endif
    size_t most = s->o.body_most;
    http_reset(&c->request);
    c->request.body_most = most;
    c->n_input = 0, c->outlet = NULL, c->closing = false, c->lingers = 0;
    c->since = c->moved = now();
    c->fd = fd;
    s->n_open++;
}

// ---- the loop ----

// Whether a connection has nothing more to send.
static bool is_quiet(const Connection *c) { return c->fd < 0 || !c->outlet; }

static void serve_once(Server *s, struct pollfd *p) {
    char bytes[256];
    int n = 0, most = s->o.connections, room = 0;
    p[n++] = (struct pollfd){.fd = s->wake[0], .events = POLLIN};
    for (Connection *c = s->c; c < s->c + most; c++) room += c->fd < 0 || is_quiet(c);
    for (int i = 0; i < s->n_listeners; i++)
        p[n++] =
            (struct pollfd){.fd = room && !s->stopping ? s->listener[i] : -1, .events = POLLIN};
    int first = n;
    for (Connection *c = s->c; c < s->c + most; c++)
        p[n++] = (struct pollfd){
            .fd = c->fd,
            .events = (short)((c->n_input < INPUT ? POLLIN : 0) | (has_output(c) ? POLLOUT : 0))};
    if (poll(p, (nfds_t)n, 250) < 0) return;
    while (p[0].revents && read(s->wake[0], bytes, sizeof bytes) == sizeof bytes) continue;
    for (int i = 0; i < most; i++) {
        Connection *c = &s->c[i];
        if (c->fd >= 0 && p[first + i].revents) read_input(s, c, p[first + i].revents);
        if (c->fd >= 0) take_input(s, c);
        if (c->fd >= 0) send_output(s, c);
        if (c->fd >= 0) take_input(s, c);  // what came behind the request just answered
        if (c->fd >= 0) check_time(s, c);
    }
    for (int i = 0; i < s->n_listeners; i++)
        if (p[1 + i].revents) accept_one(s, s->listener[i]);
}

static void *serve_loop(void *arg) {
    Server *s = arg;
    struct pollfd *p = calloc((size_t)s->o.connections + LISTENERS + 1, sizeof *p);
    double stopped = 0;
    while (p) {
        serve_once(s, p);
        if (!s->stopping) continue;
        if (stopped == 0) stopped = now();
        bool quiet = true;
        for (int i = 0; i < s->o.connections; i++) quiet = quiet && is_quiet(&s->c[i]);
        if (quiet || now() - stopped > 1) break;
    }
    free(p);
    return NULL;
}

// ---- opening ----

static bool is_loopback(const struct sockaddr *a) {
    if (a->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)a)->sin_addr.s_addr) >> 24 == 127;
    return a->sa_family == AF_INET6 &&
           IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)a)->sin6_addr);
}

static int bound_port(int fd) {
    struct sockaddr_storage a;
    socklen_t n = sizeof a;
    if (getsockname(fd, (struct sockaddr *)&a, &n) != 0) return 0;
    return ntohs(a.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&a)->sin6_port
                                         : ((struct sockaddr_in *)&a)->sin_port);
}

// Listens at one address. 0, or -1 with errno.
static int listen_at(Server *s, const struct addrinfo *a) {
    int one = 1, fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
    if (fd < 0) return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
#ifdef IPV6_V6ONLY
    if (a->ai_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
#endif
    if (bind(fd, a->ai_addr, a->ai_addrlen) != 0 || listen(fd, BACKLOG) != 0 ||
        make_nonblocking(fd) != 0) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    s->listener[s->n_listeners++] = fd;
    return 0;
}

static int listen_all(Server *s, int *port, char *err) {
    char name[16];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *all;
    snprintf(name, sizeof name, "%d", s->o.port);
    int code = getaddrinfo(s->o.host, name, &hints, &all);
    if (code != 0) return fail(err, "--host %s: %s", s->o.host, gai_strerror(code));
    int error = 0, status = 0;
    for (struct addrinfo *a = all; a && s->n_listeners < LISTENERS; a = a->ai_next) {
        if (a->ai_family != AF_INET && a->ai_family != AF_INET6) continue;
        if (!s->o.keys && !is_loopback(a->ai_addr)) {
            status =
                fail(err, "--host %s lets other machines in: that needs --api-key-file", s->o.host);
            break;
        }
        if (s->o.port == 0 && s->n_listeners > 0) break;  // another family's free port is another
        if (listen_at(s, a) != 0) error = errno;
    }
    freeaddrinfo(all);
    if (status == 0 && s->n_listeners == 0)
        status = fail(err, "%s port %d: %s", s->o.host, s->o.port, strerror(error));
    if (status == 0) *port = bound_port(s->listener[0]);
    return status;
}

Server *serve_open(const ServeOptions *o, int *port, char *err) {
    Server *s = calloc(1, sizeof *s);
    if (!s) return fail(err, "out of memory"), NULL;
    s->o = *o;
    s->wake[0] = s->wake[1] = -1;
    s->c = calloc((size_t)o->connections, sizeof *s->c);
    for (int i = 0; s->c && i < o->connections; i++) s->c[i].fd = -1;
    int status = s->c ? 0 : fail(err, "out of memory for %d connections", o->connections);
    if (status == 0 && pipe(s->wake) != 0) status = fail(err, "no pipe: %s", strerror(errno));
    if (status == 0 && (make_nonblocking(s->wake[0]) != 0 || make_nonblocking(s->wake[1]) != 0))
        status = fail(err, "no pipe: %s", strerror(errno));
    if (status == 0) status = listen_all(s, port, err);
    if (status == 0) return s;
    serve_close(s);
    return NULL;
}

int serve_start(Server *s, char *err) {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    int code = pthread_create(&s->thread, NULL, serve_loop, s);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    s->started = code == 0;
    return s->started ? 0 : fail(err, "no thread can be made");
}

void serve_close(Server *s) {
    if (!s) return;
    s->stopping = 1;
    if (s->started && write(s->wake[1], "", 1) < 0 && errno != EAGAIN) return;
    if (s->started) pthread_join(s->thread, NULL);
    for (int i = 0; s->c && i < s->o.connections; i++) drop(s, &s->c[i]);
    for (int i = 0; i < s->n_listeners; i++) close(s->listener[i]);
    for (int i = 0; i < 2; i++)
        if (s->wake[i] >= 0) close(s->wake[i]);
    free(s->c);
    free(s);
}
