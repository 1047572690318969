// drafts.h: what may come next, guessed from what came before.
//
// Answers about a document often say what it says. Where the last tokens stood before, those that
// followed them are a draft of what comes now. One forward call computes what follows each token of
// the draft, and as many are taken as the model writes itself (speculative decoding, arXiv
// 2211.17192, with drafts from the prompt: prompt lookup decoding, arXiv 2304.04487). So the answer
// stays what it is; where weights are waited for, a few rows more cost little.
#ifndef DRAFTS_H
#define DRAFTS_H

enum { DRAFT_MOST = 7 };  // tokens of a draft: with the one before them a short run (KV_LONG_RUN)

// Texts that follow each other: a document, a prompt, an answer.
typedef struct {
    const int *id[3];  // [n[i]]
    int n[3];
} DraftText;

// What followed the longest of the text's ends, 2 to 8 tokens, where it stood last before: guess
// [most]. Returns how many there are, 0: it stood nowhere.
int draft_guess(const DraftText *t, int most, int *guess);
#endif
