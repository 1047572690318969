// memory.h: whether what a command is about to do fits into memory.
#ifndef MEMORY_H
#define MEMORY_H
#include "cli/session.h"

// What a command will have in memory at once, beside the model and its scratch.
typedef struct {
    double tokens;    // of its longest sequence
    double copies;    // sequences of that length together; 0 counts as 1
    double forked;    // tokens that forks add, all of them together
    double loaded;    // bytes of a saved cache
    double more;      // other bytes
    double n_prefix;  // of the tokens: they are never evicted
    double scores;    // bytes of scores for each pair of the sequence
    bool evicts;      // --ratio, --stream and --budget would make it smaller
    bool whole;       // all pairs are kept as they came until they have been scored
} MemoryNeed;

// How that is held: which types pages have, and how many pairs a head keeps while tokens come.
typedef struct {
    KVTypes types;
    double ratio;   // share of the pairs that stays, 1: all
    double budget;  // pairs a head; 0: as ratio has it
} MemoryPlan;

// The parts of an estimate, in bytes.
typedef struct {
    double weights;  // the whole file: mapped, but slow unless it stays in memory
    double scratch, cache, rest;
} MemoryUse;

// What s, with its model and scratch open, needs at its peak.
MemoryUse memory_use(const Session *s, const MemoryNeed *need, const MemoryPlan *plan);
double memory_total(const MemoryUse *use);

// The smallest limit on the memory of the control groups that text, as of /proc/self/cgroup, names;
// root is where they are mounted. INFINITY: none.
double memory_group_limit(const char *text, const char *root);

// Bytes that the machine has and this process may use; *who says which of them is less.
double memory_here(const char **who);

// Bytes of scores for each pair of a sequence that the policy scores once it is there.
double memory_scores(const Session *s, const Policy *policy);

// Whether `need` is less than --mem allows: 0, or -1 with err, which says what would fit. Without
// --mem it warns where it is more than the machine or the control group has.
int memory_fits(const Session *s, const MemoryNeed *need, char *err);

// With --mem: ends the program where `need` is more, and says what would fit. Without: warns where
// it is more than the machine or the control group has.
void memory_check(const Session *s, const MemoryNeed *need);
#endif
