/* The limit of one fault: one page a fault, contents in memory, one VM after the other, the least system calls.
 *
 *   server SOCKET FILE BYTES [spin] [keep] [cold] [batch] [cpu=N]
 *
 * It blocks in poll(2) and reads; or spins on read(2). With `keep` it looks whether its VM is gone, and takes the next one.
 * With `batch` one read takes many messages.
 * With `cold` the file is not mapped ahead, so that what is on the disk stays there until it is wanted. */
#include "attach.h"

static void copy_in(const struct served *vm, uint64_t at)
{
	struct uffdio_copy copy = {
		.dst = vm->start + at, .src = (uintptr_t)vm->contents + at, .len = vm->page_size};
	CHECK(ioctl(vm->userfaultfd, UFFDIO_COPY, &copy) == 0 || errno == EEXIST || errno == ESRCH || errno == ENOENT);
}

/* pwrite(2) into the memory file, and not a store into a mapping: no fault of our own. */
static void fill_and_continue(const struct served *vm, uint64_t at)
{
	struct uffdio_continue expose = {.range = {.start = vm->start + at, .len = vm->page_size}};
	CHECK(pwrite(vm->memfd, vm->contents + at, vm->page_size, (off_t)at) == (ssize_t)vm->page_size);
	CHECK(ioctl(vm->userfaultfd, UFFDIO_CONTINUE, &expose) == 0 || errno == EEXIST || errno == ESRCH || errno == ENOENT);
}

int main(int count, char **arguments)
{
	CHECK(count >= 4);
	end_with_parent();
	stay_on((int)option(arguments, "cpu", -1));
	int spin = given(arguments, "spin"), keep = given(arguments, "keep"), batch = given(arguments, "batch");
	const char *contents = contents_of(arguments[2], strtoul(arguments[3], NULL, 10), !given(arguments, "cold"));
	int listener = listen_at(arguments[1]);
	for (;;) {
		struct served vm = attach(listener);
		struct pollfd polled[2] = {{.fd = vm.userfaultfd, .events = POLLIN}, {.fd = vm.socket, .events = POLLIN}};
		vm.contents = contents;
		for (;;) {
			struct uffd_msg messages[64];
			if (!spin) {
				CHECK(poll(polled, keep ? 2 : 1, -1) > 0);
				if (polled[1].revents)
					break;
			}
			ssize_t got = read(vm.userfaultfd, messages, batch ? sizeof messages : sizeof *messages);
			for (ssize_t i = 0; i < got / (ssize_t)sizeof *messages; i++) {
				if (messages[i].event != UFFD_EVENT_PAGEFAULT)
					continue;
				uint64_t at = (messages[i].arg.pagefault.address - vm.start) & ~(vm.page_size - 1);
				if (vm.memfd < 0)
					copy_in(&vm, at);
				else
					fill_and_continue(&vm, at);
			}
		}
		close(vm.userfaultfd);
		close(vm.socket);
		if (vm.memfd >= 0)
			close(vm.memfd);
	}
}
