/* What the programs of the benches share: they fail loudly, count time in one clock, and know the contents of every page. */
#ifndef LATEPAGE_BENCH_COMMON_H
#define LATEPAGE_BENCH_COMMON_H

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul

#define CHECK(what) \
	do { \
		if (!(what)) { \
			fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #what, strerror(errno)); \
			exit(1); \
		} \
	} while (0)

static inline uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Nothing is left behind, even where the bench itself is killed. */
static inline void end_with_parent(void)
{
	CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
}

static inline void stay_on(int cpu)
{
	cpu_set_t set;
	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET((size_t)cpu, &set);
	CHECK(sched_setaffinity(0, sizeof set, &set) == 0);
}

/* splitmix64: word `n` of the memory file, so that whoever reads a word knows whether it is right. Never zero in practice. */
static inline uint64_t word_at(uint64_t n)
{
	uint64_t z = (n + 1) * 0x9e3779b97f4a7c15u;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

/* name=value among the arguments, as a number; `otherwise` where it is not given. */
static inline long option(char **arguments, const char *name, long otherwise)
{
	size_t length = strlen(name);
	for (; *arguments; arguments++)
		if (!strncmp(*arguments, name, length) && (*arguments)[length] == '=')
			return strtol(*arguments + length + 1, NULL, 10);
	return otherwise;
}

static inline int given(char **arguments, const char *word)
{
	for (; *arguments; arguments++)
		if (!strcmp(*arguments, word))
			return 1;
	return 0;
}

static inline int by_size(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return (x > y) - (x < y);
}

/* The value below which `share` of `count` sorted ones lie. */
static inline uint64_t quantile(const uint64_t *sorted, size_t count, double share)
{
	size_t place = (size_t)(share * (double)count);
	return count ? sorted[place < count ? place : count - 1] : 0;
}

/* 0..count-1, shuffled (Fisher-Yates) by a seed. */
static inline uint32_t *shuffled(size_t count, uint64_t seed, int shuffle)
{
	uint32_t *order = malloc(count * sizeof *order);
	CHECK(order);
	for (size_t i = 0; i < count; i++)
		order[i] = (uint32_t)i;
	for (size_t i = count - 1; shuffle && i > 0; i--) {
		size_t j = word_at(seed * 0x10000000u + i) % (i + 1);
		uint32_t swap = order[i];
		order[i] = order[j];
		order[j] = swap;
	}
	return order;
}

#endif
