#include "interrupts.h"

#include "console.h"
#include "machine.h"

enum { EXCEPTIONS = 32, IRQS = 16, GATE = 0x8e00 /* present, ring 0, interrupts held */ };
enum { PIC1 = 0x20, PIC2 = 0xa0 };

struct gate {
    uint16_t low, selector, kind, middle;
    uint32_t high, zero;
};

static struct gate idt[EXCEPTIONS + IRQS];

extern const char exceptions[], interrupt[]; /* start.s */

static void set_gate(int vector, const char *to)
{
    uint64_t address = (uint64_t)to;
    uint16_t code;
    __asm__("mov %%cs, %0" : "=r"(code));
    idt[vector] = (struct gate){(uint16_t)address, code, GATE, (uint16_t)(address >> 16), (uint32_t)(address >> 32), 0};
}

void interrupts_begin(void)
{
    for (int vector = 0; vector < EXCEPTIONS; vector++)
        set_gate(vector, exceptions + 16 * vector);
    for (int irq = 0; irq < IRQS; irq++)
        set_gate(EXCEPTIONS + irq, interrupt);
    struct __attribute__((packed)) {
        uint16_t limit;
        uint64_t base;
    } idtr = {sizeof idt - 1, (uint64_t)idt};
    __asm__ volatile("lidt %0" : : "m"(idtr));

    /* The two 8259s: edges, vectors right after the exceptions, every line open. */
    out8(PIC1, 0x11);
    out8(PIC2, 0x11);
    out8(PIC1 + 1, EXCEPTIONS);
    out8(PIC2 + 1, EXCEPTIONS + 8);
    out8(PIC1 + 1, 1 << 2);
    out8(PIC2 + 1, 2);
    out8(PIC1 + 1, 1);
    out8(PIC2 + 1, 1);
    out8(PIC1 + 1, 0);
    out8(PIC2 + 1, 0);
}

_Noreturn void exception(uint64_t vector, uint64_t error, uint64_t rip);

_Noreturn void exception(uint64_t vector, uint64_t error, uint64_t rip)
{
    uint64_t address;
    __asm__("mov %%cr2, %0" : "=r"(address));
    line_begin("exception");
    line_number("vector", vector);
    line_number("code", error);
    line_hex("rip", rip);
    line_hex("address", address);
    line_end();
    end_vm();
}

_Noreturn void end_vm(void)
{
    hold_interrupts();
    out8(0x64, 0xfe);
    for (;;)
        __asm__ volatile("hlt");
}
