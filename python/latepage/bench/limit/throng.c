/* Threads that touch shared memory whose pages come late, each touch timed, and the least that can bring them, by each delivery.
 *
 *   throng uffd FILE BYTES [option]...      a process beside this one reads userfaultfds, many messages at once, and copies
 *   throng thread FILE BYTES [option]...    SIGBUS comes back to the thread, which copies the page
 *   throng channel FILE BYTES [option]...   SIGBUS comes back, the thread posts in shared memory and waits; a process fills, it continues
 *
 *   threads=N (1)   touches=N (all pages), in random order   seed=N   cpu=N, server_cpu=N: pinned there
 *   shards=N (1): so many userfaultfds over slices   servers=N (1): threads that read them
 *
 * One line of JSON: from when all threads were ready to the last touch, CPU of both processes meanwhile, and of single touches. */
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>

#include "attach.h"

enum way { UFFD, THREAD, CHANNEL };

#define MOST 4096

struct slot {
	_Alignas(64) uint32_t state; /* 1 posted, 2 filled; the futex word */
	uint32_t page;
};

/* What two processes share. */
struct channel {
	_Alignas(64) uint32_t armed;
	_Alignas(64) uint64_t posted[MOST / 64];
	struct slot slots[MOST];
};

static enum way way;
static struct vm vm;
static const char *contents;
static int userfaultfds[MOST], bell;
static struct channel *channel;
static uint32_t *order;
static uint64_t *took;
static size_t touches, threads, shards, servers, wrong;
static pid_t server;
static __thread uint32_t number_of_thread;

static void fill(uint64_t at)
{
	CHECK(pwrite(vm.memfd, contents + at, PAGE, (off_t)at) == (ssize_t)PAGE);
}

static void expose(int userfaultfd, uint64_t at)
{
	struct uffdio_continue range = {.range = {.start = (uintptr_t)vm.memory + at, .len = PAGE}};
	CHECK(ioctl(userfaultfd, UFFDIO_CONTINUE, &range) == 0 || errno == EEXIST || errno == ESRCH || errno == ENOENT);
}

/* Both in one call. */
static void copy(int userfaultfd, uint64_t at)
{
	struct uffdio_copy page = {.dst = (uintptr_t)vm.memory + at, .src = (uintptr_t)contents + at, .len = PAGE};
	CHECK(ioctl(userfaultfd, UFFDIO_COPY, &page) == 0 || errno == EEXIST || errno == ESRCH || errno == ENOENT);
}

static void futex(uint32_t *word, int what, uint32_t value)
{
	syscall(SYS_futex, word, what, value, NULL, NULL, 0);
}

/* One of the threads that read userfaultfds. */
static void *serve_userfaultfds(void *argument)
{
	size_t number = (size_t)(uintptr_t)argument;
	int all = epoll_create1(EPOLL_CLOEXEC);
	CHECK(all >= 0);
	for (size_t i = number; i < shards; i += servers) {
		struct epoll_event event = {.events = EPOLLIN, .data.fd = userfaultfds[i]};
		CHECK(epoll_ctl(all, EPOLL_CTL_ADD, userfaultfds[i], &event) == 0);
	}
	for (;;) {
		struct epoll_event ready[16];
		int count = epoll_wait(all, ready, 16, -1);
		for (int i = 0; i < count; i++) {
			struct uffd_msg message[64];
			ssize_t got = read(ready[i].data.fd, message, sizeof message);
			for (ssize_t k = 0; k < got / (ssize_t)sizeof *message; k++) {
				uint64_t at = (message[k].arg.pagefault.address - (uintptr_t)vm.memory) & ~(PAGE - 1);
				copy(ready[i].data.fd, at);
			}
		}
	}
	return NULL;
}

