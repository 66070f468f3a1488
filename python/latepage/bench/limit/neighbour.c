/* A neighbour that faults as fast as it can: threads that touch one VM in random order, then the next VM, until standard input ends.
 *
 *   neighbour SOCKET BYTES [threads=N] [granule=PAGES]    says how many touches there were, and in how much time */
#include <poll.h>
#include <pthread.h>

#include "vm.h"

static struct vm vm;
static uint32_t *order;
static size_t granules, granule, next, touches;
static int ended;

static void *run(void *argument)
{
	for (size_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < granules;) {
		size_t page = order[i] * granule;
		if (__atomic_load_n(&ended, __ATOMIC_RELAXED))
			break;
		CHECK(*(volatile uint64_t *)(vm.memory + page * PAGE) == word_at(page * (PAGE / 8)));
		__atomic_fetch_add(&touches, 1, __ATOMIC_RELAXED);
	}
	return argument;
}

static void *wait_for_the_end(void *argument)
{
	struct pollfd polled = {.fd = 0, .events = POLLIN};
	poll(&polled, 1, -1);
	__atomic_store_n(&ended, 1, __ATOMIC_RELAXED);
	return argument;
}

int main(int count, char **arguments)
{
	CHECK(count >= 3);
	end_with_parent();
	size_t bytes = strtoul(arguments[2], NULL, 10), threads = (size_t)option(arguments, "threads", 4);
	granule = (size_t)option(arguments, "granule", 1);
	granules = bytes / PAGE / granule;
	order = shuffled(granules, 7, 1);
	pthread_t waiter, others[64];
	CHECK(threads <= 64 && pthread_create(&waiter, NULL, wait_for_the_end, NULL) == 0);
	uint64_t began = now_ns();
	for (int first = 1; !__atomic_load_n(&ended, __ATOMIC_RELAXED); first = 0) {
		vm = make_vm(COPY, bytes, PAGE);
		introduce(&vm, arguments[1]);
		if (first) {
			CHECK(*(volatile uint64_t *)vm.memory == word_at(0));
			puts("{}");
			fflush(stdout);
			began = now_ns();
		}
		next = 0;
		for (size_t i = 0; i < threads; i++)
			CHECK(pthread_create(&others[i], NULL, run, NULL) == 0);
		for (size_t i = 0; i < threads; i++)
			pthread_join(others[i], NULL);
		end_vm(&vm);
	}
	printf("{\"touches\": %zu, \"ns\": %lu}\n", touches, now_ns() - began);
	return 0;
}
