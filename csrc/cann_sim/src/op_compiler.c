/* The operator compiler: describes operators and hands them to whoever carries them (cann_sim.h). Nothing is compiled,
 * and an operator that nobody carries fails with its name. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "acl_api.h"
#include "cann_sim.h"
#include "errors.h"

#define MAX_OPTION 256

struct aclDataBuffer {
    void *data;
    size_t size;
};

struct aclTensorDesc {
    aclDataType type;
    aclFormat format;
    size_t dimension_count;
    int64_t *dimensions;
};

/* Each attribute owns its name and values. */
struct aclopAttr {
    cann_sim_attribute *attributes;
    size_t count;
};

static _Atomic(cann_sim_operator_carrier) carrier;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char options[ACL_OP_DEBUG_OPTION + 1][MAX_OPTION]; /* "": not set */

/* Describes memory, which stays the caller's. Returns NULL if the host has no memory left. */
aclDataBuffer *aclCreateDataBuffer(void *data, size_t size)
{
    aclDataBuffer *buffer = malloc(sizeof *buffer);

    if (buffer)
        *buffer = (aclDataBuffer){data, size};
    else
        sim_no_memory(__func__);
    return buffer;
}

/* Frees the description of the memory, not the memory. */
aclError aclDestroyDataBuffer(const aclDataBuffer *dataBuffer)
{
    free((void *)dataBuffer);
    return ACL_SUCCESS;
}

static aclError set_shape(const char *function, aclTensorDesc *desc, int count, const int64_t *dimensions)
{
    int64_t *copy;

    if (count < 0 || (count && !dimensions))
        return sim_fail(function, ACL_ERROR_INVALID_PARAM, "%d dimensions", count);
    if (!(copy = calloc((size_t)count + 1, sizeof *copy)))
        return sim_no_memory(function);
    if (count)
        memcpy(copy, dimensions, (size_t)count * sizeof *copy);
    free(desc->dimensions);
    desc->dimensions = copy;
    desc->dimension_count = (size_t)count;
    return ACL_SUCCESS;
}

/* Describes a tensor. Returns NULL if the arguments are wrong or the host has no memory left. */
aclTensorDesc *aclCreateTensorDesc(aclDataType dataType, int numDims, const int64_t *dims, aclFormat format)
{
    aclTensorDesc *desc = calloc(1, sizeof *desc);

    if (!desc) {
        sim_no_memory(__func__);
        return NULL;
    }
    desc->type = dataType;
    desc->format = format;
    if (set_shape(__func__, desc, numDims, dims)) {
        free(desc);
        return NULL;
    }
    return desc;
}

/* Frees the description of a tensor. */
void aclDestroyTensorDesc(const aclTensorDesc *desc)
{
    if (desc)
        free(desc->dimensions);
    free((void *)desc);
}

/* Returns the type that was given to aclCreateTensorDesc. */
aclDataType aclGetTensorDescType(const aclTensorDesc *desc)
{
    return desc ? desc->type : ACL_DT_UNDEFINED;
}

/* Returns the format that was given to aclCreateTensorDesc or aclSetTensorFormat. */
aclFormat aclGetTensorDescFormat(const aclTensorDesc *desc)
{
    return desc ? desc->format : ACL_FORMAT_UNDEFINED;
}

/* Returns the number of dimensions that were given to aclCreateTensorDesc or aclSetTensorShape. */
size_t aclGetTensorDescNumDims(const aclTensorDesc *desc)
{
    return desc ? desc->dimension_count : 0;
}

/* Tells the size of the dimension with this index. */
aclError aclGetTensorDescDimV2(const aclTensorDesc *desc, size_t index, int64_t *dimSize)
{
    if (!desc || !dimSize || index >= desc->dimension_count)
        return FAIL(ACL_ERROR_INVALID_PARAM, "dimension %zu", index);
    *dimSize = desc->dimensions[index];
    return ACL_SUCCESS;
}

/* Ignored: the name would be shown nowhere. */
void aclSetTensorDescName(aclTensorDesc *desc, const char *name)
{
    (void)desc, (void)name;
}

