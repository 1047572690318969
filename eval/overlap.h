// overlap.h: how much two texts have in common in the same order. Knows nothing of words.
#ifndef OVERLAP_H
#define OVERLAP_H

// ROUGE-L (Lin: ROUGE, a package for automatic evaluation of summaries, 2004) of texts whose words
// have white space between them: 2 x common / (words + words), the harmonic mean of precision and
// recall, where common is the length of the longest list of words that both have in this order. 0
// to 1, two empty texts are 1; -1: no memory.
double overlap_rouge(const char *text, const char *want);

// The same for characters instead of words: the edit similarity of LongBench's tasks of code, which
// counts characters put in and taken out.
double overlap_characters(const char *text, const char *want);

// BLEU of up to four words (Papineni and others, 2002), smoothed by the fourth method of Chen and
// Cherry (2014) as NLTK has it: what RepoQA (arXiv 2406.06025) compares functions with. 0 to 1; -1:
// no memory.
double overlap_bleu(const char *text, const char *want);
#endif
