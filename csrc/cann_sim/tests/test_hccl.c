#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include "children.h"
#include "hccl_api.h"

/* The ranks of a test are processes, each on the device that has its number. */

static HcclRootInfo root;
static HcclComm comm;

static void join(unsigned rank, unsigned size)
{
    aclrtSetDevice((int)rank);
    CHECK("the communicator is made", !HcclCommInitRootInfo(size, &root, rank, &comm));
}

static void *memory(size_t bytes)
{
    void *address = NULL;

    aclrtMalloc(&address, bytes ? bytes : 1, ACL_MEM_MALLOC_HUGE_FIRST);
    return address;
}

static void identity(unsigned rank, unsigned size)
{
    char name[COMM_NAME_MAX_LENGTH];
    uint32_t my_rank = 99, my_size = 99;
    HcclResult async = HCCL_E_INTERNAL;

    join(rank, size);
    CHECK("it knows rank and size",
          !HcclGetRankId(comm, &my_rank) && my_rank == rank && !HcclGetRankSize(comm, &my_size) && my_size == size);
    CHECK("it has a name", !HcclGetCommName(comm, name) && *name);
    CHECK("it has no error", !HcclGetCommAsyncError(comm, &async) && async == HCCL_SUCCESS);
    CHECK("a barrier passes", !HcclBarrier(comm, NULL));
    CHECK("it is destroyed once", !HcclCommDestroy(comm) && HcclCommDestroy(comm) == HCCL_E_PARA);
    CHECK("what was destroyed is told", HcclBarrier(comm, NULL) == HCCL_E_PARA &&
                                            HcclGetCommAsyncError(comm, &async) == HCCL_E_PARA &&
                                            HcclGetCommName(comm, name) == HCCL_E_PARA);
    CHECK("the root info can be used again",
          !HcclCommInitRootInfo(size, &root, rank, &comm) && !HcclBarrier(comm, NULL) && !HcclCommDestroy(comm));
}

/* Values that are exact in every type: what rank `rank` gives at `index`. */
static int value(unsigned rank, size_t index)
{
    return (int)((index + rank) % 3) + 1;
}

static int reduced(HcclReduceOp op, unsigned size, size_t index)
{
    int result = value(0, index);

    for (unsigned rank = 1; rank < size; rank++) {
        int next = value(rank, index);

        if (op == HCCL_REDUCE_SUM)
            result += next;
        else if (op == HCCL_REDUCE_PROD)
            result *= next;
        else if (op == HCCL_REDUCE_MAX ? next > result : next < result)
            result = next;
    }
    return result;
}

typedef struct {
    HcclDataType type;
    size_t size;
} data_type;

static const data_type types[] = {
    {HCCL_DATA_TYPE_INT8, 1},  {HCCL_DATA_TYPE_INT16, 2},  {HCCL_DATA_TYPE_INT32, 4},  {HCCL_DATA_TYPE_INT64, 8},
    {HCCL_DATA_TYPE_UINT8, 1}, {HCCL_DATA_TYPE_UINT16, 2}, {HCCL_DATA_TYPE_UINT32, 4}, {HCCL_DATA_TYPE_UINT64, 8},
    {HCCL_DATA_TYPE_FP16, 2},  {HCCL_DATA_TYPE_BFP16, 2},  {HCCL_DATA_TYPE_FP32, 4},   {HCCL_DATA_TYPE_FP64, 8},
};

enum { TYPES = sizeof types / sizeof *types };

/* Small positive integers as 16-bit floats: exponent and fraction by hand. */
static uint16_t as_16_bit(int number, int fraction_bits, int bias)
{
    int exponent = 0;

    while (number >> (exponent + 1))
        exponent++;
    return (uint16_t)((exponent + bias) << fraction_bits |
                      ((number << fraction_bits >> exponent) & ((1 << fraction_bits) - 1)));
}

