// weights.h: where the weights of an open model lie, which decides how fast a token is written.
//
// A token reads them all once, and a processor finds its way through memory by pages: of 4 KB each
// there are half a million in 2 GB, of 2 MB a thousand. A file's map has what the page cache holds,
// large pages where the file was read through in order, small ones where it was just written. A
// copy in anonymous memory has large pages wherever the system does, but no other process shares
// it.
#ifndef WEIGHTS_H
#define WEIGHTS_H
#include "tensors.h"

// Asks for large pages before the file's bytes come from disk. Changes nothing else.
void weights_advise(const TensorFile *f);

// Marks [at, at + n) of the map as read a row here and a row there: the system is told not to read
// more of it than that, and it is not copied.
void weights_cold(TensorFile *f, const void *at, size_t n);

// Replaces the map of the file, but for what is cold, by a copy at the same addresses, in large
// pages where the system has them: pointers stay. Stops after `seconds`, for a system that has to
// make room for large pages takes its time: what is copied by then is copied. Returns 0, or -1 with
// err, after which f can only be closed.
int weights_copy(TensorFile *f, double seconds, char *err);

// The share of the file's bytes that are in large pages at the moment; -1: this system does not
// say.
double weights_large(const TensorFile *f);

// Whether a copy pays and leaves room: of 256 MB or more, less than half of them in large pages,
// judged by a few places that are read for it, and three times as much memory available.
bool weights_should_copy(const TensorFile *f);
#endif
