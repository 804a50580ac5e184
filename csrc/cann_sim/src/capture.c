#include "capture.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "cann_sim.h"
#include "errors.h"
#include "graph.h"

/* A stream's part in a capture. `work` counts what it was given; `joined` is how much of that the capture's first
 * stream, or one that will be joined itself, waits for. */
typedef struct sim_part {
    struct sim_part *next; /* of the same capture */
    struct sim_capture *capture;
    sim_stream *stream; /* with a reference */
    uint64_t work, joined;
} sim_part;

/* A capture under way. */
typedef struct sim_capture {
    struct sim_capture *next;
    sim_graph *graph; /* lives at least as long: it cannot be destroyed before it is complete */
    aclmdlRICaptureMode mode;
    pthread_t thread; /* that began the capture */
    sim_part *parts;  /* the last is that of the first stream */
    bool invalid;
} sim_capture;

/* Captures are rare and short: one lock for all of them. `captures` tells without it that there is none. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static sim_capture *active;
static atomic_int captures;
static _Thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

/* With the lock held. */
static aclError join(const char *function, sim_capture *capture, sim_stream *stream)
{
    sim_part *part;
    aclError error = sim_take_graph_stream(function, capture->graph, stream->device);

    if (error)
        return error;
    if (!(part = malloc(sizeof *part)))
        return sim_no_memory(function);
    *part = (sim_part){capture->parts, capture, stream, 0, 0};
    capture->parts = stream->part = part;
    sim_hold(&stream->object);
    return ACL_SUCCESS;
}

/* With the lock held: the streams are free again. The caller releases the capture without the lock. */
static void finish(sim_capture *capture)
{
    sim_capture **place;

    for (place = &active; *place != capture; place = &(*place)->next)
        ;
    *place = capture->next;
    captures--;
    for (sim_part *part = capture->parts; part; part = part->next)
        part->stream->part = NULL;
}

static void release_capture(sim_capture *capture)
{
    sim_part *part;

    while ((part = capture->parts)) {
        capture->parts = part->next;
        sim_let_go(&part->stream->object);
        free(part);
    }
    free(capture);
}

static const sim_part *first_part(const sim_capture *capture)
{
    const sim_part *part = capture->parts;

    while (part->next)
        part = part->next;
    return part;
}

/* With the lock held: by an error, or because one of the streams was destroyed. */
static bool is_spoilt(const sim_capture *capture)
{
    for (const sim_part *part = capture->parts; part; part = part->next)
        if (sim_is_closed(part->stream))
            return true;
    return capture->invalid;
}

static bool is_captured(const sim_stream *stream)
{
    bool captured;

    if (!captures)
        return false;
    pthread_mutex_lock(&lock);
    captured = stream->part != NULL;
    pthread_mutex_unlock(&lock);
    return captured;
}

