/* The VMM's side of a VM whose memory comes late: memory, a userfaultfd, and the handshake; no guest yet. */
#ifndef LATEPAGE_BENCH_VM_H
#define LATEPAGE_BENCH_VM_H

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "common.h"

/* Firecracker's handshake, and pages are copied in; or ours with the memory file, and pages are filled there and continued. */
enum form { COPY, MINOR };

struct vm {
	char *memory;
	size_t bytes;
	long page_size;
	int userfaultfd, memfd, socket;
};

static inline int make_userfaultfd(uint64_t features)
{
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	CHECK(device >= 0);
	int fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	CHECK(fd >= 0);
	close(device);
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	CHECK(ioctl(fd, UFFDIO_API, &api) == 0);
	return fd;
}

/* Memory that is registered and that nobody serves yet; at a place that is reserved for it, or anywhere (NULL). */
static inline struct vm make_vm_at(char *place, enum form form, size_t bytes, long page_size)
{
	struct vm vm = {.bytes = bytes, .page_size = page_size, .memfd = -1, .socket = -1};
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (page_size > (long)PAGE ? MAP_HUGETLB : 0);
	uint64_t features = UFFD_FEATURE_EVENT_REMOVE, mode = UFFDIO_REGISTER_MODE_MISSING;
	if (form == MINOR) {
		vm.memfd = memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
		CHECK(vm.memfd >= 0 && ftruncate(vm.memfd, (off_t)bytes) == 0);
		CHECK(fcntl(vm.memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL) == 0);
		flags = MAP_SHARED;
		features |= UFFD_FEATURE_MINOR_SHMEM;
		mode |= UFFDIO_REGISTER_MODE_MINOR;
	}
	vm.memory = mmap(place, bytes, PROT_READ | PROT_WRITE, flags | (place ? MAP_FIXED : 0), vm.memfd, 0);
	CHECK(vm.memory != MAP_FAILED);
	vm.userfaultfd = make_userfaultfd(features);
	struct uffdio_register range = {.range = {.start = (uintptr_t)vm.memory, .len = bytes}, .mode = mode};
	CHECK(ioctl(vm.userfaultfd, UFFDIO_REGISTER, &range) == 0);
	return vm;
}

static inline struct vm make_vm(enum form form, size_t bytes, long page_size)
{
	return make_vm_at(NULL, form, bytes, page_size);
}

/* connect(2), and one message with the descriptors. Whoever listens serves from now on. */
static inline void introduce(struct vm *vm, const char *path)
{
	char text[512];
	const char *firecracker = "[{\"base_host_virt_addr\":%lu,\"size\":%lu,\"offset\":0,\"page_size\":%ld,\"page_size_kib\":%ld}]";
	const char *ours = "{\"version\":1,\"delivery\":\"uffd\",\"backing\":\"shared\",\"descriptors\":[\"userfaultfd\",\"memory\"],"
			   "\"regions\":[{\"hva\":%lu,\"size\":%lu,\"offset\":0,\"page_size\":%ld}]}";
	int length = snprintf(text, sizeof text, vm->memfd < 0 ? firecracker : ours, (unsigned long)(uintptr_t)vm->memory,
			      (unsigned long)vm->bytes, vm->page_size, vm->page_size);
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	CHECK(strlen(path) < sizeof address.sun_path);
	strcpy(address.sun_path, path);
	vm->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(vm->socket >= 0 && connect(vm->socket, (struct sockaddr *)&address, sizeof address) == 0);

	int fds[2] = {vm->userfaultfd, vm->memfd};
	size_t sent = sizeof(int) * (vm->memfd < 0 ? 1 : 2);
	union { char bytes[CMSG_SPACE(sizeof fds)]; struct cmsghdr align; } control = {0};
	struct iovec part = {text, (size_t)length};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_SPACE(sent)};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sent);
	memcpy(CMSG_DATA(header), fds, sent);
	CHECK(sendmsg(vm->socket, &message, MSG_NOSIGNAL) == length);
}

/* The memory goes first: a userfaultfd whose last reference goes would let a waiting thread through to zero pages. */
static inline void end_vm(struct vm *vm)
{
	munmap(vm->memory, vm->bytes);
	close(vm->userfaultfd);
	close(vm->socket);
	if (vm->memfd >= 0)
		close(vm->memfd);
}

#endif
