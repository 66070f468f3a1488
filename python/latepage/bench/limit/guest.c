/* A VM with threads as its guest: its memory comes from somewhere, and it touches one word a page.
 *
 *   guest copy|minor SOCKET BYTES [option]...    from whoever serves at the socket, by either handshake
 *   guest map|read FILE BYTES [option]...        a private mapping of the file; or all of it read in first
 *
 *   touches=N  (all pages)     random  (else in sequence)   threads=N (1)     seed=N
 *   page=BYTES (4096)          granule=PAGES (1): touches are so far apart    cpu=N: pinned there
 *   idle: touches nothing, waits until all memory is there
 *
 * One line of JSON: the time from before the memory is mapped to the last touch, and of single touches. */
#include <pthread.h>
#include <sys/resource.h>

#include "vm.h"

static char *memory;
static uint32_t *order;
static uint64_t *took;
static size_t touches, threads, granule, wrong;

/* The threads of a guest take every so-manyth touch each. */
static void *run(void *argument)
{
	size_t bad = 0;
	for (size_t i = (size_t)(uintptr_t)argument; i < touches; i += threads) {
		size_t page = order[i] * granule;
		uint64_t before = now_ns();
		uint64_t word = *(volatile uint64_t *)(memory + page * PAGE);
		took[i] = now_ns() - before;
		bad += word != word_at(page * (PAGE / 8));
	}
	__atomic_fetch_add(&wrong, bad, __ATOMIC_RELAXED);
	return NULL;
}

/* An idle guest must not touch anything, and the kernel can be asked what is there. */
static void wait_until_whole(size_t bytes)
{
	unsigned char there[256];
	for (size_t at = 0; at < bytes;) {
		size_t length = bytes - at < sizeof there * PAGE ? bytes - at : sizeof there * PAGE;
		CHECK(mincore(memory + at, length, there) == 0);
		if (memchr(there, 0, length / PAGE) == NULL)
			at += length;
		else
			usleep(200);
	}
}

int main(int count, char **arguments)
{
	CHECK(count >= 4);
	end_with_parent();
	const char *origin = arguments[1], *path = arguments[2];
	size_t bytes = strtoul(arguments[3], NULL, 10);
	long page_size = option(arguments, "page", PAGE);
	stay_on((int)option(arguments, "cpu", -1));
	threads = (size_t)option(arguments, "threads", 1);
	granule = (size_t)option(arguments, "granule", 1);
	size_t granules = bytes / PAGE / granule;
	touches = (size_t)option(arguments, "touches", (long)granules);
	CHECK(touches <= granules);
	order = shuffled(granules, (uint64_t)option(arguments, "seed", 1), given(arguments, "random"));
	took = malloc(touches * sizeof *took + 1);
	CHECK(took);
	memset(took, 0, touches * sizeof *took); /* no faults of our own while the guest runs */

	struct rusage before, after;
	getrusage(RUSAGE_SELF, &before);
	uint64_t began = now_ns();
	struct vm vm = {.bytes = bytes};
	if (!strcmp(origin, "copy") || !strcmp(origin, "minor")) {
		vm = make_vm(*origin == 'c' ? COPY : MINOR, bytes, page_size);
		introduce(&vm, path);
	} else {
		int file = open(path, O_RDONLY | O_CLOEXEC);
		int flags = MAP_PRIVATE | (*origin == 'm' ? 0 : MAP_ANONYMOUS);
		CHECK(file >= 0);
		vm.memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, *origin == 'm' ? file : -1, 0);
		CHECK(vm.memory != MAP_FAILED);
		for (size_t done = 0; *origin == 'r' && done < bytes;) {
			ssize_t got = read(file, vm.memory + done, bytes - done);
			CHECK(got > 0);
			done += (size_t)got;
		}
	}
	memory = vm.memory;
	if (given(arguments, "idle")) {
		wait_until_whole(bytes);
		touches = 0;
	} else {
		pthread_t others[64];
		CHECK(threads <= 64);
		for (size_t i = 1; i < threads; i++)
			CHECK(pthread_create(&others[i], NULL, run, (void *)(uintptr_t)i) == 0);
		run(NULL);
		for (size_t i = 1; i < threads; i++)
			pthread_join(others[i], NULL);
	}
	uint64_t ns = now_ns() - began;
	getrusage(RUSAGE_SELF, &after);

	/* What was there already takes a fraction of a microsecond; a fault that someone serves does not. */
	size_t there = 0;
	qsort(took, touches, sizeof *took, by_size);
	while (there < touches && took[there] < 1000)
		there++;
	printf("{\"ns\": %lu, \"touches\": %zu, \"there\": %zu, \"wrong\": %zu, \"p50\": %lu, \"p99\": %lu, \"faults\": %ld}\n", ns,
	       touches, there, wrong, quantile(took + there, touches - there, 0.5), quantile(took + there, touches - there, 0.99),
	       after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt);
	return wrong != 0;
}
