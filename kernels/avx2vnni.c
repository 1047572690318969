// avx2vnni.c: AVX2 with VNNI: laptops without AVX-512, from Alder Lake (2021) on.
//
// One instruction, vpdpbusd, adds four products of bytes to a 32-bit sum. All else is AVX2's. It is
// encoded as VEX on such laptops and as EVEX where there is AVX-512, where this set runs as well.
#include "kernels/x86.h"

#ifdef __x86_64__

AVX2 static void quantize(const Activations *a, int t0, int t1) {
    for (int t = t0; t < t1; t++) quantize_bytes(a, t);
}

AVX2 static void matmul_q8_evex(const PanelProduct *p) { matmul_bytes(p, false, false, VNNI_EVEX); }

AVX2 static void matmul_q4_evex(const PanelProduct *p) { matmul_nibbles(p, VNNI_EVEX); }

AVX2 static void matmul_q8_vex(const PanelProduct *p) { matmul_bytes(p, false, false, VNNI_VEX); }

AVX2 static void matmul_q4_vex(const PanelProduct *p) { matmul_nibbles(p, VNNI_VEX); }

AVX2 static float peak_evex(int rounds) { return peak_bytes(rounds, VNNI_EVEX); }
AVX2 static float peak_vex(int rounds) { return peak_bytes(rounds, VNNI_VEX); }

static const Peak int_evex = {2 * 32 * CHAINS, peak_evex}, int_vex = {2 * 32 * CHAINS, peak_vex};

void adapt_avx2vnni(Kernels *k, const Features *f) {
    bool evex = f->avx512vnni;
    k->matmul[W_Q8] = evex ? matmul_q8_evex : matmul_q8_vex;
    k->matmul[W_Q4] = evex ? matmul_q4_evex : matmul_q4_vex;
    k->wide = false;
    k->quantize = quantize;
    k->peak[W_Q8] = k->peak[W_Q4] = evex ? &int_evex : &int_vex;
}

#endif
