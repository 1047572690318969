// documents.h: contexts that were read once and compressed, by name, in memory and on disk.
//
// A document is a saved cache (kvfile.h). With a folder it is NAME.kvc there and is found again
// after a restart; its pages are loaded when they are first asked for. Used by the engine's thread
// alone.
#ifndef DOCUMENTS_H
#define DOCUMENTS_H
#include "kvfile.h"
#include "model.h"
#include "tokenizer.h"

enum { DOC_NAME = 64 };

typedef struct {
    char name[DOC_NAME + 1];
    char *path;            // NULL: in memory alone
    unsigned long serial;  // no two have the same, not even one after the other
    Ids ids;               // what was read
    int n_prefix;
    char policy[32], fit[8], kv[KV_NAME];
    double ratio;
    size_t bytes, full_bytes;  // of the cache, and what it would be whole
    size_t file_bytes;         // 0: not on disk
    int seq;                   // of the engine's cache, -1: not loaded
    bool borrowed;             // -c: its file is another's, and stays when the document goes
    bool automatic;            // made by --compress-prompts; its name is the hash of its ids
    long created;              // Unix time
    double used;
    bool tried;  // loading it ahead: it is there, or cannot be read
} Document;

typedef struct {
    KVCache *kv;
    const Model *model;
    const char *folder;  // NULL: none
    size_t most_bytes;   // of files; 0: no limit
    Document **doc;      // [n]
    int n;
    unsigned long serials;
    bool full;  // a document had no room within most_bytes
} Documents;

// Finds the saved caches of the folder that are this model's; what others there are is left alone.
// *skipped counts saved caches of other models and broken ones. 0, or -1 with err.
int documents_open(Documents *d, int *skipped, char *err);
void documents_close(Documents *d);

bool documents_name_ok(const char *name);  // letters, digits, '-', '_', '.', none of them first '.'
// The document of that name, also one that another process has put into the folder; or NULL.
Document *documents_find(Documents *d, const char *name);
Document *documents_serial(const Documents *d, unsigned long serial);
// "prompt-0123456789abcdef" of ids [n].
void documents_hash(const int *ids, int n, char name[DOC_NAME + 1]);

// A file elsewhere gets a name, and stays another's; what is there under the name is replaced. 0,
// or -1 with err.
int documents_borrow(Documents *d, const char *name, const char *path, char *err);

// The sequence seq, compressed, becomes a document: saved where there is a folder. It takes the
// place of one with the same name. seq is the document's from then on, also on failure. NULL with
// err.
Document *documents_add(Documents *d, const char *name, int seq, const KVInfo *info, bool automatic,
                        char *err);

// Its pages into the cache. 0, or -1 with err.
int documents_load(Documents *d, Document *doc, char *err);
// Loads one that was not asked for yet, if it takes no more than `room` bytes. false: there is
// none.
bool documents_load_ahead(Documents *d, size_t room);
void documents_unload(Documents *d, Document *doc);  // where it is on disk
// Ends it, its file as well. 0, or -1 with err.
int documents_remove(Documents *d, Document *doc, char *err);

// What stays of a document's context (the prefix always does) in the layers that evict.
typedef struct {
    int layer, head;  // in: whose pairs are counted by token; -1: those of all
    int from, n;      // in: tokens [from, from + n) of the context, within it
    int *kept;        // [n] how many of n_heads heads keep the token
    int n_heads;
    int *layers, n_layers;     // [n_layers] those that evict
    int *pairs;                // [n_layers][n_kv_heads] of the context; demoted ones not counted
    double n_kept, n_demoted;  // in all of them
} DocumentMap;

// Fills m. A document that is not loaded is looked at in its file, and is not loaded by it. Time
// and memory: a look at each pair; two numbers a token and a head. 0, or -1 with err.
int documents_map(const Documents *d, const Document *doc, DocumentMap *m, char *err);
void documents_map_free(DocumentMap *m);
#endif
