#include <dirent.h>
#include <pthread.h>
#include <string.h>

#include "children.h"
#include "gate.h"
#include "hccl_api.h"

#define UNUSED_RANK (void)rank, (void)size

static void handles(unsigned rank, unsigned size)
{
    aclrtStream stream, other, third;
    aclrtStreamStatus status;
    int32_t id, other_id;
    uint32_t flag = 7;
    char *memory;

    UNUSED_RANK;
    CHECK("a stream needs a device", aclrtCreateStream(&stream) == ACL_ERROR_RT_CONTEXT_NULL);
    aclrtSetDevice(0);
    aclrtMalloc((void **)&memory, 64, ACL_MEM_MALLOC_HUGE_FIRST);
    CHECK("streams are made", !aclrtCreateStream(&stream) && !aclrtCreateStreamWithConfig(&other, 3, 1));
    CHECK("they are different",
          stream != other && !aclrtStreamGetId(stream, &id) && !aclrtStreamGetId(other, &other_id) && id != other_id);
    CHECK("an idle stream is complete", !aclrtStreamQuery(stream, &status) && status == ACL_STREAM_STATUS_COMPLETE &&
                                            !aclrtSynchronizeStream(stream));
    CHECK("there is a default stream", !aclrtSynchronizeStream(NULL) && !aclrtMemsetAsync(memory, 64, 1, 64, NULL));
    CHECK("attributes are taken", !aclrtSetStreamFailureMode(stream, ACL_STOP_ON_FAILURE) &&
                                      !aclrtSetStreamOverflowSwitch(stream, 1) &&
                                      !aclrtGetStreamOverflowSwitch(stream, &flag) && flag == 1);
    CHECK("unknown ones are not",
          aclrtSetStreamFailureMode(stream, 9) == ACL_ERROR_INVALID_PARAM &&
              aclrtSetStreamAttribute(stream, (aclrtStreamAttr)77, &(aclrtStreamAttrValue){0}) ==
                  ACL_ERROR_RT_FEATURE_NOT_SUPPORT);
    CHECK("a stream is destroyed once",
          !aclrtDestroyStream(stream) && aclrtDestroyStream(stream) == ACL_ERROR_RT_INVALID_HANDLE);
    CHECK("what was destroyed is told", aclrtSynchronizeStream(stream) == ACL_ERROR_RT_INVALID_HANDLE &&
                                            aclrtMemsetAsync(memory, 64, 1, 64, stream) == ACL_ERROR_RT_INVALID_HANDLE);
    CHECK("its place is not its successor's", !aclrtCreateStream(&third) && third != stream &&
                                                  aclrtSynchronizeStream(stream) == ACL_ERROR_RT_INVALID_HANDLE);
    CHECK("nonsense is not a stream", aclrtSynchronizeStream(&id) == ACL_ERROR_RT_INVALID_HANDLE);
    CHECK("another device's stream is refused",
          !aclrtSetDevice(1) && aclrtSynchronizeStream(other) == ACL_ERROR_RT_STREAM_CONTEXT &&
              aclrtMemsetAsync(memory, 64, 1, 64, other) == ACL_ERROR_RT_STREAM_CONTEXT);
    CHECK("a reset ends the device's streams",
          !aclrtResetDevice(0) && !aclrtSetDevice(0) && aclrtSynchronizeStream(other) == ACL_ERROR_RT_INVALID_HANDLE);
    CHECK("not the other's", !aclrtSetDevice(1) && !aclrtSynchronizeStream(NULL));
    aclrtFree(memory);
}

static char order[16];

static void note(void *argument)
{
    strncat(order, argument, 1);
}

static void synchronous(unsigned rank, unsigned size)
{
    aclrtStream stream;
    char a[] = "a", b[] = "b";

    UNUSED_RANK;
    aclrtSetDevice(0);
    aclrtCreateStream(&stream);
    CHECK("host functions run in order",
          !aclrtLaunchHostFunc(stream, note, a) && !aclrtLaunchHostFunc(stream, note, b) && !strcmp(order, "ab"));
    CHECK("a missing function is refused", aclrtLaunchHostFunc(stream, NULL, a) == ACL_ERROR_INVALID_PARAM);
}

