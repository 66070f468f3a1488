#include "memory.h"

enum { WORDS = PAGE / 8, GENERATIONS = 127, HOST = 128 };

static const uint64_t SPREAD = 0x9e3779b97f4a7c15; /* odd, so that no two pages or generations share a word */

static uint32_t pages;
static uint8_t generation;
static uint8_t generation_of[MOST_PAGES]; /* and HOST while it is the host's */

static uint64_t *page_at(uint32_t number)
{
    return (uint64_t *)((uint64_t)(FIRST_PAGE + number) * PAGE);
}

/* The first word: never zero, since the address is not. */
static uint64_t fingerprint(const uint64_t *page, uint8_t of)
{
    return ((uint64_t)page + of) * SPREAD;
}

static uint64_t *between(uint64_t *page, uint64_t print)
{
    return page + WORDS / 8 + (print >> 56);
}

static void write(uint64_t *page, uint8_t of)
{
    uint64_t print = fingerprint(page, of);
    page[0] = print;
    *between(page, print) = print ^ SPREAD;
    page[WORDS - 1] = ~print;
}

static bool right(uint64_t *page, uint8_t of)
{
    uint64_t print = fingerprint(page, of);
    return page[0] == print && *between(page, print) == (print ^ SPREAD) && page[WORDS - 1] == ~print;
}

void memory_begin(uint64_t end)
{
    uint64_t last = end / PAGE;
    last = last > MOST_PAGES ? MOST_PAGES : last;
    pages = last > FIRST_PAGE ? (uint32_t)(last - FIRST_PAGE) : 0;
}

uint32_t memory_pages(void)
{
    return pages;
}

uint8_t memory_next_generation(void)
{
    generation = generation == GENERATIONS ? 0 : generation + 1;
    return generation;
}

void memory_visit(struct order *order, uint32_t steps, enum visit visit, struct findings *findings)
{
    /* Kept in registers while it goes on. */
    struct order at = *order;
    uint64_t skipped = 0;
    for (uint32_t step = 0; step < steps; step++) {
        uint32_t number = order_next(&at);
        uint64_t *page = page_at(number);
        uint8_t was = generation_of[number];
        if (was & HOST) {
            skipped++;
            continue;
        }
        if (visit != FILL && !right(page, was) && !findings->wrong++) {
            findings->page = FIRST_PAGE + number;
            findings->found = page[0];
        }
        if (visit != VERIFY) {
            /* What is not of this generation is zero: a page has three words, and no others. */
            *between(page, fingerprint(page, was)) = 0;
            write(page, generation);
            generation_of[number] = generation;
        }
    }
    *order = at;
    findings->pages += steps - skipped;
    findings->skipped += skipped;
}

void memory_give(uint32_t number)
{
    generation_of[number] |= HOST;
}

bool memory_take(uint32_t number)
{
    uint64_t *page = page_at(number), found = page[WORDS - 1];
    uint8_t was = generation_of[number] & (uint8_t)~HOST;
    found |= *between(page, fingerprint(page, was));
    for (uint32_t word = 0; word < WORDS; word += 64)
        found |= page[word];
    write(page, generation);
    generation_of[number] = generation;
    return !found;
}
