/* Graph capture: what is put into captured streams is kept, to be repeated.
 *
 * As the streams run while they are captured, so does what is captured: a capture is the first replay. The rules are
 * those of a device: a capture begins and ends in one stream, others join it by waiting for its events and must be
 * waited for before its end, and what would make the host wait is refused and spoils the capture.
 */
#ifndef CANN_SIM_CAPTURE_H
#define CANN_SIM_CAPTURE_H

#include "event.h"
#include "stream.h"

/* Whether work for the stream belongs to a graph. */
bool sim_is_captured(sim_stream *stream);

/* Runs a task in a captured stream and keeps it as a node. The argument is the graph's afterwards. */
aclError sim_capture_task(const char *function, sim_stream *stream, const sim_task *task);

/* The stream is about to record the event. */
void sim_capture_record(sim_event *event, sim_stream *stream);

/* The stream is about to wait for the event: joins streams to captures. An error if the two do not go together. */
aclError sim_capture_wait(const char *function, sim_stream *stream, sim_event *event);

/* Errors for calls that make the host wait: anywhere while a capture forbids it, for a captured stream, for an event
 * inside a graph. The capture is invalid afterwards. */
aclError sim_refuse_in_capture(const char *function);
aclError sim_refuse_if_captured(const char *function, sim_stream *stream);
aclError sim_refuse_captured_event(const char *function, sim_event *event);

/* The stream is being destroyed: a capture that it belongs to is invalid. */
void sim_capture_forget(sim_stream *stream);

#endif
