#include "console.h"

#include <stddef.h>

#include "machine.h"

enum { DATA = 0x3f8, INTERRUPTS = DATA + 1, MODEM = DATA + 4, STATUS = DATA + 5 };
enum { RECEIVED = 1, LONGEST = 80 };

static char incoming[LONGEST];
static size_t length;

void console_begin(void)
{
    out8(INTERRUPTS, RECEIVED);
    out8(MODEM, 0x0b);
}

static void say(const char *text)
{
    while (*text)
        out8(DATA, (uint8_t)*text++);
}

static void say_number(uint64_t value, unsigned base)
{
    char digits[21];
    size_t first = sizeof digits - 1;
    digits[first] = 0;
    do {
        digits[--first] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    say(digits + first);
}

static void say_key(const char *key)
{
    say(",\"");
    say(key);
    say("\":");
}

void line_begin(const char *event)
{
    say("{\"event\":\"");
    say(event);
    say("\"");
}

void line_number(const char *key, uint64_t value)
{
    say_key(key);
    say_number(value, 10);
}

void line_hex(const char *key, uint64_t value)
{
    say_key(key);
    say("\"0x");
    say_number(value, 16);
    say("\"");
}

void line_text(const char *key, const char *value)
{
    say_key(key);
    say("\"");
    say(value);
    say("\"");
}

void line_end(void)
{
    say("}\n");
}

const char *line_in(void)
{
    while (in8(STATUS) & RECEIVED) {
        char next = (char)in8(DATA);
        if (next == '\n' || next == '\r') {
            incoming[length] = 0;
            length = 0;
            return incoming;
        }
        /* What is too long is no word of ours; it is cut, and refused as a whole. */
        if (length < LONGEST - 1)
            incoming[length++] = next;
    }
    return NULL;
}

bool same(const char *one, const char *other)
{
    while (*one && *one == *other)
        one++, other++;
    return *one == *other;
}
