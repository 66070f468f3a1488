#include "boot.h"

/* Offsets in the zero page: Documentation/arch/x86/zero-page.rst of Linux. */
enum { E820_ENTRIES = 0x1e8, COMMAND_LINE = 0x228, E820_TABLE = 0x2d0, E820_RAM = 1 };

struct __attribute__((packed)) e820 {
    uint64_t start, size;
    uint32_t kind;
};

/* Whether `word` stands at the beginning of `text`; then `text` is moved past it. */
static bool begins(const char **text, const char *word)
{
    const char *at = *text;
    while (*word)
        if (*at++ != *word++)
            return false;
    *text = at;
    return true;
}

static uint32_t number(const char *text)
{
    uint32_t value = 0;
    while (*text >= '0' && *text <= '9')
        value = 10 * value + (uint32_t)(*text++ - '0');
    return value;
}

struct boot boot_read(const uint8_t *zero_page)
{
    struct boot boot = {0, false, 32};
    const struct e820 *table = (const void *)(zero_page + E820_TABLE);
    for (uint8_t entry = 0; entry < zero_page[E820_ENTRIES]; entry++)
        if (table[entry].kind == E820_RAM && table[entry].start == 1 << 20)
            boot.memory_end = table[entry].start + table[entry].size;

    const char *word = (const char *)(uint64_t) * (const uint32_t *)(zero_page + COMMAND_LINE);
    while (*word) {
        const char *rest = word;
        if (begins(&rest, "loop") && (*rest == ' ' || !*rest))
            boot.loop = true;
        else if (begins(&rest, "balloon-run=") && number(rest))
            boot.run = number(rest);
        while (*word && *word++ != ' ')
            ;
    }
    return boot;
}
