// marks.h: how good an answer is. Knows nothing of models and files.
#ifndef MARKS_H
#define MARKS_H
#include <stdbool.h>

// contained: an answer stands in the text, as whole words; exact: it is the text; f1: words in
// common; choice: the first letter that stands alone.
typedef enum { METRIC_CONTAINED, METRIC_EXACT, METRIC_F1, METRIC_CHOICE, METRICS } EvalMetric;

// How well `answer` says what is wanted: 0 to 1, or -1: no memory.
//
// Texts are compared by their words (marks.c says what one is): case, accents' encoding,
// punctuation, hyphens, articles and the commas of large numbers decide nothing, "three" is 3. A
// wanted text that has no words at all, as "?", is compared sign by sign.
double mark_answer(EvalMetric metric, const char *answer, const char *want);

// The words of a text, a space between two, as they are compared; with `signs` punctuation and
// symbols are words as well. malloc'ed, NULL: no memory.
char *mark_words(const char *text, bool signs);
#endif
