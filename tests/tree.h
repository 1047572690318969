// tree.h: a document written back from its nodes, for test_json.c and fuzz_json.c.
#ifndef TREE_H
#define TREE_H
#include "json.h"

// v as JSON without spaces; numbers as they were written.
static inline void tree_put(FILE *f, const JsonNode *v) {
    if (v->kind == JSON_NULL) fputs("null", f);
    if (v->kind == JSON_BOOL) fputs(v->n ? "true" : "false", f);
    if (v->kind == JSON_NUMBER) fprintf(f, "%.*s", v->n, v->text);
    if (v->kind == JSON_STRING) json_put_string(f, v->text, (size_t)v->n);
    if (v->kind < JSON_LIST) return;
    fputc(v->kind == JSON_LIST ? '[' : '{', f);
    for (const JsonNode *m = v->child; m; m = m->next) {
        if (v->kind == JSON_OBJECT) json_print(f, "%s:", m->key);
        tree_put(f, m);
        if (m->next) fputc(',', f);
    }
    fputc(v->kind == JSON_LIST ? ']' : '}', f);
}
#endif
