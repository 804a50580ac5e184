/* Graph capture: what is put into captured streams is kept, to be repeated.
 *
 * The streams run while they are captured, and so does the work that is captured: a capture is the first replay. The
 * rules are those of a device: a capture begins and ends in one stream, others join it by waiting for its events and
 * must be waited for before its end, and a call that would make the host wait is refused and spoils the capture.
 *
 * Captures are built on streams and graphs, which do not know of them. Whoever puts work into a stream, records or
 * waits for an event, or makes the host wait, asks here first.
 */
#ifndef CANN_SIM_CAPTURE_H
#define CANN_SIM_CAPTURE_H

#include "acl_api.h"
#include "stream.h"

/* Where in a capture an event was last recorded. It is kept by the event; only capture.c reads and writes it. */
typedef struct {
    uint64_t graph; /* its id; 0: the stream was not being captured */
    const sim_stream *stream;
    uint64_t work; /* how much the stream had been given */
} sim_capture_point;

/* Work for the stream `handle` (NULL: the default stream of the current device). If the stream is being captured, the
 * work runs at once and is kept as a node. The task's argument is the stream's or the graph's afterwards, whatever is
 * returned. Errors of work that ran at once are returned, later ones reported later. */
aclError sim_submit(const char *function, aclrtStream handle, const sim_task *task);

/* The stream is about to record the event to which the point belongs. */
void sim_capture_record(sim_stream *stream, sim_capture_point *point);

/* The stream is about to wait for the event to which the point belongs, and which has been `recorded` or not: the
 * stream joins the event's capture. An error if the two do not go together. */
aclError sim_capture_wait(const char *function, sim_stream *stream, const sim_capture_point *point, bool recorded);

/* Errors for calls that make the host wait: anywhere while a capture forbids it, for a captured stream, for an event
 * inside a graph. The capture is invalid afterwards. */
aclError sim_refuse_in_capture(const char *function);
aclError sim_refuse_if_captured(const char *function, sim_stream *stream);
aclError sim_refuse_captured_event(const char *function, const sim_capture_point *point);

#endif
