/* The pager's side of the handshake, for one VM of one region, trusting everything: no product. */
#ifndef LATEPAGE_BENCH_ATTACH_H
#define LATEPAGE_BENCH_ATTACH_H

#include <poll.h>

#include "vm.h"

struct served {
	uint64_t start, bytes, page_size;
	int userfaultfd, memfd, socket;
	const char *contents;
};

static inline int listen_at(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	CHECK(strlen(path) < sizeof address.sun_path);
	strcpy(address.sun_path, path);
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(listener >= 0 && bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 128) == 0);
	puts("listening");
	fflush(stdout);
	return listener;
}

static inline uint64_t number(const char *text, const char *key)
{
	const char *found = strstr(text, key);
	CHECK(found);
	return strtoull(found + strlen(key), NULL, 10);
}

static inline struct served attach(int listener)
{
	char text[4096] = {0};
	int fds[2] = {-1, -1};
	union { char bytes[CMSG_SPACE(sizeof fds)]; struct cmsghdr align; } control = {0};
	struct iovec part = {text, sizeof text - 1};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	struct served vm = {.socket = accept(listener, NULL, NULL)};
	CHECK(vm.socket >= 0 && recvmsg(vm.socket, &message, 0) > 0);
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	CHECK(header && header->cmsg_type == SCM_RIGHTS);
	memcpy(fds, CMSG_DATA(header), header->cmsg_len - CMSG_LEN(0));
	vm.userfaultfd = fds[0];
	vm.memfd = fds[1];
	vm.start = number(text, *text == '[' ? "\"base_host_virt_addr\":" : "\"hva\":");
	vm.bytes = number(text, "\"size\":");
	vm.page_size = number(text, "\"page_size\":");
	return vm;
}

/* The memory file as this process sees it; what is in the page cache is mapped at once. */
static inline const char *contents_of(const char *path, uint64_t bytes, int populate)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(file >= 0);
	char *contents = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE | (populate ? MAP_POPULATE : 0), file, 0);
	CHECK(contents != MAP_FAILED);
	return contents;
}

#endif