static void put(void *buffer, size_t index, HcclDataType type, int number)
{
    switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_UINT8:
        ((int8_t *)buffer)[index] = (int8_t)number;
        break;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
        ((int16_t *)buffer)[index] = (int16_t)number;
        break;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
        ((int32_t *)buffer)[index] = number;
        break;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
        ((int64_t *)buffer)[index] = number;
        break;
    case HCCL_DATA_TYPE_FP16:
        ((uint16_t *)buffer)[index] = as_16_bit(number, 10, 15);
        break;
    case HCCL_DATA_TYPE_BFP16:
        ((uint16_t *)buffer)[index] = as_16_bit(number, 7, 127);
        break;
    case HCCL_DATA_TYPE_FP32:
        ((float *)buffer)[index] = (float)number;
        break;
    default:
        ((double *)buffer)[index] = number;
    }
}

static bool holds(const void *buffer, size_t index, HcclDataType type, int number)
{
    unsigned char expected[16] = {0};
    size_t size = 0;

    for (int i = 0; i < TYPES; i++)
        if (types[i].type == type)
            size = types[i].size;
    put(expected, 0, type, number);
    return !memcmp((const char *)buffer + index * size, expected, size);
}

static void all_reduce_of(unsigned rank, unsigned size, HcclDataType type, size_t element, HcclReduceOp op,
                          size_t count, bool in_place)
{
    void *send = memory(count * element), *receive = in_place ? send : memory(count * element);
    size_t wrong = 0;

    for (size_t i = 0; i < count; i++)
        put(send, i, type, value(rank, i));
    CHECK("all-reduce works", !HcclAllReduce(send, receive, count, type, op, comm, NULL));
    for (size_t i = 0; i < count; i++)
        wrong += !holds(receive, i, type, reduced(op, size, i));
    CHECK("all-reduce is right", !wrong);
    if (!in_place)
        aclrtFree(receive);
    aclrtFree(send);
}

static void all_reduce(unsigned rank, unsigned size)
{
    join(rank, size);
    for (int i = 0; i < TYPES; i++)
        for (int op = HCCL_REDUCE_SUM; op <= HCCL_REDUCE_MIN; op++)
            all_reduce_of(rank, size, types[i].type, types[i].size, (HcclReduceOp)op, 37, op % 2);
    all_reduce_of(rank, size, HCCL_DATA_TYPE_FP32, 4, HCCL_REDUCE_SUM, 1, true);
    all_reduce_of(rank, size, HCCL_DATA_TYPE_FP32, 4, HCCL_REDUCE_SUM, 0, false);
    all_reduce_of(rank, size, HCCL_DATA_TYPE_FP32, 4, HCCL_REDUCE_SUM, 3000017, true);
    all_reduce_of(rank, size, HCCL_DATA_TYPE_BFP16, 2, HCCL_REDUCE_SUM, 1000003, false);
    HcclCommDestroy(comm);
}

/* Sums of 16-bit floats by their bits: what two ranks give, and what comes of it. */
static void rounding(unsigned rank, unsigned size)
{
    static const struct {
        HcclDataType type;
        uint16_t given[2], sum;
    } cases[] = {
        {HCCL_DATA_TYPE_BFP16, {0x3f80, 0x3b80}, 0x3f80}, /* 1 + 2^-8: halfway, to even */
        {HCCL_DATA_TYPE_BFP16, {0x3f81, 0x3b80}, 0x3f82}, /* the next: halfway, to even */
        {HCCL_DATA_TYPE_BFP16, {0x7f7f, 0x7f7f}, 0x7f80}, /* too large: infinity */
        {HCCL_DATA_TYPE_BFP16, {0x7f80, 0xff80}, 0xffc0}, /* infinity less infinity: not a number */
        {HCCL_DATA_TYPE_FP16, {0x3c00, 0x1000}, 0x3c00},  /* 1 + 2^-11: halfway, to even */
        {HCCL_DATA_TYPE_FP16, {0x3c01, 0x1000}, 0x3c02},  /* the next: halfway, to even */
        {HCCL_DATA_TYPE_FP16, {0x7bff, 0x4bff}, 0x7bff},  /* 65504 + 15.99: still the largest */
        {HCCL_DATA_TYPE_FP16, {0x7bff, 0x4c00}, 0x7c00},  /* 65504 + 16: infinity */
        {HCCL_DATA_TYPE_FP16, {0x03ff, 0x0001}, 0x0400},  /* the smallest normal number, of two that are not */
        {HCCL_DATA_TYPE_FP16, {0x0001, 0x0001}, 0x0002},  /* subnormal */
        {HCCL_DATA_TYPE_FP16, {0xbc00, 0x3c00}, 0x0000},  /* zero */
        {HCCL_DATA_TYPE_FP16, {0x8001, 0x8400}, 0x8401},  /* negative */
        {HCCL_DATA_TYPE_FP16, {0x3bff, 0x1000}, 0x3c00},  /* rounds up to the next power of two */
    };
    uint16_t *buffer;

    join(rank, size);
    buffer = memory(2);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        *buffer = cases[i].given[rank];
        CHECK("16-bit floats add up", !HcclAllReduce(buffer, buffer, 1, cases[i].type, HCCL_REDUCE_SUM, comm, NULL));
        CHECK("and are rounded",
              (*buffer & 0x7fff) > 0x7f80 ? (cases[i].sum & 0x7fff) > 0x7f80 : *buffer == cases[i].sum);
    }
    HcclCommDestroy(comm);
    aclrtFree(buffer);
}

