/* The limit of population: a bare loop of UFFDIO_COPY over all of an idle VM, contents in the page cache.
 *
 *   copier SOCKET FILE BYTES chunk=BYTES */
#include "attach.h"

int main(int count, char **arguments)
{
	CHECK(count >= 5);
	end_with_parent();
	uint64_t bytes = strtoul(arguments[3], NULL, 10), chunk = (uint64_t)option(arguments, "chunk", 0);
	CHECK(chunk);
	const char *contents = contents_of(arguments[2], bytes, 1);
	struct served vm = attach(listen_at(arguments[1]));
	for (uint64_t at = 0; at < bytes; at += chunk) {
		struct uffdio_copy copy = {
			.dst = vm.start + at, .src = (uintptr_t)contents + at, .len = bytes - at < chunk ? bytes - at : chunk};
		CHECK(ioctl(vm.userfaultfd, UFFDIO_COPY, &copy) == 0);
	}
	/* Whoever started it ends it: the VM's userfaultfd stays open until then. */
	pause();
}
