// serve.h: connections: one thread that listens, reads requests, hands them on and sends answers.
//
// It knows nothing of models: a request goes to the function of its route, which answers through an
// outlet, at once or later from another thread.
#ifndef SERVE_H
#define SERVE_H
#include "serve/http.h"
#include "serve/outlet.h"

// Who answers: method and path; a path that ends with '/' stands for all that begin with it.
typedef struct {
    const char *method, *path;
    void (*answer)(void *arg, Http *h, Outlet *o);  // releases o; may change the body
} Route;

// The caller's to fill in. Times in seconds.
typedef struct {
    const char *host;  // a name or an address
    int port;          // 0: any
    char **keys;       // NULL behind the last one; NULL: everybody may ask
    bool cors;         // pages of other origins may ask
    size_t body_most;  // bytes of a request's body
    int connections;   // at most
    double head_s;     // for a request's head, once it has begun
    double idle_s;     // without a byte in a body or of an answer; of a connection between requests
    const Route *routes;      // path NULL behind the last one
    const char *const *open;  // paths that need no key; NULL behind the last one
    void *arg;                // of their functions
} ServeOptions;

typedef struct Server Server;

// Listens; *port becomes the port. Refuses a host that is not this machine's alone where there are
// no keys. NULL with err.
Server *serve_open(const ServeOptions *o, int *port, char *err);
// Starts the thread. 0, or -1 with err.
int serve_start(Server *s, char *err);
// Takes no more requests, sends what is ready for a second at most, and ends.
void serve_close(Server *s);  // NULL allowed

// An answer of a few words in OpenAI's shape of an error, which is Anthropic's as well. param and
// code may be NULL. Releases o.
void serve_error(Outlet *o, int status, const char *message, const char *param, const char *code);

int serve_connections(const Server *s);  // open ones, about
#endif