static void gathering(unsigned rank, unsigned size)
{
    uint64_t counts[8], places[8], total = 0;
    size_t wrong = 0, each = 1000003;
    int32_t *send, *receive;

    join(rank, size);
    send = memory(each * 4);
    receive = memory(each * size * 4);
    for (size_t i = 0; i < each; i++)
        send[i] = (int32_t)(rank * 10000000 + i);
    CHECK("all-gather works", !HcclAllGather(send, receive, each, HCCL_DATA_TYPE_INT32, comm, NULL));
    for (size_t i = 0; i < each * size; i++)
        wrong += receive[i] != (int32_t)(i / each * 10000000 + i % each);
    CHECK("all-gather is right", !wrong);

    for (unsigned peer = 0; peer < size; peer++) {
        counts[peer] = peer * 5;
        places[peer] = total + peer; /* with gaps */
        total = places[peer] + counts[peer];
    }
    memset(receive, 0xff, each * 4);
    CHECK("with different lengths, too",
          !HcclAllGatherV(send, counts[rank], receive, counts, places, HCCL_DATA_TYPE_INT32, comm, NULL));
    wrong = 0;
    for (unsigned peer = 0; peer < size; peer++)
        for (size_t i = 0; i < counts[peer]; i++)
            wrong += receive[places[peer] + i] != (int32_t)(peer * 10000000 + i);
    CHECK("it is right and leaves the gaps alone", !wrong && receive[0] == -1);

    for (size_t i = 0; i < each; i++)
        receive[i] = (int32_t)(rank == size - 1 ? i : 0);
    CHECK("broadcast works", !HcclBroadcast(receive, each, HCCL_DATA_TYPE_INT32, size - 1, comm, NULL));
    wrong = 0;
    for (size_t i = 0; i < each; i++)
        wrong += receive[i] != (int32_t)i;
    CHECK("broadcast is right", !wrong);
    HcclCommDestroy(comm);
    aclrtFree(send);
    aclrtFree(receive);
}

static void scattering(unsigned rank, unsigned size)
{
    uint64_t counts[8], places[8], total = 0;
    size_t wrong = 0, each = 600001;
    int64_t *send, *receive;

    join(rank, size);
    send = memory(each * size * 8);
    receive = memory(each * 8);
    for (size_t i = 0; i < each * size; i++)
        send[i] = value(rank, i);
    CHECK("reduce-scatter works",
          !HcclReduceScatter(send, receive, each, HCCL_DATA_TYPE_INT64, HCCL_REDUCE_SUM, comm, NULL));
    for (size_t i = 0; i < each; i++)
        wrong += receive[i] != reduced(HCCL_REDUCE_SUM, size, rank * each + i);
    CHECK("reduce-scatter is right", !wrong);

    for (unsigned peer = 0; peer < size; peer++) {
        counts[peer] = 1 + peer * 3;
        places[peer] = total;
        total += counts[peer];
    }
    CHECK("with different lengths, too", !HcclReduceScatterV(send, counts, places, receive, counts[rank],
                                                             HCCL_DATA_TYPE_INT64, HCCL_REDUCE_MAX, comm, NULL));
    wrong = 0;
    for (size_t i = 0; i < counts[rank]; i++)
        wrong += receive[i] != reduced(HCCL_REDUCE_MAX, size, places[rank] + i);
    CHECK("it is right", !wrong);

    CHECK("reduce works",
          !HcclReduce(send, receive, each, HCCL_DATA_TYPE_INT64, HCCL_REDUCE_PROD, size - 1, comm, NULL));
    wrong = 0;
    for (size_t i = 0; i < each && rank == size - 1; i++)
        wrong += receive[i] != reduced(HCCL_REDUCE_PROD, size, i);
    CHECK("reduce is right", !wrong);

    CHECK("scatter works", !HcclScatter(rank ? NULL : send, receive, each, HCCL_DATA_TYPE_INT64, 0, comm, NULL));
    wrong = 0;
    for (size_t i = 0; i < each; i++)
        wrong += receive[i] != value(0, rank * each + i);
    CHECK("scatter is right", !wrong);
    HcclCommDestroy(comm);
    aclrtFree(send);
    aclrtFree(receive);
}

