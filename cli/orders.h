// orders.h: what a person tells the chat itself: lines that begin with a slash.
#ifndef ORDERS_H
#define ORDERS_H
#include "answer.h"
#include "cli/session.h"

// A talk that orders may change. Zeroed but for the first two fields at the start.
typedef struct {
    Session *s;
    Talk *talk;
    Ids held;       // what the talk's sequence has read, in order, evicted or not
    bool can_undo;  // before is the talk without its last question, seq a sequence of its own
    Talk before;
    int held_before;          // ids of it
    long questions, written;  // in all, and tokens of the answers
} Orders;

// The reply, whose sequence grew from the talk's, is about to become its last turn
// (talk_answered). The sequence before it is kept for /undo, or dropped.
void orders_answered(Orders *o, const Reply *r);

// Whether the line is an order, which then is done; what cannot be done is said in one line.
bool orders_take(Orders *o, const char *line);

void orders_free(Orders *o);  // safe on a zeroed struct, and twice
#endif
