#include "errors.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define TEXT_SIZE 1024

static _Thread_local aclError last_code;
static _Thread_local char last_text[TEXT_SIZE];
static _Thread_local char told_text[TEXT_SIZE];

int sim_fail(const char *function, int code, const char *format, ...)
{
    char text[TEXT_SIZE]; /* the arguments may include sim_error_text() */
    int used = snprintf(text, sizeof text, "%s: ", function);
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(text + used, sizeof text - (size_t)used, format, arguments);
    va_end(arguments);
    memcpy(last_text, text, sizeof text);
    last_code = code;
    return code;
}

aclError sim_no_memory(const char *function)
{
    return sim_fail(function, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "the host has no memory left");
}

HcclResult hccl_no_memory(const char *function)
{
    return sim_fail(function, HCCL_E_MEMORY, "the host has no memory left");
}

aclError sim_not_simulated(const char *name)
{
    fprintf(stderr, "cann_sim: %s is not simulated\n", name);
    return sim_fail(name, ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "not simulated");
}

const char *sim_error_text(void)
{
    return last_text;
}

/* Returns the text of the calling thread's last error, "" if there was none since the previous call. The text is valid
 * until the next call in this thread. */
const char *aclGetRecentErrMsg(void)
{
    memcpy(told_text, last_text, sizeof told_text);
    last_text[0] = '\0';
    return told_text;
}

/* Returns the calling thread's last error code and clears it. */
aclError aclrtGetLastError(aclrtLastErrLevel level)
{
    aclError code = aclrtPeekAtLastError(level);

    last_code = ACL_SUCCESS;
    return code;
}

/* Returns the calling thread's last error code and keeps it. */
aclError aclrtPeekAtLastError(aclrtLastErrLevel level)
{
    return level == ACL_RT_THREAD_LEVEL ? last_code : ACL_ERROR_INVALID_PARAM;
}
