/* Streams: work in order.
 *
 * Work runs in the thread that submits it, unless something before it in the stream still waits, or it may wait itself
 * and CANN_SIM_ASYNC is set. Then it goes to a queue that a thread of the stream works off. So a stream is as
 * synchronous as it can be, and its order is always that of submission.
 *
 * Work that fails in the queue leaves its error with the stream: what follows is skipped, and the next synchronisation
 * reports the error and clears it.
 *
 * Streams know nothing of captures, which are built on them; work for a stream that may be captured goes through
 * sim_submit (capture.h).
 */
#ifndef CANN_SIM_STREAM_H
#define CANN_SIM_STREAM_H

#include <pthread.h>
#include <stdbool.h>

#include "acl_api.h"
#include "handles.h"

/* `run` may be called more than once (a captured graph repeats it). `release` frees `argument` after the last call;
 * NULL if there is nothing to free. */
typedef struct {
    const char *name; /* lives as long as the program */
    aclError (*run)(void *argument);
    void (*release)(void *argument);
    void *argument;
    bool waits;  /* for others: may be queued */
    bool always; /* runs even if work before it failed */
} sim_task;

/* Calls `release`, if there is one. */
void sim_release_task(const sim_task *task);

typedef struct sim_queued {
    struct sim_queued *next;
    sim_task task;
} sim_queued;

typedef struct sim_stream {
    sim_object object;
    struct sim_stream *next; /* of the same device */
    void *handle;
    int device, id;
    uint32_t overflow_switch;

    pthread_mutex_t lock; /* for all fields up to the error's text */
    pthread_cond_t changed;
    sim_queued *queue, **queue_end;
    bool running, has_worker, closing;
    pthread_t runner; /* if running */
    pthread_t worker; /* if it has one: a thread that is joined or detached when the stream is closed */
    aclError error;
    char error_text[256];

    struct sim_part *part; /* in a capture, or NULL; belongs to capture.c */
} sim_stream;

/* Counts streams of a device as taken: those that are made here, and those that graphs and communicators hold. Fails
 * with ACL_ERROR_RT_NO_STREAM_RESOURCE; counts them as free again. */
aclError sim_take_streams(const char *function, int device, size_t count);
void sim_give_streams(int device, size_t count);

/* Makes a stream of `device`; `handle` is NULL after an error. */
aclError sim_create_stream(const char *function, int device, void **handle);

/* The stream behind a handle (NULL: the default stream of the current device), with a reference; it must belong to the
 * current device. `stream` is NULL after an error. */
aclError sim_find_stream(const char *function, aclrtStream handle, sim_stream **stream);

/* Runs a task when it is its turn: now, or later in the stream's thread. The argument is the stream's afterwards,
 * whatever is returned. Errors of work that ran at once are returned, later ones reported later. */
aclError sim_run(const char *function, sim_stream *stream, const sim_task *task);

/* Whether all work in the stream is done. */
bool sim_is_idle(sim_stream *stream);

/* Waits until the stream is idle. Returns its error, and clears it if `clear` is set. `timeout` in milliseconds, -1 for
 * ever. */
aclError sim_drain(const char *function, sim_stream *stream, int timeout, bool clear);

/* The same, one after the other, for all streams of a device; returns the first error and clears all of them. */
aclError sim_drain_device(const char *function, int device, int timeout);

/* Ends a stream whose handle was retired, and gives the reference back. What is queued is not done. */
void sim_close_stream(sim_stream *stream);

/* The same for all streams of a device that were not destroyed before. */
void sim_close_streams(int device);

/* Whether the stream was destroyed, for whoever still has a reference. */
bool sim_is_closed(sim_stream *stream);

#endif
