/* Functions that torch-npu needs in order to be loaded and that are not simulated: calling one is an error by name.
 *
 * Functions that it looks up by name when they are called need no place here: torch-npu says itself that it does not
 * find them.
 */
#include "errors.h"

#define EXPORT __attribute__((visibility("default")))

#define RETURNS_ERROR(name) \
    EXPORT int name(void); \
    EXPORT int name(void) \
    { \
        return sim_not_simulated(#name); \
    }

#define RETURNS_NOTHING(name) \
    EXPORT void *name(void); \
    EXPORT void *name(void) \
    { \
        sim_not_simulated(#name); \
        return NULL; \
    }

#include "not_simulated.def"