static void all_to_all(unsigned rank, unsigned size)
{
    uint64_t send_counts[8], send_places[8], receive_counts[8], receive_places[8], matrix[64];
    uint64_t sent = 0, received = 0;
    size_t wrong = 0, each = 200003;
    int32_t *send, *receive;

    join(rank, size);
    send = memory(each * size * 4);
    receive = memory(each * size * 4);
    for (size_t i = 0; i < each * size; i++)
        send[i] = (int32_t)(rank * 100000000 + i);
    CHECK("all-to-all works",
          !HcclAlltoAll(send, each, HCCL_DATA_TYPE_INT32, receive, each, HCCL_DATA_TYPE_INT32, comm, NULL));
    for (unsigned peer = 0; peer < size; peer++)
        for (size_t i = 0; i < each; i++)
            wrong += receive[peer * each + i] != (int32_t)(peer * 100000000 + rank * each + i);
    CHECK("all-to-all is right", !wrong);

    for (unsigned i = 0; i < size; i++)
        for (unsigned j = 0; j < size; j++)
            matrix[i * size + j] = (i * 7 + j * 3) % 5; /* some of them 0 */
    for (unsigned peer = 0; peer < size; peer++) {
        send_counts[peer] = matrix[rank * size + peer];
        receive_counts[peer] = matrix[peer * size + rank];
        send_places[peer] = sent;
        receive_places[peer] = received + 1;
        sent += send_counts[peer];
        received += receive_counts[peer];
    }
    CHECK("with different lengths, too",
          !HcclAlltoAllV(send, send_counts, send_places, HCCL_DATA_TYPE_INT32, receive, receive_counts, receive_places,
                         HCCL_DATA_TYPE_INT32, comm, NULL));
    CHECK("and by a matrix", !HcclAlltoAllVC(send, matrix, HCCL_DATA_TYPE_INT32, receive + received + 10,
                                             HCCL_DATA_TYPE_INT32, comm, NULL));
    CHECK("both bring the same", !memcmp(receive + 1, receive + received + 10, received * 4));
    wrong = 0;
    for (unsigned peer = 0; peer < size; peer++) {
        uint64_t before = 0;

        for (unsigned j = 0; j < rank; j++)
            before += matrix[peer * size + j];
        for (size_t i = 0; i < receive_counts[peer]; i++)
            wrong += receive[receive_places[peer] + i] != (int32_t)(peer * 100000000 + before + i);
    }
    CHECK("which is right", !wrong);
    HcclCommDestroy(comm);
    aclrtFree(send);
    aclrtFree(receive);
}

