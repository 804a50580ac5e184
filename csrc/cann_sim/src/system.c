#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "acl_api.h"
#include "config.h"
#include "device.h"
#include "errors.h"

/* The release whose interface is simulated. torch-npu asks for it before it uses newer functions. */
#define CANN_VERSION "9.1.0"
#define DRIVER_VERSION "25.5.0"
#define MAX_CONFIG 65536

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool initialised, finalised;
static int64_t system_options[ACL_OPT_STRONG_CONSISTENCY + 1];

/* "default_device" is the only entry of aclInit's JSON file that matters here: {"defaultDevice":
 * {"default_device": "0"}}. A search is enough, because torch-npu writes the file and not a user. */
static aclError read_default_device(const char *path)
{
    aclError error = ACL_SUCCESS;
    char *text = calloc(1, MAX_CONFIG);
    FILE *file = fopen(path, "re");
    const char *found;

    if (!text || !file || !fread(text, 1, MAX_CONFIG - 1, file)) {
        error = FAIL(ACL_ERROR_INVALID_PARAM, "cannot read %s", path);
        goto done;
    }
    if ((found = strstr(text, "\"default_device\"")) && (found = strchr(found, ':'))) {
        int device = atoi(found + strcspn(found, "0123456789"));

        if (!(error = CHECK_DEVICE(device)))
            sim_set_default_device(device);
    }
done:
    if (file)
        fclose(file);
    free(text);
    return error;
}

/* Reads the settings, so that a wrong one is reported here, and the default device from the file `configPath`, if
 * given. To be called once for each process. */
aclError aclInit(const char *configPath)
{
    aclError error = ACL_SUCCESS;

    if (!sim_settings())
        return ACL_ERROR_INVALID_PARAM;
    pthread_mutex_lock(&lock);
    if (initialised)
        error = FAIL(ACL_ERROR_REPEAT_INITIALIZE, "called before");
    else if (configPath && *configPath)
        error = read_default_device(configPath);
    if (!error)
        initialised = true;
    pthread_mutex_unlock(&lock);
    return error;
}

/* Ends the use of the interface. Anything that was not freed stays valid until the process ends. */
aclError aclFinalize(void)
{
    aclError error = ACL_SUCCESS;

    pthread_mutex_lock(&lock);
    if (!initialised)
        error = FAIL(ACL_ERROR_UNINITIALIZE, "aclInit was not called");
    else if (finalised)
        error = FAIL(ACL_ERROR_REPEAT_FINALIZE, "called before");
    finalised = initialised;
    pthread_mutex_unlock(&lock);
    return error;
}

/* Prints warnings and errors of the caller on standard error, if CANN's ASCEND_SLOG_PRINT_TO_STDOUT asks for it. */
void aclAppLog(aclLogLevel logLevel, const char *func, const char *file, uint32_t line, const char *fmt, ...)
{
    static const char *const names[] = {"DEBUG", "INFO", "WARNING", "ERROR"};
    const char *wanted = getenv("ASCEND_SLOG_PRINT_TO_STDOUT");
    va_list arguments;

    if (!wanted || strcmp(wanted, "1") || logLevel < ACL_WARNING || logLevel > ACL_ERROR)
        return;
    flockfile(stderr);
    fprintf(stderr, "cann_sim: %s %s:%u %s: ", names[logLevel], file, line, func);
    va_start(arguments, fmt);
    vfprintf(stderr, fmt, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    funlockfile(stderr);
}

/* Returns the name by which torch-npu knows what the device can do; NULL if a setting is wrong. It is known before
 * anything is started. */
const char *aclrtGetSocName(void)
{
    const sim_config *config = sim_settings();

    return config ? config->soc : NULL;
}

/* Tells the simulated release; only the field `version` is filled. */
aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion *version)
{
    if (!version || name < ACL_PKG_NAME_CANN || name > ACL_PKG_NAME_DRIVER)
        return FAIL(ACL_ERROR_INVALID_PARAM, "package %d", (int)name);
    memset(version, 0, sizeof *version);
    strcpy(version->version, name == ACL_PKG_NAME_DRIVER ? DRIVER_VERSION : CANN_VERSION);
    return ACL_SUCCESS;
}

