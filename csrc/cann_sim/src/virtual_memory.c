/* Addresses without memory, memory without addresses, and the joining of the two.
 *
 * Physical memory is an anonymous file, so that its content stays while it is not mapped, and nothing is left when the
 * process dies.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "acl_api.h"
#include "device.h"
#include "errors.h"
#include "handles.h"
#include "memory.h"

#define GRANULE ((size_t)2 << 20) /* the size of a huge page, in which physical memory is counted */

typedef struct {
    sim_object object;
    int device, file;
    size_t size;
} physical;

typedef struct range {
    struct range *next;
    void *base;
    size_t size;
    physical *memory; /* NULL: reserved addresses */
} range;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static range *reserved, *mapped;

static void release_physical(sim_object *object)
{
    physical *memory = (physical *)object;

    sim_give_memory(memory->device, memory->size);
    if (memory->file >= 0)
        close(memory->file);
    free(memory);
}

static range **find_base(range **list, const void *base)
{
    while (*list && (*list)->base != base)
        list = &(*list)->next;
    return list;
}

static bool lies_in(const void *base, size_t size, const range *outer)
{
    uintptr_t begin = (uintptr_t)base, low = (uintptr_t)outer->base;

    return begin >= low && size <= outer->size && begin - low <= outer->size - size;
}

