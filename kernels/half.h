// half.h: floats as bits, and half precision.
#ifndef HALF_H
#define HALF_H
#include <stdint.h>
#include <string.h>

static inline uint32_t bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline float f16_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = h >> 10 & 31, man = h & 0x3ff;
    if (exp == 0) return from_bits(sign | bits((float)man * 0x1p-24f));
    if (exp == 31) return from_bits(sign | 0x7f800000 | man << 13);
    return from_bits(sign | (exp + 112) << 23 | man << 13);
}

static inline uint16_t f32_f16(float f) {
    uint32_t u = bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);   // NaN
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to infinity
    if (a < 0x38800000) {                                   // subnormal: let the adder round
        return (uint16_t)(sign | (bits(from_bits(a) + 0.5f) - bits(0.5f)));
    }
    uint32_t odd = a >> 13 & 1;
    return (uint16_t)(sign | (a - 0x38000000 + 0xfff + odd) >> 13);
}

#endif
