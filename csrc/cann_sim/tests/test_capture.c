#include <pthread.h>
#include <string.h>

#include "cann_sim.h"
#include "children.h"

#define UNUSED_RANK (void)rank, (void)size
#define GLOBAL ACL_MODEL_RI_CAPTURE_MODE_GLOBAL
#define THREAD_LOCAL ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL
#define RELAXED ACL_MODEL_RI_CAPTURE_MODE_RELAXED

static aclrtStream stream, side;
static char *memory;

static void prepare(void)
{
    aclrtSetDevice(0);
    aclrtCreateStream(&stream);
    aclrtCreateStream(&side);
    aclrtMalloc((void **)&memory, 64, ACL_MEM_MALLOC_HUGE_FIRST);
    aclrtMemset(memory, 64, 0, 64);
}

static aclmdlRICaptureStatus status_of(aclrtStream of)
{
    aclmdlRICaptureStatus status = (aclmdlRICaptureStatus)-1;

    aclmdlRICaptureGetInfo(of, &status, NULL);
    return status;
}

typedef struct {
    int runs, releases;
    aclError outcome;
} counted;

static aclError run_operator(void *argument)
{
    ((counted *)argument)->runs++;
    return ((counted *)argument)->outcome;
}

static void release_operator(void *argument)
{
    ((counted *)argument)->releases++;
}

static void replay(unsigned rank, unsigned size)
{
    counted operator = {0, 0, ACL_SUCCESS};
    cann_sim_node node = {"operator", run_operator, release_operator, &operator, 0};
    aclmdlRI graph = NULL, during = NULL;
    aclmdlRICaptureStatus status;
    uint32_t id = 0, same = 1;

    UNUSED_RANK;
    prepare();
    CHECK("nothing is captured at first",
          status_of(stream) == ACL_MODEL_RI_CAPTURE_STATUS_NONE && !cann_sim_capturing(stream));
    CHECK("what is recorded then is refused and released",
          cann_sim_record(stream, &node) == ACL_ERROR_RT_STREAM_NOT_CAPTURED && operator.releases == 1);
    operator.releases = 0;
    CHECK("a capture begins", !aclmdlRICaptureBegin(stream, GLOBAL) && cann_sim_capturing(stream));
    CHECK("it is in one stream", !cann_sim_capturing(side) && !cann_sim_capturing(NULL));
    CHECK("it has a graph", !aclmdlRICaptureGetInfo(stream, &status, &during) &&
                                status == ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE && during && !aclmdlRIGetId(during, &id));
    CHECK("copies, fills and operators are taken",
          !aclrtMemsetAsync(memory, 64, 7, 8, stream) &&
              !aclrtMemcpyAsync(memory + 8, 56, memory, 8, ACL_MEMCPY_DEVICE_TO_DEVICE, stream) &&
              !cann_sim_record(stream, &node));
    CHECK("an operator's turn is at once", !cann_sim_wait_for_turn(stream));
    CHECK("a graph that is being captured is not run or destroyed",
          aclmdlRIExecuteAsync(during, side) == ACL_ERROR_RT_MODEL_CAPTURED &&
              aclmdlRIDestroy(during) == ACL_ERROR_RT_MODEL_CAPTURED);
    CHECK("the capture ends", !aclmdlRICaptureEnd(stream, &graph) && graph == during && !cann_sim_capturing(stream));
    CHECK("it has three nodes", cann_sim_node_count(graph) == 3 && !aclmdlRIGetId(graph, &same) && same == id);
    CHECK("what was captured ran but once", memory[15] == 7 && operator.runs == 0);
    aclrtMemset(memory, 64, 0, 64);
    CHECK("a replay repeats it", !aclmdlRIExecuteAsync(graph, side) && !aclrtSynchronizeStream(side) &&
                                     memory[0] == 7 && memory[15] == 7 && operator.runs == 1);
    CHECK("as often as one likes",
          !aclmdlRIExecuteAsync(graph, stream) && !aclmdlRIExecuteAsync(graph, NULL) && operator.runs == 3);
    operator.outcome = 507014;
    CHECK("a node that fails fails the replay", aclmdlRIExecuteAsync(graph, side) == 507014);
    CHECK("and is named", strstr(aclGetRecentErrMsg(), "operator"));
    CHECK("a graph is destroyed once, and its nodes",
          !aclmdlRIDestroy(graph) && operator.releases == 1 && aclmdlRIDestroy(graph) == ACL_ERROR_RT_INVALID_HANDLE);
    CHECK("what was destroyed is told",
          aclmdlRIExecuteAsync(graph, side) == ACL_ERROR_RT_INVALID_HANDLE && !cann_sim_node_count(graph));
    aclrtFree(memory);
}

static void *end_elsewhere(void *argument)
{
    aclmdlRI graph;

    aclrtSetDevice(0);
    *(aclError *)argument = aclmdlRICaptureEnd(stream, &graph);
    return NULL;
}

