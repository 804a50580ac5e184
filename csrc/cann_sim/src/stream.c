#include "stream.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "capture.h"
#include "config.h"
#include "device.h"
#include "errors.h"

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static sim_stream *streams[SIM_MAX_DEVICES];
static void *default_streams[SIM_MAX_DEVICES];
static atomic_int next_id;

void sim_init_condition(pthread_cond_t *condition)
{
    pthread_condattr_t attributes;

    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

struct timespec sim_deadline(int milliseconds)
{
    struct timespec deadline;

    clock_gettime(CLOCK_MONOTONIC, &deadline);
    deadline.tv_sec += milliseconds / 1000;
    deadline.tv_nsec += milliseconds % 1000 * 1000000L;
    if (deadline.tv_nsec >= 1000000000L) {
        deadline.tv_sec++;
        deadline.tv_nsec -= 1000000000L;
    }
    return deadline;
}

static void release_stream(sim_object *object)
{
    sim_stream *stream = (sim_stream *)object;

    pthread_cond_destroy(&stream->changed);
    pthread_mutex_destroy(&stream->lock);
    free(stream);
}

static void *create_stream(int device)
{
    sim_stream *stream = calloc(1, sizeof *stream);

    if (!stream) {
        FAIL(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the host has no memory left");
        return NULL;
    }
    stream->device = device;
    stream->id = next_id++;
    stream->queue_end = &stream->queue;
    pthread_mutex_init(&stream->lock, NULL);
    sim_init_condition(&stream->changed);
    if (!(stream->handle = sim_publish(SIM_STREAM, &stream->object, release_stream))) {
        release_stream(&stream->object);
        return NULL;
    }
    pthread_mutex_lock(&list_lock);
    stream->next = streams[device];
    streams[device] = stream;
    pthread_mutex_unlock(&list_lock);
    return stream->handle;
}

static void *default_stream(int device)
{
    void *handle;

    pthread_mutex_lock(&list_lock);
    handle = default_streams[device];
    pthread_mutex_unlock(&list_lock);
    if (handle || !(handle = create_stream(device)))
        return handle;
    pthread_mutex_lock(&list_lock);
    if (default_streams[device]) { /* another thread was faster; ours stays unused until the device is reset */
        handle = default_streams[device];
    } else {
        default_streams[device] = handle;
    }
    pthread_mutex_unlock(&list_lock);
    return handle;
}

aclError sim_find_stream(const char *function, aclrtStream handle, sim_stream **stream)
{
    int device;
    aclError error = sim_current_device(function, &device);

    if (error)
        return error;
    if (!handle && !(handle = default_stream(device)))
        return ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
    if (!(*stream = sim_acquire(SIM_STREAM, handle)))
        return sim_fail(function, ACL_ERROR_RT_INVALID_HANDLE, "%p is not a stream, or was destroyed", handle);
    if ((*stream)->device == device)
        return ACL_SUCCESS;
    error = sim_fail(function, ACL_ERROR_RT_STREAM_CONTEXT, "the stream is device %d's, this thread is on device %d",
                     (*stream)->device, device);
    sim_let_go(&(*stream)->object);
    return error;
}

static void release_task(const sim_task *task)
{
    if (task->release)
        task->release(task->argument);
}

/* Runs a task outside the lock. */
static aclError run_unlocked(sim_stream *stream, const sim_task *task)
{
    aclError error;

    stream->running = true;
    stream->runner = pthread_self();
    pthread_mutex_unlock(&stream->lock);
    error = task->run(task->argument);
    pthread_mutex_lock(&stream->lock);
    stream->running = false;
    pthread_cond_broadcast(&stream->changed);
    return error;
}

static void *work_off_queue(void *argument)
{
    sim_stream *stream = argument;
    sim_queued *first;

    sim_work_on(stream->device);
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        aclError error = ACL_SUCCESS;

        while ((stream->running || !stream->queue) && !stream->closing)
            pthread_cond_wait(&stream->changed, &stream->lock);
        if (stream->closing)
            break;
        first = stream->queue;
        if (!stream->error || first->task.always)
            error = run_unlocked(stream, &first->task);
        if (error && !stream->error) {
            stream->error = error;
            snprintf(stream->error_text, sizeof stream->error_text, "%.255s", sim_error_text());
        }
        /* Only now: whoever sees an empty queue may take the work for done. */
        if (!(stream->queue = first->next))
            stream->queue_end = &stream->queue;
        pthread_cond_broadcast(&stream->changed);
        pthread_mutex_unlock(&stream->lock);
        release_task(&first->task);
        free(first);
        pthread_mutex_lock(&stream->lock);
    }
    if (stream->queue && !stream->error) {
        stream->error = ACL_ERROR_RT_INVALID_HANDLE;
        snprintf(stream->error_text, sizeof stream->error_text, "the stream was destroyed with work in it");
    }
    pthread_mutex_unlock(&stream->lock);
    while ((first = stream->queue)) { /* nobody adds to it any more */
        stream->queue = first->next;
        if (first->task.always)
            first->task.run(first->task.argument); /* others wait for it */
        release_task(&first->task);
        free(first);
    }
    sim_let_go(&stream->object);
    return NULL;
}

/* With the lock held. */
static aclError enqueue(const char *function, sim_stream *stream, const sim_task *task)
{
    sim_queued *entry = malloc(sizeof *entry);

    if (!entry)
        return sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the host has no memory left");
    if (!stream->has_worker) {
        pthread_t worker;

        sim_hold(&stream->object);
        if (pthread_create(&worker, NULL, work_off_queue, stream)) {
            sim_let_go(&stream->object);
            free(entry);
            return sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the host has no thread left");
        }
        pthread_detach(worker);
        stream->has_worker = true;
    }
    *entry = (sim_queued){NULL, *task};
    *stream->queue_end = entry;
    stream->queue_end = &entry->next;
    pthread_cond_broadcast(&stream->changed);
    return ACL_SUCCESS;
}

aclError sim_run(const char *function, sim_stream *stream, const sim_task *task)
{
    aclError error;

    pthread_mutex_lock(&stream->lock);
    if (stream->running && pthread_equal(stream->runner, pthread_self())) {
        /* Work that submits to its own stream: a part of it. */
        pthread_mutex_unlock(&stream->lock);
        return task->run(task->argument);
    }
    while (stream->running && !stream->queue && !stream->closing)
        pthread_cond_wait(&stream->changed, &stream->lock); /* another thread's turn */
    if (stream->closing)
        error = sim_fail(function, ACL_ERROR_RT_INVALID_HANDLE, "the stream is being destroyed");
    else if (stream->error && !task->always)
        error = sim_fail(function, stream->error, "work before this failed: %s", stream->error_text);
    else if (stream->queue || (task->waits && sim_settings()->asynchronous)) {
        if (!(error = enqueue(function, stream, task))) {
            pthread_mutex_unlock(&stream->lock);
            return ACL_SUCCESS;
        }
    } else {
        error = run_unlocked(stream, task);
    }
    pthread_mutex_unlock(&stream->lock);
    release_task(task);
    return error;
}

aclError sim_submit(const char *function, aclrtStream handle, const sim_task *task)
{
    sim_stream *stream;
    aclError error = sim_find_stream(function, handle, &stream);

    if (error) {
        release_task(task);
        return error;
    }
    error = sim_is_captured(stream) ? sim_capture_task(function, stream, task) : sim_run(function, stream, task);
    sim_let_go(&stream->object);
    return error;
}

aclError sim_drain(const char *function, sim_stream *stream, int timeout, bool clear)
{
    struct timespec deadline = sim_deadline(timeout < 0 ? 0 : timeout);
    aclError error = ACL_SUCCESS;

    pthread_mutex_lock(&stream->lock);
    while ((stream->queue || stream->running) && !stream->closing &&
           !(stream->running && pthread_equal(stream->runner, pthread_self()))) {
        if (timeout < 0)
            pthread_cond_wait(&stream->changed, &stream->lock);
        else if (pthread_cond_timedwait(&stream->changed, &stream->lock, &deadline) == ETIMEDOUT) {
            error = sim_fail(function, ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "not done after %d ms", timeout);
            break;
        }
    }
    if (!error && stream->error) {
        error = sim_fail(function, stream->error, "%s", stream->error_text);
        if (clear)
            stream->error = ACL_SUCCESS;
    }
    pthread_mutex_unlock(&stream->lock);
    return error;
}

/* The streams of a device, each with a reference, ended by NULL; NULL if the host has no memory left. */
static sim_stream **streams_of(int device)
{
    sim_stream **list, *stream;
    size_t count = 0;

    pthread_mutex_lock(&list_lock);
    for (stream = streams[device]; stream; stream = stream->next)
        count++;
    if ((list = malloc((count + 1) * sizeof *list))) {
        count = 0;
        for (stream = streams[device]; stream; stream = stream->next) {
            sim_hold(&stream->object);
            list[count++] = stream;
        }
        list[count] = NULL;
    }
    pthread_mutex_unlock(&list_lock);
    return list;
}

aclError sim_synchronize_streams(const char *function, int device, int timeout)
{
    sim_stream **list;
    aclError error = sim_refuse_in_capture(function);

    if (error)
        return error;
    if (!(list = streams_of(device)))
        return sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the host has no memory left");
    for (sim_stream **each = list; *each; each++) {
        aclError failed = sim_drain(function, *each, timeout, true);

        error = error ? error : failed;
        sim_let_go(&(*each)->object);
    }
    free(list);
    return error;
}

static void forget_stream(sim_stream *stream)
{
    sim_stream **place;

    pthread_mutex_lock(&list_lock);
    for (place = &streams[stream->device]; *place && *place != stream; place = &(*place)->next)
        ;
    if (*place)
        *place = stream->next;
    if (default_streams[stream->device] == stream->handle)
        default_streams[stream->device] = NULL;
    pthread_mutex_unlock(&list_lock);
}

/* Ends a stream whose handle is retired. What is queued is not done. */
static void close_stream(sim_stream *stream)
{
    forget_stream(stream);
    sim_capture_forget(stream);
    pthread_mutex_lock(&stream->lock);
    stream->closing = true;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
    sim_let_go(&stream->object);
}

void sim_destroy_streams(int device)
{
    sim_stream **list = streams_of(device);

    for (sim_stream **each = list; list && *each; each++) {
        sim_stream *stream = sim_retire(SIM_STREAM, (*each)->handle);

        if (stream)
            close_stream(stream);
        sim_let_go(&(*each)->object);
    }
    free(list);
}

/* A stream of the current device. */
aclError aclrtCreateStream(aclrtStream *stream)
{
    return aclrtCreateStreamWithConfig(stream, 0, 0);
}

/* The same: streams have no priorities here, and flags only make a device faster. */
aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag)
{
    int device;
    aclError error = CURRENT_DEVICE(&device);

    (void)priority, (void)flag;
    if (error)
        return error;
    if (!stream)
        return FAIL(ACL_ERROR_INVALID_PARAM, "stream is NULL");
    return (*stream = create_stream(device)) ? ACL_SUCCESS : ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
}