/* Replaces the format of the description. */
aclError aclSetTensorFormat(aclTensorDesc *desc, aclFormat format)
{
    if (!desc)
        return FAIL(ACL_ERROR_INVALID_PARAM, "desc is NULL");
    desc->format = format;
    return ACL_SUCCESS;
}

/* Replaces the dimensions of the description. */
aclError aclSetTensorShape(aclTensorDesc *desc, int numDims, const int64_t *dims)
{
    return desc ? set_shape(__func__, desc, numDims, dims) : FAIL(ACL_ERROR_INVALID_PARAM, "desc is NULL");
}

/* Ignored: a tensor is where its memory is. */
aclError aclSetTensorPlaceMent(aclTensorDesc *desc, aclMemType memType)
{
    (void)memType;
    return desc ? ACL_SUCCESS : FAIL(ACL_ERROR_INVALID_PARAM, "desc is NULL");
}

/* Makes an empty set of attributes. Returns NULL if the host has no memory left. */
aclopAttr *aclopCreateAttr(void)
{
    aclopAttr *attr = calloc(1, sizeof *attr);

    if (!attr)
        sim_no_memory(__func__);
    return attr;
}

static void clear_attribute(cann_sim_attribute *attribute)
{
    free((void *)attribute->name);
    free((void *)attribute->integers);
    free((void *)attribute->floats);
    free((void *)attribute->text);
}

/* Frees a set of attributes. */
void aclopDestroyAttr(const aclopAttr *attr)
{
    for (size_t i = 0; attr && i < attr->count; i++)
        clear_attribute(&attr->attributes[i]);
    if (attr)
        free(attr->attributes);
    free((void *)attr);
}

/* Adds an attribute with room for `count` values; `integers` or `floats` is set to it. */
static aclError add_attribute(const char *function, aclopAttr *attr, const char *name, int count, int64_t **integers,
                              float **floats)
{
    cann_sim_attribute *more, added = {0};
    size_t room = count > 0 ? (size_t)count : 1;

    if (!attr || !name || count < 0)
        return sim_fail(function, ACL_ERROR_INVALID_PARAM, "attribute %s", name ? name : "NULL");
    if (integers)
        added.integers = *integers = calloc(room, sizeof **integers);
    if (floats)
        added.floats = *floats = calloc(room, sizeof **floats);
    added.name = strdup(name);
    added.count = (size_t)count;
    more = realloc(attr->attributes, (attr->count + 1) * sizeof *more);
    if (more)
        attr->attributes = more;
    if (!more || !added.name || (integers && !*integers) || (floats && !*floats)) {
        clear_attribute(&added);
        return sim_no_memory(function);
    }
    attr->attributes[attr->count++] = added;
    return ACL_SUCCESS;
}

/* Adds a boolean to a set of attributes. */
aclError aclopSetAttrBool(aclopAttr *attr, const char *attrName, uint8_t attrValue)
{
    return aclopSetAttrInt(attr, attrName, attrValue != 0);
}

/* Adds an integer to a set of attributes. */
aclError aclopSetAttrInt(aclopAttr *attr, const char *attrName, int64_t attrValue)
{
    return aclopSetAttrListInt(attr, attrName, 1, &attrValue);
}

/* Adds a float to a set of attributes. */
aclError aclopSetAttrFloat(aclopAttr *attr, const char *attrName, float attrValue)
{
    return aclopSetAttrListFloat(attr, attrName, 1, &attrValue);
}

/* Adds a text to a set of attributes. */
aclError aclopSetAttrString(aclopAttr *attr, const char *attrName, const char *attrValue)
{
    char *text = attrValue ? strdup(attrValue) : NULL;
    aclError error = text ? add_attribute(__func__, attr, attrName, 1, NULL, NULL)
                          : FAIL(ACL_ERROR_INVALID_PARAM, "attribute %s is NULL", attrName ? attrName : "NULL");

    if (error)
        free(text);
    else
        attr->attributes[attr->count - 1].text = text;
    return error;
}

