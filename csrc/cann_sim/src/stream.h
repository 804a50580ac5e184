/* Streams: work in order.
 *
 * Work runs in the thread that submits it, unless something before it in the stream still waits, or it may wait itself
 * and CANN_SIM_ASYNC is set; then it goes to a queue that a thread of the stream works off. So a stream is as
 * synchronous as it can be, and its order is always that of submission.
 *
 * Work that fails in the queue leaves its error with the stream: what follows is skipped, and the next synchronisation
 * reports the error and clears it.
 */
#ifndef CANN_SIM_STREAM_H
#define CANN_SIM_STREAM_H

#include <pthread.h>
#include <stdbool.h>
#include <time.h>

#include "acl_api.h"
#include "handles.h"

/* `run` may be called more than once (a captured graph repeats it). `release` frees `argument` after the last call. */
typedef struct {
    const char *name; /* lives as long as the program */
    aclError (*run)(void *argument);
    void (*release)(void *argument);
    void *argument;
    bool waits;  /* for others: may be queued */
    bool always; /* runs even if work before it failed */
} sim_task;

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

    pthread_mutex_t lock; /* what follows */
    pthread_cond_t changed;
    sim_queued *queue, **queue_end;
    bool running, has_worker, closing;
    pthread_t runner; /* if running */
    aclError error;
    char error_text[256];

    struct sim_capture *capture; /* capture.c's */
} sim_stream;

/* Work for the stream `handle` (NULL: the default stream) of the current device. The argument is the stream's
 * afterwards, whatever is returned. Errors of work that ran at once are returned, later ones reported later. */
aclError sim_submit(const char *function, aclrtStream handle, const sim_task *task);

/* The stream behind a handle (NULL: the default stream of the current device), with a reference; it must belong to the
 * current device. */
aclError sim_find_stream(const char *function, aclrtStream handle, sim_stream **stream);

/* sim_submit for who has the stream; does not look at captures. */
aclError sim_run(const char *function, sim_stream *stream, const sim_task *task);

/* Waits until the stream is idle. Returns its error, and clears it if `clear` is set. `timeout` in milliseconds, -1 for
 * ever. */
aclError sim_drain(const char *function, sim_stream *stream, int timeout, bool clear);

/* For a device as a whole. */
aclError sim_synchronize_streams(const char *function, int device, int timeout);
void sim_destroy_streams(int device);

/* A condition that counts time by the steady clock, and a point of that time. */
void sim_init_condition(pthread_cond_t *condition);
struct timespec sim_deadline(int milliseconds);

#endif