/* Waits until the stream is idle and ends it. Its handle is no longer one, whatever is returned. */
aclError aclrtDestroyStream(aclrtStream stream)
{
    sim_stream *object = sim_retire(SIM_STREAM, stream);
    aclError error;

    if (!object)
        return FAIL(ACL_ERROR_RT_INVALID_HANDLE, "%p is not a stream, or was destroyed", stream);
    error = sim_drain(__func__, object, -1, true);
    close_stream(object);
    return error;
}

/* Ends the stream without waiting; what is queued is not done. */
aclError aclrtDestroyStreamForce(aclrtStream stream)
{
    sim_stream *object = sim_retire(SIM_STREAM, stream);

    if (!object)
        return FAIL(ACL_ERROR_RT_INVALID_HANDLE, "%p is not a stream, or was destroyed", stream);
    close_stream(object);
    return ACL_SUCCESS;
}

/* Returns when all work in the stream is done, with the error of what failed, which is then forgotten. */
aclError aclrtSynchronizeStream(aclrtStream stream)
{
    return aclrtSynchronizeStreamWithTimeout(stream, -1);
}

/* The same, within `timeout` milliseconds; -1: however long it takes. */
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout)
{
    sim_stream *object;
    aclError error = sim_find_stream(__func__, stream, &object);

    if (error)
        return error;
    if (!(error = sim_refuse_if_captured(__func__, object)))
        error = sim_drain(__func__, object, timeout, true);
    sim_let_go(&object->object);
    return error;
}

