#include "memory.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cann_sim.h"
#include "config.h"
#include "device.h"
#include "errors.h"
#include "machine.h"

#define HUGE_PAGE ((size_t)2 << 20)
#define GRANULE ((size_t)4096)
#define POISON 0xa5 /* as bfloat16, half or float: small negative numbers that no model has */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static sim_region *regions; /* by address */
static size_t region_count, region_room;

static size_t round_up(size_t size)
{
    return (size + GRANULE - 1) / GRANULE * GRANULE;
}

/* The number of regions that begin at or below `address`. */
static size_t regions_up_to(const void *address)
{
    size_t low = 0, high = region_count;

    while (low < high) {
        size_t middle = (low + high) / 2;

        if ((uintptr_t)regions[middle].base <= (uintptr_t)address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static uintptr_t end_of(const sim_region *region)
{
    return (uintptr_t)region->base + region->size;
}

/* With the lock held. */
static sim_place locate(const void *address, size_t length, int *device)
{
    uintptr_t begin = (uintptr_t)address, end = begin + length;
    size_t index = regions_up_to(address);
    const sim_region *first, *last;

    if (!index || end_of(&regions[index - 1]) <= begin) {
        bool runs_into_device =
            index < region_count && (uintptr_t)regions[index].base < end && regions[index].device >= 0;

        return runs_into_device ? SIM_BROKEN : SIM_PAGEABLE;
    }
    first = &regions[index - 1];
    *device = first->device;
    /* Mapped memory may be in several pieces, side by side. */
    for (last = first; end_of(last) < end; last++) {
        const sim_region *next = last + 1;

        if (next == regions + region_count || (uintptr_t)next->base != end_of(last) || next->device != first->device)
            return first->device < 0 ? SIM_PAGEABLE : SIM_BROKEN;
    }
    return first->device < 0 ? SIM_PINNED : SIM_DEVICE_MEMORY;
}

sim_place sim_locate(const void *address, size_t length, int *device)
{
    int ignored;
    sim_place place;

    pthread_mutex_lock(&lock);
    place = locate(address, length, device ? device : &ignored);
    pthread_mutex_unlock(&lock);
    return place;
}

aclError sim_add_region(const char *function, const sim_region *region)
{
    aclError error = ACL_SUCCESS;
    size_t index;

    pthread_mutex_lock(&lock);
    if (region_count == region_room) {
        size_t room = region_room ? 2 * region_room : 256;
        sim_region *more = realloc(regions, room * sizeof *more);

        if (!more) {
            error = sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "no memory for the table of allocations");
            goto done;
        }
        regions = more;
        region_room = room;
    }
    index = regions_up_to(region->base);
    if ((index && end_of(&regions[index - 1]) > (uintptr_t)region->base) ||
        (index < region_count && (uintptr_t)regions[index].base < end_of(region))) {
        error = sim_fail(function, ACL_ERROR_RT_PARAM_INVALID,
                         "%zu bytes at %p overlap what is allocated or registered", region->size, region->base);
        goto done;
    }
    memmove(&regions[index + 1], &regions[index], (region_count - index) * sizeof *regions);
    regions[index] = *region;
    region_count++;
done:
    pthread_mutex_unlock(&lock);
    return error;
}

bool sim_remove_region(void *base, sim_origin origin, sim_region *region)
{
    bool found = false;
    size_t index;

    pthread_mutex_lock(&lock);
    index = regions_up_to(base);
    if (index && regions[index - 1].base == base && regions[index - 1].origin == origin) {
        found = true;
        *region = regions[--index];
        memmove(&regions[index], &regions[index + 1], (region_count - index - 1) * sizeof *regions);
        region_count--;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

aclError sim_take_memory(const char *function, int device, size_t size)
{
    size_t total = sim_settings()->memory, left;
    aclError error = sim_take(function, SIM_BYTES, device, size, total, &left);

    if (error || size <= left)
        return error;
    return sim_fail(function, ACL_ERROR_RT_MEMORY_ALLOCATION, "%zu bytes asked of device %d, of whose %zu %zu are free",
                    size, device, total, left);
}

void sim_give_memory(int device, size_t size)
{
    sim_give(SIM_BYTES, device, size);
}

/* Maps fresh pages, huge ones where they help: most of the cost is in touching memory for the first time. */
static void *map_pages(size_t size)
{
    void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (base == MAP_FAILED)
        return NULL;
    if (size >= HUGE_PAGE)
        (void)madvise(base, size, MADV_HUGEPAGE); /* only advice: it may fail */
    return base;
}

/* Allocates memory of the current device, aligned to a page. Its content is undefined: zero, or garbage with
 * CANN_SIM_POISON=1. The device has CANN_SIM_MEMORY bytes; beyond that the error is ACL_ERROR_RT_MEMORY_ALLOCATION. */
aclError aclrtMalloc(void **devPtr, size_t size, aclrtMemMallocPolicy policy)
{
    sim_region region = {NULL, round_up(size), SIM_MALLOC, -1};
    aclError error;

    (void)policy;
    if ((error = CURRENT_DEVICE(&region.device)))
        return error;
    if (!devPtr || !size || region.size < size)
        return FAIL(ACL_ERROR_INVALID_PARAM, "%zu bytes to %p", size, (void *)devPtr);
    if ((error = sim_take_memory(__func__, region.device, region.size)))
        return error;
    if (!(region.base = map_pages(region.size))) {
        error = FAIL(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no %zu bytes left", region.size);
        goto failed;
    }
    if (sim_settings()->poison)
        memset(region.base, POISON, region.size);
    if ((error = sim_add_region(__func__, &region)))
        goto failed;
    *devPtr = region.base;
    return ACL_SUCCESS;

failed:
    if (region.base)
        munmap(region.base, region.size);
    sim_give_memory(region.device, region.size);
    return error;
}

/* Does the same as aclrtMalloc, which aligns to more than 32 bytes anyway. */
aclError aclrtMallocAlign32(void **devPtr, size_t size, aclrtMemMallocPolicy policy)
{
    return aclrtMalloc(devPtr, size, policy);
}

/* Frees memory that aclrtMalloc returned, of any device; any other address is an error. */
aclError aclrtFree(void *devPtr)
{
    sim_region region;

    if (!sim_remove_region(devPtr, SIM_MALLOC, &region))
        return FAIL(ACL_ERROR_RT_PARAM_INVALID, "%p is not the address of an allocation", devPtr);
    munmap(region.base, region.size);
    sim_give_memory(region.device, region.size);
    return ACL_SUCCESS;
}

/* Allocates pinned host memory, aligned to a page. */
aclError aclrtMallocHost(void **hostPtr, size_t size)
{
    sim_region region = {NULL, round_up(size), SIM_MALLOC_HOST, -1};
    aclError error;

    if (!hostPtr || !size || region.size < size)
        return FAIL(ACL_ERROR_INVALID_PARAM, "%zu bytes to %p", size, (void *)hostPtr);
    if (!(region.base = map_pages(region.size)))
        return FAIL(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no %zu bytes left", region.size);
    if ((error = sim_add_region(__func__, &region))) {
        munmap(region.base, region.size);
        return error;
    }
    *hostPtr = region.base;
    return ACL_SUCCESS;
}

/* Does the same as aclrtMallocHost, whose addresses already are what the configuration can ask for. */
aclError aclrtMallocHostWithCfg(void **ptr, uint64_t size, aclrtMallocConfig *cfg)
{
    (void)cfg;
    return aclrtMallocHost(ptr, (size_t)size);
}

/* Frees memory that aclrtMallocHost returned; any other address is an error. */
aclError aclrtFreeHost(void *hostPtr)
{
    sim_region region;

    if (!sim_remove_region(hostPtr, SIM_MALLOC_HOST, &region))
        return FAIL(ACL_ERROR_RT_PARAM_INVALID, "%p is not the address of pinned memory", hostPtr);
    munmap(region.base, region.size);
    return ACL_SUCCESS;
}

/* Pins host memory that the caller owns. The device reaches it at the same address. */
aclError aclrtHostRegister(void *ptr, uint64_t size, aclrtHostRegisterType type, void **devPtr)
{
    aclError error = aclrtHostRegisterV2(ptr, size, 0);

    (void)type;
    if (!error && devPtr)
        *devPtr = ptr;
    return error;
}

/* Pins host memory that the caller owns. Memory that was allocated or registered here before is refused. */
aclError aclrtHostRegisterV2(void *ptr, uint64_t size, uint32_t flag)
{
    sim_region region = {ptr, (size_t)size, SIM_REGISTERED, -1};
    aclError error;

    (void)flag;
    if (!ptr || !size)
        return FAIL(ACL_ERROR_INVALID_PARAM, "%zu bytes at %p", (size_t)size, ptr);
    error = sim_add_region(__func__, &region);
    return error == ACL_ERROR_RT_PARAM_INVALID ? ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED : error;
}

/* Unpins memory that was registered; any other address is an error. */
aclError aclrtHostUnregister(void *ptr)
{
    sim_region region;

    if (!sim_remove_region(ptr, SIM_REGISTERED, &region))
        return FAIL(ACL_ERROR_HOST_MEMORY_NOT_REGISTERED, "%p was not registered", ptr);
    return ACL_SUCCESS;
}

/* Tells whether an address is device memory (and of which device), pinned host memory, or neither. */
aclError aclrtPointerGetAttributes(const void *ptr, aclrtPtrAttributes *attributes)
{
    int device = 0;

    if (!attributes)
        return FAIL(ACL_ERROR_INVALID_PARAM, "attributes is NULL");
    memset(attributes, 0, sizeof *attributes);
    attributes->pageSize = (uint32_t)GRANULE;
    switch (sim_locate(ptr, 1, &device)) {
    case SIM_DEVICE_MEMORY:
        attributes->location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
        attributes->location.id = (uint32_t)device;
        break;
    case SIM_PINNED:
        attributes->location.type = ACL_MEM_LOCATION_TYPE_HOST;
        break;
    default:
        attributes->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    }
    return ACL_SUCCESS;
}

/* Tells how many bytes of the current device no process has taken. */
aclError aclrtGetMemInfo(aclrtMemAttr attr, size_t *free, size_t *total)
{
    size_t taken;
    int device;
    aclError error = CURRENT_DEVICE(&device);

    (void)attr;
    if (error)
        return error;
    if (!free || !total)
        return FAIL(ACL_ERROR_INVALID_PARAM, "NULL");
    if ((error = sim_usage(__func__, SIM_BYTES, device, &taken)))
        return error;
    *total = sim_settings()->memory;
    *free = taken < *total ? *total - taken : 0;
    return ACL_SUCCESS;
}

int cann_sim_device_of(const void *address, size_t length)
{
    int device;

    return sim_locate(address, length, &device) == SIM_DEVICE_MEMORY ? device : -1;
}