/* With the lock held: whether work for the stream can be kept. */
static aclError check_part(const char *function, const sim_stream *stream)
{
    if (!stream->part)
        return sim_fail(function, ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not being captured");
    if (is_spoilt(stream->part->capture))
        return sim_fail(function, ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED,
                        "the capture was spoilt by an earlier error");
    return ACL_SUCCESS;
}

/* Keeps a node, or releases it. */
static aclError keep_node(const char *function, sim_stream *stream, const cann_sim_node *node)
{
    aclError error;

    pthread_mutex_lock(&lock);
    if (!(error = check_part(function, stream)) &&
        !(error = sim_add_node(function, stream->part->capture->graph, node)))
        stream->part->work++;
    pthread_mutex_unlock(&lock);
    if (error && node->release)
        node->release(node->argument);
    return error;
}

static void invalidate(sim_stream *stream)
{
    pthread_mutex_lock(&lock);
    if (stream->part)
        stream->part->capture->invalid = true;
    pthread_mutex_unlock(&lock);
}

/* Runs a task in a captured stream, here and now, and leaves its argument alone. */
static aclError run_captured(const char *function, sim_stream *stream, const sim_task *task)
{
    sim_task once = *task;
    aclError error;

    once.release = NULL;
    once.waits = false;
    pthread_mutex_lock(&lock);
    error = check_part(function, stream);
    pthread_mutex_unlock(&lock);
    if (error || (error = sim_drain(function, stream, -1, false)))
        return error;
    return sim_run(function, stream, &once);
}

/* Runs a task in a captured stream and keeps it as a node. */
static aclError capture_task(const char *function, sim_stream *stream, const sim_task *task)
{
    cann_sim_node node = {task->name, task->run, task->release, task->argument, task->waits};
    aclError error = run_captured(function, stream, task);

    if (!error)
        return keep_node(function, stream, &node);
    invalidate(stream);
    sim_release_task(task);
    return error;
}

aclError sim_submit(const char *function, aclrtStream handle, const sim_task *task)
{
    SIM_BORROWED sim_stream *stream = NULL;
    aclError error = sim_find_stream(function, handle, &stream);

    if (error) {
        sim_release_task(task);
        return error;
    }
    return is_captured(stream) ? capture_task(function, stream, task) : sim_run(function, stream, task);
}

void sim_capture_record(sim_stream *stream, sim_capture_point *point)
{
    pthread_mutex_lock(&lock);
    *point = (sim_capture_point){0};
    if (stream->part)
        *point = (sim_capture_point){stream->part->capture->graph->id, stream, stream->part->work};
    pthread_mutex_unlock(&lock);
}

/* With the lock held: the capture into the graph with this number, or NULL. */
static sim_capture *find_capture(uint64_t graph)
{
    sim_capture *each;

    for (each = active; each && each->graph->id != graph; each = each->next)
        ;
    return each;
}

/* With the lock held: the stream, whether or not it is being captured, waits for an event outside of all captures. */
static aclError wait_for_outsider(const char *function, sim_stream *stream, bool recorded)
{
    if (!stream->part || !recorded)
        return ACL_SUCCESS;
    stream->part->capture->invalid = true;
    return sim_fail(function, ACL_ERROR_RT_CAPTURE_DEPENDENCY,
                    "the stream is being captured, the event was recorded outside of the capture");
}

/* With the lock held: the stream waits for an event in a captured stream, and joins the capture if it is not in it. */
static aclError wait_for_point(const char *function, sim_stream *stream, const sim_capture_point *point)
{
    sim_capture *capture = find_capture(point->graph);
    aclError error;

    if (!capture)
        return sim_fail(function, ACL_ERROR_RT_CAPTURE_DEPENDENCY, "the event was recorded in a capture that is over");
    if (stream->part && stream->part->capture != capture)
        return sim_fail(function, ACL_ERROR_RT_CAPTURE_DEPENDENCY, "the event belongs to another capture");
    if (!stream->part && (error = join(function, capture, stream))) {
        capture->invalid = true;
        return error;
    }
    if (stream == point->stream)
        return ACL_SUCCESS;
    for (sim_part *part = capture->parts; part; part = part->next)
        if (part->stream == point->stream && part->joined < point->work)
            part->joined = point->work;
    stream->part->work++;
    return ACL_SUCCESS;
}

aclError sim_capture_wait(const char *function, sim_stream *stream, const sim_capture_point *point, bool recorded)
{
    aclError error;

    pthread_mutex_lock(&lock);
    error = point->graph ? wait_for_point(function, stream, point) : wait_for_outsider(function, stream, recorded);
    pthread_mutex_unlock(&lock);
    return error;
}

/* Whether the capture lets the calling thread make the host wait. */
static bool allows_waiting(const sim_capture *capture)
{
    if (capture->mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED)
        return true;
    if (pthread_equal(capture->thread, pthread_self()))
        return false;
    return capture->mode == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL ||
           thread_mode == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL;
}

/* With the lock held. */
static aclError refuse_waiting(const char *function)
{
    for (sim_capture *each = active; each; each = each->next)
        if (!allows_waiting(each)) {
            each->invalid = true;
            return sim_fail(function, ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, "not while a stream is being captured");
        }
    return ACL_SUCCESS;
}

aclError sim_refuse_in_capture(const char *function)
{
    aclError error;

    if (!captures || thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED)
        return ACL_SUCCESS;
    pthread_mutex_lock(&lock);
    error = refuse_waiting(function);
    pthread_mutex_unlock(&lock);
    return error;
}

aclError sim_refuse_if_captured(const char *function, sim_stream *stream)
{
    if (!is_captured(stream))
        return ACL_SUCCESS;
    invalidate(stream);
    return sim_fail(function, ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured");
}

aclError sim_refuse_captured_event(const char *function, const sim_capture_point *point)
{
    sim_capture *capture;
    bool captured;

    pthread_mutex_lock(&lock);
    if ((captured = point->graph != 0) && (capture = find_capture(point->graph)))
        capture->invalid = true;
    pthread_mutex_unlock(&lock);
    if (!captured)
        return ACL_SUCCESS;
    return sim_fail(function, ACL_ERROR_RT_EVENT_CAPTURED, "the event was recorded in a captured stream");
}

/* A capture into a new graph, not yet begun; NULL, with the thread's error set, if there is no room for it. */
static sim_capture *new_capture(const char *function, aclmdlRICaptureMode mode)
{
    sim_capture *capture = calloc(1, sizeof *capture);

    if (!capture) {
        sim_no_memory(function);
        return NULL;
    }
    capture->mode = mode;
    capture->thread = pthread_self();
    if ((capture->graph = sim_new_graph(function)))
        return capture;
    free(capture);
    return NULL;
}

/* With the lock held. */
static aclError begin(const char *function, sim_capture *capture, sim_stream *stream)
{
    aclError error;

    if (stream->part)
        return sim_fail(function, ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured");
    if ((error = join(function, capture, stream)))
        return error;
    capture->next = active;
    active = capture;
    captures++;
    return ACL_SUCCESS;
}

/* Keeps all work that is put into `stream` from now on. `mode` says who may still make the host wait meanwhile: nobody
 * (global), other threads (thread-local), everybody (relaxed). */
aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode)
{
    SIM_BORROWED sim_stream *object = NULL;
    sim_capture *capture;
    aclError error;

    if ((int)mode < 0 || mode > ACL_MODEL_RI_CAPTURE_MODE_RELAXED)
        return FAIL(ACL_ERROR_INVALID_PARAM, "mode %d", (int)mode);
    if (!stream)
        return FAIL(ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT, "the default stream cannot be captured");
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    if (!(capture = new_capture(__func__, mode)))
        return ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;

    pthread_mutex_lock(&lock);
    error = begin(__func__, capture, object);
    pthread_mutex_unlock(&lock);
    if (error) {
        sim_drop_graph(capture->graph);
        release_capture(capture);
    }
    return error;
}

/* Tells whether the stream is being captured, and into which graph. */
aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status, aclmdlRI *modelRI)
{
    SIM_BORROWED sim_stream *object = NULL;
    aclmdlRI graph = NULL;
    aclError error;

    if (!status)
        return FAIL(ACL_ERROR_INVALID_PARAM, "status is NULL");
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    *status = ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    pthread_mutex_lock(&lock);
    if (object->part) {
        const sim_capture *capture = object->part->capture;

        *status = is_spoilt(capture) ? ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED : ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
        graph = capture->graph->handle;
    }
    pthread_mutex_unlock(&lock);
    if (modelRI)
        *modelRI = graph;
    return ACL_SUCCESS;
}

/* With the lock held: whether the calling thread may end a capture in this stream. */
static aclError check_caller(const char *function, const sim_stream *stream)
{
    const sim_capture *capture = stream->part ? stream->part->capture : NULL;

    if (!capture)
        return sim_fail(function, ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not being captured");
    if (first_part(capture)->stream != stream)
        return sim_fail(function, ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "the capture did not begin in this stream");
    if (capture->mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED && !pthread_equal(capture->thread, pthread_self()))
        return sim_fail(function, ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD, "the capture was begun by another thread");
    return ACL_SUCCESS;
}

/* With the lock held: whether the capture ends well. */
static aclError check_result(const char *function, const sim_capture *capture)
{
    if (is_spoilt(capture))
        return sim_fail(function, ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED,
                        "the capture was spoilt by an earlier error");
    for (const sim_part *part = capture->parts; part->next; part = part->next)
        if (part->joined < part->work)
            return sim_fail(function, ACL_ERROR_RT_STREAM_UNJOINED,
                            "stream %d joined the capture, and nothing waits for its last work", part->stream->id);
    return ACL_SUCCESS;
}

/* Ends the capture that began in `stream`. The caller must destroy the graph; after an error there is none. */
aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI *modelRI)
{
    SIM_BORROWED sim_stream *object = NULL;
    sim_capture *ended = NULL;
    aclError error;

    if (!modelRI)
        return FAIL(ACL_ERROR_INVALID_PARAM, "modelRI is NULL");
    *modelRI = NULL;
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;

    pthread_mutex_lock(&lock);
    if (!(error = check_caller(__func__, object))) {
        ended = object->part->capture;
        error = check_result(__func__, ended);
        finish(ended);
    }
    pthread_mutex_unlock(&lock);
    if (!ended)
        return error;

    if (error) {
        sim_drop_graph(ended->graph);
    } else {
        *modelRI = ended->graph->handle;
        sim_complete_graph(ended->graph);
    }
    release_capture(ended);
    return error;
}

/* Sets what the calling thread may do while others capture, and returns what it was before. */
aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode)
{
    aclmdlRICaptureMode before = thread_mode;

    if (!mode || (int)*mode < 0 || *mode > ACL_MODEL_RI_CAPTURE_MODE_RELAXED)
        return FAIL(ACL_ERROR_INVALID_PARAM, "mode");
    thread_mode = *mode;
    *mode = before;
    return ACL_SUCCESS;
}

int cann_sim_capturing(aclrtStream stream)
{
    SIM_BORROWED sim_stream *object = NULL;

    if (!captures || sim_find_stream(__func__, stream, &object))
        return 0;
    return is_captured(object);
}

aclError cann_sim_record(aclrtStream stream, const cann_sim_node *node)
{
    SIM_BORROWED sim_stream *object = NULL;
    aclError error = sim_find_stream(__func__, stream, &object);

    if (!error)
        return keep_node(__func__, object, node);
    if (node->release)
        node->release(node->argument);
    return error;
}
