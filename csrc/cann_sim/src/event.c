/* Events: points in streams. */
#include <stdio.h>
#include <stdlib.h>

#include "capture.h"
#include "clock.h"
#include "device.h"
#include "errors.h"
#include "handles.h"
#include "stream.h"

typedef struct {
    sim_object object;
    int device;
    uint32_t flags;

    pthread_mutex_t lock; /* for all fields up to the error's text */
    pthread_cond_t changed;
    uint64_t recorded;  /* how many times it was put into a stream */
    uint64_t completed; /* the last of these records whose turn has come */
    uint64_t reset;     /* the records that were made before it was reset */
    int64_t time;       /* of the last completed record, in ns of the steady clock */
    aclError error;     /* of the stream before that record */
    char error_text[256];

    sim_capture_point point; /* of the last record; belongs to capture.c */
} sim_event;

/* What a stream has to do for an event: reach it, or wait for it. */
typedef struct {
    sim_event *event;
    sim_stream *stream; /* that reaches it */
    uint64_t number;    /* of the record */
} event_task;

static void release_event(sim_object *object)
{
    sim_event *event = (sim_event *)object;

    pthread_cond_destroy(&event->changed);
    pthread_mutex_destroy(&event->lock);
    free(event);
}

static void release_event_task(void *argument)
{
    event_task *task = argument;

    if (task->stream)
        sim_let_go(&task->stream->object);
    sim_let_go(&task->event->object);
    free(task);
}

static aclError find_event(const char *function, aclrtEvent handle, sim_event **event)
{
    if ((*event = sim_acquire(SIM_EVENT, handle)))
        return ACL_SUCCESS;
    return sim_fail(function, ACL_ERROR_RT_INVALID_HANDLE, "%p is not an event, or was destroyed", handle);
}

/* With the event's lock held. */
static bool has_come(const sim_event *event)
{
    return event->recorded > event->reset && event->completed >= event->recorded;
}

/* The number of the record that a wait from now on is for; 0 if the event is not recorded. */
static uint64_t current_record(sim_event *event)
{
    uint64_t number;

    pthread_mutex_lock(&event->lock);
    number = event->recorded > event->reset ? event->recorded : 0;
    pthread_mutex_unlock(&event->lock);
    return number;
}

/* Whether the record is completed and has no failure to pass on. */
static bool is_past(sim_event *event, uint64_t number)
{
    bool past;

    pthread_mutex_lock(&event->lock);
    past = event->completed >= number && !(number && event->error);
    pthread_mutex_unlock(&event->lock);
    return past;
}

/* Makes an event of the current device. */
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag)
{
    sim_event *object;
    int device;
    aclError error = CURRENT_DEVICE(&device);

    if (error)
        return error;
    if (!event)
        return FAIL(ACL_ERROR_INVALID_PARAM, "event is NULL");
    if (!(object = calloc(1, sizeof *object)))
        return sim_no_memory(__func__);
    object->device = device;
    object->flags = flag;
    pthread_mutex_init(&object->lock, NULL);
    sim_init_condition(&object->changed);
    if ((*event = sim_publish(SIM_EVENT, &object->object, release_event)))
        return ACL_SUCCESS;
    release_event(&object->object);
    return ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
}

/* Does the same as aclrtCreateEventExWithFlag: the two differ in limits that are not simulated. */
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag)
{
    return aclrtCreateEventExWithFlag(event, flag);
}

/* Destroys the handle. Streams that wait for the event go on waiting and are told when its turn has come. */
aclError aclrtDestroyEvent(aclrtEvent event)
{
    sim_event *object = sim_retire(SIM_EVENT, event);

    if (!object)
        return FAIL(ACL_ERROR_RT_INVALID_HANDLE, "%p is not an event, or was destroyed", event);
    sim_let_go(&object->object);
    return ACL_SUCCESS;
}

static aclError reach_event(void *argument)
{
    const event_task *task = argument;
    sim_event *event = task->event;
    int64_t now = sim_nanoseconds();
    aclError error;

    pthread_mutex_lock(&task->stream->lock);
    error = task->stream->error;
    pthread_mutex_lock(&event->lock);
    if (task->number > event->completed) {
        event->completed = task->number;
        event->time = now;
        event->error = error;
        snprintf(event->error_text, sizeof event->error_text, "%s", error ? task->stream->error_text : "");
        pthread_cond_broadcast(&event->changed);
    }
    pthread_mutex_unlock(&event->lock);
    pthread_mutex_unlock(&task->stream->lock);
    return ACL_SUCCESS;
}

static aclError wait_for_event(void *argument)
{
    const event_task *task = argument;
    sim_event *event = task->event;
    aclError error = ACL_SUCCESS;

    pthread_mutex_lock(&event->lock);
    while (event->completed < task->number)
        pthread_cond_wait(&event->changed, &event->lock);
    if (task->number && event->error)
        error = sim_fail("event", event->error, "%s", event->error_text);
    pthread_mutex_unlock(&event->lock);
    return error;
}

static aclError submit_event_task(const char *function, sim_event *event, sim_stream *stream, bool wait,
                                  uint64_t number)
{
    event_task *argument = malloc(sizeof *argument);
    sim_task task = {
        .name = function,
        .run = wait ? wait_for_event : reach_event,
        .release = release_event_task,
        .argument = argument,
        .waits = wait,
        .always = !wait,
    };

    if (!argument)
        return sim_no_memory(function);
    sim_hold(&event->object);
    if (!wait)
        sim_hold(&stream->object);
    *argument = (event_task){event, wait ? NULL : stream, number};
    return sim_run(function, stream, &task);
}