static void serve_channel(void)
{
	struct pollfd polled = {.fd = bell, .events = POLLIN};
	for (;;) {
		int found = 0;
		for (size_t word = 0; word <= (threads - 1) / 64; word++) {
			uint64_t bits = __atomic_load_n(&channel->posted[word], __ATOMIC_RELAXED);
			if (bits)
				bits = __atomic_exchange_n(&channel->posted[word], 0, __ATOMIC_ACQ_REL);
			for (; bits; bits &= bits - 1) {
				struct slot *slot = &channel->slots[word * 64 + (size_t)__builtin_ctzll(bits)];
				fill((uint64_t)slot->page * PAGE);
				__atomic_store_n(&slot->state, 2, __ATOMIC_RELEASE);
				futex(&slot->state, FUTEX_WAKE, 1);
				found = 1;
			}
		}
		if (found) {
			__atomic_store_n(&channel->armed, 0, __ATOMIC_RELAXED);
		} else if (!__atomic_load_n(&channel->armed, __ATOMIC_RELAXED)) {
			/* Once more before it sleeps: whoever posts from now on rings. */
			__atomic_store_n(&channel->armed, 1, __ATOMIC_SEQ_CST);
			__atomic_thread_fence(__ATOMIC_SEQ_CST);
		} else {
			uint64_t rung;
			CHECK(poll(&polled, 1, -1) > 0);
			CHECK(read(bell, &rung, sizeof rung) == sizeof rung);
		}
	}
}

static void serve(int cpu)
{
	pthread_t other;
	end_with_parent();
	stay_on(cpu);
	if (way == CHANNEL)
		serve_channel();
	for (size_t i = 1; i < servers; i++)
		CHECK(pthread_create(&other, NULL, serve_userfaultfds, (void *)(uintptr_t)i) == 0);
	serve_userfaultfds(NULL);
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	uint64_t at = ((uintptr_t)info->si_addr - (uintptr_t)vm.memory) & ~(PAGE - 1);
	(void)signal, (void)context;
	if (way == THREAD)
		return copy(userfaultfds[0], at);
	struct slot *slot = &channel->slots[number_of_thread];
	slot->page = (uint32_t)(at / PAGE);
	__atomic_store_n(&slot->state, 1, __ATOMIC_RELEASE);
	__atomic_fetch_or(&channel->posted[number_of_thread / 64], 1ull << number_of_thread % 64, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&channel->armed, __ATOMIC_SEQ_CST) && __atomic_exchange_n(&channel->armed, 0, __ATOMIC_SEQ_CST))
		CHECK(write(bell, &(uint64_t){1}, 8) == 8);
	while (__atomic_load_n(&slot->state, __ATOMIC_ACQUIRE) == 1)
		futex(&slot->state, FUTEX_WAIT, 1);
	expose(userfaultfds[0], at);
}

/* All pass a turn together; the last one that comes says when that was. */
struct turn {
	pthread_barrier_t barrier;
	size_t came;
	uint64_t at, cpu;
};

static struct turn begin, end;

static uint64_t cpu_ns(clockid_t clock)
{
	struct timespec t;
	CHECK(clock_gettime(clock, &t) == 0);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void pass(struct turn *turn)
{
	if (__atomic_add_fetch(&turn->came, 1, __ATOMIC_ACQ_REL) == threads) {
		turn->at = now_ns();
		turn->cpu = cpu_ns(CLOCK_PROCESS_CPUTIME_ID);
	}
	pthread_barrier_wait(&turn->barrier);
}

static void *run(void *argument)
{
	size_t bad = 0;
	number_of_thread = (uint32_t)(uintptr_t)argument;
	pass(&begin);
	for (size_t i = number_of_thread; i < touches; i += threads) {
		size_t page = order[i];
		uint64_t before = now_ns();
		uint64_t word = *(volatile uint64_t *)(vm.memory + page * PAGE);
		took[i] = now_ns() - before;
		bad += word != word_at(page * (PAGE / 8));
	}
	__atomic_fetch_add(&wrong, bad, __ATOMIC_RELAXED);
	pass(&end);
	return NULL;
}

static void make_memory(size_t bytes)
{
	vm = (struct vm){.bytes = bytes, .page_size = PAGE, .memfd = memfd_create("guest", MFD_CLOEXEC)};
	CHECK(vm.memfd >= 0 && ftruncate(vm.memfd, (off_t)bytes) == 0);
	vm.memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vm.memfd, 0);
	CHECK(vm.memory != MAP_FAILED);
	size_t slice = bytes / PAGE / shards * PAGE;
	for (size_t i = 0; i < shards; i++) {
		size_t length = i + 1 < shards ? slice : bytes - i * slice;
		userfaultfds[i] = make_userfaultfd(UFFD_FEATURE_MINOR_SHMEM | (way == UFFD ? 0 : UFFD_FEATURE_SIGBUS));
		struct uffdio_register range = {.range = {.start = (uintptr_t)vm.memory + i * slice, .len = length},
						.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR};
		CHECK(ioctl(userfaultfds[i], UFFDIO_REGISTER, &range) == 0);
	}
}

