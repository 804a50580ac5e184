#include "handles.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "errors.h"

/* 20 bits of place, 20 of generation, 3 of kind: handles look like addresses, which some callers print or sort. */
#define PLACE_BITS 20
#define GENERATION_BITS 20
#define MAX_PLACES (1u << PLACE_BITS)

typedef struct {
    sim_object *object; /* NULL: free */
    uint32_t generation;
    uint32_t next_free; /* a place, or MAX_PLACES */
} place;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static place *places;
static uint32_t place_count, first_free = MAX_PLACES;

static uintptr_t encode(sim_kind kind, uint32_t index)
{
    return ((uintptr_t)kind << (PLACE_BITS + GENERATION_BITS)) | ((uintptr_t)places[index].generation << PLACE_BITS) |
           index;
}

static place *find(sim_kind kind, const void *handle)
{
    uint32_t index = (uint32_t)((uintptr_t)handle & (MAX_PLACES - 1));

    if (index >= place_count || !places[index].object || encode(kind, index) != (uintptr_t)handle)
        return NULL;
    return &places[index];
}

static int grow(void)
{
    uint32_t count = place_count ? 2 * place_count : 256;
    place *more = count <= MAX_PLACES ? realloc(places, count * sizeof *more) : NULL;

    if (!more)
        return 0;
    places = more;
    while (place_count < count) {
        places[place_count] = (place){NULL, 0, first_free};
        first_free = place_count++;
    }
    return 1;
}

void *sim_publish(sim_kind kind, sim_object *object, void (*release)(sim_object *object))
{
    uintptr_t handle = 0;
    uint32_t index;

    pthread_mutex_lock(&lock);
    if (first_free != MAX_PLACES || grow()) {
        index = first_free;
        first_free = places[index].next_free;
        object->references = 1;
        object->release = release;
        places[index].object = object;
        places[index].generation = (places[index].generation + 1) % (1u << GENERATION_BITS);
        handle = encode(kind, index);
    }
    pthread_mutex_unlock(&lock);
    if (!handle)
        FAIL(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "too many streams, events, graphs and communicators");
    return (void *)handle;
}

void *sim_acquire(sim_kind kind, const void *handle)
{
    sim_object *object = NULL;
    place *found;

    pthread_mutex_lock(&lock);
    if ((found = find(kind, handle))) {
        object = found->object;
        object->references++;
    }
    pthread_mutex_unlock(&lock);
    return object;
}

void *sim_retire(sim_kind kind, const void *handle)
{
    sim_object *object = NULL;
    place *found;

    pthread_mutex_lock(&lock);
    if ((found = find(kind, handle))) {
        object = found->object;
        found->object = NULL;
        found->next_free = first_free;
        first_free = (uint32_t)(found - places);
    }
    pthread_mutex_unlock(&lock);
    return object;
}

void sim_hold(sim_object *object)
{
    pthread_mutex_lock(&lock);
    object->references++;
    pthread_mutex_unlock(&lock);
}

void sim_let_go(sim_object *object)
{
    int left;

    pthread_mutex_lock(&lock);
    left = --object->references;
    pthread_mutex_unlock(&lock);
    if (!left)
        object->release(object);
}

void sim_give_back(void *variable)
{
    sim_object *object;

    memcpy(&object, variable, sizeof object); /* it is a pointer to whatever begins with a sim_object */
    if (object)
        sim_let_go(object);
}
