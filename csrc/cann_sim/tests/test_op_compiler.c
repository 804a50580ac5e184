#include <fcntl.h>
#include <string.h>

#include "cann_sim.h"
#include "children.h"

#define UNUSED_RANK (void)rank, (void)size

int aclrtProcessReport(int timeout);
int rtKernelLaunch(void);

/* What goes to standard error while `body` runs. */
static const char *errors_of(void (*body)(void))
{
    static char text[512];
    int ends[2], saved = dup(2);
    ssize_t length;

    if (pipe(ends))
        return "";
    dup2(ends[1], 2);
    body();
    dup2(saved, 2);
    close(saved);
    close(ends[1]);
    length = read(ends[0], text, sizeof text - 1);
    close(ends[0]);
    text[length > 0 ? length : 0] = '\0';
    return text;
}

static aclError first, second;

static void run_operator(void)
{
    first = aclopCompileAndExecute("MatMulV9", 0, NULL, NULL, 0, NULL, NULL, NULL, ACL_ENGINE_SYS, ACL_COMPILE_SYS,
                                   NULL, NULL);
    second = aclopCompileAndExecuteV2("AddV9", 0, NULL, NULL, 0, NULL, NULL, NULL, ACL_ENGINE_SYS, ACL_COMPILE_SYS,
                                      NULL, NULL);
}

static void run_missing(void)
{
    first = aclrtProcessReport(0);
    second = rtKernelLaunch();
}

static void failures_have_names(unsigned rank, unsigned size)
{
    const char *text;

    UNUSED_RANK;
    text = errors_of(run_operator);
    CHECK("an operator fails", first == ACL_ERROR_OP_NOT_FOUND && second == ACL_ERROR_OP_NOT_FOUND);
    CHECK("by name",
          strstr(text, "operator MatMulV9 is not simulated") && strstr(text, "operator AddV9 is not simulated"));
    CHECK("the message has it, too", strstr(aclGetRecentErrMsg(), "AddV9"));
    text = errors_of(run_missing);
    CHECK("so does a function that is not simulated",
          first == ACL_ERROR_RT_FEATURE_NOT_SUPPORT && second == ACL_ERROR_RT_FEATURE_NOT_SUPPORT &&
              strstr(text, "cann_sim: aclrtProcessReport is not simulated\n") && strstr(text, "rtKernelLaunch"));
}

static void descriptions(unsigned rank, unsigned size)
{
    const int64_t shape[] = {2, 3}, *const lists[] = {shape};
    const int lengths[] = {2};
    aclTensorDesc *desc = aclCreateTensorDesc(ACL_BF16, 2, shape, ACL_FORMAT_ND);
    aclDataBuffer *buffer = aclCreateDataBuffer(&first, sizeof first);
    aclopAttr *attr = aclopCreateAttr();
    int64_t dimension = 0;
    float number = 1;
    uint8_t flag = 1;

    UNUSED_RANK;
    CHECK("a tensor is described",
          desc && aclGetTensorDescType(desc) == ACL_BF16 && aclGetTensorDescFormat(desc) == ACL_FORMAT_ND &&
              aclGetTensorDescNumDims(desc) == 2 && !aclGetTensorDescDimV2(desc, 1, &dimension) && dimension == 3);
    CHECK("its shape can change", !aclSetTensorShape(desc, 1, shape) && aclGetTensorDescNumDims(desc) == 1 &&
                                      aclGetTensorDescDimV2(desc, 1, &dimension) == ACL_ERROR_INVALID_PARAM);
    CHECK("and its format", !aclSetTensorFormat(desc, ACL_FORMAT_FRACTAL_NZ) &&
                                aclGetTensorDescFormat(desc) == ACL_FORMAT_FRACTAL_NZ &&
                                !aclSetTensorPlaceMent(desc, ACL_MEMTYPE_HOST));
    CHECK("a description must make sense", !aclCreateTensorDesc(ACL_BF16, 2, NULL, ACL_FORMAT_ND));
    CHECK("attributes are taken",
          !aclopSetAttrBool(attr, "a", 1) && !aclopSetAttrInt(attr, "a", 1) && !aclopSetAttrFloat(attr, "a", 1) &&
              !aclopSetAttrString(attr, "a", "b") && !aclopSetAttrDataType(attr, "a", ACL_BF16) &&
              !aclopSetAttrListBool(attr, "a", 1, &flag) && !aclopSetAttrListInt(attr, "a", 2, shape) &&
              !aclopSetAttrListFloat(attr, "a", 1, &number) && !aclopSetAttrListListInt(attr, "a", 1, lengths, lists));
    CHECK("if they have names", aclopSetAttrInt(attr, NULL, 1) == ACL_ERROR_INVALID_PARAM &&
                                    aclopSetAttrListInt(NULL, "a", 2, shape) == ACL_ERROR_INVALID_PARAM);
    aclSetTensorDescName(desc, "x");
    aclDestroyTensorDesc(desc);
    aclDestroyDataBuffer(buffer);
    aclopDestroyAttr(attr);
}

