#include "balloon.h"

#include "console.h"
#include "machine.h"
#include "memory.h"
#include "order.h"

/* Virtio 1.2: 4.2.2 (registers), 2.7 (split queues), 5.5 (balloon). Firecracker puts its devices from here on, one a page:
 * at 3 GiB, and before 1.13 at 3.25 GiB. */
static const uint32_t first_devices[] = {0xc0001000, 0xd0000000};
enum { PLACES = sizeof first_devices / sizeof *first_devices, DEVICES = 32, MAGIC = 0x74726976, BALLOON = 5 };

enum {
    R_MAGIC = 0x00, R_DEVICE = 0x08, R_FEATURES = 0x20, R_FEATURES_SELECT = 0x24, R_QUEUE = 0x30, R_QUEUE_SIZE = 0x38,
    R_QUEUE_READY = 0x44, R_NOTIFY = 0x50, R_INTERRUPT = 0x60, R_INTERRUPT_DONE = 0x64, R_STATUS = 0x70, R_TABLE = 0x80,
    R_AVAILABLE = 0x90, R_USED = 0xa0, R_WANTED = 0x100, R_GIVEN = 0x104,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, VERSION_1 = 1 /* of the upper 32 features */ };

enum { GIVE, TAKE, QUEUES };
enum { SIZE = 16, PAGES_EACH = 256 /* the most that Firecracker takes */, BATCH = SIZE * PAGES_EACH };

struct queue {
    struct {
        uint64_t address;
        uint32_t length;
        uint16_t flags, next;
    } table[SIZE];
    struct {
        uint16_t flags;
        volatile uint16_t index;
        uint16_t ring[SIZE], event;
    } available;
    struct __attribute__((aligned(4))) {
        uint16_t flags;
        volatile uint16_t index;
        struct {
            uint32_t id, length;
        } ring[SIZE];
        uint16_t event;
    } used;
};

/* A place in the sequence in which pages are given. It goes through all runs of pages in an order of its own, and around
 * again, so that what is given first is taken back first and nobody needs to remember which pages those are. */
struct place {
    struct order runs;
    uint32_t first, within;
};

static _Alignas(PAGE) struct queue queues[QUEUES];
static _Alignas(PAGE) uint32_t batch[BATCH];
static _Alignas(PAGE) uint64_t devices_table[512];

static volatile uint8_t *device;
static struct place places[QUEUES];
static uint32_t run_pages, most, given, on_the_way, direction;
static uint64_t moved, not_zero, not_zero_ever;

static uint32_t get(uint32_t at)
{
    return *(volatile uint32_t *)(device + at);
}

static void set(uint32_t at, uint32_t value)
{
    *(volatile uint32_t *)(device + at) = value;
}

static void set_address(uint32_t at, const volatile void *address)
{
    set(at, (uint32_t)(uint64_t)address);
    set(at + 4, (uint32_t)((uint64_t)address >> 32));
}

/* Maps 2 MiB of each place of devices. All are in the fourth GiB, which the boot's page tables leave out. */
static void map_devices(void)
{
    uint64_t *top;
    __asm__("mov %%cr3, %0" : "=r"(top));
    uint64_t *below = (uint64_t *)(top[0] & ~0xfffull);
    for (uint32_t place = 0; place < PLACES; place++)
        devices_table[first_devices[place] >> 21 & 511] =
            (first_devices[place] & ~0x1fffffull) | 0x93; /* present, writable, uncached, 2 MiB */
    below[3] = (uint64_t)devices_table | 3;
}

static bool find(void)
{
    for (uint32_t place = 0; place < PLACES; place++)
        for (uint32_t number = 0; number < DEVICES; number++) {
            device = (volatile uint8_t *)(uint64_t)(first_devices[place] + number * PAGE);
            if (get(R_MAGIC) == MAGIC && get(R_DEVICE) == BALLOON)
                return true;
        }
    device = 0;
    return false;
}

