/* Functions that torch-npu needs in order to be loaded but that are not simulated. Each fails with its name.
 *
 * Functions that torch-npu looks up only when they are called need no place here: it reports by itself that it does not
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
