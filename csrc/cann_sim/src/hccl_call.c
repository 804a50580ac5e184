#include "hccl_call.h"

#include <stdlib.h>
#include <string.h>

#include "capture.h"
#include "device.h"
#include "errors.h"
#include "hccl_types.h"
#include "memory.h"

typedef struct grouped {
    struct grouped *next;
    hccl_call call;
    hcclStream stream;
} grouped;

static _Thread_local HcclResult last_result; /* of an operation that ran in this thread */
static _Thread_local int group_depth;
static _Thread_local grouped *group;

HcclResult hccl_begin(hccl_call *call, HcclComm comm)
{
    HcclResult result = hccl_find(call->name, comm, &call->comm);
    int device;

    if (result) {
        call->comm = NULL;
        return result;
    }
    if (sim_current_device(call->name, &device))
        return HCCL_E_RUNTIME;
    if (device != call->comm->device)
        return sim_fail(call->name, HCCL_E_RUNTIME, "the communicator is device %d's, this thread is on device %d",
                        call->comm->device, device);
    return HCCL_SUCCESS;
}

HcclResult hccl_make_counts(const hccl_call *call, uint64_t **which, size_t count)
{
    *which = calloc(count, sizeof **which);
    return *which ? HCCL_SUCCESS : hccl_no_memory(call->name);
}

HcclResult hccl_check_buffer(const hccl_call *call, const char *which, const void *buffer, uint64_t count,
                             HcclDataType type)
{
    size_t size = hccl_type_size(type);
    int device = -1;

    if (!size)
        return sim_fail(call->name, HCCL_E_PARA, "data type %d is unknown", (int)type);
    if (!count)
        return HCCL_SUCCESS;
    if (!buffer)
        return sim_fail(call->name, HCCL_E_PTR, "the %s buffer is NULL", which);
    if (count > SIZE_MAX / size)
        return sim_fail(call->name, HCCL_E_PARA, "%llu elements", (unsigned long long)count);
    if (sim_locate(buffer, count * size, &device) != SIM_DEVICE_MEMORY || device != call->comm->device)
        return sim_fail(call->name, HCCL_E_PARA, "the %s buffer, %zu bytes at %p, is not memory of device %d", which,
                        (size_t)count * size, buffer, call->comm->device);
    return HCCL_SUCCESS;
}

HcclResult hccl_check_rank(const hccl_call *call, uint32_t rank)
{
    return rank < call->comm->size
               ? HCCL_SUCCESS
               : (HcclResult)sim_fail(call->name, HCCL_E_PARA, "there is no rank %u among %u", rank, call->comm->size);
}

static void clear_call(hccl_call *call)
{
    if (call->comm)
        sim_let_go(&call->comm->object);
    free(call->send_counts);
    free(call->send_places);
    free(call->receive_counts);
    free(call->receive_places);
    free(call->items);
}

static void release_call(void *argument)
{
    clear_call(argument);
    free(argument);
}

/* What a stream reports of an operation that failed in it. */
static aclError as_acl_error(HcclResult result)
{
    return result == HCCL_E_TIMEOUT ? ACL_ERROR_RT_FFTS_PLUS_TIMEOUT : ACL_ERROR_RT_TS_ERROR;
}

static aclError run_call(void *argument)
{
    const hccl_call *call = argument;
    hccl_comm *comm = call->comm;
    HcclResult result;

    pthread_mutex_lock(&comm->turn);
    if (!(result = hccl_state(call->name, comm)) && (result = call->run(comm, call)))
        hccl_give_up(comm, result, sim_error_text());
    pthread_mutex_unlock(&comm->turn);
    last_result = result;
    return result ? as_acl_error(result) : ACL_SUCCESS;
}

static HcclResult submit(hccl_call *call, hcclStream stream)
{
    hccl_call *argument = malloc(sizeof *argument);
    sim_task task = {.name = call->name, .run = run_call, .release = release_call, .argument = argument, .waits = true};

    if (!argument) {
        hccl_no_memory(call->name);
        clear_call(call);
        return HCCL_E_MEMORY;
    }
    *argument = *call;
    last_result = HCCL_SUCCESS;
    if (!sim_submit(call->name, stream, &task))
        return HCCL_SUCCESS;
    return last_result ? last_result : HCCL_E_RUNTIME;
}

static HcclResult join_group(hccl_call *call, hcclStream stream)
{
    grouped **place = &group, *entry;

    for (; *place; place = &(*place)->next) {
        hccl_call *other = &(*place)->call;
        HcclSendRecvItem *items;

        if (!call->items || !other->items || other->comm != call->comm || (*place)->stream != stream)
            continue;
        if (!(items = realloc(other->items, (other->item_count + call->item_count) * sizeof *items)))
            break;
        memcpy(items + other->item_count, call->items, call->item_count * sizeof *items);
        other->items = items;
        other->item_count += call->item_count;
        clear_call(call);
        return HCCL_SUCCESS;
    }
    if (*place || !(entry = malloc(sizeof *entry))) {
        hccl_no_memory(call->name);
        clear_call(call);
        return HCCL_E_MEMORY;
    }
    *entry = (grouped){NULL, *call, stream};
    *place = entry;
    return HCCL_SUCCESS;
}

HcclResult hccl_end(hccl_call *call, HcclResult result, hcclStream stream)
{
    if (result) {
        clear_call(call);
        return result;
    }
    return group_depth ? join_group(call, stream) : submit(call, stream);
}

void hccl_begin_group(void)
{
    group_depth++;
}

HcclResult hccl_end_group(const char *function)
{
    HcclResult result = HCCL_SUCCESS;
    grouped *entry;

    if (!group_depth)
        return sim_fail(function, HCCL_E_PARA, "no group was begun");
    if (--group_depth)
        return HCCL_SUCCESS;
    while ((entry = group)) {
        group = entry->next;
        if (result)
            clear_call(&entry->call);
        else
            result = submit(&entry->call, entry->stream);
        free(entry);
    }
    return result;
}
