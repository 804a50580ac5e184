/* CANN's functions on streams, and those on a device or a graph that concern streams. What makes the host wait, or puts
 * work into a stream, has to ask capture.c first; that is why they are apart from stream.c. */
#include <stdlib.h>

#include "acl_api.h"
#include "cann_sim.h"
#include "capture.h"
#include "device.h"
#include "errors.h"
#include "graph.h"
#include "stream.h"

/* Makes a stream of the current device, which has CANN_SIM_STREAMS; beyond them the error is
 * ACL_ERROR_RT_NO_STREAM_RESOURCE. */
aclError aclrtCreateStream(aclrtStream *stream)
{
    return aclrtCreateStreamWithConfig(stream, 0, 0);
}

/* Does the same as aclrtCreateStream: streams have no priorities here, and flags only make a device faster. */
aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag)
{
    int device;
    aclError error = CURRENT_DEVICE(&device);

    (void)priority, (void)flag;
    if (error)
        return error;
    if (!stream)
        return FAIL(ACL_ERROR_INVALID_PARAM, "stream is NULL");
    return sim_create_stream(__func__, device, stream);
}

/* Ends the handle; the reference is the caller's. */
static aclError retire_stream(const char *function, aclrtStream handle, sim_stream **stream)
{
    if ((*stream = sim_retire(SIM_STREAM, handle)))
        return ACL_SUCCESS;
    return sim_fail(function, ACL_ERROR_RT_INVALID_HANDLE, "%p is not a stream, or was destroyed", handle);
}

/* Waits until the stream is idle and destroys it, even if an error is returned. */
aclError aclrtDestroyStream(aclrtStream stream)
{
    sim_stream *object;
    aclError error = retire_stream(__func__, stream, &object);

    if (error)
        return error;
    error = sim_drain(__func__, object, -1, true);
    sim_close_stream(object);
    return error;
}

/* Destroys the stream without waiting; work that is queued is not done. */
aclError aclrtDestroyStreamForce(aclrtStream stream)
{
    sim_stream *object;
    aclError error = retire_stream(__func__, stream, &object);

    if (error)
        return error;
    sim_close_stream(object);
    return ACL_SUCCESS;
}

/* Undoes one aclrtSetDevice, of whichever thread. After the last the device's streams are gone; its memory stays,
 * because on the host others may still look at it. */
aclError aclrtResetDevice(int32_t deviceId)
{
    bool last;
    aclError error;

    if ((error = CHECK_DEVICE(deviceId)) || (error = sim_leave_device(__func__, deviceId, &last)))
        return error;
    if (last)
        sim_close_streams(deviceId);
    return ACL_SUCCESS;
}

/* Returns when all work in the stream is done. If some of it failed, returns the error and clears it. */
aclError aclrtSynchronizeStream(aclrtStream stream)
{
    return aclrtSynchronizeStreamWithTimeout(stream, -1);
}

/* Does the same as aclrtSynchronizeStream, but fails after `timeout` milliseconds; -1: waits for ever. */
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout)
{
    SIM_BORROWED sim_stream *object = NULL;
    aclError error;

    if ((error = sim_find_stream(__func__, stream, &object)) || (error = sim_refuse_if_captured(__func__, object)))
        return error;
    return sim_drain(__func__, object, timeout, true);
}

/* Returns when all streams of the current device are idle, with the first error that one of them reports. */
aclError aclrtSynchronizeDevice(void)
{
    return aclrtSynchronizeDeviceWithTimeout(-1);
}

/* Does the same as aclrtSynchronizeDevice, but a stream fails after `timeout` milliseconds; -1: waits for ever. */
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout)
{
    int device;
    aclError error;

    if ((error = CURRENT_DEVICE(&device)) || (error = sim_refuse_in_capture(__func__)))
        return error;
    return sim_drain_device(__func__, device, timeout);
}

/* Returns when all that was put into `stream` is done, during a capture, too; the stream keeps its error. */
aclError cann_sim_wait_for_turn(aclrtStream stream)
{
    SIM_BORROWED sim_stream *object = NULL;
    aclError error = sim_find_stream(__func__, stream, &object);

    return error ? error : sim_drain(__func__, object, -1, false);
}