static void begin_and_end(unsigned rank, unsigned size)
{
    aclmdlRI graph;
    aclError elsewhere;
    pthread_t thread;

    UNUSED_RANK;
    prepare();
    CHECK("the default stream is not captured",
          aclmdlRICaptureBegin(NULL, GLOBAL) == ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT);
    CHECK("a capture that did not begin does not end",
          aclmdlRICaptureEnd(stream, &graph) == ACL_ERROR_RT_STREAM_NOT_CAPTURED && !graph);
    CHECK("a mode must be one", aclmdlRICaptureBegin(stream, (aclmdlRICaptureMode)5) == ACL_ERROR_INVALID_PARAM);
    CHECK("a stream is captured once at a time",
          !aclmdlRICaptureBegin(stream, GLOBAL) &&
              aclmdlRICaptureBegin(stream, GLOBAL) == ACL_ERROR_RT_STREAM_CAPTURED);
    CHECK("two streams may be captured",
          !aclmdlRICaptureBegin(side, RELAXED) && !aclmdlRICaptureEnd(side, &graph) && !aclmdlRIDestroy(graph));
    pthread_create(&thread, NULL, end_elsewhere, &elsewhere);
    pthread_join(thread, NULL);
    CHECK("who began it ends it", elsewhere == ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD &&
                                      !aclmdlRICaptureEnd(stream, &graph) && !aclmdlRIDestroy(graph));
    CHECK("unless it is relaxed", !aclmdlRICaptureBegin(stream, RELAXED));
    pthread_create(&thread, NULL, end_elsewhere, &elsewhere);
    pthread_join(thread, NULL);
    CHECK("then anyone may", elsewhere == ACL_SUCCESS);
    aclrtFree(memory);
}

