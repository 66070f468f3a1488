/* COM1: lines of JSON out, words in. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

void console_begin(void);

/* A line: {"event":"NAME","KEY":VALUE,...}. */
void line_begin(const char *event);
void line_number(const char *key, uint64_t value);
void line_hex(const char *key, uint64_t value);
void line_text(const char *key, const char *value);
void line_end(void);

/* The next line that came in, without its end; NULL while none is complete. Good until the next call. */
const char *line_in(void);

bool same(const char *one, const char *other);