bool balloon_begin(uint32_t run)
{
    run_pages = run;
    most = memory_pages() / run * run;
    for (int which = 0; which < QUEUES; which++)
        places[which] = (struct place){order_of(most / run, true, 1), 0, 0};
    map_devices();
    if (!most || !find())
        return false;
    /* One bit at a time: Firecracker takes no other way. */
    set(R_STATUS, 0);
    set(R_STATUS, ACKNOWLEDGE);
    set(R_STATUS, ACKNOWLEDGE | DRIVER);
    set(R_FEATURES_SELECT, 0);
    set(R_FEATURES, 0);
    set(R_FEATURES_SELECT, 1);
    set(R_FEATURES, VERSION_1);
    set(R_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    for (uint32_t which = 0; which < QUEUES; which++) {
        struct queue *queue = &queues[which];
        set(R_QUEUE, which);
        set(R_QUEUE_SIZE, SIZE);
        set_address(R_TABLE, queue->table);
        set_address(R_AVAILABLE, &queue->available);
        set_address(R_USED, &queue->used);
        set(R_QUEUE_READY, 1);
    }
    set(R_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return get(R_STATUS) & DRIVER_OK;
}

static uint32_t next_page(struct place *place)
{
    if (!place->within)
        place->first = order_next(&place->runs) * run_pages;
    uint32_t page = place->first + place->within;
    place->within = place->within + 1 == run_pages ? 0 : place->within + 1;
    return page;
}

/* Sends the next pages in that direction, as many as go at once. */
static void send(uint32_t which, uint32_t pages)
{
    struct queue *queue = &queues[which];
    on_the_way = pages < BATCH ? pages : BATCH;
    direction = which;
    for (uint32_t entry = 0; entry < on_the_way; entry++) {
        uint32_t page = next_page(&places[which]);
        batch[entry] = FIRST_PAGE + page;
        if (which == GIVE)
            memory_give(page);
    }
    uint16_t index = queue->available.index;
    for (uint32_t first = 0; first < on_the_way; first += PAGES_EACH) {
        uint32_t count = on_the_way - first < PAGES_EACH ? on_the_way - first : PAGES_EACH;
        uint16_t slot = index++ % SIZE;
        queue->table[slot].address = (uint64_t)(batch + first);
        queue->table[slot].length = 4 * count;
        queue->available.ring[slot] = slot;
    }
    barrier();
    queue->available.index = index;
    barrier();
    set(R_NOTIFY, which);
}

/* The device has used what was sent. */
static void arrived(void)
{
    if (direction == TAKE) {
        for (uint32_t entry = 0; entry < on_the_way; entry++)
            not_zero += !memory_take(batch[entry] - FIRST_PAGE);
        given -= on_the_way;
    } else {
        given += on_the_way;
    }
    moved += on_the_way;
    on_the_way = 0;
    set(R_GIVEN, given);
}

static void tell(void)
{
    line_begin(direction == GIVE ? "inflated" : "deflated");
    line_number("pages", moved);
    line_number("given", given);
    if (direction == TAKE)
        line_number("not_zero", not_zero);
    line_end();
    not_zero_ever += not_zero;
    moved = not_zero = 0;
}

bool balloon_step(void)
{
    if (!device)
        return false;
    uint32_t interrupt = get(R_INTERRUPT);
    if (interrupt)
        set(R_INTERRUPT_DONE, interrupt);
    if (on_the_way) {
        if (queues[direction].used.index != queues[direction].available.index)
            return false;
        arrived();
    }
    uint32_t wanted = get(R_WANTED);
    wanted = wanted > most ? most : wanted;
    if (moved && (wanted == given || (wanted > given) != (direction == GIVE)))
        tell();
    if (wanted == given)
        return false;
    send(wanted > given ? GIVE : TAKE, wanted > given ? wanted - given : given - wanted);
    return true;
}

uint32_t balloon_given(void)
{
    return given;
}

uint64_t balloon_not_zero(void)
{
    return not_zero_ever + not_zero;
}
