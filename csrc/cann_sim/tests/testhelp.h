/* Two macros: CHECK counts and tells what fails, REPORT is what main returns. */
#ifndef CANN_SIM_TESTHELP_H
#define CANN_SIM_TESTHELP_H

#include <stdio.h>

#include "acl_api.h"

static int checks, failures;

#define CHECK(claim, condition) \
    do { \
        checks++; \
        if (!(condition)) { \
            failures++; \
            printf("FAILED %s:%d: %s [%s]\n", __FILE__, __LINE__, claim, aclGetRecentErrMsg()); \
        } \
    } while (0)

#define REPORT() (printf("%d checks, %d failed\n", checks, failures), fflush(stdout), failures ? 1 : 0)

#endif