/* Tells whether all work in the stream is done. */
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status)
{
    SIM_BORROWED sim_stream *object = NULL;
    aclError error;

    if (!status)
        return FAIL(ACL_ERROR_INVALID_PARAM, "status is NULL");
    if ((error = sim_find_stream(__func__, stream, &object)) || (error = sim_refuse_if_captured(__func__, object)))
        return error;
    *status = sim_is_idle(object) ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    return ACL_SUCCESS;
}

/* Tells a number that no other stream of the process has had. */
aclError aclrtStreamGetId(aclrtStream stream, int32_t *streamId)
{
    SIM_BORROWED sim_stream *object = NULL;
    aclError error;

    if (!streamId)
        return FAIL(ACL_ERROR_INVALID_PARAM, "streamId is NULL");
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    *streamId = object->id;
    return ACL_SUCCESS;
}

/* Checks the mode and ignores it: a stream always stops on a failure, until the failure is reported. */
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode)
{
    aclrtStreamAttrValue value = {.failureMode = mode};

    return aclrtSetStreamAttribute(stream, ACL_STREAM_ATTR_FAILURE_MODE, &value);
}

/* Remembers the switch for aclrtGetStreamOverflowSwitch; what happens on overflow is up to the operators. */
aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t flag)
{
    aclrtStreamAttrValue value = {.overflowSwitch = flag};

    return aclrtSetStreamAttribute(stream, ACL_STREAM_ATTR_FLOAT_OVERFLOW_CHECK, &value);
}

/* Tells the overflow switch as it was set; 0 before. */
aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *flag)
{
    SIM_BORROWED sim_stream *object = NULL;
    aclError error;

    if (!flag)
        return FAIL(ACL_ERROR_INVALID_PARAM, "flag is NULL");
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    *flag = object->overflow_switch;
    return ACL_SUCCESS;
}

/* Remembers the overflow switch and accepts the other attributes that are known: they need nothing done. */
aclError aclrtSetStreamAttribute(aclrtStream stream, aclrtStreamAttr stmAttrType, aclrtStreamAttrValue *value)
{
    SIM_BORROWED sim_stream *object = NULL;
    aclError error;

    if (!value)
        return FAIL(ACL_ERROR_INVALID_PARAM, "value is NULL");
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    if ((int)stmAttrType < ACL_STREAM_ATTR_FAILURE_MODE || stmAttrType > ACL_STREAM_ATTR_PRIORITY)
        return FAIL(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "stream attribute %d is not simulated", (int)stmAttrType);
    if (stmAttrType == ACL_STREAM_ATTR_FAILURE_MODE && value->failureMode > ACL_STOP_ON_FAILURE)
        return FAIL(ACL_ERROR_INVALID_PARAM, "failure mode %llu", (unsigned long long)value->failureMode);
    if (stmAttrType == ACL_STREAM_ATTR_FLOAT_OVERFLOW_CHECK)
        object->overflow_switch = value->overflowSwitch;
    return ACL_SUCCESS;
}

typedef struct {
    aclrtHostFunc function;
    void *argument;
} host_call;

static aclError run_host_call(void *argument)
{
    const host_call *call = argument;

    call->function(call->argument);
    return ACL_SUCCESS;
}

/* Calls a host function when it is its turn in the stream. */
aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc fn, void *args)
{
    host_call *call;
    sim_task task = {.name = __func__, .run = run_host_call, .release = free};

    if (!fn)
        return FAIL(ACL_ERROR_INVALID_PARAM, "fn is NULL");
    if (!(call = malloc(sizeof *call)))
        return sim_no_memory(__func__);
    *call = (host_call){fn, args};
    task.argument = call;
    return sim_submit(__func__, stream, &task);
}

/* Puts all nodes of the graph into `stream`, in the order of their capture. The first that fails ends the replay. */
aclError aclmdlRIExecuteAsync(aclmdlRI modelRI, aclrtStream stream)
{
    SIM_BORROWED sim_graph *graph = NULL;
    SIM_BORROWED sim_stream *object = NULL;
    aclError error;

    if ((error = sim_find_graph(__func__, modelRI, &graph)) || (error = sim_find_stream(__func__, stream, &object)) ||
        (error = sim_refuse_if_captured(__func__, object)))
        return error;
    return sim_replay(__func__, graph, object);
}
