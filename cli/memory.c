// memory.c: what a command will need at its peak, before it starts.
//
// The cache gives its own figures (kvcache_token_bytes and the like); what must be known here is
// how many pairs are there at once: all tokens, or with eviction those that stay, the window that
// is not evicted, and the block that is being read.
#define _DEFAULT_SOURCE  // _SC_PHYS_PAGES
#define _DARWIN_C_SOURCE
#include "cli/memory.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cgroup.h"
#include "cli/output.h"
#include "constrain.h"

// Bytes of a program that has nothing open: code, libraries, stacks, buffers.
static const double PROGRAM = 6e6;
enum {
    PAGE_PAIRS = 64,
    STREAM_PAIR = 16,  // bytes of scores and of what is noted of a pair while tokens come
};

// ---- the estimate ----

// Pairs of a head that are in memory together.
static double pairs_at_once(const Session *s, const MemoryNeed *need, const MemoryPlan *plan) {
    double text = need->tokens - need->n_prefix;
    double stay = plan->budget > 0 ? plan->budget : ceil(text * plan->ratio);
    stay += need->n_prefix + (double)s->o->window + MAX_ROWS;
    return fmin(stay, need->tokens);
}

// Of the layers with a window, which hold it, a page that they leave and the block being read.
static double window_bytes(const KVShape *shape, KVTypes types, double tokens) {
    double bytes = 0;
    for (int l = 0; l < shape->n_layers; l++) {
        double window = shape->window[l], pairs = fmin(tokens, window + MAX_ROWS + PAGE_PAIRS);
        double page = (double)kvcache_page_bytes(kvshape_dim(shape, l), types);
        if (window > 0 && kvshape_owns(shape, l))
            bytes += pairs * kvshape_heads(shape, l) * (page / PAGE_PAIRS + sizeof(int));
    }
    return bytes;
}

// Of a pair, what a reader knows of its page: of one reader at a time, the one that asks for most.
static double digest_bytes(const Session *s, const KVShape *shape) {
    double most = 0;
    for (int i = 0; i < s->n_reads; i++) most = fmax(most, reader_bytes(&s->reads[i], shape));
    return most;
}

MemoryUse memory_use(const Session *s, const MemoryNeed *need, const MemoryPlan *plan) {
    KVShape shape = model_kv_shape(&s->model);
    KVTypes exact = kvcache_both(s->kv.type), types = need->whole ? exact : plan->types;
    bool streams = plan->ratio < 1 || plan->budget > 0;
    double heads = (double)shape.n_kv_heads * kvcache_scored_layers(&shape, NULL);
    double pairs = streams ? pairs_at_once(s, need, plan) : need->tokens;
    double copies = need->copies > 0 ? need->copies : 1;
    double whole_pages = ceil(pairs / PAGE_PAIRS) * PAGE_PAIRS;
    double open = fmin(need->tokens, MAX_ROWS + 2 * PAGE_PAIRS);  // pages that have not settled yet
    const TensorFile *file = &s->model.file;
    MemoryUse use = {.weights = (double)(file->map_bytes - file->cold_bytes),
                     .scratch = (double)s->state.bytes};
    use.cache = copies * ((double)kvcache_first_bytes(&shape, types) +
                          whole_pages * (double)kvcache_token_bytes(&shape, types) +
                          open * (double)kvcache_token_bytes(&shape, exact) *
                              (types.k != exact.k || types.v != exact.v));
    use.cache += need->forked * (double)kvcache_token_bytes(&shape, exact);
    use.cache += copies * window_bytes(&shape, exact, need->tokens);
    use.cache += (copies + 1) * (double)kvcache_state_bytes(&shape);  // and what a mark keeps
    use.cache += need->loaded;
    use.rest = PROGRAM + need->more;
    if (s->kv.type == KV_F16) use.rest += whole_pages * (double)kvcache_read_bytes(&shape);
    use.rest += heads * pairs * (streams ? STREAM_PAIR : need->scores);
    use.rest += digest_bytes(s, &shape) *
                (copies * heads * whole_pages + (double)s->kv.n_pages * PAGE_PAIRS);
    if (s->o->json_object || s->o->json_schema)
        use.rest += (double)constrain_bytes(s->model.config.vocab_size);
    return use;
}

