/* The pages that the guest checks: all from 2 MiB to the end of memory, or to 1 GiB, as far as the boot's page tables map it.
 *
 * A page's contents are three words: the first, the last, and one at a place in between that the fingerprint decides. They
 * tell the page and its generation. A page in the balloon has no generation: it is the host's. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "order.h"

enum { PAGE = 4096, FIRST_PAGE = 512, MOST_PAGES = 1 << 18 };

/* What one visit of all pages found. */
struct findings {
    uint64_t pages;   /* visited */
    uint64_t skipped; /* the host's at that time */
    uint64_t wrong;   /* not what was written to them last */
    uint64_t page;    /* the first of those, */
    uint64_t found;   /* and what its first word was */
};

enum visit { FILL, VERIFY, CHANGE };

/* Takes the memory up to `end`, a guest-physical address. */
void memory_begin(uint64_t end);

/* How many pages are checked, the first being FIRST_PAGE. */
uint32_t memory_pages(void);

/* From now on pages are written with the next generation, which is returned. */
uint8_t memory_next_generation(void);

/* Visits the next pages in that order, so many of them, counted from FIRST_PAGE. FILL writes a page, whatever it holds; VERIFY
 * checks it; CHANGE checks it and then writes it. */
void memory_visit(struct order *order, uint32_t steps, enum visit visit, struct findings *findings);

/* The page goes to the host. */
void memory_give(uint32_t number);

/* The page comes back and is written again. Whether it read as zero, as a page must that was discarded. */
bool memory_take(uint32_t number);