static void asynchronous(unsigned rank, unsigned size)
{
    aclrtStream slow, other;
    aclrtStreamStatus status;
    char a[] = "a", b[] = "b";
    char *memory;
    gate_state gate;
    aclmdlRI graph;

    UNUSED_RANK;
    setenv("CANN_SIM_ASYNC", "1", 1);
    aclrtSetDevice(0);
    aclrtCreateStream(&slow);
    aclrtCreateStream(&other);
    aclrtMalloc((void **)&memory, 64, ACL_MEM_MALLOC_HUGE_FIRST);
    aclrtMemset(memory, 64, 0, 64);
    graph = make_gate(&gate, slow, ACL_SUCCESS);
    CHECK("work that takes time does not hold up the caller", !aclmdlRIExecuteAsync(graph, slow));
    CHECK("work after it waits",
          !aclrtMemsetAsync(memory, 64, 1, 64, slow) && !aclrtLaunchHostFunc(slow, note, a) && !memory[0] && !*order);
    CHECK("the stream is busy", !aclrtStreamQuery(slow, &status) && status == ACL_STREAM_STATUS_NOT_READY);
    CHECK("to wait for it may take too long",
          aclrtSynchronizeStreamWithTimeout(slow, 20) == ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
    CHECK("so may the device", aclrtSynchronizeDeviceWithTimeout(20) == ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
    CHECK("another stream is free", !aclrtLaunchHostFunc(other, note, b) && !strcmp(order, "b"));
    CHECK("a graph that runs is not destroyed", aclmdlRIDestroy(graph) == ACL_ERROR_RT_MODEL_RUNNING);
    open_gate(&gate);
    CHECK("then all is done", !aclrtSynchronizeStream(slow) && memory[63] == 1 && !strcmp(order, "ba"));
    CHECK("idle again, work runs at once", !aclrtMemsetAsync(memory, 64, 2, 64, slow) && memory[63] == 2);
    CHECK("the graph can be destroyed", !aclmdlRIDestroy(graph) && gate.released == 1);
    aclrtFree(memory);
}

static void failing(unsigned rank, unsigned size)
{
    aclrtStream stream;
    char *memory;
    gate_state gate;
    aclmdlRI graph;

    UNUSED_RANK;
    setenv("CANN_SIM_ASYNC", "1", 1);
    aclrtSetDevice(0);
    aclrtCreateStream(&stream);
    aclrtMalloc((void **)&memory, 64, ACL_MEM_MALLOC_HUGE_FIRST);
    aclrtMemset(memory, 64, 0, 64);
    graph = make_gate(&gate, stream, 507014);
    CHECK("work is put in", !aclmdlRIExecuteAsync(graph, stream) && !aclrtMemsetAsync(memory, 64, 1, 64, stream));
    open_gate(&gate);
    CHECK("who waits for a turn sees the error", cann_sim_wait_for_turn(stream) == 507014);
    CHECK("until it is reported nothing runs", aclrtMemsetAsync(memory, 64, 1, 64, stream) == 507014);
    CHECK("a synchronisation reports it", aclrtSynchronizeStream(stream) == 507014);
    CHECK("the message tells which node it was", strstr(aclGetRecentErrMsg(), "gate"));
    CHECK("what came after it was not done", !memory[0]);
    CHECK("then the stream works again",
          !aclrtSynchronizeStream(stream) && !aclrtMemsetAsync(memory, 64, 2, 64, stream) && memory[0] == 2);
    CHECK("the graph is released", !aclmdlRIDestroy(graph) && gate.released == 1);
    aclrtFree(memory);
}

static void destroyed_while_busy(unsigned rank, unsigned size)
{
    aclrtStream stream, waiting;
    aclrtEvent event;
    gate_state gate;
    aclmdlRI graph;

    UNUSED_RANK;
    setenv("CANN_SIM_ASYNC", "1", 1);
    aclrtSetDevice(0);
    aclrtCreateStream(&stream);
    aclrtCreateStream(&waiting);
    aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC);
    graph = make_gate(&gate, stream, ACL_SUCCESS);
    CHECK("a stream is busy and another waits for it",
          !aclmdlRIExecuteAsync(graph, stream) && !aclmdlRIExecuteAsync(graph, stream) &&
              !aclrtRecordEvent(event, stream) && !aclrtStreamWaitEvent(waiting, event));
    CHECK("it can be destroyed by force",
          !aclrtDestroyStreamForce(stream) && aclrtSynchronizeStream(stream) == ACL_ERROR_RT_INVALID_HANDLE);
    open_gate(&gate);
    CHECK("who waits is told", aclrtSynchronizeStream(waiting) == ACL_ERROR_RT_INVALID_HANDLE);
    while (aclmdlRIDestroy(graph) == ACL_ERROR_RT_MODEL_RUNNING)
        usleep(1000);
    CHECK("the graph is released", gate.released == 1);
}

typedef struct {
    aclrtStream stream;
    aclmdlRI graph;
    aclError outcome;
} nested_work;

static void replay_within(void *argument)
{
    nested_work *work = argument;

    work->outcome = aclmdlRIExecuteAsync(work->graph, work->stream);
}

static void submitting_from_within(unsigned rank, unsigned size)
{
    nested_work work = {.outcome = -1};
    gate_state gate;

    UNUSED_RANK;
    aclrtSetDevice(0);
    aclrtCreateStream(&work.stream);
    work.graph = make_gate(&gate, work.stream, ACL_SUCCESS);
    open_gate(&gate);
    CHECK("work may put more work into its own stream",
          !aclrtLaunchHostFunc(work.stream, replay_within, &work) && !work.outcome);
    CHECK("which is over with it", !aclmdlRIDestroy(work.graph) && gate.released == 1);
}

static aclrtStream shared;
static int counter;

static void count(void *argument)
{
    (void)argument;
    counter++; /* one at a time, or the sanitizer and the sum notice */
}

static void *count_often(void *argument)
{
    aclrtSetDevice(0);
    for (int i = 0; i < 1000; i++)
        *(int *)argument |= aclrtLaunchHostFunc(shared, count, NULL);
    return NULL;
}

static void many_threads(unsigned rank, unsigned size)
{
    pthread_t threads[4];
    int failed[4] = {0};

    UNUSED_RANK;
    aclrtSetDevice(0);
    aclrtCreateStream(&shared);
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, count_often, &failed[i]);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    CHECK("threads take turns in a stream", !failed[0] && !failed[1] && !failed[2] && !failed[3] && counter == 4000);
}

