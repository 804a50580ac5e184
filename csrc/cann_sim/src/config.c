#include "config.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "errors.h"

#define DEFAULT_DEVICES 2
#define DEFAULT_SOC "Ascend910B1"
#define DEFAULT_MEMORY ((size_t)4 << 30)
#define MIN_MEMORY ((size_t)1 << 20)
#define DEFAULT_STREAMS 1984
#define COMMUNICATOR_STREAMS 40 /* what vllm-ascend reckoned with */
#define DEFAULT_HCCL_TIMEOUT 30.0

static pthread_once_t once = PTHREAD_ONCE_INIT;
static sim_config config;
static char fault[256];

static void wrong(const char *name, const char *value, const char *allowed)
{
    if (!fault[0])
        snprintf(fault, sizeof fault, "%s is \"%s\": expected %s", name, value, allowed);
}

static long read_integer(const char *name, long missing, long low, long high, const char *allowed)
{
    const char *value = getenv(name);
    char *end;
    long number;

    if (!value)
        return missing;
    errno = 0;
    number = strtol(value, &end, 10);
    if (errno || end == value || *end || number < low || number > high)
        wrong(name, value, allowed);
    return number;
}

static size_t read_size(const char *name, size_t missing)
{
    const char *value = getenv(name);
    const char *units = "KMGT", *unit;
    unsigned long long number;
    char *end;
    int shift = 0;

    if (!value)
        return missing;
    errno = 0;
    number = strtoull(value, &end, 10);
    if (*end && (unit = strchr(units, toupper((unsigned char)*end)))) {
        shift = 10 * (int)(unit - units + 1);
        end++;
    }
    if (errno || !isdigit((unsigned char)*value) || *end || number > (SIZE_MAX >> shift) ||
        (number << shift) < MIN_MEMORY)
        wrong(name, value, "a number of bytes, at least 1M, perhaps with K, M, G or T");
    return (size_t)number << shift;
}

static double read_seconds(const char *name, double missing)
{
    const char *value = getenv(name);
    char *end;
    double number;

    if (!value)
        return missing;
    number = strtod(value, &end);
    if (end == value || *end || !isfinite(number) || number <= 0 || number > 86400)
        wrong(name, value, "seconds above 0, at most a day");
    return number;
}

static void read_soc(void)
{
    const char *value = getenv("CANN_SIM_SOC");

    if (!value)
        value = DEFAULT_SOC;
    if (strncmp(value, "Ascend", strlen("Ascend")) || strlen(value) >= sizeof config.soc)
        wrong("CANN_SIM_SOC", value, "the name of a SoC, such as Ascend910B1");
    else
        strcpy(config.soc, value);
}

/* Reads the list as CANN's runtime does: it ends at a character that is neither digit nor comma and at a device that
 * does not exist, and if the devices are not in ascending order, no device is visible. */
static void read_visible_devices(int machine)
{
    const char *value = getenv("ASCEND_RT_VISIBLE_DEVICES");
    int count = 0;

    if (!value) {
        for (count = 0; count < machine; count++)
            config.physical[count] = count;
        config.device_count = machine;
        return;
    }
    while (isdigit((unsigned char)*value)) {
        char *end;
        long device = strtol(value, &end, 10);

        if (count && device <= config.physical[count - 1]) {
            count = 0;
            break;
        }
        if (device >= machine)
            break;
        config.physical[count++] = (int)device;
        value = *end == ',' ? end + 1 : "";
    }
    config.device_count = count;
}

/* CANN's variable: whether HCCL unfolds operations on the vector cores, for which it needs no more streams. */
static size_t read_communicator_streams(void)
{
    const char *mode = getenv("HCCL_OP_EXPANSION_MODE");

    return mode && !strcmp(mode, "AIV") ? 1 : COMMUNICATOR_STREAMS;
}

static void read_environment(void)
{
    long machine = read_integer("CANN_SIM_DEVICES", DEFAULT_DEVICES, 1, SIM_MAX_DEVICES, "a number from 1 to 64");

    read_soc();
    config.machine_devices = (int)machine;
    config.machine = getenv("CANN_SIM_MACHINE") ? strdup(getenv("CANN_SIM_MACHINE")) : "";
    config.streams = (size_t)read_integer("CANN_SIM_STREAMS", DEFAULT_STREAMS, 1, 1 << 20, "a number of streams");
    config.communicator_streams = read_communicator_streams();
    config.memory = read_size("CANN_SIM_MEMORY", DEFAULT_MEMORY);
    config.hccl_timeout = read_seconds("CANN_SIM_HCCL_TIMEOUT", DEFAULT_HCCL_TIMEOUT);
    config.connect_timeout = (double)read_integer("HCCL_CONNECT_TIMEOUT", -1, 120, 7200, "seconds from 120 to 7200");
    if (config.connect_timeout < 0)
        config.connect_timeout = config.hccl_timeout;
    config.asynchronous = read_integer("CANN_SIM_ASYNC", 0, 0, 1, "0 or 1") != 0;
    config.poison = read_integer("CANN_SIM_POISON", 0, 0, 1, "0 or 1") != 0;
    if (!fault[0])
        read_visible_devices((int)machine);
}

const sim_config *sim_settings(void)
{
    pthread_once(&once, read_environment);
    if (!fault[0])
        return &config;
    FAIL(ACL_ERROR_INVALID_PARAM, "%s", fault);
    return NULL;
}
