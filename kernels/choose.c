// choose.c: which instruction sets this machine has, and the table of functions that is used.
//
// One program runs on all machines of an architecture: every file of a set is compiled for its
// instructions, function by function, and the best set that the processor has is chosen once, when
// the program starts. The fact that must stay true: a set counts only when the operating system
// saves its registers, too; else the first switch of threads would lose them.
#define _DEFAULT_SOURCE  // syscall
#include "kernels/blas.h"
#include "kernels/simd.h"

#include <string.h>

#ifdef __x86_64__
#include "kernels/x86.h"
#include <cpuid.h>
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined __aarch64__ && (defined __linux__ || defined __FreeBSD__)
#include <sys/auxv.h>
#endif

Kernels kern;

// ---- what the machine has ----

#ifdef __x86_64__
typedef enum { EAX, EBX, ECX, EDX } Register;

// A bit that CPUID answers, asked directly: __builtin_cpu_supports needs a library that some
// toolchains leave out (zig cc for musl finds no AVX2 with it).
typedef struct {
    unsigned leaf, subleaf;
    Register reg;
    int bit;
} CpuBit;

// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID.
static const CpuBit FMA = {1, 0, ECX, 12}, OSXSAVE = {1, 0, ECX, 27}, F16C = {1, 0, ECX, 29},
                    AVX_2 = {7, 0, EBX, 5}, AVX512F = {7, 0, EBX, 16}, AVX512DQ = {7, 0, EBX, 17},
                    AVX512BW = {7, 0, EBX, 30}, AVX512VL = {7, 0, EBX, 31},
                    AVX512_VNNI = {7, 0, ECX, 11}, AVX_VNNI = {7, 1, EAX, 4},
                    AVX512_BF16 = {7, 1, EAX, 5}, AMX_BF16 = {7, 0, EDX, 22},
                    AMX_TILE = {7, 0, EDX, 24};

// Registers that the system saves, bits of XCR0 (same manual, volume 1, 13.3):
//
//   bit    18      17      7       6       5       2     1
//          tiles   their   ZMM     ZMM     k0      YMM   XMM
//                  shapes  16-31   0-15    to k7
//                                  upper
enum { SAVES_YMM = 1 << 1 | 1 << 2, SAVES_ZMM = SAVES_YMM | 1 << 5 | 1 << 6 | 1 << 7 };
enum { SAVES_TILES = 1 << 17 | 1 << 18 };

static bool has(CpuBit b) {
    unsigned r[4] = {0};
    return __get_cpuid_count(b.leaf, b.subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) &&
           r[b.reg] >> b.bit & 1;
}

static bool saves(unsigned registers) {
    unsigned low, high;
    if (!has(OSXSAVE)) return false;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & registers) == registers;
}

// macOS turns the bits for ZMM on when a thread first uses such a register, so that there the
// kernel is asked whether it would.
static bool saves_zmm(void) {
#ifdef __APPLE__
    int yes = 0;
    size_t size = sizeof yes;
    return sysctlbyname("hw.optional.avx512f", &yes, &size, NULL, 0) == 0 && yes;
#else
    return saves(SAVES_ZMM);
#endif
}

// Linux gives a process its 8 KB of tiles when it asks for them, once for all of its threads
// (Documentation/arch/x86/xstate.rst); to ask again changes nothing. An older kernel, or a
// sandbox, refuses.
static bool tiles_allowed(void) {
#ifdef __linux__
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
    return false;
#endif
}