/* Puts the event into the stream, which must be of the same device. A later record replaces an earlier one. */
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream)
{
    SIM_BORROWED sim_event *object = NULL;
    SIM_BORROWED sim_stream *target = NULL;
    uint64_t number;
    aclError error;

    if ((error = find_event(__func__, event, &object)) || (error = sim_find_stream(__func__, stream, &target)))
        return error;
    if (object->device != target->device)
        return FAIL(ACL_ERROR_RT_STREAM_CONTEXT, "the event is device %d's, the stream device %d's", object->device,
                    target->device);
    sim_capture_record(target, &object->point);
    pthread_mutex_lock(&object->lock);
    number = ++object->recorded;
    pthread_mutex_unlock(&object->lock);
    return submit_event_task(__func__, object, target, false, number);
}

/* Forgets that the event was recorded. */
aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream)
{
    SIM_BORROWED sim_event *object = NULL;
    SIM_BORROWED sim_stream *target = NULL;
    aclError error;

    if ((error = find_event(__func__, event, &object)) || (error = sim_find_stream(__func__, stream, &target)))
        return error;
    pthread_mutex_lock(&object->lock);
    object->reset = object->recorded;
    pthread_mutex_unlock(&object->lock);
    return ACL_SUCCESS;
}

/* What is put into the stream from now on comes after the event's last record, on whichever device that was. An event
 * that was not recorded holds nothing up. */
aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event)
{
    SIM_BORROWED sim_event *object = NULL;
    SIM_BORROWED sim_stream *target = NULL;
    uint64_t number;
    aclError error;

    if ((error = find_event(__func__, event, &object)) || (error = sim_find_stream(__func__, stream, &target)))
        return error;
    number = current_record(object);
    if ((error = sim_capture_wait(__func__, target, &object->point, number != 0)))
        return error;
    if (is_past(object, number))
        return ACL_SUCCESS;
    return submit_event_task(__func__, object, target, true, number);
}

/* Tells whether the event was recorded and its turn has come. */
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status)
{
    SIM_BORROWED sim_event *object = NULL;
    aclError error;

    if (!status)
        return FAIL(ACL_ERROR_INVALID_PARAM, "status is NULL");
    if ((error = find_event(__func__, event, &object)) || (error = sim_refuse_captured_event(__func__, &object->point)))
        return error;
    pthread_mutex_lock(&object->lock);
    *status = has_come(object) ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    pthread_mutex_unlock(&object->lock);
    return ACL_SUCCESS;
}

/* Tells whether no stream can still be waiting for the event. */
aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status)
{
    SIM_BORROWED sim_event *object = NULL;
    aclError error;

    if (!status)
        return FAIL(ACL_ERROR_INVALID_PARAM, "status is NULL");
    if ((error = find_event(__func__, event, &object)))
        return error;
    pthread_mutex_lock(&object->lock);
    *status = object->completed >= object->recorded ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
    pthread_mutex_unlock(&object->lock);
    return ACL_SUCCESS;
}

/* Returns when the event's turn has come, with the error of what failed before it in its stream. Does not wait for an
 * event that was not recorded. */
aclError aclrtSynchronizeEvent(aclrtEvent event)
{
    SIM_BORROWED sim_event *object = NULL;
    event_task task;
    aclError error;

    if ((error = find_event(__func__, event, &object)) ||
        (error = sim_refuse_captured_event(__func__, &object->point)) || (error = sim_refuse_in_capture(__func__)))
        return error;
    task = (event_task){object, NULL, current_record(object)};
    return wait_for_event(&task);
}

/* With the event's lock held. */
static aclError check_time(const char *function, const sim_event *event)
{
    if (!(event->flags & ACL_EVENT_TIME_LINE))
        return sim_fail(function, ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID, "the event was made without timing");
    if (!has_come(event))
        return sim_fail(function, ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID, "the event's turn has not come");
    return ACL_SUCCESS;
}

static aclError time_of(const char *function, aclrtEvent handle, int64_t *time)
{
    SIM_BORROWED sim_event *event = NULL;
    aclError error;

    if ((error = find_event(function, handle, &event)) || (error = sim_refuse_captured_event(function, &event->point)))
        return error;
    pthread_mutex_lock(&event->lock);
    error = check_time(function, event);
    *time = event->time;
    pthread_mutex_unlock(&event->lock);
    return error;
}

/* Tells the milliseconds between two events that were made with timing and whose turn has come. */
aclError aclrtEventElapsedTime(float *ms, aclrtEvent startEvent, aclrtEvent endEvent)
{
    int64_t start, end;
    aclError error;

    if (!ms)
        return FAIL(ACL_ERROR_INVALID_PARAM, "ms is NULL");
    if ((error = time_of(__func__, startEvent, &start)) || (error = time_of(__func__, endEvent, &end)))
        return error;
    if (end < start)
        return FAIL(ACL_ERROR_RT_EVENT_TIMESTAMP_REVERSAL, "the end came %lld ns before the start",
                    (long long)(start - end));
    *ms = (float)(end - start) / 1e6f;
    return ACL_SUCCESS;
}

/* Tells when the event's turn came, in microseconds of the steady clock. */
aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t *timestamp)
{
    int64_t time;
    aclError error;

    if (!timestamp)
        return FAIL(ACL_ERROR_INVALID_PARAM, "timestamp is NULL");
    if ((error = time_of(__func__, event, &time)))
        return error;
    *timestamp = (uint64_t)time / 1000;
    return ACL_SUCCESS;
}