static void point_to_point(unsigned rank, unsigned size)
{
    size_t wrong = 0, each = 3000001;
    unsigned next = (rank + 1) % size, before = (rank + size - 1) % size;
    uint8_t *send, *receive;
    HcclSendRecvItem items[4];

    join(rank, size);
    send = memory(each);
    receive = memory(each);
    memset(send, (int)rank + 1, each);
    /* In a line: each waits for the one before. */
    if (rank)
        CHECK("receive works", !HcclRecv(receive, each, HCCL_DATA_TYPE_UINT8, rank - 1, comm, NULL));
    if (rank < size - 1)
        CHECK("send works", !HcclSend(send, each, HCCL_DATA_TYPE_UINT8, rank + 1, comm, NULL));
    for (size_t i = 0; i < each && rank; i++)
        wrong += receive[i] != rank;
    CHECK("receive is right", !wrong);

    /* In a circle, where one after the other would wait for ever. */
    items[0] = (HcclSendRecvItem){HCCL_SEND, send, each, HCCL_DATA_TYPE_UINT8, next};
    items[1] = (HcclSendRecvItem){HCCL_RECV, receive, each, HCCL_DATA_TYPE_UINT8, before};
    CHECK("send and receive at once",
          !HcclBatchSendRecv(items, 2, comm, NULL) && receive[0] == before + 1 && receive[each - 1] == before + 1);
    memset(receive, 0, each);
    CHECK("a group does the same", !HcclGroupStart() && !HcclSend(send, each, HCCL_DATA_TYPE_UINT8, next, comm, NULL) &&
                                       !HcclRecv(receive, each, HCCL_DATA_TYPE_UINT8, before, comm, NULL) &&
                                       !receive[0] && !HcclGroupEnd() && receive[each - 1] == before + 1);

    /* Several with one peer stay in order. */
    send[0] = 10;
    send[1] = 20;
    items[0] = (HcclSendRecvItem){HCCL_SEND, send, 1, HCCL_DATA_TYPE_UINT8, next};
    items[1] = (HcclSendRecvItem){HCCL_SEND, send + 1, 1, HCCL_DATA_TYPE_UINT8, next};
    items[2] = (HcclSendRecvItem){HCCL_RECV, receive, 1, HCCL_DATA_TYPE_UINT8, before};
    items[3] = (HcclSendRecvItem){HCCL_RECV, receive + 1, 1, HCCL_DATA_TYPE_UINT8, before};
    CHECK("in order", !HcclBatchSendRecv(items, 4, comm, NULL) && receive[0] == 10 && receive[1] == 20);
    CHECK("nested groups end with the outermost", !HcclGroupStart() && !HcclGroupStart() && !HcclBarrier(comm, NULL) &&
                                                      !HcclGroupEnd() && !HcclGroupEnd() &&
                                                      HcclGroupEnd() == HCCL_E_PARA);
    CHECK("all is well", !HcclBarrier(comm, NULL));
    HcclCommDestroy(comm);
    aclrtFree(send);
    aclrtFree(receive);
}

static HcclCommConfig configuration(const char *name, int timeout)
{
    HcclCommConfig config;
    size_t size = sizeof config;
    uint32_t magic = HCCL_COMM_CONFIG_MAGIC_WORD;

    memset(&config, 0, sizeof config);
    memcpy(config.reserved, &size, sizeof size);
    memcpy(config.reserved + sizeof size, &magic, sizeof magic);
    strcpy(config.hcclCommName, name);
    config.hcclExecTimeOut = timeout;
    return config;
}

static void configured(unsigned rank, unsigned size)
{
    HcclCommConfig config = configuration("group_a", 1), wrong;
    char name[COMM_NAME_MAX_LENGTH] = "";
    HcclRootInfo second;
    HcclComm other;
    char *buffer;

    aclrtSetDevice((int)rank);
    buffer = memory(4);
    memset(&wrong, 0, sizeof wrong);
    CHECK("a configuration must be initialised",
          HcclCommInitRootInfoConfig(size, &root, rank, &wrong, &comm) == HCCL_E_PARA);
    CHECK("a communicator is configured", !HcclCommInitRootInfoConfig(size, &root, rank, &config, &comm) &&
                                              !HcclGetCommName(comm, name) && !strcmp(name, "group_a"));
    HcclGetRootInfo(&second);
    CHECK("a name is used once on a device", HcclCommInitRootInfoConfig(1, &second, 0, &config, &other) == HCCL_E_PARA);
    config = configuration("group_b", 0);
    strcpy(config.hcclUdi, "123456789 123456789 123456789 123");
    CHECK("torch-npu's name for a group has 32 characters",
          HcclCommInitRootInfoConfig(1, &second, 0, &config, &other) == HCCL_E_PARA &&
              strstr(aclGetRecentErrMsg(), "group_name"));
    config.hcclUdi[32] = '\0';
    CHECK("another is free", !HcclCommInitRootInfoConfig(1, &second, 0, &config, &other) && !HcclCommDestroy(other));
    HcclBarrier(comm, NULL);
    if (!rank)
        CHECK("the configured timeout holds",
              HcclRecv(buffer, 4, HCCL_DATA_TYPE_UINT8, 1, comm, NULL) == HCCL_E_TIMEOUT);
    else
        usleep(1600000); /* longer than that */
    HcclCommDestroy(comm);
    config = configuration("group_a", 0);
    CHECK("a name is free again after its communicator",
          !HcclCommInitRootInfoConfig(1, &second, 0, &config, &other) && !HcclCommDestroy(other));
    aclrtFree(buffer);
}

