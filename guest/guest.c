/* The guest: does what it is told at COM1, and what the balloon asks for, in slices between which it looks at both. */
#include <stddef.h>

#include "balloon.h"
#include "boot.h"
#include "console.h"
#include "interrupts.h"
#include "machine.h"
#include "memory.h"
#include "order.h"

enum { SLICE = 1024 /* pages */ };

/* A visit of all pages. */
struct pass {
    const char *event;
    enum visit visit;
    bool random;
};

static const struct pass FILLED = {"filled", FILL, false};
static const struct pass IN_ORDER = {"verified", VERIFY, false};
static const struct pass AT_RANDOM = {"verified", VERIFY, true};
static const struct pass CHANGED = {"changed", CHANGE, true};

static const struct pass *pass; /* the one under way, else NULL */
static struct order order;
static uint32_t left, passes;
static bool loop;
static struct findings findings;
static uint64_t wrong_ever;

void guest(const uint8_t *zero_page);

static void start(const struct pass *next)
{
    pass = next;
    if (pass->visit != VERIFY)
        memory_next_generation();
    left = memory_pages();
    /* Each random pass has another order. */
    order = order_of(left, pass->random, 0x2545f491 * (passes + 1));
    findings = (struct findings){0};
}

static void tell_status(void)
{
    line_begin("status");
    line_number("pages", memory_pages());
    line_number("passes", passes);
    line_number("wrong", wrong_ever + findings.wrong);
    line_number("given", balloon_given());
    line_number("not_zero", balloon_not_zero());
    line_end();
}

static const struct pass *pass_by_name(const char *line)
{
    if (same(line, "fill"))
        return &FILLED;
    if (same(line, "verify sequential"))
        return &IN_ORDER;
    if (same(line, "verify random"))
        return &AT_RANDOM;
    return same(line, "change") ? &CHANGED : NULL;
}

/* Does what a line says; false if it has to wait until the pass under way is over. */
static bool obey(const char *line)
{
    const struct pass *next = pass_by_name(line);
    if (next && pass)
        return false;
    if (next)
        start(next);
    else if (same(line, "loop"))
        loop = true;
    else if (same(line, "stop"))
        loop = false;
    else if (same(line, "status"))
        tell_status();
    else if (same(line, "quit"))
        end_vm();
    else {
        line_begin("refused");
        line_text("why", "not a word of this guest's: see guest/README.md");
        line_end();
    }
    return true;
}

static void finish(void)
{
    passes++;
    line_begin(pass->event);
    line_text("order", pass->random ? "random" : "sequential");
    line_number("pass", passes);
    line_number("pages", findings.pages);
    line_number("skipped", findings.skipped);
    line_number("wrong", findings.wrong);
    if (findings.wrong) {
        line_number("page", findings.page);
        line_hex("found", findings.found);
    }
    line_end();
    wrong_ever += findings.wrong;
    findings = (struct findings){0};
    pass = NULL;
}

static void slice(void)
{
    uint32_t now = left < SLICE ? left : SLICE;
    left -= now;
    memory_visit(&order, now, pass->visit, &findings);
    if (!left)
        finish();
}

void guest(const uint8_t *zero_page)
{
    struct boot boot = boot_read(zero_page);
    console_begin();
    interrupts_begin();
    memory_begin(boot.memory_end);
    bool balloon = balloon_begin(boot.run);
    loop = boot.loop;
    line_begin("ready");
    line_number("pages", memory_pages());
    line_number("balloon", balloon);
    line_end();

    static const struct pass *const ROUND[] = {&IN_ORDER, &AT_RANDOM, &CHANGED};
    uint32_t round = 0;
    const char *line = NULL;
    start(&FILLED);
    for (;;) {
        hold_interrupts();
        bool busy = balloon_step();
        if (!line)
            line = line_in();
        if (line && obey(line)) {
            line = NULL;
            busy = true;
        }
        if (!pass && loop)
            start(ROUND[round++ % 3]);
        if (pass)
            slice();
        else if (!busy)
            sleep_until_interrupt();
    }
}
