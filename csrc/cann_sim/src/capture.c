#include "capture.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cann_sim.h"
#include "errors.h"

typedef struct node {
    struct node *next;
    char name[64];
    aclError (*run)(void *argument);
    void (*release)(void *argument);
    void *argument;
} node;

/* A stream's part in a capture. `work` counts what it was given; `joined` is how much of that the capture's first
 * stream, or one that will be joined itself, waits for. */
typedef struct sim_capture {
    struct sim_capture *next; /* of the same graph */
    struct graph *graph;
    sim_stream *stream;
    uint64_t work, joined;
} sim_capture;

typedef struct graph {
    sim_object object;
    struct graph *next; /* of the captures under way */
    void *handle;
    uint32_t id;
    aclmdlRICaptureMode mode;
    pthread_t thread;     /* that began the capture */
    sim_capture *streams; /* the last is the first that was captured; NULL when the capture is over */
    bool invalid;
    bool waits; /* one of the nodes does */
    node *nodes, **nodes_end;
    size_t node_count;
    int runs; /* replays under way */
} graph;

/* Captures are rare and short: one lock for all of them. `captures` tells without it that there is none. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static graph *active;
static atomic_int captures;
static uint32_t last_id;
static _Thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

static void release_graph(sim_object *object)
{
    graph *graph = (struct graph *)object;
    node *each;

    while ((each = graph->nodes)) {
        graph->nodes = each->next;
        if (each->release)
            each->release(each->argument);
        free(each);
    }
    free(graph);
}

/* With the lock held. */
static aclError join(const char *function, graph *graph, sim_stream *stream)
{
    sim_capture *part = calloc(1, sizeof *part);

    if (!part)
        return sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the host has no memory left");
    *part = (sim_capture){graph->streams, graph, stream, 0, 0};
    graph->streams = stream->capture = part;
    sim_hold(&stream->object);
    return ACL_SUCCESS;
}

/* With the lock held: the graph takes no more work. Returns the streams for the caller to let go without the lock. */
static sim_capture *finish(graph *finished)
{
    sim_capture *parts = finished->streams;
    graph **place;

    for (place = &active; *place != finished; place = &(*place)->next)
        ;
    *place = finished->next;
    captures--;
    for (sim_capture *part = parts; part; part = part->next)
        part->stream->capture = NULL;
    finished->streams = NULL;
    return parts;
}

static void let_go(sim_capture *parts)
{
    while (parts) {
        sim_capture *next = parts->next;

        sim_let_go(&parts->stream->object);
        free(parts);
        parts = next;
    }
}

static sim_capture *first_of(const graph *graph)
{
    sim_capture *part = graph->streams;

    while (part->next)
        part = part->next;
    return part;
}

bool sim_is_captured(sim_stream *stream)
{
    bool captured;

    if (!captures)
        return false;
    pthread_mutex_lock(&lock);
    captured = stream->capture != NULL;
    pthread_mutex_unlock(&lock);
    return captured;
}

