#include "stream.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "config.h"
#include "device.h"
#include "errors.h"
#include "machine.h"

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static sim_stream *streams[SIM_MAX_DEVICES];
static void *default_streams[SIM_MAX_DEVICES];
static atomic_int next_id;

aclError sim_take_streams(const char *function, int device, size_t count)
{
    size_t limit = sim_settings()->streams, left;
    aclError error = sim_take(function, SIM_STREAMS, device, count, limit, &left);

    if (error || count <= left)
        return error;
    return sim_fail(function, ACL_ERROR_RT_NO_STREAM_RESOURCE,
                    "device %d has %zu streams, of which %zu are free and %zu needed: those of graphs and communicators "
                    "count, and those of other processes",
                    device, limit, left, count);
}

void sim_give_streams(int device, size_t count)
{
    sim_give(SIM_STREAMS, device, count);
}

static void release_stream(sim_object *object)
{
    sim_stream *stream = (sim_stream *)object;

    pthread_cond_destroy(&stream->changed);
    pthread_mutex_destroy(&stream->lock);
    free(stream);
}

/* A stream that is counted already. */
static sim_stream *new_stream(const char *function, int device)
{
    sim_stream *stream = calloc(1, sizeof *stream);

    if (!stream) {
        sim_no_memory(function);
        return NULL;
    }
    stream->device = device;
    stream->id = next_id++;
    stream->queue_end = &stream->queue;
    pthread_mutex_init(&stream->lock, NULL);
    sim_init_condition(&stream->changed);
    if ((stream->handle = sim_publish(SIM_STREAM, &stream->object, release_stream)))
        return stream;
    release_stream(&stream->object);
    return NULL;
}

aclError sim_create_stream(const char *function, int device, void **handle)
{
    sim_stream *stream;
    aclError error;

    *handle = NULL;
    if ((error = sim_take_streams(function, device, 1)))
        return error;
    if (!(stream = new_stream(function, device))) {
        sim_give_streams(device, 1);
        return ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
    }
    *handle = stream->handle;
    pthread_mutex_lock(&list_lock);
    stream->next = streams[device];
    streams[device] = stream;
    pthread_mutex_unlock(&list_lock);
    return ACL_SUCCESS;
}

static aclError default_stream(const char *function, int device, void **handle)
{
    aclError error;
    void *made;

    pthread_mutex_lock(&list_lock);
    *handle = default_streams[device];
    pthread_mutex_unlock(&list_lock);
    if (*handle || (error = sim_create_stream(function, device, &made)))
        return *handle ? ACL_SUCCESS : error;
    pthread_mutex_lock(&list_lock);
    if (!default_streams[device]) /* or another thread was faster; ours stays unused until the device is reset */
        default_streams[device] = made;
    *handle = default_streams[device];
    pthread_mutex_unlock(&list_lock);
    return ACL_SUCCESS;
}

aclError sim_find_stream(const char *function, aclrtStream handle, sim_stream **stream)
{
    int device;
    aclError error = sim_current_device(function, &device);
    sim_stream *found;

    *stream = NULL;
    if (error)
        return error;
    if (!handle && (error = default_stream(function, device, &handle)))
        return error;
    if (!(found = sim_acquire(SIM_STREAM, handle)))
        return sim_fail(function, ACL_ERROR_RT_INVALID_HANDLE, "%p is not a stream, or was destroyed", handle);
    if (found->device == device) {
        *stream = found;
        return ACL_SUCCESS;
    }
    error = sim_fail(function, ACL_ERROR_RT_STREAM_CONTEXT, "the stream is device %d's, this thread is on device %d",
                     found->device, device);
    sim_let_go(&found->object);
    return error;
}

void sim_release_task(const sim_task *task)
{
    if (task->release)
        task->release(task->argument);
}

/* With the lock held: whether it is the calling thread that runs the stream's work, and asks from within it. */
static bool runs_here(const sim_stream *stream)
{
    return stream->running && pthread_equal(stream->runner, pthread_self());
}

