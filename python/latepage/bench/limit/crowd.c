/* Many small VMs in one process, all idle but for what is asked of them on standard input, a line each; each answer is a line of JSON.
 *
 *   crowd SOCKET VMS BYTES [granule=PAGES] [seed=N]
 *
 *   trickle RATE TOUCHES   touches so many pages a second, one VM after the other, none twice, `granule` pages apart
 *   greet COUNT            makes so many more VMs, one after the other: from connect to the end of the first fault
 *   renew                  ends all VMs, and makes as many new ones */
#include "vm.h"

static const char *path;
static struct vm *vms;
static size_t *touched, number, bytes, granules, granule, turn;
static uint32_t *order;

/* Each VM begins at 2 MiB, so that those of up to 2 MiB have one page of page tables, whatever their number. */
static char *place(size_t vm)
{
	static char *start;
	size_t apart = (bytes + (2 << 20) - 1) & ~((2ul << 20) - 1);
	if (!start) {
		char *all = mmap(NULL, apart * (number + 1), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		CHECK(all != MAP_FAILED);
		start = (char *)(((uintptr_t)all + (2 << 20) - 1) & ~((2ul << 20) - 1));
	}
	return start + vm * apart;
}

static void make_all(void)
{
	for (size_t i = 0; i < number; i++) {
		vms[i] = make_vm_at(place(i), COPY, bytes, PAGE);
		introduce(&vms[i], path);
		touched[i] = 0;
	}
}

/* What was there gives way to a reservation in one step, so that nothing else takes the place. */
static void end_all(void)
{
	for (size_t i = 0; i < number; i++) {
		int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
		CHECK(mmap(vms[i].memory, bytes, PROT_NONE, flags, -1, 0) == vms[i].memory);
		close(vms[i].userfaultfd);
		close(vms[i].socket);
	}
}

static uint64_t touch(const struct vm *vm, size_t page)
{
	uint64_t before = now_ns();
	uint64_t word = *(volatile uint64_t *)(vm->memory + page * PAGE);
	uint64_t took = now_ns() - before;
	CHECK(word == word_at(page * (PAGE / 8)));
	return took;
}

static void answer(uint64_t *took, size_t count, uint64_t ns)
{
	size_t there = 0;
	qsort(took, count, sizeof *took, by_size);
	while (there < count && took[there] < 1000)
		there++;
	printf("{\"touches\": %zu, \"there\": %zu, \"p50\": %lu, \"p99\": %lu, \"ns\": %lu}\n", count, there,
	       quantile(took + there, count - there, 0.5), quantile(took + there, count - there, 0.99), ns);
}

static void trickle(uint64_t *took, size_t rate, size_t count)
{
	uint64_t began = now_ns(), gap = 1000000000u / rate;
	for (size_t i = 0; i < count; i++, turn = (turn + 1) % number) {
		uint64_t due = began + i * gap;
		struct timespec until = {.tv_sec = (time_t)(due / 1000000000u), .tv_nsec = (long)(due % 1000000000u)};
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
		CHECK(touched[turn] < granules);
		took[i] = touch(&vms[turn], order[touched[turn]++] * granule);
	}
	answer(took, count, now_ns() - began);
}

static void greet(uint64_t *took, size_t count)
{
	uint64_t began = now_ns();
	for (size_t i = 0; i < count; i++) {
		struct vm vm = make_vm(COPY, bytes, PAGE);
		uint64_t before = now_ns();
		introduce(&vm, path);
		touch(&vm, order[i % granules] * granule);
		took[i] = now_ns() - before;
		end_vm(&vm);
		usleep(2000); /* its end is not what the next one should wait for */
	}
	answer(took, count, now_ns() - began);
}

int main(int count, char **arguments)
{
	CHECK(count >= 4);
	end_with_parent();
	path = arguments[1];
	number = strtoul(arguments[2], NULL, 10);
	bytes = strtoul(arguments[3], NULL, 10);
	granule = (size_t)option(arguments, "granule", 1);
	granules = bytes / PAGE / granule;
	order = shuffled(granules, (uint64_t)option(arguments, "seed", 1), 1);
	vms = calloc(number + 1, sizeof *vms);
	touched = calloc(number + 1, sizeof *touched);
	CHECK(vms && touched);
	make_all();
	puts("{}");
	fflush(stdout);
	char line[128];
	while (fgets(line, sizeof line, stdin)) {
		size_t a = 0, b = 0;
		sscanf(line, "%*s %zu %zu", &a, &b);
		uint64_t *took = calloc(a + b + 1, sizeof *took);
		CHECK(took);
		memset(took, 1, (a + b + 1) * sizeof *took); /* no faults of our own while times are taken */
		if (!strncmp(line, "trickle", 7)) {
			trickle(took, a, b);
		} else if (!strncmp(line, "greet", 5)) {
			greet(took, a);
		} else {
			end_all();
			make_all();
			puts("{}");
		}
		fflush(stdout);
		free(took);
	}
	return 0;
}
