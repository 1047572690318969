// jobs.c: what a request asks, and what of its answers can be shown.
#include <stdlib.h>
#include <string.h>

#include "serve/engine.h"

Job *job_new(Outlet *o, int n_parts) {
    Job *job = calloc(1, sizeof *job);
    if (!job) return NULL;
    job->parts = calloc((size_t)max_int(n_parts, 1), sizeof *job->parts);
    if (!job->parts) return free(job), NULL;
    job->outlet = o;
    job->n_parts = n_parts;
    job->n_tops = -1;
    for (int i = 0; i < n_parts; i++) job->parts[i].job = job, job->parts[i].index = i;
    return job;
}

void job_free(Job *job) {
    if (!job) return;
    if (job->close) job->close(job);
    for (Part *p = job->parts; p < job->parts + job->n_parts; p++) {
        ids_free(&p->prompt);
        ids_free(&p->source);
        reply_free(&p->reply);
        free(p->scores);
    }
    for (char **stop = job->stop; *stop; stop++) free(*stop);
    schema_close(job->schema);
    free(job->bias);
    free(job->parts);
    free(job->document);
    free(job->door);
    free(job);
}

// ---- parts ----

bool part_stopped(const Part *p, const char **stop) {
    const Reply *r = &p->reply;
    size_t longest = 0;
    if (!r->done || r->cut || r->stop_id >= 0) return false;
    for (char **s = p->job->stop; *s; s++) {
        size_t n = strlen(*s);
        if (n > longest && n <= r->text.n && memcmp(r->text.s + r->text.n - n, *s, n) == 0)
            longest = n, *stop = *s;
    }
    return longest > 0;
}

// Bytes at the end of the text that may be the beginning of a stop text.
static size_t held_back(const Part *p) {
    const Buffer *t = &p->reply.text;
    size_t most = 0;
    for (char **s = p->job->stop; *s; s++) {
        size_t n = strlen(*s) - 1;
        if (n > t->n) n = t->n;
        while (n > most && memcmp(t->s + t->n - n, *s, n) != 0) n--;
        if (n > most) most = n;
    }
    return most;
}

void part_end(Part *p) { p->reply.done = true; }

size_t part_visible(const Part *p) {
    const char *stop;
    if (p->reply.done) return p->reply.text.n - (part_stopped(p, &stop) ? strlen(stop) : 0);
    return p->reply.text.n - held_back(p);
}