static void waiting_is_refused(unsigned rank, unsigned size)
{
    aclrtEvent event;
    aclmdlRI graph;
    char host;

    UNUSED_RANK;
    prepare();
    aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC);
    aclmdlRICaptureBegin(stream, GLOBAL);
    CHECK("the stream cannot be waited for", aclrtSynchronizeStream(stream) == ACL_ERROR_RT_STREAM_CAPTURED);
    CHECK("that spoils the capture", status_of(stream) == ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED);
    CHECK("it takes no more work",
          aclrtMemsetAsync(memory, 64, 0, 1, stream) == ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED);
    CHECK("and ends without a graph",
          aclmdlRICaptureEnd(stream, &graph) == ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED && !graph);
    CHECK("then the stream works again", !aclrtSynchronizeStream(stream));
    aclmdlRICaptureBegin(stream, GLOBAL);
    CHECK("nor the device", aclrtSynchronizeDevice() == ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
    CHECK("which spoils it, too",
          aclmdlRICaptureEnd(stream, &graph) == ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED && !graph);
    aclmdlRICaptureBegin(stream, GLOBAL);
    CHECK("nor a copy",
          aclrtMemcpy(&host, 1, memory, 1, ACL_MEMCPY_DEVICE_TO_HOST) == ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
    aclmdlRICaptureEnd(stream, &graph);
    aclmdlRICaptureBegin(stream, GLOBAL);
    aclrtRecordEvent(event, stream);
    CHECK("nor an event in the graph", aclrtSynchronizeEvent(event) == ACL_ERROR_RT_EVENT_CAPTURED);
    aclmdlRICaptureEnd(stream, &graph);
    CHECK("recorded outside it can", !aclrtRecordEvent(event, stream) && !aclrtSynchronizeEvent(event));
    aclmdlRICaptureBegin(stream, RELAXED);
    CHECK("a relaxed capture lets the host wait",
          !aclrtSynchronizeDevice() && !aclrtSynchronizeStream(side) && !aclmdlRICaptureEnd(stream, &graph));
    aclmdlRIDestroy(graph);
    aclrtFree(memory);
}

static void *synchronize_elsewhere(void *argument)
{
    aclrtSetDevice(0);
    *(aclError *)argument = aclrtSynchronizeDevice();
    return NULL;
}

static void *synchronize_relaxed(void *argument)
{
    aclmdlRICaptureMode mode = RELAXED;

    aclmdlRICaptureThreadExchangeMode(&mode);
    return mode == GLOBAL ? synchronize_elsewhere(argument) : NULL;
}

static aclError other_thread(void *(*body)(void *))
{
    aclError error = -1;
    pthread_t thread;

    pthread_create(&thread, NULL, body, &error);
    pthread_join(thread, NULL);
    return error;
}

static void modes(unsigned rank, unsigned size)
{
    aclmdlRI graph;

    UNUSED_RANK;
    prepare();
    aclmdlRICaptureBegin(stream, GLOBAL);
    CHECK("a relaxed thread may wait", other_thread(synchronize_relaxed) == ACL_SUCCESS);
    CHECK("others may not", other_thread(synchronize_elsewhere) == ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
    aclmdlRICaptureEnd(stream, &graph);
    aclmdlRICaptureBegin(stream, THREAD_LOCAL);
    CHECK("unless the capture is its thread's own affair", other_thread(synchronize_elsewhere) == ACL_SUCCESS);
    CHECK("which may not", aclrtSynchronizeDevice() == ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
    aclmdlRICaptureEnd(stream, &graph);
    aclrtFree(memory);
}

static void joining(unsigned rank, unsigned size)
{
    aclrtEvent fork, join, outside;
    aclmdlRI graph;

    UNUSED_RANK;
    prepare();
    aclrtCreateEventExWithFlag(&fork, ACL_EVENT_SYNC);
    aclrtCreateEventExWithFlag(&join, ACL_EVENT_SYNC);
    aclrtCreateEventExWithFlag(&outside, ACL_EVENT_SYNC);
    aclrtRecordEvent(outside, side);

    aclmdlRICaptureBegin(stream, GLOBAL);
    CHECK("a stream joins by waiting",
          !aclrtRecordEvent(fork, stream) && !aclrtStreamWaitEvent(side, fork) && cann_sim_capturing(side));
    CHECK("its work is captured, too", !aclrtMemsetAsync(memory, 64, 3, 64, side));
    CHECK("it does not end the capture", aclmdlRICaptureEnd(side, &graph) == ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED);
    CHECK("waited for, it has joined again", !aclrtRecordEvent(join, side) && !aclrtStreamWaitEvent(stream, join) &&
                                                 !aclmdlRICaptureEnd(stream, &graph) && !cann_sim_capturing(side));
    CHECK("its node is in the graph", cann_sim_node_count(graph) == 1 && !aclmdlRIDestroy(graph));

    aclmdlRICaptureBegin(stream, GLOBAL);
    aclrtRecordEvent(fork, stream);
    aclrtStreamWaitEvent(side, fork);
    aclrtRecordEvent(join, side);
    aclrtStreamWaitEvent(stream, join);
    aclrtMemsetAsync(memory, 64, 3, 64, side);
    CHECK("work that nothing waits for is an error",
          aclmdlRICaptureEnd(stream, &graph) == ACL_ERROR_RT_STREAM_UNJOINED);
    CHECK("both streams are free again", !aclrtSynchronizeStream(stream) && !aclrtSynchronizeStream(side));

    aclmdlRICaptureBegin(stream, GLOBAL);
    CHECK("a captured stream does not wait for what is outside",
          aclrtStreamWaitEvent(stream, outside) == ACL_ERROR_RT_CAPTURE_DEPENDENCY);
    aclmdlRICaptureEnd(stream, &graph);
    CHECK("nor one outside for a capture that is over",
          aclrtStreamWaitEvent(side, fork) == ACL_ERROR_RT_CAPTURE_DEPENDENCY);

    aclmdlRICaptureBegin(stream, GLOBAL);
    aclmdlRICaptureBegin(side, GLOBAL);
    aclrtRecordEvent(fork, stream);
    CHECK("captures do not wait for one another", aclrtStreamWaitEvent(side, fork) == ACL_ERROR_RT_CAPTURE_DEPENDENCY);
    aclmdlRICaptureEnd(side, &graph);
    aclmdlRIDestroy(graph);
    CHECK("a stream may be destroyed in the middle", !aclrtDestroyStream(stream));
    aclrtFree(memory);
}

static void a_stream_that_joined_is_destroyed(unsigned rank, unsigned size)
{
    aclrtEvent fork;
    aclmdlRI graph;

    UNUSED_RANK;
    prepare();
    aclrtCreateEventExWithFlag(&fork, ACL_EVENT_SYNC);
    aclmdlRICaptureBegin(stream, GLOBAL);
    aclrtRecordEvent(fork, stream);
    aclrtStreamWaitEvent(side, fork);
    CHECK("a stream that joined is destroyed", !aclrtDestroyStream(side));
    CHECK("that spoils the capture",
          status_of(stream) == ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED &&
              aclrtMemsetAsync(memory, 64, 0, 1, stream) == ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED);
    CHECK("which ends without a graph",
          aclmdlRICaptureEnd(stream, &graph) == ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED && !graph);
    CHECK("then the first stream works again", !aclrtSynchronizeStream(stream));
    aclrtFree(memory);
}

int main(void)
{
    CHECK("replay", alone(replay));
    CHECK("begin and end", alone(begin_and_end));
    CHECK("waiting is refused", alone(waiting_is_refused));
    CHECK("modes", alone(modes));
    CHECK("joining", alone(joining));
    CHECK("a stream that joined is destroyed", alone(a_stream_that_joined_is_destroyed));
    return REPORT();
}