static bool forget_pages(void *base, size_t size)
{
    return mmap(base, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
}

/* Reserves at least `size` bytes of addresses, aligned to 2 MiB; `alignment` and `expectPtr` are
 * ignored. */
aclError aclrtReserveMemAddress(void **virPtr, size_t size, size_t alignment, void *expectPtr, uint64_t flags)
{
    range *entry = NULL;
    char *base, *aligned;

    (void)alignment, (void)expectPtr, (void)flags;
    if (!virPtr || !size || size > SIZE_MAX - 2 * GRANULE)
        return FAIL(ACL_ERROR_INVALID_PARAM, "%zu bytes to %p", size, (void *)virPtr);
    size = (size + GRANULE - 1) / GRANULE * GRANULE;
    base = mmap(NULL, size + GRANULE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || !(entry = malloc(sizeof *entry))) {
        if (base != MAP_FAILED)
            munmap(base, size + GRANULE);
        return FAIL(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "no %zu bytes of addresses left", size);
    }
    aligned = base + (GRANULE - (uintptr_t)base % GRANULE) % GRANULE;
    if (aligned > base)
        munmap(base, (size_t)(aligned - base));
    munmap(aligned + size, GRANULE - (size_t)(aligned - base));
    pthread_mutex_lock(&lock);
    *entry = (range){reserved, aligned, size, NULL};
    reserved = entry;
    pthread_mutex_unlock(&lock);
    *virPtr = aligned;
    return ACL_SUCCESS;
}

/* Gives reserved addresses back. No memory may be mapped there. */
aclError aclrtReleaseMemAddress(void *virPtr)
{
    aclError error = ACL_SUCCESS;
    range **place, *entry;

    pthread_mutex_lock(&lock);
    place = find_base(&reserved, virPtr);
    if (!(entry = *place)) {
        error = FAIL(ACL_ERROR_RT_PARAM_INVALID, "%p was not reserved", virPtr);
        goto done;
    }
    for (const range *inner = mapped; inner; inner = inner->next)
        if (lies_in(inner->base, inner->size, entry)) {
            error = FAIL(ACL_ERROR_RT_PARAM_INVALID, "memory is still mapped at %p", inner->base);
            goto done;
        }
    *place = entry->next;
    munmap(entry->base, entry->size);
    free(entry);
done:
    pthread_mutex_unlock(&lock);
    return error;
}

/* Takes `size` bytes, a multiple of 2 MiB, of the device that `prop` names. They count as taken until they are freed
 * and mapped nowhere. */
aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t size, const aclrtPhysicalMemProp *prop, uint64_t flags)
{
    physical *memory;
    aclError error;
    int device;

    (void)flags;
    if (!handle || !prop || !size || size % GRANULE || prop->location.type != ACL_MEM_LOCATION_TYPE_DEVICE)
        return FAIL(ACL_ERROR_INVALID_PARAM, "%zu bytes are not a multiple of 2 MiB, or not asked of a device", size);
    device = (int)prop->location.id;
    if ((error = CHECK_DEVICE(prop->location.id)) || (error = sim_take_memory(__func__, device, size)))
        return error;
    if (!(memory = calloc(1, sizeof *memory))) {
        sim_give_memory(device, size);
        return sim_no_memory(__func__);
    }

    *memory = (physical){.device = device, .size = size, .file = memfd_create("cann_sim", MFD_CLOEXEC)};
    if (memory->file < 0 || ftruncate(memory->file, (off_t)size))
        error = FAIL(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no %zu bytes left", size);
    else if (!(*handle = sim_publish(SIM_PHYSICAL, &memory->object, release_physical)))
        error = ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
    if (error)
        release_physical(&memory->object);
    return error;
}

/* Destroys the handle. The memory is freed as soon as it is mapped nowhere. */
aclError aclrtFreePhysical(aclrtDrvMemHandle handle)
{
    physical *memory = sim_retire(SIM_PHYSICAL, handle);

    if (!memory)
        return FAIL(ACL_ERROR_RT_INVALID_HANDLE, "%p is not physical memory", handle);
    sim_let_go(&memory->object);
    return ACL_SUCCESS;
}

static bool is_reserved(const void *base, size_t size)
{
    for (const range *outer = reserved; outer; outer = outer->next)
        if (lies_in(base, size, outer))
            return true;
    return false;
}

/* With the lock held: maps the entry's memory at its addresses, and keeps both. */
static aclError map(const char *function, range *entry, size_t offset)
{
    physical *memory = entry->memory;
    sim_region region = {entry->base, entry->size, SIM_MAPPED, memory->device};
    aclError error;

    if (!is_reserved(entry->base, entry->size))
        return sim_fail(function, ACL_ERROR_RT_PARAM_INVALID, "nothing is reserved for %zu bytes at %p", entry->size,
                        entry->base);
    if (offset || entry->size != memory->size)
        return sim_fail(function, ACL_ERROR_RT_PARAM_INVALID, "%zu bytes from byte %zu on, instead of all %zu bytes",
                        entry->size, offset, memory->size);
    if ((error = sim_add_region(function, &region)))
        return error;
    if (mmap(entry->base, entry->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory->file, 0) == MAP_FAILED) {
        sim_remove_region(entry->base, SIM_MAPPED, &region);
        return sim_fail(function, ACL_ERROR_RT_MEMORY_ALLOCATION, "the host cannot map %zu bytes", entry->size);
    }
    sim_hold(&memory->object);
    entry->next = mapped;
    mapped = entry;
    return ACL_SUCCESS;
}

/* Maps all of the memory into reserved addresses where nothing is mapped. `offset` must be 0. */
aclError aclrtMapMem(void *virPtr, size_t size, size_t offset, aclrtDrvMemHandle handle, uint64_t flags)
{
    SIM_BORROWED physical *memory = sim_acquire(SIM_PHYSICAL, handle);
    range *entry;
    aclError error;

    (void)flags;
    if (!memory)
        return FAIL(ACL_ERROR_RT_INVALID_HANDLE, "%p is not physical memory", handle);
    if (!(entry = malloc(sizeof *entry)))
        return sim_no_memory(__func__);
    *entry = (range){NULL, virPtr, size, memory};
    pthread_mutex_lock(&lock);
    error = map(__func__, entry, offset);
    pthread_mutex_unlock(&lock);
    if (error)
        free(entry);
    return error;
}

/* Unmaps memory. Its addresses stay reserved. */
aclError aclrtUnmapMem(void *virPtr)
{
    aclError error = ACL_SUCCESS;
    range **place, *entry;
    sim_region region;

    pthread_mutex_lock(&lock);
    place = find_base(&mapped, virPtr);
    if (!(entry = *place)) {
        error = FAIL(ACL_ERROR_RT_PARAM_INVALID, "nothing is mapped at %p", virPtr);
        goto done;
    }
    if (!forget_pages(entry->base, entry->size)) {
        error = FAIL(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the host cannot unmap %zu bytes", entry->size);
        goto done;
    }
    *place = entry->next;
    sim_remove_region(virPtr, SIM_MAPPED, &region);
    sim_let_go(&entry->memory->object);
    free(entry);
done:
    pthread_mutex_unlock(&lock);
    return error;
}