/* With the lock held: the first failure stays until it is reported. */
static void note_failure(sim_stream *stream, aclError error, const char *text)
{
    if (stream->error)
        return;
    stream->error = error;
    snprintf(stream->error_text, sizeof stream->error_text, "%.255s", text);
}

/* With the lock held, which is not held while the task runs. */
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

/* With the lock held: does the first work in the queue, or skips it after a failure. */
static void run_first(sim_stream *stream)
{
    sim_queued *first = stream->queue;
    aclError error = ACL_SUCCESS;

    if (!stream->error || first->task.always)
        error = run_unlocked(stream, &first->task);
    if (error)
        note_failure(stream, error, sim_error_text());

    /* Only now: whoever sees an empty queue may take the work for done. */
    if (!(stream->queue = first->next))
        stream->queue_end = &stream->queue;
    pthread_cond_broadcast(&stream->changed);

    pthread_mutex_unlock(&stream->lock);
    sim_release_task(&first->task);
    free(first);
    pthread_mutex_lock(&stream->lock);
}

/* Releases what is left in the queue of a closed stream, to which nobody adds any more. Only work that others wait for
 * is still done. */
static void abandon_queue(sim_stream *stream)
{
    sim_queued *first;

    while ((first = stream->queue)) {
        stream->queue = first->next;
        if (first->task.always)
            first->task.run(first->task.argument);
        sim_release_task(&first->task);
        free(first);
    }
}

static void *work_off_queue(void *argument)
{
    sim_stream *stream = argument;

    sim_work_on(stream->device);
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        while ((stream->running || !stream->queue) && !stream->closing)
            pthread_cond_wait(&stream->changed, &stream->lock);
        if (stream->closing)
            break;
        run_first(stream);
    }
    if (stream->queue)
        note_failure(stream, ACL_ERROR_RT_INVALID_HANDLE, "the stream was destroyed with work in it");
    pthread_mutex_unlock(&stream->lock);

    abandon_queue(stream);
    sim_let_go(&stream->object);
    return NULL;
}

/* With the lock held: a thread that works off the queue, if there is none yet. */
static aclError start_worker(const char *function, sim_stream *stream)
{
    if (stream->has_worker)
        return ACL_SUCCESS;
    sim_hold(&stream->object);
    if (pthread_create(&stream->worker, NULL, work_off_queue, stream)) {
        sim_let_go(&stream->object);
        return sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the host has no thread left");
    }
    stream->has_worker = true;
    return ACL_SUCCESS;
}

/* With the lock held. */
static aclError enqueue(const char *function, sim_stream *stream, const sim_task *task)
{
    sim_queued *entry;
    aclError error = start_worker(function, stream);

    if (error)
        return error;
    if (!(entry = malloc(sizeof *entry)))
        return sim_no_memory(function);
    *entry = (sim_queued){NULL, *task};
    *stream->queue_end = entry;
    stream->queue_end = &entry->next;
    pthread_cond_broadcast(&stream->changed);
    return ACL_SUCCESS;
}

/* With the lock held: whether the stream takes the task. */
static aclError check_stream(const char *function, const sim_stream *stream, const sim_task *task)
{
    if (stream->closing)
        return sim_fail(function, ACL_ERROR_RT_INVALID_HANDLE, "the stream is being destroyed");
    if (stream->error && !task->always)
        return sim_fail(function, stream->error, "work before this failed: %s", stream->error_text);
    return ACL_SUCCESS;
}