int main(int count, char **arguments)
{
	CHECK(count >= 4);
	end_with_parent();
	way = *arguments[1] == 'u' ? UFFD : *arguments[1] == 't' ? THREAD : CHANNEL;
	size_t bytes = strtoul(arguments[3], NULL, 10);
	threads = (size_t)option(arguments, "threads", 1);
	shards = (size_t)option(arguments, "shards", 1);
	servers = (size_t)option(arguments, "servers", 1);
	size_t pages = bytes / PAGE;
	touches = (size_t)option(arguments, "touches", (long)pages);
	CHECK(threads <= MOST && shards <= MOST && threads <= touches && touches <= pages);
	contents = contents_of(arguments[2], bytes, 1);
	order = shuffled(pages, (uint64_t)option(arguments, "seed", 1), 1);
	took = malloc(touches * sizeof *took);
	CHECK(took);
	memset(took, 1, touches * sizeof *took); /* no faults of our own while times are taken */
	make_memory(bytes);
	if (way == CHANNEL) {
		channel = mmap(NULL, sizeof *channel, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
		bell = eventfd(0, EFD_CLOEXEC);
		CHECK(channel != MAP_FAILED && bell >= 0);
	}
	if (way != UFFD) {
		struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART};
		CHECK(sigaction(SIGBUS, &action, NULL) == 0);
	}
	if (way != THREAD) {
		server = fork();
		CHECK(server >= 0);
		if (!server)
			serve((int)option(arguments, "server_cpu", -1));
	}
	stay_on((int)option(arguments, "cpu", -1));

	pthread_t *others = calloc(threads, sizeof *others);
	pthread_attr_t small;
	CHECK(others && pthread_attr_init(&small) == 0 && pthread_attr_setstacksize(&small, 256 << 10) == 0);
	CHECK(pthread_barrier_init(&begin.barrier, NULL, (unsigned)threads) == 0);
	CHECK(pthread_barrier_init(&end.barrier, NULL, (unsigned)threads) == 0);
	clockid_t servers_clock = (clockid_t)(((unsigned)~server << 3) | 2);
	uint64_t before = server ? cpu_ns(servers_clock) : 0;
	for (size_t i = 0; i < threads; i++)
		CHECK(pthread_create(&others[i], &small, run, (void *)(uintptr_t)i) == 0);
	for (size_t i = 0; i < threads; i++)
		pthread_join(others[i], NULL);
	uint64_t served = server ? cpu_ns(servers_clock) - before : 0;
	if (server)
		kill(server, SIGKILL);

	size_t there = 0;
	qsort(took, touches, sizeof *took, by_size);
	while (there < touches && took[there] < 1000)
		there++;
	printf("{\"ns\": %lu, \"cpu_ns\": %lu, \"server_ns\": %lu, \"touches\": %zu, \"there\": %zu, \"wrong\": %zu, \"p50\": %lu, "
	       "\"p99\": %lu}\n",
	       end.at - begin.at, end.cpu - begin.cpu, served, touches, there, wrong,
	       quantile(took + there, touches - there, 0.5), quantile(took + there, touches - there, 0.99));
	return wrong != 0;
}
