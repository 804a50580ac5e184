#include <string.h>

#include "children.h"
#include "gate.h"

#define UNUSED_RANK (void)rank, (void)size

static bool is_complete(aclrtEvent event)
{
    aclrtEventRecordedStatus status = ACL_EVENT_RECORDED_STATUS_NOT_READY;

    return !aclrtQueryEventStatus(event, &status) && status == ACL_EVENT_RECORDED_STATUS_COMPLETE;
}

static void handles(unsigned rank, unsigned size)
{
    aclrtEventWaitStatus status;
    aclrtEvent event;
    aclrtStream stream, other;

    UNUSED_RANK;
    CHECK("an event needs a device", aclrtCreateEventExWithFlag(&event, 0) == ACL_ERROR_RT_CONTEXT_NULL);
    aclrtSetDevice(1);
    aclrtCreateStream(&other);
    aclrtSetDevice(0);
    aclrtCreateStream(&stream);
    CHECK("an event is made", !aclrtCreateEventWithFlag(&event, ACL_EVENT_SYNC));
    CHECK("it is not complete", !is_complete(event));
    CHECK("nobody need wait for it", !aclrtStreamWaitEvent(stream, event) && !aclrtSynchronizeEvent(event) &&
                                         !aclrtQueryEventWaitStatus(event, &status) &&
                                         status == ACL_EVENT_WAIT_STATUS_COMPLETE);
    CHECK("recorded it is", !aclrtRecordEvent(event, stream) && is_complete(event) && !aclrtSynchronizeEvent(event));
    CHECK("reset it is not", !aclrtResetEvent(event, stream) && !is_complete(event));
    CHECK("recorded again it is", !aclrtRecordEvent(event, stream) && is_complete(event));
    CHECK("another device waits for it", !aclrtSetDevice(1) && !aclrtStreamWaitEvent(other, event));
    CHECK("but does not record it", aclrtRecordEvent(event, other) == ACL_ERROR_RT_STREAM_CONTEXT);
    CHECK("nor in a stream of a device that is not current",
          aclrtRecordEvent(event, stream) == ACL_ERROR_RT_STREAM_CONTEXT);
    CHECK("an event is destroyed once",
          !aclrtDestroyEvent(event) && aclrtDestroyEvent(event) == ACL_ERROR_RT_INVALID_HANDLE);
    CHECK("what was destroyed is told", aclrtRecordEvent(event, other) == ACL_ERROR_RT_INVALID_HANDLE &&
                                            aclrtStreamWaitEvent(other, event) == ACL_ERROR_RT_INVALID_HANDLE &&
                                            aclrtSynchronizeEvent(event) == ACL_ERROR_RT_INVALID_HANDLE);
    CHECK("a stream is not an event", aclrtDestroyEvent(other) == ACL_ERROR_RT_INVALID_HANDLE);
}

static void timing(unsigned rank, unsigned size)
{
    aclrtEvent start, end, untimed;
    uint64_t first, second;
    float ms = -1;

    UNUSED_RANK;
    aclrtSetDevice(0);
    aclrtCreateEventExWithFlag(&start, ACL_EVENT_TIME_LINE);
    aclrtCreateEventExWithFlag(&end, ACL_EVENT_TIME_LINE | ACL_EVENT_SYNC);
    aclrtCreateEventExWithFlag(&untimed, ACL_EVENT_SYNC);
    CHECK("what was not recorded has no time",
          aclrtEventElapsedTime(&ms, start, end) == ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID);
    aclrtRecordEvent(start, NULL);
    aclrtRecordEvent(untimed, NULL);
    usleep(20000);
    aclrtRecordEvent(end, NULL);
    CHECK("time passes", !aclrtEventElapsedTime(&ms, start, end) && ms >= 20 && ms < 5000);
    CHECK("not backwards", aclrtEventElapsedTime(&ms, end, start) == ACL_ERROR_RT_EVENT_TIMESTAMP_REVERSAL);
    CHECK("not for events without timing",
          aclrtEventElapsedTime(&ms, start, untimed) == ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID);
    CHECK("events know when it was",
          !aclrtEventGetTimestamp(start, &first) && !aclrtEventGetTimestamp(end, &second) && second - first >= 20000);
}

static void order(unsigned rank, unsigned size)
{
    aclrtStream slow, other;
    aclrtEvent event;
    char *memory;
    gate_state gate;
    aclmdlRI graph;

    UNUSED_RANK;
    setenv("CANN_SIM_ASYNC", "1", 1);
    aclrtSetDevice(0);
    aclrtCreateStream(&slow);
    aclrtCreateStream(&other);
    aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC);
    aclrtMalloc((void **)&memory, 64, ACL_MEM_MALLOC_HUGE_FIRST);
    aclrtMemset(memory, 64, 0, 64);
    graph = make_gate(&gate, slow, ACL_SUCCESS);
    aclmdlRIExecuteAsync(graph, slow);
    CHECK("an event behind slow work is not complete", !aclrtRecordEvent(event, slow) && !is_complete(event));
    CHECK("a stream that does not wait goes on", !aclrtMemsetAsync(memory, 64, 1, 32, other) && memory[0] == 1);
    CHECK("one that waits does not",
          !aclrtStreamWaitEvent(other, event) && !aclrtMemsetAsync(memory, 64, 2, 64, other) && memory[0] == 1);
    CHECK("it may be destroyed while it is waited for", !aclrtDestroyEvent(event));
    open_gate(&gate);
    CHECK("then it goes on", !aclrtSynchronizeStream(other) && memory[0] == 2);
    aclmdlRIDestroy(graph);
    aclrtFree(memory);
}

static void errors(unsigned rank, unsigned size)
{
    aclrtStream slow, other;
    aclrtEvent event;
    char *memory;
    gate_state gate;
    aclmdlRI graph;

    UNUSED_RANK;
    setenv("CANN_SIM_ASYNC", "1", 1);
    aclrtSetDevice(0);
    aclrtCreateStream(&slow);
    aclrtCreateStream(&other);
    aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC);
    aclrtMalloc((void **)&memory, 64, ACL_MEM_MALLOC_HUGE_FIRST);
    aclrtMemset(memory, 64, 0, 64);
    graph = make_gate(&gate, slow, 507014);
    aclmdlRIExecuteAsync(graph, slow);
    aclrtRecordEvent(event, slow);
    aclrtStreamWaitEvent(other, event);
    aclrtMemsetAsync(memory, 64, 1, 64, other);
    open_gate(&gate);
    CHECK("who waits for the event gets the error", aclrtSynchronizeEvent(event) == 507014);
    CHECK("so does the stream that waits, and does nothing", aclrtSynchronizeStream(other) == 507014 && !memory[0]);
    CHECK("the stream itself reports it", aclrtSynchronizeStream(slow) == 507014);
    CHECK("recorded again the event is good", !aclrtRecordEvent(event, slow) && !aclrtSynchronizeEvent(event) &&
                                                  !aclrtStreamWaitEvent(other, event) &&
                                                  !aclrtSynchronizeStream(other));
    aclmdlRIDestroy(graph);
    aclrtFree(memory);
}

int main(void)
{
    CHECK("handles", alone(handles));
    CHECK("timing", alone(timing));
    CHECK("order", alone(order));
    CHECK("errors", alone(errors));
    return REPORT();
}