/* With the lock held: runs the task, or queues it, which makes it the queue's to release. */
static aclError run_or_queue(const char *function, sim_stream *stream, const sim_task *task, bool *queued)
{
    aclError error;

    if (runs_here(stream)) { /* work that submits to its own stream: a part of it */
        pthread_mutex_unlock(&stream->lock);
        error = task->run(task->argument);
        pthread_mutex_lock(&stream->lock);
        return error;
    }
    while (stream->running && !stream->queue && !stream->closing)
        pthread_cond_wait(&stream->changed, &stream->lock); /* another thread's turn */
    if ((error = check_stream(function, stream, task)))
        return error;
    if (!stream->queue && !(task->waits && sim_settings()->asynchronous))
        return run_unlocked(stream, task);
    error = enqueue(function, stream, task);
    *queued = !error;
    return error;
}

aclError sim_run(const char *function, sim_stream *stream, const sim_task *task)
{
    bool queued = false;
    aclError error;

    pthread_mutex_lock(&stream->lock);
    error = run_or_queue(function, stream, task, &queued);
    pthread_mutex_unlock(&stream->lock);
    if (!queued)
        sim_release_task(task);
    return error;
}

/* With the lock held. */
static bool has_work(const sim_stream *stream)
{
    return stream->queue || stream->running;
}

bool sim_is_idle(sim_stream *stream)
{
    bool idle;

    pthread_mutex_lock(&stream->lock);
    idle = !has_work(stream);
    pthread_mutex_unlock(&stream->lock);
    return idle;
}

/* With the lock held: returns when the stream is idle, closed, or asked by its own work. */
static aclError wait_until_idle(const char *function, sim_stream *stream, int timeout)
{
    struct timespec deadline = sim_deadline(timeout < 0 ? 0 : timeout);

    while (has_work(stream) && !stream->closing && !runs_here(stream)) {
        if (timeout < 0)
            pthread_cond_wait(&stream->changed, &stream->lock);
        else if (pthread_cond_timedwait(&stream->changed, &stream->lock, &deadline) == ETIMEDOUT)
            return sim_fail(function, ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "not done after %d ms", timeout);
    }
    return ACL_SUCCESS;
}

aclError sim_drain(const char *function, sim_stream *stream, int timeout, bool clear)
{
    aclError error;

    pthread_mutex_lock(&stream->lock);
    error = wait_until_idle(function, stream, timeout);
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

aclError sim_drain_device(const char *function, int device, int timeout)
{
    sim_stream **list = streams_of(device);
    aclError error = ACL_SUCCESS;

    if (!list)
        return sim_no_memory(function);
    for (sim_stream **each = list; *each; each++) {
        aclError failed = sim_drain(function, *each, timeout, true);

        error = error ? error : failed;
        sim_let_go(&(*each)->object);
    }
    free(list);
    return error;
}

static void leave_list(const sim_stream *stream)
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

/* Ends the thread of a closed stream. One that was `idle` is gone when this returns: torch-npu destroys its streams when
 * the process ends, and a thread that still ended then would clean up after itself in libraries that are gone. */
static void end_worker(sim_stream *stream, bool idle)
{
    if (!stream->has_worker)
        return;
    if (idle && !pthread_equal(stream->worker, pthread_self()))
        pthread_join(stream->worker, NULL);
    else
        pthread_detach(stream->worker);
}

void sim_close_stream(sim_stream *stream)
{
    bool idle;

    leave_list(stream);
    sim_give_streams(stream->device, 1);
    pthread_mutex_lock(&stream->lock);
    idle = !has_work(stream);
    stream->closing = true;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);

    end_worker(stream, idle);
    sim_let_go(&stream->object);
}

void sim_close_streams(int device)
{
    sim_stream **list = streams_of(device);

    for (sim_stream **each = list; list && *each; each++) {
        sim_stream *stream = sim_retire(SIM_STREAM, (*each)->handle);

        if (stream)
            sim_close_stream(stream);
        sim_let_go(&(*each)->object);
    }
    free(list);
}

bool sim_is_closed(sim_stream *stream)
{
    bool closed;

    pthread_mutex_lock(&stream->lock);
    closed = stream->closing;
    pthread_mutex_unlock(&stream->lock);
    return closed;
}
