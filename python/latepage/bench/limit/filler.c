/* The best that a restore by userfaultfd comes to without a product: one VM, one file, no care for anything else.
 *
 *   filler SOCKET FILE BYTES [option]...
 *
 *   around=BYTES (4096)  the aligned window around a fault that is copied in one go
 *   chunk=BYTES (0)      other threads copy everything, chunk by chunk; 0: only what is touched comes
 *   threads=N (1)        so many of them
 *   spin                 the thread of the faults spins on read(2) instead of blocking in poll(2)
 *   cpu=N                the thread of the faults stays there
 *   populate             the file is mapped page by page before anybody connects: for files in the page cache
 *   ahead                another thread has the kernel read the file from the disk, in order
 *   read                 contents are read(2) into a buffer instead of copied from a mapping
 *   direct               the same, past the page cache
 *
 * A byte a page says who brings it, so that no page is copied twice and no copy stops in its middle. */
#include <pthread.h>

#include "attach.h"

static struct served vm;
static unsigned char *claimed;
static uint64_t around, chunk, next_chunk;
static int file, reading;

/* The pages of [from, to) that nobody has claimed yet, copied as runs. */
static void bring(uint64_t from, uint64_t to, char *buffer)
{
	while (from < to) {
		uint64_t end = from;
		while (end < to && !__atomic_exchange_n(&claimed[end / PAGE], 1, __ATOMIC_RELAXED))
			end += PAGE;
		if (end == from) {
			from += PAGE;
			continue;
		}
		uint64_t source = (uintptr_t)vm.contents + from;
		if (reading) {
			for (uint64_t at = from; at < end;) {
				ssize_t got = pread(file, buffer + (at - from), end - at, (off_t)at);
				CHECK(got > 0);
				at += (uint64_t)got;
			}
			source = (uintptr_t)buffer;
		}
		struct uffdio_copy copy = {.dst = vm.start + from, .src = source, .len = end - from};
		/* The VM may be gone before everything was brought. */
		if (ioctl(vm.userfaultfd, UFFDIO_COPY, &copy) != 0) {
			CHECK(errno == ESRCH || errno == ENOENT);
			exit(0);
		}
		from = end + (end < to ? PAGE : 0);
	}
}

static void *populate(void *argument)
{
	char *buffer = argument;
	for (uint64_t at; (at = __atomic_fetch_add(&next_chunk, chunk, __ATOMIC_RELAXED)) < vm.bytes;)
		bring(at, at + chunk < vm.bytes ? at + chunk : vm.bytes, buffer);
	return NULL;
}

static void *read_ahead(void *argument)
{
	/* In pieces: one request for everything is cut short by the kernel. */
	for (uint64_t at = 0; at < vm.bytes; at += 4 << 20)
		readahead(file, (off_t)at, 4 << 20);
	return argument;
}

static char *make_buffer(uint64_t bytes)
{
	char *buffer = mmap(NULL, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(buffer != MAP_FAILED);
	if (reading)
		memset(buffer, 1, bytes); /* its own faults are over before the VM comes */
	return buffer;
}

int main(int count, char **arguments)
{
	CHECK(count >= 4);
	end_with_parent();
	uint64_t bytes = strtoul(arguments[3], NULL, 10);
	around = (uint64_t)option(arguments, "around", PAGE);
	chunk = (uint64_t)option(arguments, "chunk", 0);
	int direct = given(arguments, "direct"), threads = (int)option(arguments, "threads", 1);
	reading = direct || given(arguments, "read");
	CHECK(threads <= 16);
	int spin = given(arguments, "spin");
	const char *contents = contents_of(arguments[2], bytes, given(arguments, "populate"));
	file = open(arguments[2], O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0));
	claimed = calloc(bytes / PAGE, 1);
	CHECK(file >= 0 && claimed);
	memset(claimed, 0, bytes / PAGE);
	char *buffers[17] = {make_buffer(around)};
	for (int i = 1; chunk && i <= threads; i++)
		buffers[i] = make_buffer(chunk);
	int listener = listen_at(arguments[1]);
	vm = attach(listener);
	vm.contents = contents;
	pthread_t populator, reader;
	if (given(arguments, "ahead"))
		CHECK(pthread_create(&reader, NULL, read_ahead, NULL) == 0);
	for (int i = 1; chunk && i <= threads; i++)
		CHECK(pthread_create(&populator, NULL, populate, buffers[i]) == 0);
	stay_on((int)option(arguments, "cpu", -1));
	struct pollfd polled = {.fd = vm.userfaultfd, .events = POLLIN};
	for (;;) {
		struct uffd_msg message[16];
		if (!spin)
			CHECK(poll(&polled, 1, -1) > 0);
		ssize_t got = read(vm.userfaultfd, message, sizeof message);
		for (ssize_t i = 0; i < got / (ssize_t)sizeof *message; i++) {
			uint64_t at = (message[i].arg.pagefault.address - vm.start) & ~(around - 1);
			bring(at, at + around < vm.bytes ? at + around : vm.bytes, buffers[0]);
		}
	}
}
