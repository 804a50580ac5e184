/* Copies and fills, at once or in a stream. */
#include <stdlib.h>
#include <string.h>

#include "acl_api.h"
#include "capture.h"
#include "errors.h"
#include "memory.h"

typedef struct {
    void *destination;
    const void *source; /* NULL: a fill */
    int value;
    size_t count;
} copy;

static const char *name_of(sim_place place)
{
    static const char *const names[] = {
        [SIM_PAGEABLE] = "host memory",
        [SIM_PINNED] = "pinned host memory",
        [SIM_DEVICE_MEMORY] = "device memory",
        [SIM_BROKEN] = "a range that is not in one device allocation",
    };
    return names[place];
}

/* Whether the memory is on a device, or on the host, as the direction of the copy demands. */
static aclError check_side(const char *function, const char *side, const void *address, size_t count, bool on_device)
{
    sim_place place = sim_locate(address, count, NULL);

    if (place != SIM_BROKEN && (place == SIM_DEVICE_MEMORY) == on_device)
        return ACL_SUCCESS;
    return sim_fail(function, ACL_ERROR_RT_PARAM_INVALID, "the %s, %zu bytes at %p, is %s, not %s memory", side, count,
                    address, name_of(place), on_device ? "device" : "host");
}

static aclError check_copy(const char *function, const copy *task, size_t room, aclrtMemcpyKind kind)
{
    bool from_device = kind == ACL_MEMCPY_DEVICE_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_DEVICE ||
                       kind == ACL_MEMCPY_INNER_DEVICE_TO_DEVICE || kind == ACL_MEMCPY_INTER_DEVICE_TO_DEVICE;
    bool to_device = kind == ACL_MEMCPY_HOST_TO_DEVICE || kind == ACL_MEMCPY_HOST_TO_BUF_TO_DEVICE ||
                     (from_device && kind != ACL_MEMCPY_DEVICE_TO_HOST);
    aclError error;

    if ((int)kind < 0 || kind > ACL_MEMCPY_INTER_DEVICE_TO_DEVICE)
        return sim_fail(function, ACL_ERROR_INVALID_PARAM, "direction %d is unknown", (int)kind);
    if (task->count > room || !task->destination || !task->source)
        return sim_fail(function, ACL_ERROR_INVALID_PARAM, "%zu bytes from %p to %p, which has room for %zu",
                        task->count, task->source, task->destination, room);
    if (!task->count)
        return ACL_SUCCESS;
    if (kind == ACL_MEMCPY_DEFAULT) { /* the addresses decide; they must still be whole */
        from_device = sim_locate(task->source, task->count, NULL) == SIM_DEVICE_MEMORY;
        to_device = sim_locate(task->destination, task->count, NULL) == SIM_DEVICE_MEMORY;
    }
    error = check_side(function, "source", task->source, task->count, from_device);
    return error ? error : check_side(function, "destination", task->destination, task->count, to_device);
}

static aclError check_fill(const char *function, const copy *task, size_t room)
{
    if (task->count > room || !task->destination)
        return sim_fail(function, ACL_ERROR_INVALID_PARAM, "%zu bytes at %p, which has room for %zu", task->count,
                        task->destination, room);
    if (task->count && sim_locate(task->destination, task->count, NULL) == SIM_BROKEN)
        return check_side(function, "destination", task->destination, task->count, true);
    return ACL_SUCCESS;
}

static aclError run_copy(void *argument)
{
    const copy *task = argument;

    if (task->source)
        memmove(task->destination, task->source, task->count);
    else
        memset(task->destination, task->value, task->count);
    return ACL_SUCCESS;
}

static aclError submit(const char *function, const copy *task, aclrtStream stream)
{
    copy *argument = malloc(sizeof *argument);
    sim_task work = {.name = function, .run = run_copy, .release = free, .argument = argument};

    if (!argument)
        return sim_no_memory(function);
    *argument = *task;
    return sim_submit(function, stream, &work);
}

/* Copies at once, whatever the streams have to do. The direction must be that of the addresses. */
aclError aclrtMemcpy(void *dst, size_t destMax, const void *src, size_t count, aclrtMemcpyKind kind)
{
    copy task = {dst, src, 0, count};
    aclError error;

    if ((error = sim_refuse_in_capture(__func__)) || (error = check_copy(__func__, &task, destMax, kind)))
        return error;
    return run_copy(&task);
}

/* Puts a copy into `stream`. The addresses are checked now and used when it is the copy's turn. */
aclError aclrtMemcpyAsync(void *dst, size_t destMax, const void *src, size_t count, aclrtMemcpyKind kind,
                          aclrtStream stream)
{
    copy task = {dst, src, 0, count};
    aclError error = check_copy(__func__, &task, destMax, kind);

    return error ? error : submit(__func__, &task, stream);
}

/* Does the same as aclrtMemcpyAsync: the two differ only in what a device does with pageable host memory. */
aclError aclrtMemcpyAsyncWithCondition(void *dst, size_t destMax, const void *src, size_t count, aclrtMemcpyKind kind,
                                       aclrtStream stream)
{
    return aclrtMemcpyAsync(dst, destMax, src, count, kind, stream);
}

/* Fills memory at once, whatever the streams have to do. */
aclError aclrtMemset(void *devPtr, size_t maxCount, int32_t value, size_t count)
{
    copy task = {devPtr, NULL, value, count};
    aclError error;

    if ((error = sim_refuse_in_capture(__func__)) || (error = check_fill(__func__, &task, maxCount)))
        return error;
    return run_copy(&task);
}

/* Puts a fill into `stream`. The address is checked now and used when it is the fill's turn. */
aclError aclrtMemsetAsync(void *devPtr, size_t maxCount, int32_t value, size_t count, aclrtStream stream)
{
    copy task = {devPtr, NULL, value, count};
    aclError error = check_fill(__func__, &task, maxCount);

    return error ? error : submit(__func__, &task, stream);
}
