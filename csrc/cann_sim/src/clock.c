#include "clock.h"

#include <math.h>

int64_t sim_nanoseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

double sim_seconds(void)
{
    return (double)sim_nanoseconds() * 1e-9;
}

int sim_milliseconds_until(double seconds)
{
    double left = ceil((seconds - sim_seconds()) * 1000);

    return left <= 0 ? 0 : left > 1e6 ? 1000000 : (int)left;
}

void sim_init_condition(pthread_cond_t *condition)
{
    pthread_condattr_t attributes;

    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

struct timespec sim_deadline(int milliseconds)
{
    int64_t deadline = sim_nanoseconds() + (int64_t)milliseconds * 1000000;

    return (struct timespec){deadline / 1000000000, deadline % 1000000000};
}