/* Whether all work in the stream is done. */
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status)
{
    sim_stream *object;
    aclError error;

    if (!status)
        return FAIL(ACL_ERROR_INVALID_PARAM, "status is NULL");
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    if (!(error = sim_refuse_if_captured(__func__, object))) {
        pthread_mutex_lock(&object->lock);
        *status = object->queue || object->running ? ACL_STREAM_STATUS_NOT_READY : ACL_STREAM_STATUS_COMPLETE;
        pthread_mutex_unlock(&object->lock);
    }
    sim_let_go(&object->object);
    return error;
}

/* A number that no other stream of the process has had. */
aclError aclrtStreamGetId(aclrtStream stream, int32_t *streamId)
{
    sim_stream *object;
    aclError error;

    if (!streamId)
        return FAIL(ACL_ERROR_INVALID_PARAM, "streamId is NULL");
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    *streamId = object->id;
    sim_let_go(&object->object);
    return ACL_SUCCESS;
}

/* ACL_STOP_ON_FAILURE is what a stream does here: after a failure nothing runs until it is reported. */
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode)
{
    aclrtStreamAttrValue value = {.failureMode = mode};

    return aclrtSetStreamAttribute(stream, ACL_STREAM_ATTR_FAILURE_MODE, &value);
}

/* Remembered; overflow is what the operators make of it. */
aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t flag)
{
    aclrtStreamAttrValue value = {.overflowSwitch = flag};

    return aclrtSetStreamAttribute(stream, ACL_STREAM_ATTR_FLOAT_OVERFLOW_CHECK, &value);
}

