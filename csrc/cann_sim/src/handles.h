/* Handles that stay distinguishable after their object is gone.
 *
 * What CANN's callers hold as a pointer (stream, event, graph, communicator) is a number here: kind, generation and
 * place in a table. A handle that was destroyed, or never was one, is recognised without touching memory, and an object
 * lives until the last thread that uses it has let go.
 */
#ifndef CANN_SIM_HANDLES_H
#define CANN_SIM_HANDLES_H

typedef enum { SIM_STREAM = 1, SIM_EVENT, SIM_GRAPH, SIM_PHYSICAL, SIM_COMMUNICATOR } sim_kind;

/* The first member of each object. */
typedef struct sim_object {
    int references;
    void (*release)(struct sim_object *object);
} sim_object;

/* A handle for a new object, whose single reference belongs to the handle; NULL with the thread's error set if there
 * are too many, and then the object is still the caller's. `release` frees the object after the last reference. */
void *sim_publish(sim_kind kind, sim_object *object, void (*release)(sim_object *object));

/* The object behind a live handle, with a reference for the caller; NULL if the handle is not live. */
void *sim_acquire(sim_kind kind, const void *handle);

/* As sim_acquire, but ends the handle: the caller gets the handle's own reference. Only one caller succeeds. */
void *sim_retire(sim_kind kind, const void *handle);

/* One more reference to an object that the caller has a reference to. */
void sim_hold(sim_object *object);

/* Gives a reference back. */
void sim_let_go(sim_object *object);

/* Marks a local variable that holds a reference or NULL: where its scope ends, the reference is given back. The
 * variable must be initialised where it is declared. */
#define SIM_BORROWED __attribute__((cleanup(sim_give_back)))
void sim_give_back(void *variable);

#endif
