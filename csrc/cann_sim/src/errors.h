/* The last error of each thread: a code and a text. */
#ifndef CANN_SIM_ERRORS_H
#define CANN_SIM_ERRORS_H

#include "acl_api.h"
#include "hccl_api.h"

/* Notes `code` and "function: text" as the calling thread's last error and returns `code`. */
int sim_fail(const char *function, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

#define FAIL(...) sim_fail(__func__, __VA_ARGS__)

/* The same for an allocation on the host that failed, in the codes of the two interfaces. */
aclError sim_no_memory(const char *function);
HcclResult hccl_no_memory(const char *function);

/* Prints "cann_sim: NAME is not simulated" on standard error and notes it as an error. */
aclError sim_not_simulated(const char *name);

/* The calling thread's last text, "" if there is none. Valid until its next error. */
const char *sim_error_text(void);

#endif