static Features find_features(void) {
    bool ymm = saves(SAVES_YMM), zmm = ymm && saves_zmm();
    bool avx512 = zmm && has(AVX512F) && has(AVX512BW) && has(AVX512DQ) && has(AVX512VL);
    return (Features){
        .avx2 = ymm && has(AVX_2) && has(FMA) && has(F16C),
        .avx_vnni = ymm && KNOWS_VEX && has(AVX_VNNI),
        .avx512vnni = avx512 && has(AVX512_VNNI),
        .avx512bf16 = avx512 && has(AVX512_VNNI) && has(AVX512_BF16),
        .amx = zmm && KNOWS_VEX && has(AMX_TILE) && has(AMX_BF16) && saves(SAVES_TILES),
    };
}
#elif defined __aarch64__ && defined __linux__
static Features find_features(void) {
    return (Features){.dotprod = getauxval(AT_HWCAP) & HWCAP_ASIMDDP};
}
#elif defined __aarch64__ && defined __FreeBSD__
static Features find_features(void) {
    unsigned long caps = 0;
    elf_aux_info(AT_HWCAP, &caps, sizeof caps);
    return (Features){.dotprod = caps & HWCAP_ASIMDDP};
}
#elif defined __aarch64__ && defined __APPLE__
static Features find_features(void) {  // every Apple processor that runs macOS has sdot
    return (Features){.dotprod = true};
}
#else
static Features find_features(void) { return (Features){0}; }
#endif

// ---- choosing ----

// A set is a table and what more features of the machine put in its place.
typedef struct {
    const char *name;
    bool (*usable)(const Features *f);  // NULL: always
    const Kernels *table;
    void (*adapt)(Kernels *k, const Features *f);  // NULL: nothing
    bool (*pays)(void);  // whether it is better here than the sets after it; NULL: yes
} Isa;

#ifdef __x86_64__
static bool has_avx2(const Features *f) { return f->avx2; }
static bool has_avx2vnni(const Features *f) { return f->avx2 && (f->avx512vnni || f->avx_vnni); }
static bool has_avx512(const Features *f) { return f->avx2 && f->avx512vnni; }
static bool has_avx512bf16(const Features *f) { return has_avx512(f) && f->avx512bf16; }
static bool has_amx(const Features *f) {  // no machine that this was written on had it: tried first
    return has_avx512bf16(f) && f->amx && tiles_allowed() && amx_multiplies();
}

// The processor's maker: "AuthenticAMD", "GenuineIntel" (CPUID, leaf 0).
static bool made_by(const char *name) {
    unsigned r[4] = {0};
    char maker[13] = {0};
    if (!__get_cpuid(0, &r[EAX], &r[EBX], &r[ECX], &r[EDX])) return false;
    memcpy(maker, &r[EBX], 4), memcpy(maker + 4, &r[EDX], 4), memcpy(maker + 8, &r[ECX], 4);
    return strcmp(maker, name) == 0;
}

// On AMD's processors vdpbf16ps does twice as many operations as a product of f32, on Intel's half
// as many. A table and not a measurement: the two sets differ in last bits, and a program that is
// started twice, once on a busy machine, must give the same ones.
static bool bf16_pays(void) { return made_by("AuthenticAMD") || made_by("HygonGenuine"); }
#endif

static const Isa isas[] = {
// best first
#ifdef __x86_64__
    {"amx", has_amx, &kernels_avx2, adapt_amx, NULL},
    {"avx512bf16", has_avx512bf16, &kernels_avx2, adapt_avx512bf16, bf16_pays},
    {"avx512", has_avx512, &kernels_avx2, adapt_avx512, NULL},
    {"avx2vnni", has_avx2vnni, &kernels_avx2, adapt_avx2vnni, NULL},
    {"avx2", has_avx2, &kernels_avx2, NULL, NULL},
#endif
#ifdef __aarch64__
    {"neon", NULL, &kernels_neon, adapt_neon, NULL},
#endif
    {"scalar", NULL, &kernels_scalar, NULL, NULL},
    {"amx-emulated", NULL, &kernels_scalar, adapt_amx_emulated, NULL},  // never by itself
};

int kernels_init(const char *isa) {
    const Features f = find_features();
    for (const Isa *i = isas; i < isas + sizeof isas / sizeof *isas; i++) {
        if ((isa ? strcmp(isa, i->name) != 0 : i->pays && !i->pays()) ||
            (i->usable && !i->usable(&f)))
            continue;
        Kernels k = *i->table;
        if (i->adapt) i->adapt(&k, &f);
        k.name = i->name;
        kern = k;
        blas_init();
        return 0;
    }
    return -1;
}
