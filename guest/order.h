/* Orders in which numbers below a count are visited, each once, and then again. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct order {
    uint32_t count;  /* numbers below this one */
    uint32_t mask;   /* the power of two above, less one */
    uint32_t shift;  /* of the step that stirs the low bits */
    uint32_t state;
    bool random;
};

static inline struct order order_of(uint32_t count, bool random, uint32_t seed)
{
    uint32_t bits = 1;
    while (count > 1u << bits)
        bits++;
    uint32_t mask = (1u << bits) - 1;
    return (struct order){count, mask, (bits + 1) / 2, random ? seed & mask : 0, random};
}

/* The next number. A full-period generator modulo a power of two, its low bits stirred by a bijection; what lies past the
 * count is passed over, which is less than every second one. */
static inline uint32_t order_next(struct order *order)
{
    uint32_t next;
    do {
        next = order->state;
        if (order->random) {
            order->state = (next * 1664525 + 1013904223) & order->mask;
            next ^= next >> order->shift;
        } else {
            order->state = next + 1 == order->count ? 0 : next + 1;
        }
    } while (next >= order->count);
    return next;
}
