/* The virtio-mmio balloon: gives pages to the host when it asks for them, and takes them back when it lets go of them. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/* Looks for the device and brings it up; whether there is one. Pages go and come in runs of `run` pages that lie together. */
bool balloon_begin(uint32_t run);

/* One step towards what the host asks for, if there is one to make. Tells of it when the host has what it asked for. */
bool balloon_step(void);

/* How many pages the host has, and how many of all that came back did not read as zero. */
uint32_t balloon_given(void);
uint64_t balloon_not_zero(void);
