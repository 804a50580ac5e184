/* Events: points in streams. */
#ifndef CANN_SIM_EVENT_H
#define CANN_SIM_EVENT_H

#include <pthread.h>

#include "handles.h"
#include "stream.h"

typedef struct sim_event {
    sim_object object;
    int device;
    uint32_t flags;

    pthread_mutex_t lock; /* what follows */
    pthread_cond_t changed;
    uint64_t recorded;  /* how often it was put into a stream */
    uint64_t completed; /* the last of these that has come to its turn */
    uint64_t reset;     /* how often, when it was reset */
    int64_t time;       /* of the last, in ns of the steady clock */
    aclError error;     /* of the stream before the last */
    char error_text[256];

    /* Where it was last recorded, if in a captured stream; capture.c's, under its lock. */
    uint64_t captured_by;
    const sim_stream *captured_in;
    uint64_t captured_at;
} sim_event;

#endif
