// calibrate.h: KVzip over sample text, once per model, so that later contexts need no second pass.
#ifndef CALIBRATE_H
#define CALIBRATE_H
#include "policies.h"

// What to calibrate with, and where the profile goes.
typedef struct {
    Context context;    // state, kv, tok, chunk, postfix; the rest is filled in per text
    const Ids *prefix;  // protected ids before every text
    double lambda;      // of the ridge regression, as a share of each feature's own square
    int most_tokens;    // of the text's parts together, about; 0: as many as take some minutes
    const char *path;   // where the profile goes
    bool into;          // as part of a copy of the model, else as a file of its own
    // After so many seconds or more what is known after a text is saved beside the profile, as
    // "PATH.unfinished"; a call with the same model, texts and settings goes on from there.
    double save_seconds;
    // called as work goes on; total counts tokens; nonzero stops with an error
    int (*progress)(void *arg, const char *what, long done, long total);
    void *progress_arg;
} Calibrate;

// Layer shares by effect (effects.h) against KVzip's own, on texts that were not measured for them.
typedef struct {
    int n_texts;   // set aside; 0: not tried, too few texts or a single layer
    double kl[2];  // mean KL at a ratio of 0.3 with KVzip's layer shares, and with those by effect
    bool used;     // the profile has the latter
} ShareTrial;

// What came of it.
typedef struct {
    int n_texts, n_tokens;  // contexts scored, the joined one included, and their tokens
    int longest;            // tokens of the joined one
    int n_found;            // texts that an unfinished call had scored
    double explained;  // share of the variance of log scores that probes explain, mean over heads
    ShareTrial trial;
    double seconds;
} CalibrateResult;

// text [n]: contexts, parted by lines of at least four '='. Each is read and scored by KVzip on its
// own, and then all of them joined, up to the length the model was trained for, so that late
// positions are seen as well. From four texts on, layer shares by effect are tried. Writes the
// profile. Returns 0, or -1 with err.
int calibrate_run(const Calibrate *c, const char *text, size_t n, CalibrateResult *result,
                  char *err);
#endif
