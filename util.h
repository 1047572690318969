// util.h: what every floor may need: errors, clamping, the clock, random numbers, hashes, UTF-8,
// text that grows and whole files.
#ifndef UTIL_H
#define UTIL_H
#include <stddef.h>
#include <stdint.h>

// Files are mapped and used in place, as they lie in memory, and sizes of real models are added up
// in size_t: neither works on other machines.
_Static_assert(sizeof(void *) == 8 && sizeof(size_t) == 8,
               "kvzip.c needs a 64-bit system: files larger than its memory are mapped whole");
#if !defined __BYTE_ORDER__ || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error \
    "kvzip.c needs a little-endian machine: the numbers of its files are used where they are mapped"
#endif

enum { ERR_LEN = 512 };

// Writes one sentence into err [ERR_LEN] and returns -1, so that `return fail(err, ...)` reads as
// the end of the story. Long sentences are cut between characters, never overrun.
int fail(char *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }

// Seconds of a clock that only goes forward.
double now(void);

// The next 64 bits of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
// generators, 2014); any state may start it.
uint64_t random_next(uint64_t *state);

#define HASH_START 0xcbf29ce484222325u
// FNV-1a of data [n], going on from h, HASH_START at first
// (http://www.isthe.com/chongo/tech/comp/fnv/).
uint64_t hash_bytes(uint64_t h, const void *data, size_t n);

// Writes code point c, at most 0x10ffff, as UTF-8; returns how many bytes, 1 to 4.
int utf8_put(uint8_t *out, uint32_t c);

// Bytes of the character at p, p < end, which goes to *c; 0 when no valid one begins there, -1 when
// end cuts one short. Surrogates, overlong forms and all beyond U+10FFFF are invalid.
int utf8_get(const uint8_t *p, const uint8_t *end, uint32_t *c);

// Where no valid character begins: bytes at p, p < end, that begin one and do not end it, the most
// that one U+FFFD stands for (Unicode 15, section 3.9, "maximal subpart").
int utf8_broken(const uint8_t *p, const uint8_t *end);

// Bytes of s [n] without the character that end cuts short, if one does.
size_t utf8_whole(const char *s, size_t n);

// Text that grows; {0} is empty.
typedef struct {
    char *s;  // [n] bytes and a NUL; NULL before anything was added
    size_t n, cap;
} Buffer;

// Appends n bytes. Returns 0, or -1 when memory is out, and then b is as it was.
int buffer_add(Buffer *b, const char *s, size_t n);

// s [n] without the white space at both ends: the first byte that stays, how many in *length.
const char *stripped(const char *s, size_t n, size_t *length);

// The number that text [n] is, all of it, in decimal ("5", "-0.5", "1e3", nothing before or behind
// it); NaN where it is none, or no finite double.
double number_read(const char *text, size_t n);

// What has no size, a pipe or a device, and a line of it are taken up to this many bytes: it may
// have no end.
enum { STREAM_MOST = 1 << 28 };

// The whole file, or stdin for "-", and a NUL behind its *n bytes; malloc'ed, once where the file's
// size is known. NULL with err; then errno says why, EFBIG what is beyond STREAM_MOST.
char *file_read(const char *path, size_t *n, char *err);
#endif
