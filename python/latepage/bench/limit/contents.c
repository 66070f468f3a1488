/* Writes a memory file of so many bytes, no page of it zero and no two alike, and syncs it.
 *
 *   contents FILE BYTES */
#include <fcntl.h>

#include "common.h"

int main(int count, char **arguments)
{
	static uint64_t words[1 << 17];
	CHECK(count == 3);
	end_with_parent();
	size_t bytes = strtoul(arguments[2], NULL, 10);
	int file = open(arguments[1], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	CHECK(file >= 0);
	for (size_t done = 0; done < bytes;) {
		size_t length = bytes - done < sizeof words ? bytes - done : sizeof words;
		for (size_t i = 0; i < length / 8; i++)
			words[i] = word_at(done / 8 + i);
		CHECK(write(file, words, length) == (ssize_t)length);
		done += length;
	}
	CHECK(fsync(file) == 0);
	return 0;
}