static cann_sim_operator seen;
static int64_t seen_axis;
static float seen_scale;
static char seen_mode[16];

/* Carries "Double": output = 2 * input, int32. */
static aclError carry(const cann_sim_operator *operation)
{
    if (strcmp(operation->type, "Double"))
        return ACL_ERROR_OP_NOT_FOUND;
    seen = *operation;
    for (size_t i = 0; i < operation->attribute_count; i++) {
        const cann_sim_attribute *attribute = &operation->attributes[i];

        if (!strcmp(attribute->name, "axes") && attribute->count == 2)
            seen_axis = attribute->integers[1];
        if (!strcmp(attribute->name, "scale"))
            seen_scale = *attribute->floats;
        if (!strcmp(attribute->name, "mode"))
            strncpy(seen_mode, attribute->text, sizeof seen_mode - 1);
    }
    for (size_t i = 0; i < operation->inputs[0].size / 4; i++)
        ((int *)operation->outputs[0].data)[i] = 2 * ((int *)operation->inputs[0].data)[i];
    return ACL_SUCCESS;
}

static void carried(unsigned rank, unsigned size)
{
    const int64_t shape[] = {4}, axes[] = {3, 5};
    aclTensorDesc *desc = aclCreateTensorDesc(ACL_INT32, 1, shape, ACL_FORMAT_ND);
    aclopAttr *attr = aclopCreateAttr();
    aclDataBuffer *input, *output;
    aclrtStream stream;
    aclmdlRI graph;
    int *memory;

    UNUSED_RANK;
    aclrtSetDevice(0);
    aclrtCreateStream(&stream);
    aclrtMalloc((void **)&memory, 32, ACL_MEM_MALLOC_HUGE_FIRST);
    memory[3] = 21;
    input = aclCreateDataBuffer(memory, 16);
    output = aclCreateDataBuffer(memory + 4, 16);
    aclopSetAttrListInt(attr, "axes", 2, axes);
    aclopSetAttrFloat(attr, "scale", 0.5f);
    aclopSetAttrString(attr, "mode", "constant");
    cann_sim_carry_operators(carry);
#define EXECUTE(type) \
    aclopCompileAndExecute(type, 1, (const aclTensorDesc *const[]){desc}, (const aclDataBuffer *const[]){input}, 1, \
                           (const aclTensorDesc *const[]){desc}, (aclDataBuffer *const[]){output}, attr, \
                           ACL_ENGINE_SYS, ACL_COMPILE_SYS, NULL, stream)
    CHECK("an operator is carried", !EXECUTE("Double") && memory[7] == 42);
    CHECK("with its tensors", seen.input_count == 1 && seen.output_count == 1);
    CHECK("and attributes",
          seen.attribute_count == 3 && seen_axis == 5 && seen_scale == 0.5f && !strcmp(seen_mode, "constant"));
    CHECK("another is not", EXECUTE("Triple") == ACL_ERROR_OP_NOT_FOUND);
    aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL);
    CHECK("none is captured", EXECUTE("Double") == ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
    aclmdlRICaptureEnd(stream, &graph);
    cann_sim_carry_operators(NULL);
    CHECK("without a carrier none is carried", EXECUTE("Double") == ACL_ERROR_OP_NOT_FOUND);
    aclmdlRIDestroy(graph);
    aclDestroyTensorDesc(desc);
    aclDestroyDataBuffer(input);
    aclDestroyDataBuffer(output);
    aclopDestroyAttr(attr);
    aclrtFree(memory);
}

static void options(unsigned rank, unsigned size)
{
    char value[16];

    UNUSED_RANK;
    CHECK("nothing is compiled at first", aclGetCompileoptSize(ACL_OP_JIT_COMPILE) == sizeof "disable" &&
                                              !aclGetCompileopt(ACL_OP_JIT_COMPILE, value, sizeof value) &&
                                              !strcmp(value, "disable"));
    CHECK("an option is remembered", !aclSetCompileopt(ACL_OP_JIT_COMPILE, "enable") &&
                                         !aclGetCompileopt(ACL_OP_JIT_COMPILE, value, sizeof value) &&
                                         !strcmp(value, "enable"));
    CHECK("it needs room", aclGetCompileopt(ACL_OP_JIT_COMPILE, value, 3) == ACL_ERROR_INVALID_PARAM);
    CHECK("unknown options are refused", aclSetCompileopt((aclCompileOpt)99, "x") == ACL_ERROR_INVALID_PARAM);
}

int main(void)
{
    CHECK("failures have names", alone(failures_have_names));
    CHECK("descriptions", alone(descriptions));
    CHECK("carried", alone(carried));
    CHECK("options", alone(options));
    return REPORT();
}