/* Tells the release of a package by its name, "driver" or one of CANN's. `versionStr` has room for 128 bytes. */
aclError aclsysGetVersionStr(char *pkgName, char *versionStr)
{
    if (!pkgName || !versionStr)
        return FAIL(ACL_ERROR_INVALID_PARAM, "NULL");
    strcpy(versionStr, strcmp(pkgName, "driver") ? CANN_VERSION : DRIVER_VERSION);
    return ACL_SUCCESS;
}

/* Lists what the platform can do: infinities and bfloat16, but not the compilation of operators. */
aclError aclGetCannAttributeList(const aclCannAttr **cannAttrList, size_t *num)
{
    static const aclCannAttr attributes[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16};

    if (!cannAttrList || !num)
        return FAIL(ACL_ERROR_INVALID_PARAM, "NULL");
    *cannAttrList = attributes;
    *num = sizeof attributes / sizeof *attributes;
    return ACL_SUCCESS;
}

/* Tells whether aclGetCannAttributeList lists the attribute (1) or not (0). */
aclError aclGetCannAttribute(aclCannAttr cannAttr, int32_t *value)
{
    if (!value || cannAttr < ACL_CANN_ATTR_INF_NAN || cannAttr > ACL_CANN_ATTR_JIT_COMPILE)
        return FAIL(ACL_ERROR_INVALID_PARAM, "attribute %d", (int)cannAttr);
    *value = cannAttr != ACL_CANN_ATTR_JIT_COMPILE;
    return ACL_SUCCESS;
}

/* Remembers an option for aclrtGetSysParamOpt. It has no effect: everything the simulator does is deterministic. */
aclError aclrtSetSysParamOpt(aclSysParamOpt opt, int64_t value)
{
    if ((int)opt < 0 || opt > ACL_OPT_STRONG_CONSISTENCY)
        return FAIL(ACL_ERROR_INVALID_PARAM, "option %d", (int)opt);
    pthread_mutex_lock(&lock);
    system_options[opt] = value;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

/* Tells the value of an option as it was set; 0 before. */
aclError aclrtGetSysParamOpt(aclSysParamOpt opt, int64_t *value)
{
    if ((int)opt < 0 || opt > ACL_OPT_STRONG_CONSISTENCY || !value)
        return FAIL(ACL_ERROR_INVALID_PARAM, "option %d", (int)opt);
    pthread_mutex_lock(&lock);
    *value = system_options[opt];
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

/* Does the same as aclrtSetSysParamOpt: all contexts have one set of options. */
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt opt, int64_t value)
{
    return aclrtSetSysParamOpt(opt, value);
}

/* Checks the mode and ignores it: what happens on overflow is up to the operators. */
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode)
{
    if ((int)mode < 0 || mode > ACL_RT_OVERFLOW_MODE_UNDEF)
        return FAIL(ACL_ERROR_INVALID_PARAM, "mode %d", (int)mode);
    return ACL_SUCCESS;
}

/* Ignored: only collectives wait on a device here, and they have CANN_SIM_HCCL_TIMEOUT. */
aclError aclrtSetOpWaitTimeout(uint32_t timeout)
{
    (void)timeout;
    return ACL_SUCCESS;
}

/* Ignored: operators are not executed here. */
aclError aclrtSetOpExecuteTimeOut(uint32_t timeout)
{
    (void)timeout;
    return ACL_SUCCESS;
}

/* Ignored, because operators are not executed here; the timeout is reported back as given. */
aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t *actualTimeout)
{
    if (!actualTimeout)
        return FAIL(ACL_ERROR_INVALID_PARAM, "actualTimeout is NULL");
    *actualTimeout = timeout;
    return ACL_SUCCESS;
}