static void several(unsigned rank, unsigned size)
{
    HcclComm all, neighbours;
    HcclRootInfo pair = root;
    int32_t *buffer;

    /* Two communicators in which a rank has different numbers; the second of ranks 0, 1 and of 2, 3. */
    pair.internal[20] ^= (char)(rank / 2 + 1);
    aclrtSetDevice((int)rank);
    buffer = memory(8);
    CHECK("both are made",
          !HcclCommInitRootInfo(size, &root, rank, &all) && !HcclCommInitRootInfo(2, &pair, rank % 2, &neighbours));
    for (int i = 0; i < 100; i++) {
        buffer[0] = buffer[1] = 1;
        CHECK("both work",
              !HcclAllReduce(buffer, buffer, 1, HCCL_DATA_TYPE_INT32, HCCL_REDUCE_SUM, all, NULL) &&
                  !HcclAllReduce(buffer + 1, buffer + 1, 1, HCCL_DATA_TYPE_INT32, HCCL_REDUCE_SUM, neighbours, NULL));
        CHECK("apart", buffer[0] == (int32_t)size && buffer[1] == 2);
    }
    CHECK("one is destroyed", !HcclCommDestroy(neighbours));
    CHECK("the other goes on", !HcclBarrier(all, NULL));
    HcclCommDestroy(all);
    aclrtFree(buffer);
}

static void *be_rank_one(void *argument)
{
    HcclComm mine;
    uint8_t *buffer;

    aclrtSetDevice(1);
    buffer = memory(4);
    *(HcclResult *)argument = HcclCommInitRootInfo(2, &root, 1, &mine);
    if (!*(HcclResult *)argument)
        *(HcclResult *)argument = HcclRecv(buffer, 4, HCCL_DATA_TYPE_UINT8, 0, mine, NULL);
    if (!*(HcclResult *)argument && buffer[3] != 4)
        *(HcclResult *)argument = HCCL_E_INTERNAL;
    HcclCommDestroy(mine);
    aclrtFree(buffer);
    return NULL;
}

static void threads_as_ranks(unsigned rank, unsigned size)
{
    HcclResult other = HCCL_E_INTERNAL;
    pthread_t thread;
    uint8_t *buffer;

    (void)rank, (void)size;
    pthread_create(&thread, NULL, be_rank_one, &other);
    aclrtSetDevice(0);
    buffer = memory(4);
    aclrtMemset(buffer, 4, 4, 4);
    CHECK("a thread is rank 0",
          !HcclCommInitRootInfo(2, &root, 0, &comm) && !HcclSend(buffer, 4, HCCL_DATA_TYPE_UINT8, 1, comm, NULL));
    pthread_join(thread, NULL);
    CHECK("another is rank 1", other == HCCL_SUCCESS);
    HcclCommDestroy(comm);
    aclrtFree(buffer);
}

static void captured(unsigned rank, unsigned size)
{
    int32_t *buffer, start = (int32_t)rank + 1;
    aclrtStream stream;
    aclmdlRI graph;

    join(rank, size);
    buffer = memory(4);
    aclrtCreateStream(&stream);
    aclrtMemcpy(buffer, 4, &start, 4, ACL_MEMCPY_HOST_TO_DEVICE);
    CHECK("a collective is captured",
          !aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL) &&
              !HcclAllReduce(buffer, buffer, 1, HCCL_DATA_TYPE_INT32, HCCL_REDUCE_SUM, comm, stream) &&
              !aclmdlRICaptureEnd(stream, &graph));
    aclrtMemcpy(buffer, 4, &start, 4, ACL_MEMCPY_HOST_TO_DEVICE);
    CHECK("and repeated", !aclmdlRIExecuteAsync(graph, stream) && !aclrtSynchronizeStream(stream) &&
                              *buffer == (int32_t)(size * (size + 1) / 2));
    CHECK("on its communicator only", !HcclCommDestroy(comm) && aclmdlRIExecuteAsync(graph, stream));
    aclmdlRIDestroy(graph);
    aclrtFree(buffer);
}