// A score is a float, and whether its pair stays a byte. KVzip+, alone or wrapped, has a float for
// each query head as well.
double memory_scores(const Session *s, const Policy *policy) {
    const Config *m = &s->model.config;
    return 5 + (strstr(policy->name, "kvzip+") ? 4.0 * m->n_heads / m->n_kv_heads : 0);
}

double memory_total(const MemoryUse *use) {
    return use->weights + use->scratch + use->cache + use->rest;
}

// ---- what there is ----

// Bytes that a group's folder allows, or INFINITY.
static double group_limit(const char *folder, int version) {
    double x[2];
    const char *name = version == 2 ? "memory.max" : "memory.limit_in_bytes";
    return cgroup_numbers(folder, name, x, 1) == 1 && x[0] > 0 ? x[0] : INFINITY;
}

double memory_group_limit(const char *text, const char *root) {
    return cgroup_least(text, root, "memory", group_limit);
}

double memory_here(const char **who) {
    char err[ERR_LEN];
    size_t n;
    char *groups = file_read("/proc/self/cgroup", &n, err);
    double machine = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    double group = groups ? memory_group_limit(groups, "/sys/fs/cgroup") : INFINITY;
    free(groups);
    *who = group < machine ? "this control group" : "this machine";
    return fmin(machine > 0 ? machine : INFINITY, group);
}

// ---- advice ----

static double total_of(const Session *s, const MemoryNeed *need, const MemoryPlan *plan) {
    MemoryUse use = memory_use(s, need, plan);
    return memory_total(&use);
}

// The largest ratio, in hundredths, with which it fits; 0: none does.
static double fitting_ratio(const Session *s, MemoryNeed need, KVTypes types, double limit) {
    need.whole = false;
    for (int hundredths = 99; need.evicts && hundredths > 0; hundredths--) {
        MemoryPlan plan = {types, hundredths / 100.0, 0};
        if (total_of(s, &need, &plan) <= limit) return plan.ratio;
    }
    return 0;
}

// What would fit, as flags: a ratio, another type of pages, or both. Returns text.
static const char *advice(char text[160], const Session *s, const MemoryNeed *need, MemoryPlan plan,
                          double limit) {
    static const KVType smaller[] = {KV_Q8, KV_Q4};
    const char *stream = s->o->bit == COMPRESS ? "--stream " : "";
    double ratio = fitting_ratio(s, *need, plan.types, limit);
    size_t n = 0;
    text[0] = '\0';
    if (ratio > 0) n += (size_t)snprintf(text, 160, "%s--ratio %g", stream, ratio);
    for (int i = 0; i < 2; i++) {
        plan.types = kvcache_both(smaller[i]);
        if (total_of(s, need, &plan) > limit) continue;
        snprintf(text + n, 160 - n, "%s--kv %s", n ? " or " : "", kvcache_type_name(smaller[i]));
        return text;
    }
    for (int i = 0; i < 2 && n == 0; i++) {
        ratio = fitting_ratio(s, *need, kvcache_both(smaller[i]), limit);
        if (ratio > 0)
            n += (size_t)snprintf(text, 160, "%s--ratio %g with --kv %s", stream, ratio,
                                  kvcache_type_name(smaller[i]));
    }
    return n > 0 ? text : "a shorter text or a smaller model alone";
}

int memory_fits(const Session *s, const MemoryNeed *need, char *err) {
    const Options *o = s->o;
    char size[6][32], text[160];
    const char *who = "--mem";
    MemoryPlan plan = {s->kv.types, wants_stream(o) && o->ratio > 0 ? o->ratio : 1,
                       (double)o->budget};
    MemoryUse use = memory_use(s, need, &plan);
    double total = memory_total(&use), limit = o->mem > 0 ? o->mem : memory_here(&who);
    if (total <= limit || (o->mem == 0 && o->quiet)) return 0;
    fail(err, "this needs %s (weights %s, scratch %s, cache %s, more %s), %s has %s; what fits: %s",
         size_text(size[0], total), size_text(size[1], use.weights),
         size_text(size[2], use.scratch), size_text(size[3], use.cache),
         size_text(size[4], use.rest), who, size_text(size[5], limit),
         advice(text, s, need, plan, limit));
    if (o->mem > 0) return -1;
    warning("%s", err);
    return 0;
}

void memory_check(const Session *s, const MemoryNeed *need) {
    char err[ERR_LEN];
    if (memory_fits(s, need, err) != 0) die("%s", err);
}