/* With the lock held: whether work for the stream can be kept. */
static aclError check_part(const char *function, const sim_stream *stream)
{
    if (!stream->capture)
        return sim_fail(function, ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not being captured");
    if (stream->capture->graph->invalid)
        return sim_fail(function, ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED,
                        "the capture was spoilt by an earlier error");
    return ACL_SUCCESS;
}

static aclError add_node(const char *function, sim_stream *stream, const cann_sim_node *source)
{
    aclError error = ACL_SUCCESS;
    node *entry = calloc(1, sizeof *entry);

    if (!entry) {
        error = sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the host has no memory left");
    } else {
        snprintf(entry->name, sizeof entry->name, "%s", source->name ? source->name : "");
        entry->run = source->run;
        entry->release = source->release;
        entry->argument = source->argument;
        pthread_mutex_lock(&lock);
        if (!(error = check_part(function, stream))) {
            graph *graph = stream->capture->graph;

            stream->capture->work++;
            *graph->nodes_end = entry;
            graph->nodes_end = &entry->next;
            graph->node_count++;
            graph->waits = graph->waits || source->waits;
        }
        pthread_mutex_unlock(&lock);
    }
    if (error) {
        free(entry);
        if (source->release)
            source->release(source->argument);
    }
    return error;
}

static void invalidate(sim_stream *stream)
{
    pthread_mutex_lock(&lock);
    if (stream->capture)
        stream->capture->graph->invalid = true;
    pthread_mutex_unlock(&lock);
}

aclError sim_capture_task(const char *function, sim_stream *stream, const sim_task *task)
{
    cann_sim_node source = {task->name, task->run, task->release, task->argument, task->waits};
    sim_task once = *task;
    aclError error;

    once.release = NULL;
    once.waits = false;
    pthread_mutex_lock(&lock);
    error = check_part(function, stream);
    pthread_mutex_unlock(&lock);
    if (!error)
        error = sim_drain(function, stream, -1, false); /* so that it runs here and now */
    if (error || (error = sim_run(function, stream, &once))) {
        invalidate(stream);
        if (task->release)
            task->release(task->argument);
        return error;
    }
    return add_node(function, stream, &source);
}

void sim_capture_record(sim_event *event, sim_stream *stream)
{
    pthread_mutex_lock(&lock);
    event->captured_by = stream->capture ? stream->capture->graph->id : 0;
    event->captured_in = stream->capture ? stream : NULL;
    event->captured_at = stream->capture ? stream->capture->work : 0;
    pthread_mutex_unlock(&lock);
}

/* With the lock held. */
static graph *active_graph(uint64_t id)
{
    graph *each;

    for (each = active; each && each->id != id; each = each->next)
        ;
    return each;
}

aclError sim_capture_wait(const char *function, sim_stream *stream, sim_event *event)
{
    aclError error = ACL_SUCCESS;
    bool recorded;
    graph *graph;

    pthread_mutex_lock(&event->lock);
    recorded = event->recorded > event->reset;
    pthread_mutex_unlock(&event->lock);
    pthread_mutex_lock(&lock);
    graph = event->captured_by ? active_graph(event->captured_by) : NULL;
    if (event->captured_by && !graph) {
        error = sim_fail(function, ACL_ERROR_RT_CAPTURE_DEPENDENCY, "the event was recorded in a capture that is over");
    } else if (graph && stream->capture && stream->capture->graph != graph) {
        error = sim_fail(function, ACL_ERROR_RT_CAPTURE_DEPENDENCY, "the event belongs to another capture");
    } else if (!graph && stream->capture && recorded) {
        error = sim_fail(function, ACL_ERROR_RT_CAPTURE_DEPENDENCY,
                         "the stream is being captured, the event was recorded outside of the capture");
        stream->capture->graph->invalid = true;
    } else if (graph && (stream->capture || !(error = join(function, graph, stream)))) {
        for (sim_capture *part = graph->streams; part; part = part->next)
            if (part->stream == event->captured_in && part->stream != stream && part->joined < event->captured_at)
                part->joined = event->captured_at;
        if (event->captured_in != stream)
            stream->capture->work++;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

aclError sim_refuse_in_capture(const char *function)
{
    aclError error = ACL_SUCCESS;

    if (!captures || thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED)
        return ACL_SUCCESS;
    pthread_mutex_lock(&lock);
    for (graph *each = active; each && !error; each = each->next) {
        bool ours = pthread_equal(each->thread, pthread_self());

        if (each->mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED ||
            (!ours && (each->mode == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL ||
                       thread_mode == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL)))
            continue;
        each->invalid = true;
        error = sim_fail(function, ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, "not while a stream is being captured");
    }
    pthread_mutex_unlock(&lock);
    return error;
}

aclError sim_refuse_if_captured(const char *function, sim_stream *stream)
{
    aclError error = ACL_SUCCESS;

    if (!captures)
        return ACL_SUCCESS;
    pthread_mutex_lock(&lock);
    if (stream->capture) {
        stream->capture->graph->invalid = true;
        error = sim_fail(function, ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured");
    }
    pthread_mutex_unlock(&lock);
    return error;
}

aclError sim_refuse_captured_event(const char *function, sim_event *event)
{
    aclError error = ACL_SUCCESS;

    pthread_mutex_lock(&lock);
    if (event->captured_by) {
        graph *graph = active_graph(event->captured_by);

        if (graph)
            graph->invalid = true;
        error = sim_fail(function, ACL_ERROR_RT_EVENT_CAPTURED, "the event was recorded in a captured stream");
    }
    pthread_mutex_unlock(&lock);
    return error;
}

void sim_capture_forget(sim_stream *stream)
{
    invalidate(stream); /* the capture keeps its reference until its end */
}

/* What is put into `stream` from now on is kept. `mode` says who may still make the host wait meanwhile: nobody
 * (global), other threads (thread-local), everybody (relaxed). */
aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode)
{
    sim_stream *object;
    graph *graph = NULL;
    aclError error;

    if ((int)mode < 0 || mode > ACL_MODEL_RI_CAPTURE_MODE_RELAXED)
        return FAIL(ACL_ERROR_INVALID_PARAM, "mode %d", (int)mode);
    if (!stream)
        return FAIL(ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT, "the default stream cannot be captured");
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    if (!(graph = calloc(1, sizeof *graph))) {
        error = FAIL(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the host has no memory left");
        goto done;
    }
    graph->mode = mode;
    graph->thread = pthread_self();
    graph->nodes_end = &graph->nodes;
    if (!(graph->handle = sim_publish(SIM_GRAPH, &graph->object, release_graph))) {
        free(graph);
        error = ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
        goto done;
    }
    pthread_mutex_lock(&lock);
    if (object->capture)
        error = FAIL(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured");
    else if (!(error = join(__func__, graph, object))) {
        graph->id = ++last_id;
        graph->next = active;
        active = graph;
        captures++;
    }
    pthread_mutex_unlock(&lock);
    if (error) {
        sim_retire(SIM_GRAPH, graph->handle);
        sim_let_go(&graph->object);
    }
done:
    sim_let_go(&object->object);
    return error;
}

/* Whether the stream is being captured, and into which graph. */
aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status, aclmdlRI *modelRI)
{
    sim_stream *object;
    aclError error;

    if (!status)
        return FAIL(ACL_ERROR_INVALID_PARAM, "status is NULL");
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    pthread_mutex_lock(&lock);
    *status = ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    if (modelRI)
        *modelRI = NULL;
    if (object->capture) {
        *status = object->capture->graph->invalid ? ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED
                                                  : ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
        if (modelRI)
            *modelRI = object->capture->graph->handle;
    }
    pthread_mutex_unlock(&lock);
    sim_let_go(&object->object);
    return ACL_SUCCESS;
}

/* With the lock held: why a capture cannot end well. The first part of the list of streams joined last. */
static aclError check_end(const char *function, const graph *graph)
{
    if (graph->invalid)
        return sim_fail(function, ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED,
                        "the capture was spoilt by an earlier error");
    for (const sim_capture *part = graph->streams; part->next; part = part->next)
        if (part->joined < part->work)
            return sim_fail(function, ACL_ERROR_RT_STREAM_UNJOINED,
                            "stream %d joined the capture, and nothing waits for its last work", part->stream->id);
    return ACL_SUCCESS;
}

/* Ends the capture that began in `stream`. The graph is the caller's, to be destroyed; after an error there is none. */
aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI *modelRI)
{
    sim_capture *parts = NULL;
    sim_stream *object;
    graph *graph;
    aclError error;

    if (!modelRI)
        return FAIL(ACL_ERROR_INVALID_PARAM, "modelRI is NULL");
    *modelRI = NULL;
    if ((error = sim_find_stream(__func__, stream, &object)))
        return error;
    pthread_mutex_lock(&lock);
    if (!object->capture) {
        error = FAIL(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not being captured");
        goto done;
    }
    graph = object->capture->graph;
    if (first_of(graph)->stream != object) {
        error = FAIL(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "the capture did not begin in this stream");
        goto done;
    }
    if (graph->mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED && !pthread_equal(graph->thread, pthread_self())) {
        error = FAIL(ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD, "the capture was begun by another thread");
        goto done;
    }
    error = check_end(__func__, graph);
    parts = finish(graph);
    if (!error)
        *modelRI = graph->handle;
done:
    pthread_mutex_unlock(&lock);
    if (parts && error && (graph = sim_retire(SIM_GRAPH, parts->graph->handle)))
        sim_let_go(&graph->object);
    let_go(parts);
    sim_let_go(&object->object);
    return error;
}

/* Sets what the calling thread allows itself while others capture, and returns what it was. */
aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode)
{
    aclmdlRICaptureMode before = thread_mode;

    if (!mode || (int)*mode < 0 || *mode > ACL_MODEL_RI_CAPTURE_MODE_RELAXED)
        return FAIL(ACL_ERROR_INVALID_PARAM, "mode");
    thread_mode = *mode;
    *mode = before;
    return ACL_SUCCESS;
}

static aclError find_graph(const char *function, aclmdlRI handle, graph **found)
{
    bool captured;

    if (!(*found = sim_acquire(SIM_GRAPH, handle)))
        return sim_fail(function, ACL_ERROR_RT_INVALID_HANDLE, "%p is not a graph, or was destroyed", handle);
    pthread_mutex_lock(&lock);
    captured = (*found)->streams != NULL;
    pthread_mutex_unlock(&lock);
    if (!captured)
        return ACL_SUCCESS;
    sim_let_go(&(*found)->object);
    return sim_fail(function, ACL_ERROR_RT_MODEL_CAPTURED, "the graph is still being captured");
}

static aclError replay(void *argument)
{
    graph *graph = argument;
    aclError error = ACL_SUCCESS;

    for (const node *each = graph->nodes; each && !error; each = each->next)
        if ((error = each->run(each->argument)))
            sim_fail(__func__, error, "%s: %s", each->name, sim_error_text());
    return error;
}

static void end_replay(void *argument)
{
    graph *graph = argument;

    pthread_mutex_lock(&lock);
    graph->runs--;
    pthread_mutex_unlock(&lock);
    sim_let_go(&graph->object);
}

/* Puts all nodes of the graph into `stream`, in the order of their capture. The first that fails ends it. */
aclError aclmdlRIExecuteAsync(aclmdlRI modelRI, aclrtStream stream)
{
    sim_task task = {.name = __func__, .run = replay, .release = end_replay};
    sim_stream *object = NULL;
    graph *graph;
    aclError error = find_graph(__func__, modelRI, &graph);

    if (error)
        return error;
    if ((error = sim_find_stream(__func__, stream, &object)))
        goto failed;
    if ((error = sim_refuse_if_captured(__func__, object)))
        goto failed;
    pthread_mutex_lock(&lock);
    graph->runs++;
    task.waits = graph->waits;
    pthread_mutex_unlock(&lock);
    task.argument = graph;
    error = sim_run(__func__, object, &task);
    sim_let_go(&object->object);
    return error;

failed:
    if (object)
        sim_let_go(&object->object);
    sim_let_go(&graph->object);
    return error;
}

/* Destroys a graph that is neither being captured nor replayed, and releases its nodes. */
aclError aclmdlRIDestroy(aclmdlRI modelRI)
{
    graph *graph;
    aclError error = find_graph(__func__, modelRI, &graph);
    int runs;

    if (error)
        return error;
    pthread_mutex_lock(&lock);
    runs = graph->runs;
    pthread_mutex_unlock(&lock);
    if (runs)
        error = FAIL(ACL_ERROR_RT_MODEL_RUNNING, "the graph is being replayed");
    else if (sim_retire(SIM_GRAPH, modelRI))
        sim_let_go(&graph->object);
    else
        error = FAIL(ACL_ERROR_RT_INVALID_HANDLE, "another thread destroyed the graph");
    sim_let_go(&graph->object);
    return error;
}

/* A number that no other graph of the process has had; valid during the capture, too. */
aclError aclmdlRIGetId(aclmdlRI modelRI, uint32_t *modelRIId)
{
    graph *graph = sim_acquire(SIM_GRAPH, modelRI);

    if (!graph)
        return FAIL(ACL_ERROR_RT_INVALID_HANDLE, "%p is not a graph, or was destroyed", modelRI);
    if (modelRIId)
        *modelRIId = graph->id;
    sim_let_go(&graph->object);
    return modelRIId ? ACL_SUCCESS : FAIL(ACL_ERROR_INVALID_PARAM, "modelRIId is NULL");
}

int cann_sim_capturing(aclrtStream stream)
{
    sim_stream *object;
    bool captured;

    if (!captures || sim_find_stream(__func__, stream, &object))
        return 0;
    captured = sim_is_captured(object);
    sim_let_go(&object->object);
    return captured;
}

aclError cann_sim_record(aclrtStream stream, const cann_sim_node *node)
{
    sim_stream *object;
    aclError error = sim_find_stream(__func__, stream, &object);

    if (error) {
        if (node->release)
            node->release(node->argument);
        return error;
    }
    error = add_node(__func__, object, node);
    sim_let_go(&object->object);
    return error;
}

aclError cann_sim_wait_for_turn(aclrtStream stream)
{
    sim_stream *object;
    aclError error = sim_find_stream(__func__, stream, &object);

    if (error)
        return error;
    error = sim_drain(__func__, object, -1, false);
    sim_let_go(&object->object);
    return error;
}

size_t cann_sim_node_count(aclmdlRI graph)
{
    struct graph *object = sim_acquire(SIM_GRAPH, graph);
    size_t count = 0;

    if (object) {
        pthread_mutex_lock(&lock);
        count = object->node_count;
        pthread_mutex_unlock(&lock);
        sim_let_go(&object->object);
    }
    return count;
}