/* Adds a data type to a set of attributes. */
aclError aclopSetAttrDataType(aclopAttr *attr, const char *attrName, aclDataType attrValue)
{
    return aclopSetAttrInt(attr, attrName, attrValue);
}

/* Adds a list of booleans to a set of attributes. */
aclError aclopSetAttrListBool(aclopAttr *attr, const char *attrName, int numValues, const uint8_t *values)
{
    int64_t *integers = NULL;
    aclError error = add_attribute(__func__, attr, attrName, values || !numValues ? numValues : -1, &integers, NULL);

    for (int i = 0; !error && i < numValues; i++)
        integers[i] = values[i] != 0;
    return error;
}

/* Adds a list of integers to a set of attributes. */
aclError aclopSetAttrListInt(aclopAttr *attr, const char *attrName, int numValues, const int64_t *values)
{
    int64_t *integers = NULL;
    aclError error = add_attribute(__func__, attr, attrName, values || !numValues ? numValues : -1, &integers, NULL);

    if (!error && numValues)
        memcpy(integers, values, (size_t)numValues * sizeof *values);
    return error;
}

/* Adds a list of floats to a set of attributes. */
aclError aclopSetAttrListFloat(aclopAttr *attr, const char *attrName, int numValues, const float *values)
{
    float *floats = NULL;
    aclError error = add_attribute(__func__, attr, attrName, values || !numValues ? numValues : -1, NULL, &floats);

    if (!error && numValues)
        memcpy(floats, values, (size_t)numValues * sizeof *values);
    return error;
}

/* Checks the arguments and ignores them: no operator that comes this way needs lists of lists. */
aclError aclopSetAttrListListInt(aclopAttr *attr, const char *attrName, int numLists, const int *numValues,
                                 const int64_t *const values[])
{
    if (!attr || !attrName || numLists < 0 || (numLists && (!numValues || !values)))
        return FAIL(ACL_ERROR_INVALID_PARAM, "attribute %s", attrName ? attrName : "NULL");
    return ACL_SUCCESS;
}

void cann_sim_carry_operators(cann_sim_operator_carrier wanted)
{
    carrier = wanted;
}

static aclError refuse_operator(const char *function, const char *type)
{
    fprintf(stderr, "cann_sim: operator %s is not simulated\n", type);
    return sim_fail(function, ACL_ERROR_OP_NOT_FOUND, "operator %s is not simulated", type);
}

static void view_tensors(cann_sim_tensor *views, size_t count, const aclTensorDesc *const descs[],
                         const aclDataBuffer *const buffers[])
{
    for (size_t i = 0; i < count; i++)
        views[i] = (cann_sim_tensor){descs[i]->type,       descs[i]->format, descs[i]->dimension_count,
                                     descs[i]->dimensions, buffers[i]->data, buffers[i]->size};
}

static bool are_whole(size_t count, const aclTensorDesc *const descs[], const aclDataBuffer *const buffers[])
{
    bool whole = !count || (descs && buffers);

    for (size_t i = 0; whole && i < count; i++)
        whole = descs[i] && buffers[i];
    return whole;
}

/* Gives an operator to the carrier, when it is its turn. */
static aclError carry(const char *function, cann_sim_operator *operation, const aclTensorDesc *const input_descs[],
                      const aclDataBuffer *const inputs[], const aclTensorDesc *const output_descs[],
                      const aclDataBuffer *const outputs[], aclrtStream stream)
{
    cann_sim_operator_carrier chosen = carrier;
    cann_sim_tensor *views;
    aclError error;

    if (!operation->type || !are_whole(operation->input_count, input_descs, inputs) ||
        !are_whole(operation->output_count, output_descs, outputs))
        return sim_fail(function, ACL_ERROR_INVALID_PARAM, "an operator without type, description or buffer");
    if (!chosen)
        return refuse_operator(function, operation->type);
    if (cann_sim_capturing(stream))
        return sim_fail(function, ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, "operator %s cannot be captured",
                        operation->type);
    if ((error = cann_sim_wait_for_turn(stream)))
        return error;
    if (!(views = calloc(operation->input_count + operation->output_count + 1, sizeof *views)))
        return sim_no_memory(function);
    view_tensors(views, operation->input_count, input_descs, inputs);
    view_tensors(views + operation->input_count, operation->output_count, output_descs, outputs);
    operation->inputs = views;
    operation->outputs = views + operation->input_count;
    error = chosen(operation);
    free(views);
    if (error == ACL_ERROR_OP_NOT_FOUND)
        return refuse_operator(function, operation->type);
    return error ? sim_fail(function, error, "operator %s failed", operation->type) : ACL_SUCCESS;
}

