/* What the VMM says to a guest that it boots by Linux's 64-bit protocol. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct boot {
    uint64_t memory_end; /* the end of the memory that begins at 1 MiB, a guest-physical address */
    bool loop;           /* `loop` is among the boot arguments */
    uint32_t run;        /* `balloon-run=PAGES`, else 32 */
};

struct boot boot_read(const uint8_t *zero_page);