/* What was set, 0 before. */
aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *flag)
{
    sim_stream *object;
    aclError error;

    if (!flag)
        return FAIL(ACL_ERROR_INVALID_PARAM, "flag is NULL");
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    *flag = object->overflow_switch;
    sim_let_go(&object->object);
    return ACL_SUCCESS;
}

/* Remembers the overflow switch and accepts the other attributes that are known: they need nothing done. */
aclError aclrtSetStreamAttribute(aclrtStream stream, aclrtStreamAttr stmAttrType, aclrtStreamAttrValue *value)
{
    sim_stream *object;
    aclError error;

    if (!value)
        return FAIL(ACL_ERROR_INVALID_PARAM, "value is NULL");
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    if (stmAttrType == ACL_STREAM_ATTR_FAILURE_MODE) {
        if (value->failureMode > ACL_STOP_ON_FAILURE)
            error = FAIL(ACL_ERROR_INVALID_PARAM, "failure mode %llu", (unsigned long long)value->failureMode);
    } else if (stmAttrType == ACL_STREAM_ATTR_FLOAT_OVERFLOW_CHECK) {
        object->overflow_switch = value->overflowSwitch;
    } else if ((int)stmAttrType < ACL_STREAM_ATTR_FAILURE_MODE || stmAttrType > ACL_STREAM_ATTR_PRIORITY) {
        error = FAIL(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "stream attribute %d is not simulated", (int)stmAttrType);
    }
    sim_let_go(&object->object);
    return error;
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
        return FAIL(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the host has no memory left");
    *call = (host_call){fn, args};
    task.argument = call;
    return sim_submit(__func__, stream, &task);
}