static void misuse(unsigned rank, unsigned size)
{
    uint8_t host[8], *mine, *foreign;
    HcclRootInfo nonsense = {{0}};
    HcclComm none;

    join(rank, size);
    mine = memory(8);
    aclrtSetDevice(3);
    foreign = memory(8);
    aclrtSetDevice((int)rank);
    CHECK("a root info must be one", HcclCommInitRootInfo(size, &nonsense, rank, &none) == HCCL_E_PARA);
    CHECK("a rank must be one", HcclCommInitRootInfo(size, &root, size, &none) == HCCL_E_PARA);
    CHECK("host memory is refused", HcclBroadcast(host, 8, HCCL_DATA_TYPE_UINT8, 0, comm, NULL) == HCCL_E_PARA);
    CHECK("another device's, too", HcclBroadcast(foreign, 8, HCCL_DATA_TYPE_UINT8, 0, comm, NULL) == HCCL_E_PARA);
    CHECK("and what ends too early",
          HcclBroadcast(mine, 4097, HCCL_DATA_TYPE_UINT8, 0, comm, NULL) == HCCL_E_PARA &&
              HcclAllGather(mine, mine, 4000, HCCL_DATA_TYPE_UINT8, comm, NULL) == HCCL_E_PARA);
    CHECK("a buffer must be there", HcclBroadcast(NULL, 8, HCCL_DATA_TYPE_UINT8, 0, comm, NULL) == HCCL_E_PTR);
    CHECK("a root must be one", HcclBroadcast(mine, 8, HCCL_DATA_TYPE_UINT8, size, comm, NULL) == HCCL_E_PARA);
    CHECK("a type must be one", HcclBroadcast(mine, 8, (HcclDataType)77, 0, comm, NULL) == HCCL_E_PARA);
    CHECK("8-bit floats are not reduced",
          HcclAllReduce(mine, mine, 8, HCCL_DATA_TYPE_FP8E4M3, HCCL_REDUCE_SUM, comm, NULL) == HCCL_E_PARA);
    CHECK("nobody sends to himself", HcclSend(mine, 8, HCCL_DATA_TYPE_UINT8, rank, comm, NULL) == HCCL_E_PARA);
    CHECK("a stream must be one", HcclBarrier(comm, &none) == HCCL_E_RUNTIME);
    aclrtSetDevice(3);
    CHECK("the thread must be on the communicator's device",
          HcclSend(mine, 8, HCCL_DATA_TYPE_UINT8, 1 - rank, comm, NULL) == HCCL_E_RUNTIME);
    aclrtSetDevice((int)rank);
    CHECK("none of this harms the communicator", !HcclBarrier(comm, NULL));
    HcclCommDestroy(comm);
    aclrtFree(mine);
    aclrtFree(foreign);
}

int main(void)
{
    setenv("CANN_SIM_DEVICES", "8", 1);
    setenv("CANN_SIM_HCCL_TIMEOUT", "20", 1);
    HcclGetRootInfo(&root);
    for (unsigned size = 1; size <= 4; size++) {
        CHECK("identity", run_ranks(identity, size) == size);
        CHECK("all-reduce", run_ranks(all_reduce, size) == size);
        CHECK("gathering", run_ranks(gathering, size) == size);
        CHECK("scattering", run_ranks(scattering, size) == size);
        CHECK("all-to-all", run_ranks(all_to_all, size) == size);
        CHECK("captured", run_ranks(captured, size) == size);
    }
    CHECK("rounding", run_ranks(rounding, 2) == 2);
    CHECK("eight ranks", run_ranks(identity, 8) == 8);
    for (unsigned size = 2; size <= 4; size++)
        CHECK("point to point", run_ranks(point_to_point, size) == size);
    CHECK("configured", run_ranks(configured, 2) == 2);
    CHECK("several", run_ranks(several, 4) == 4);
    CHECK("threads as ranks", run_ranks(threads_as_ranks, 1) == 1);
    CHECK("misuse", run_ranks(misuse, 2) == 2);
    return REPORT();
}
