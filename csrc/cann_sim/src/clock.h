/* The steady clock, by which everything waits here. */
#ifndef CANN_SIM_CLOCK_H
#define CANN_SIM_CLOCK_H

#include <pthread.h>
#include <stdint.h>
#include <time.h>

/* The time in nanoseconds, and in seconds. */
int64_t sim_nanoseconds(void);
double sim_seconds(void);

/* How long poll may wait until a point of time in seconds: 0 when it has come. */
int sim_milliseconds_until(double seconds);

/* A condition that counts time by this clock, and the point of time in so many milliseconds for it. */
void sim_init_condition(pthread_cond_t *condition);
struct timespec sim_deadline(int milliseconds);

#endif