/* Makes streams until there are none left, and returns how many. */
static int use_up_streams(aclrtStream made[16])
{
    int count = 0;

    while (count < 16 && !aclrtCreateStream(&made[count]))
        count++;
    return count;
}

static void too_many(unsigned rank, unsigned size)
{
    aclrtStream made[16], more;
    aclmdlRI graph;
    aclrtEvent event;
    HcclRootInfo root;
    HcclComm comm;

    UNUSED_RANK;
    setenv("CANN_SIM_STREAMS", "8", 1);
    setenv("HCCL_OP_EXPANSION_MODE", "AIV", 1);
    aclrtSetDevice(0);
    CHECK("the default stream is one", !aclrtSynchronizeStream(NULL));
    CHECK("a device has so many streams, and no more",
          use_up_streams(made) == 7 && aclrtCreateStream(&more) == ACL_ERROR_RT_NO_STREAM_RESOURCE && !more);
    CHECK("the message says so", strstr(aclGetRecentErrMsg(), "has 8 streams"));
    CHECK("another device has its own", !aclrtSetDevice(1) && !aclrtCreateStream(&more) && !aclrtSetDevice(0));
    CHECK("a capture needs one", aclmdlRICaptureBegin(made[0], ACL_MODEL_RI_CAPTURE_MODE_GLOBAL) ==
                                     ACL_ERROR_RT_NO_STREAM_RESOURCE);
    CHECK("a stream that is destroyed leaves one",
          !aclrtDestroyStream(made[6]) && !aclmdlRICaptureBegin(made[0], ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
    aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC);
    aclrtRecordEvent(event, made[0]);
    CHECK("a stream that joins needs one, too",
          aclrtStreamWaitEvent(made[1], event) == ACL_ERROR_RT_NO_STREAM_RESOURCE);
    CHECK("and the capture is spoilt",
          aclmdlRICaptureEnd(made[0], &graph) == ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED && !graph);
    CHECK("what a capture that failed held is free", !aclmdlRICaptureBegin(made[0], ACL_MODEL_RI_CAPTURE_MODE_GLOBAL) &&
                                                         !aclmdlRICaptureEnd(made[0], &graph));
    CHECK("a graph holds it", aclrtCreateStream(&more) == ACL_ERROR_RT_NO_STREAM_RESOURCE);
    CHECK("a communicator needs one",
          !HcclGetRootInfo(&root) && HcclCommInitRootInfo(1, &root, 0, &comm) == HCCL_E_RUNTIME);
    CHECK("a graph that is destroyed leaves it",
          !aclmdlRIDestroy(graph) && !HcclCommInitRootInfo(1, &root, 0, &comm));
    CHECK("a communicator holds it", aclrtCreateStream(&more) == ACL_ERROR_RT_NO_STREAM_RESOURCE);
    CHECK("until it is destroyed", !HcclCommDestroy(comm) && !aclrtCreateStream(&more));
}

static void with_hccl(unsigned rank, unsigned size)
{
    aclrtStream made[16];
    HcclRootInfo root;
    HcclComm comm;

    UNUSED_RANK;
    setenv("CANN_SIM_STREAMS", "50", 1);
    aclrtSetDevice(0);
    HcclGetRootInfo(&root);
    CHECK("a communicator takes forty", !HcclCommInitRootInfo(1, &root, 0, &comm) && use_up_streams(made) == 10);
}

static void too_late(unsigned rank, unsigned size)
{
    aclrtStream stream;

    UNUSED_RANK;
    CHECK("none is left", aclrtCreateStream(&stream) == ACL_ERROR_RT_NO_STREAM_RESOURCE);
}

static void of_others(unsigned rank, unsigned size)
{
    aclrtStream made[16];

    UNUSED_RANK;
    setenv("CANN_SIM_STREAMS", "8", 1);
    aclrtSetDevice(0);
    CHECK("streams are made", use_up_streams(made) == 8);
    CHECK("another process gets none", alone(too_late));
}

static int threads(void)
{
    DIR *tasks = opendir("/proc/self/task");
    int count = 0;

    for (struct dirent *entry; (entry = readdir(tasks));)
        count += entry->d_name[0] != '.';
    closedir(tasks);
    return count;
}

static void no_threads_left(unsigned rank, unsigned size)
{
    aclrtStream stream;
    gate_state gate;
    aclmdlRI graph;
    int before;

    UNUSED_RANK;
    setenv("CANN_SIM_ASYNC", "1", 1);
    aclrtSetDevice(0);
    before = threads();
    aclrtCreateStream(&stream);
    graph = make_gate(&gate, stream, ACL_SUCCESS);
    CHECK("work that takes time has a thread", !aclmdlRIExecuteAsync(graph, stream) && threads() == before + 1);
    open_gate(&gate);
    CHECK("an idle stream keeps it", !aclrtSynchronizeStream(stream) && threads() == before + 1);
    CHECK("until it is destroyed", !aclrtDestroyStream(stream) && threads() == before);
    CHECK("the graph can be destroyed", !aclmdlRIDestroy(graph));
}

int main(void)
{
    CHECK("handles", alone(handles));
    CHECK("synchronous", alone(synchronous));
    CHECK("asynchronous", alone(asynchronous));
    CHECK("failing", alone(failing));
    CHECK("destroyed while busy", alone(destroyed_while_busy));
    CHECK("no threads left", alone(no_threads_left));
    CHECK("submitting from within", alone(submitting_from_within));
    CHECK("many threads", alone(many_threads));
    CHECK("too many", alone(too_many));
    CHECK("with HCCL", alone(with_hccl));
    CHECK("of others", alone(of_others));
    return REPORT();
}
