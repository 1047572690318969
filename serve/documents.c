// documents.c: contexts that were read once and compressed, by name.
//
// The folder is the truth: a file that is whole is a document, and newfile.h sees to it that there
// are no others. What a document is made of lies in its file's head, so that a start costs a look
// at each, and no pages.
#define _POSIX_C_SOURCE 200809L
#include "serve/documents.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "newfile.h"

static const char ENDING[] = ".kvc", AUTOMATIC[] = "prompt-";

// ---- names ----

bool documents_name_ok(const char *name) {
    size_t n = strlen(name);
    static const char may[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
    return n > 0 && n <= DOC_NAME && name[0] != '.' && strspn(name, may) == n;
}

void documents_hash(const int *ids, int n, char name[DOC_NAME + 1]) {
    uint64_t a = hash_bytes(HASH_START, ids, (size_t)n * sizeof *ids);
    uint64_t b = hash_bytes(a ^ 0x9e3779b97f4a7c15u, ids, (size_t)n * sizeof *ids);
    snprintf(name, DOC_NAME + 1, "%s%016llx%016llx", AUTOMATIC, (unsigned long long)a,
             (unsigned long long)b);
}

static Document *listed(const Documents *d, const char *name) {
    for (int i = 0; i < d->n; i++)
        if (strcmp(d->doc[i]->name, name) == 0) return d->doc[i];
    return NULL;
}

Document *documents_serial(const Documents *d, unsigned long serial) {
    for (int i = 0; i < d->n && serial; i++)
        if (d->doc[i]->serial == serial) return d->doc[i];
    return NULL;
}

// FOLDER/NAME.kvc, malloc'ed; NULL: no memory.
static char *path_of(const char *folder, const char *name) {
    size_t n = strlen(folder) + strlen(name) + sizeof ENDING + 1;
    char *path = malloc(n);
    if (path) snprintf(path, n, "%s/%s%s", folder, name, ENDING);
    return path;
}

// ---- one document ----

static void document_free(Documents *d, Document *doc) {
    if (doc->seq >= 0) kvcache_drop(d->kv, doc->seq);
    ids_free(&doc->ids);
    free(doc->path);
    free(doc);
}

static Document *document_new(Documents *d, const char *name, char *err) {
    Document *doc = calloc(1, sizeof *doc);
    if (!doc) return fail(err, "out of memory for a document"), NULL;
    snprintf(doc->name, sizeof doc->name, "%s", name);
    doc->seq = -1;
    doc->serial = ++d->serials;
    doc->used = now();
    doc->automatic = strncmp(name, AUTOMATIC, sizeof AUTOMATIC - 1) == 0;
    return doc;
}

static int note_info(Document *doc, const KVInfo *info, char *err) {
    doc->n_prefix = info->n_prefix;
    doc->ratio = info->ratio;
    snprintf(doc->policy, sizeof doc->policy, "%s", info->policy ? info->policy : "");
    snprintf(doc->fit, sizeof doc->fit, "%s", info->fit ? info->fit : "none");
    for (int i = 0; i < info->n_ids; i++)
        if (ids_push(&doc->ids, info->ids[i]) != 0) return fail(err, "out of memory");
    return 0;
}

static void note_file(Document *doc) {
    struct stat st;
    if (!doc->path || stat(doc->path, &st) != 0) return;
    doc->file_bytes = (size_t)st.st_size;
    doc->created = (long)st.st_mtime;
}

// What the head of the file at doc->path says. 0, or -1 with err.
static int read_file(Documents *d, Document *doc, char *err) {
    TensorFile f = {0};
    CacheFacts facts = {0};
    if (tensors_open(&f, doc->path, err) != 0) return -1;
    int status = kvfile_is(&f) ? kvfile_facts(&facts, &f, err) : fail(err, "no saved cache");
    if (status == 0 &&
        (!facts.info.fingerprint || strcmp(facts.info.fingerprint, d->model->fingerprint) != 0))
        status = fail(err, "made by another model");
    if (status == 0) status = note_info(doc, &facts.info, err);
    if (status == 0) {
        for (int i = 0; i < PAGE_CLASSES; i++) doc->bytes += (size_t)facts.bytes[i];
        doc->full_bytes = (size_t)facts.full_bytes;
        kvcache_types_name(facts.types[PAGE_SETTLED], doc->kv);
        note_file(doc);
    }
    kvfile_facts_free(&facts);
    tensors_close(&f);
    return status;
}

// ---- the list ----

static int list_add(Documents *d, Document *doc, char *err) {
    Document **list = realloc(d->doc, (size_t)(d->n + 1) * sizeof *list);
    if (!list) return fail(err, "out of memory for a list of documents");
    d->doc = list;
    d->doc[d->n++] = doc;
    return 0;
}

static void list_remove(Documents *d, Document *doc) {
    int i = 0;
    while (i < d->n && d->doc[i] != doc) i++;
    if (i == d->n) return;
    memmove(d->doc + i, d->doc + i + 1, (size_t)(d->n - i - 1) * sizeof *d->doc);
    d->n--;
    document_free(d, doc);
}

static Document *add_file(Documents *d, const char *name, const char *path, char *err) {
    Document *old = listed(d, name), *doc = document_new(d, name, err);
    if (!doc) return NULL;
    doc->path = strdup(path);
    if (!doc->path || read_file(d, doc, err) != 0 || list_add(d, doc, err) != 0) {
        if (!doc->path) fail(err, "out of memory");
        document_free(d, doc);
        return NULL;
    }
    if (old) list_remove(d, old);
    return doc;
}

int documents_borrow(Documents *d, const char *name, const char *path, char *err) {
    Document *doc = add_file(d, name, path, err);
    if (!doc) return -1;
    doc->borrowed = true;
    doc->file_bytes = 0;
    return 0;
}

Document *documents_find(Documents *d, const char *name) {
    char why[ERR_LEN];
    Document *doc = listed(d, name);
    if (doc || !d->folder || !documents_name_ok(name)) return doc;
    char *path = path_of(d->folder, name);
    if (path && access(path, R_OK) == 0) doc = add_file(d, name, path, why);
    if (doc) doc->tried = true;  // only what is there at the start is loaded ahead
    free(path);
    return doc;
}

int documents_open(Documents *d, int *skipped, char *err) {
    char why[ERR_LEN];
    *skipped = 0;
    if (!d->folder) return 0;
    if (mkdir(d->folder, 0777) != 0 && errno != EEXIST)
        return fail(err, "%s: %s", d->folder, strerror(errno));
    newfile_clear(d->folder, ENDING);
    DIR *dir = opendir(d->folder);
    if (!dir) return fail(err, "%s: %s", d->folder, strerror(errno));
    for (struct dirent *entry; (entry = readdir(dir));) {
        char name[DOC_NAME + 1];
        size_t n = strlen(entry->d_name), end = sizeof ENDING - 1;
        if (n <= end || n - end > DOC_NAME || strcmp(entry->d_name + n - end, ENDING) != 0)
            continue;
        snprintf(name, sizeof name, "%.*s", (int)(n - end), entry->d_name);
        if (!documents_name_ok(name)) continue;
        char *path = path_of(d->folder, name);
        if (!path || !add_file(d, name, path, why)) ++*skipped;
        free(path);
    }
    closedir(dir);
    return 0;
}

void documents_close(Documents *d) {
    while (d->n > 0) document_free(d, d->doc[--d->n]);
    free(d->doc);
    d->doc = NULL;
}

// ---- disk ----

int documents_remove(Documents *d, Document *doc, char *err) {
    if (doc->path && !doc->borrowed && unlink(doc->path) != 0 && errno != ENOENT)
        return fail(err, "%s: %s", doc->name, strerror(errno));
    list_remove(d, doc);
    return 0;
}

// Of those that --compress-prompts made the one that was used longest ago, but not `but`.
static Document *oldest(const Documents *d, const Document *but) {
    Document *old = NULL;
    for (int i = 0; i < d->n; i++)
        if (d->doc[i]->automatic && d->doc[i] != but && d->doc[i]->path && !d->doc[i]->borrowed &&
            (!old || d->doc[i]->used < old->used))
            old = d->doc[i];
    return old;
}

static size_t files_bytes(const Documents *d) {
    size_t n = 0;
    for (int i = 0; i < d->n; i++) n += d->doc[i]->file_bytes;
    return n;
}

// Keeps the files within their limit. 0, or -1 with err: doc, the newest, has no room.
static int make_room(Documents *d, const Document *doc, char *err) {
    while (d->most_bytes > 0 && files_bytes(d) > d->most_bytes) {
        Document *old = oldest(d, doc);
        d->full = !old;
        if (!old)
            return fail(err, "%zu bytes of documents are more than --docs-size %zu", files_bytes(d),
                        d->most_bytes);
        if (documents_remove(d, old, err) != 0) return -1;
    }
    return 0;
}

Document *documents_add(Documents *d, const char *name, int seq, const KVInfo *info, bool automatic,
                        char *err) {
    Document *old = listed(d, name), *doc = document_new(d, name, err);
    if (!doc) return kvcache_drop(d->kv, seq), NULL;
    doc->seq = seq;
    doc->automatic = automatic;
    doc->created = (long)time(NULL);
    doc->bytes = kvcache_bytes(d->kv, seq);
    doc->full_bytes = kvcache_unevicted_bytes(d->kv, seq, info->n_ids);
    kvcache_types_name(d->kv->types, doc->kv);
    doc->path = d->folder ? path_of(d->folder, name) : NULL;
    int status = d->folder && !doc->path ? fail(err, "out of memory") : note_info(doc, info, err);
    if (status == 0 && doc->path) status = kvfile_save(d->kv, seq, doc->path, info, err);
    if (status != 0) {
        document_free(d, doc);
        return NULL;
    }
    note_file(doc);
    if (old) list_remove(d, old);
    if (list_add(d, doc, err) != 0) {
        document_free(d, doc);
        return NULL;
    }
    if (doc->path && make_room(d, doc, err) != 0) {
        char why[ERR_LEN];
        documents_remove(d, doc, why);
        return NULL;
    }
    return doc;
}

// ---- memory ----

// Maps its file. 0, or -1 with err, and then there is nothing to close.
static int open_saved(const Documents *d, const Document *doc, KVCache *saved, char *err) {
    KVInfo info;
    KVModel model = {model_kv_shape(d->model), d->model->fingerprint};
    if (kvfile_load(saved, doc->path, &model, NULL, &info, err) != 0) return -1;
    if (info.n_ids == doc->ids.n &&
        memcmp(info.ids, doc->ids.id, (size_t)info.n_ids * sizeof *info.ids) == 0)
        return 0;
    kvcache_close(saved);
    return fail(err, "%s has changed on disk", doc->name);
}

int documents_load(Documents *d, Document *doc, char *err) {
    KVCache saved;
    doc->used = now();
    if (doc->seq >= 0) return 0;
    if (open_saved(d, doc, &saved, err) != 0) return -1;
    doc->seq = kvcache_take(d->kv, &saved, 0, err);
    kvcache_close(&saved);
    return doc->seq >= 0 ? 0 : -1;
}

bool documents_load_ahead(Documents *d, size_t room) {
    char why[ERR_LEN];
    for (int i = 0; i < d->n; i++) {
        Document *doc = d->doc[i];
        double used = doc->used;
        if (doc->tried || doc->seq >= 0 || doc->bytes > room) continue;
        doc->tried = true;
        documents_load(d, doc, why);  // who asks for it hears why not
        doc->used = used;
        return true;
    }
    return false;
}

void documents_unload(Documents *d, Document *doc) {
    if (doc->seq < 0 || !doc->path) return;
    kvcache_drop(d->kv, doc->seq);
    doc->seq = -1;
}

// ---- the map ----

// Adds up the next head, by token where that is asked.
static void map_head(DocumentMap *m, const KVCache *kv, const KVHead *h, const Document *doc,
                     int head, bool by_token) {
    int n_ctx = doc->ids.n - doc->n_prefix;
    for (int t = 0; t < h->len - h->dropped; t++) {
        const KVPage *page = &kv->pages[h->page[t / PAGE]];
        int at = page->pos[t % PAGE] - doc->n_prefix;
        bool demoted = page->class == PAGE_DEMOTED;
        if (at < 0 || at >= n_ctx) continue;  // of the prefix
        m->n_demoted += demoted, m->n_kept += !demoted, m->pairs[head] += !demoted;
        if (by_token && !demoted && at >= m->from && at - m->from < m->n) m->kept[at - m->from]++;
    }
}

int documents_map(const Documents *d, const Document *doc, DocumentMap *m, char *err) {
    KVCache saved = {0};
    const KVCache *kv = doc->seq >= 0 ? d->kv : &saved;
    const KVShape *shape = &d->kv->shape;
    int n_heads = shape->n_kv_heads, n = kvcache_scored_layers(shape, NULL) * n_heads;
    m->kept = calloc((size_t)m->n + 1, sizeof *m->kept);
    m->layers = calloc((size_t)shape->n_layers + 1, sizeof *m->layers);
    m->pairs = calloc((size_t)n + 1, sizeof *m->pairs);
    if (!m->kept || !m->layers || !m->pairs) return fail(err, "out of memory for a map");
    if (doc->seq < 0 && open_saved(d, doc, &saved, err) != 0) return -1;
    m->n_layers = kvcache_scored_layers(shape, m->layers);
    for (int i = 0; i < n; i++) {
        bool by_token = (m->layer < 0 || m->layer == m->layers[i / n_heads]) &&
                        (m->head < 0 || m->head == i % n_heads);
        m->n_heads += by_token;
        map_head(m, kv, kvcache_scored_head(kv, doc->seq >= 0 ? doc->seq : 0, i), doc, i, by_token);
    }
    if (doc->seq < 0) kvcache_close(&saved);
    return 0;
}

void documents_map_free(DocumentMap *m) {
    free(m->kept), free(m->layers), free(m->pairs);
    *m = (DocumentMap){0};
}
