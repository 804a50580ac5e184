#include <signal.h>
#include <stdint.h>
#include <string.h>

#include "children.h"
#include "hccl_api.h"

/* CANN_SIM_ASYNC=1: collectives are put into a stream, as on a device, and what goes wrong is told by the stream. */

static HcclRootInfo root;
static HcclComm comm;
static aclrtStream stream, compute;
static aclrtEvent event;
static int32_t *buffer;

enum { COUNT = 1 << 20 };

static void join(unsigned rank, unsigned size)
{
    aclrtSetDevice((int)rank);
    aclrtCreateStream(&stream);
    aclrtCreateStream(&compute);
    aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC);
    aclrtMalloc((void **)&buffer, COUNT * 4, ACL_MEM_MALLOC_HUGE_FIRST);
    aclrtMemset(buffer, COUNT * 4, 0, COUNT * 4);
    CHECK("the communicator is made", !HcclCommInitRootInfo(size, &root, rank, &comm));
}

static void leave(void)
{
    CHECK("the communicator can be destroyed", !HcclCommDestroy(comm));
    aclrtDestroyStreamForce(stream);
    aclrtDestroyStreamForce(compute);
    aclrtDestroyEvent(event);
    aclrtFree(buffer);
}

static HcclResult async_error(void)
{
    HcclResult error = HCCL_E_INTERNAL;

    return HcclGetCommAsyncError(comm, &error) ? HCCL_E_INTERNAL : error;
}

static void does_not_block(unsigned rank, unsigned size)
{
    aclrtStreamStatus status = ACL_STREAM_STATUS_COMPLETE;

    join(rank, size);
    if (rank) {
        usleep(200000);
        aclrtMemset(buffer, COUNT * 4, 1, COUNT * 4);
        CHECK("a send is put in", !HcclSend(buffer, COUNT, HCCL_DATA_TYPE_INT32, 0, comm, stream));
    } else {
        CHECK("a receive returns before there is anything",
              !HcclRecv(buffer, COUNT, HCCL_DATA_TYPE_INT32, 1, comm, stream) && !buffer[0] &&
                  !aclrtStreamQuery(stream, &status) && status == ACL_STREAM_STATUS_NOT_READY);
        CHECK("a stream that waits for it sees it",
              !aclrtRecordEvent(event, stream) && !aclrtStreamWaitEvent(compute, event) &&
                  !aclrtMemcpyAsync(buffer + 1, 4, buffer, 4, ACL_MEMCPY_DEVICE_TO_DEVICE, compute));
        CHECK("it comes",
              !aclrtSynchronizeStream(compute) && buffer[0] == 0x01010101 && buffer[COUNT - 1] == buffer[0]);
    }
    CHECK("all is done", !aclrtSynchronizeDevice());
    leave();
}

static void many_at_once(unsigned rank, unsigned size)
{
    join(rank, size);
    for (int i = 0; i < 20; i++)
        CHECK("many are put in",
              !HcclAllReduce(buffer, buffer, COUNT, HCCL_DATA_TYPE_INT32, HCCL_REDUCE_SUM, comm, stream));
    CHECK("in order",
          !HcclBroadcast(buffer, COUNT, HCCL_DATA_TYPE_INT32, 0, comm, stream) && !aclrtSynchronizeStream(stream));
    leave();
}

static void death_is_told_by_the_stream(unsigned rank, unsigned size)
{
    join(rank, size);
    HcclBarrier(comm, stream);
    aclrtSynchronizeStream(stream);
    if (rank)
        raise(SIGKILL);
    usleep(100000);
    CHECK("the call succeeds",
          !HcclAllReduce(buffer, buffer, COUNT, HCCL_DATA_TYPE_INT32, HCCL_REDUCE_SUM, comm, stream));
    CHECK("the synchronisation fails", aclrtSynchronizeStream(stream) == ACL_ERROR_RT_TS_ERROR);
    CHECK("it says why", strstr(aclGetRecentErrMsg(), "HcclAllReduce: rank 1 is gone"));
    CHECK("so does the communicator", async_error() == HCCL_E_REMOTE);
    CHECK("the next call fails itself", HcclBarrier(comm, stream) == HCCL_E_REMOTE);
    CHECK("the stream goes on", !aclrtMemsetAsync(buffer, 4, 0, 4, stream) && !aclrtSynchronizeStream(stream));
    leave();
}

static void timeout_is_told_by_the_stream(unsigned rank, unsigned size)
{
    join(rank, size);
    if (rank) {
        usleep(2600000);
    } else {
        CHECK("the call succeeds", !HcclRecv(buffer, COUNT, HCCL_DATA_TYPE_INT32, 1, comm, stream));
        CHECK("one may look before the end",
              aclrtSynchronizeStreamWithTimeout(stream, 100) == ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
        CHECK("the synchronisation fails", aclrtSynchronizeStream(stream) == ACL_ERROR_RT_FFTS_PLUS_TIMEOUT);
        CHECK("so does the communicator", async_error() == HCCL_E_TIMEOUT);
    }
    leave();
}

static void destroyed_while_queued(unsigned rank, unsigned size)
{
    join(rank, size);
    if (rank) {
        usleep(500000);
    } else {
        CHECK("two receives are put in", !HcclRecv(buffer, COUNT, HCCL_DATA_TYPE_INT32, 1, comm, stream) &&
                                             !HcclRecv(buffer, COUNT, HCCL_DATA_TYPE_INT32, 1, comm, stream));
        usleep(50000);
        CHECK("the communicator is destroyed when the first has failed", !HcclCommDestroy(comm));
        CHECK("the second is not tried", aclrtSynchronizeStream(stream) == ACL_ERROR_RT_TS_ERROR);
        HcclCommInitRootInfo(1, &root, 0, &comm);
    }
    leave();
}

int main(void)
{
    setenv("CANN_SIM_DEVICES", "8", 1);
    setenv("CANN_SIM_HCCL_TIMEOUT", "2", 1);
    setenv("CANN_SIM_ASYNC", "1", 1);
    HcclGetRootInfo(&root);
    CHECK("does not block", run_ranks(does_not_block, 2) == 2);
    CHECK("many at once", run_ranks(many_at_once, 2) == 2);
    CHECK("death is told by the stream", run_ranks(death_is_told_by_the_stream, 2) == 1);
    CHECK("timeout is told by the stream", run_ranks(timeout_is_told_by_the_stream, 2) == 2);
    CHECK("destroyed while queued", run_ranks(destroyed_while_queued, 2) == 2);
    return REPORT();
}
