/* The CPU's instructions that C has no words for. */
#pragma once

#include <stdint.h>

static inline void out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t in8(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* What was written before is seen by the devices before what is written after. */
static inline void barrier(void)
{
    __asm__ volatile("mfence" : : : "memory");
}

static inline void hold_interrupts(void)
{
    __asm__ volatile("cli" : : : "memory");
}

/* Sleeps until an interrupt comes; one that came while they were held ends it at once. */
static inline void sleep_until_interrupt(void)
{
    __asm__ volatile("sti; hlt" : : : "memory");
}
