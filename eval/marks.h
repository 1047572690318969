// marks.h: how good an answer is. Knows nothing of models and files.
#ifndef MARKS_H
#define MARKS_H
#include <stdbool.h>

typedef enum {
    METRIC_CONTAINED,  // an answer stands in the text, as whole words
    METRIC_EXACT,      // it is the text
    METRIC_F1,         // words in common
    METRIC_CHOICE,     // the first letter that stands alone
    METRIC_QA,         // the better of contained and f1
    METRIC_ROUGE,      // words in common in the same order (overlap.h)
    METRIC_NUMBER,     // the number after the last "answer is", or else the last one
    METRIC_CODE,       // 1 for code that is as good as the wanted one: BLEU of 0.8 (overlap.h)
    METRIC_EDIT,       // characters in common in the same order, of the first line of code
    METRICS
} EvalMetric;

// How well `answer` says what is wanted: 0 to 1, or -1: no memory.
//
// Texts are compared by their words (marks.c says what one is): case, accents' encoding,
// punctuation, hyphens, articles and the commas of large numbers decide nothing, "three" is 3. A
// wanted text that has no words at all, as "?", is compared sign by sign. Numbers are compared by
// their value, code as it stands: of an answer with a block of code (```) by that.
double mark_answer(EvalMetric metric, const char *answer, const char *want);

// How similar the code of an answer is to wanted code, BLEU, 0 to 1, or -1: no memory.
double mark_similar(const char *answer, const char *want);

// The words of a text, a space between two, as they are compared; with `signs` punctuation and
// symbols are words as well. malloc'ed, NULL: no memory.
char *mark_words(const char *text, bool signs);
#endif