/* Hands an operator to the carrier. Fails with its name if nobody carries it: a result of zeros would be worse. */
aclError aclopCompileAndExecute(const char *opType, int numInputs, const aclTensorDesc *const inputDesc[],
                                const aclDataBuffer *const inputs[], int numOutputs,
                                const aclTensorDesc *const outputDesc[], aclDataBuffer *const outputs[],
                                const aclopAttr *attr, aclopEngineType engineType, aclopCompileType compileFlag,
                                const char *opPath, aclrtStream stream)
{
    cann_sim_operator operation = {
        .type = opType,
        .attributes = attr ? attr->attributes : NULL,
        .input_count = numInputs > 0 ? (size_t)numInputs : 0,
        .output_count = numOutputs > 0 ? (size_t)numOutputs : 0,
        .attribute_count = attr ? attr->count : 0,
    };

    (void)engineType, (void)compileFlag, (void)opPath;
    return carry(__func__, &operation, inputDesc, inputs, outputDesc, (const aclDataBuffer *const *)outputs, stream);
}

/* Does the same as aclopCompileAndExecute. */
aclError aclopCompileAndExecuteV2(const char *opType, int numInputs, aclTensorDesc *inputDesc[],
                                  aclDataBuffer *inputs[], int numOutputs, aclTensorDesc *outputDesc[],
                                  aclDataBuffer *outputs[], aclopAttr *attr, aclopEngineType engineType,
                                  aclopCompileType compileFlag, const char *opPath, aclrtStream stream)
{
    return aclopCompileAndExecute(
        opType, numInputs, (const aclTensorDesc *const *)inputDesc, (const aclDataBuffer *const *)inputs, numOutputs,
        (const aclTensorDesc *const *)outputDesc, outputs, attr, engineType, compileFlag, opPath, stream);
}

static bool is_option(aclCompileOpt opt)
{
    return (int)opt >= 0 && opt <= ACL_OP_DEBUG_OPTION;
}

/* With the lock held: "disable" unless something else was set, because nothing is compiled. */
static const char *option_value(aclCompileOpt opt)
{
    return is_option(opt) && *options[opt] ? options[opt] : "disable";
}

/* Remembers an option of the compiler for aclGetCompileopt. */
aclError aclSetCompileopt(aclCompileOpt opt, const char *value)
{
    if (!is_option(opt) || !value || strlen(value) >= MAX_OPTION)
        return FAIL(ACL_ERROR_INVALID_PARAM, "option %d is %s", (int)opt, value ? value : "NULL");
    pthread_mutex_lock(&lock);
    strcpy(options[opt], value);
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

/* Returns the number of bytes that aclGetCompileopt needs for the option. */
size_t aclGetCompileoptSize(aclCompileOpt opt)
{
    size_t size;

    pthread_mutex_lock(&lock);
    size = strlen(option_value(opt)) + 1;
    pthread_mutex_unlock(&lock);
    return size;
}

/* Tells the value of an option as it was set, "disable" before. */
aclError aclGetCompileopt(aclCompileOpt opt, char *value, size_t length)
{
    bool fits;

    if (!is_option(opt) || !value)
        return FAIL(ACL_ERROR_INVALID_PARAM, "option %d", (int)opt);
    pthread_mutex_lock(&lock);
    if ((fits = strlen(option_value(opt)) < length))
        strcpy(value, option_value(opt));
    pthread_mutex_unlock(&lock);
    return fits ? ACL_SUCCESS : FAIL(ACL_ERROR_INVALID_PARAM, "option %d into %zu bytes", (int)opt, length);
}
