// half.h: floats as bits, and half precision (IEEE 754 binary16) in plain C.
//
//   f16    s eeeee    mmmmmmmmmm                (-1)^s * 2^(e - 15) * 1.m, e = 0: 2^-14 * 0.m
//   f32    s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm   (-1)^s * 2^(e - 127) * 1.m
//   bf16   s eeeeeeee mmmmmmm                   the upper half of an f32
//
// Instruction sets convert with instructions of their own, to the same bits.
#ifndef HALF_H
#define HALF_H
#include <stdint.h>
#include <string.h>

// The bits of a float as a number, and back.
static inline uint32_t float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float bits_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// Half precision as f32: exact.
static inline float f16_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = h >> 10 & 31, man = h & 0x3ff;
    if (exp == 0) return bits_float(sign | float_bits((float)man * 0x1p-24f));
    if (exp == 31) return bits_float(sign | 0x7f800000 | man << 13);
    return bits_float(sign | (exp + 112) << 23 | man << 13);
}

// f32 as half precision: to nearest, ties to even; too large numbers become infinity.
static inline uint16_t f32_f16(float f) {
    uint32_t u = float_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);   // NaN
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to infinity
    if (a < 0x38800000) {                                   // subnormal: let the adder round
        return (uint16_t)(sign | (float_bits(bits_float(a) + 0.5f) - float_bits(0.5f)));
    }
    uint32_t odd = a >> 13 & 1;
    return (uint16_t)(sign | (a - 0x38000000 + 0xfff + odd) >> 13);
}

// bf16 as f32: exact.
static inline float bf16_f32(uint16_t h) { return bits_float((uint32_t)h << 16); }

// f32 as bf16: to nearest, ties to even; numbers below 2^-126 become 0, as they do in the
// instruction for it (vcvtneps2bf16).
static inline uint16_t f32_bf16(float f) {
    uint32_t u = float_bits(f), a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);  // NaN
    if (a < 0x00800000) return (uint16_t)(u >> 16 & 0x8000);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

#endif
