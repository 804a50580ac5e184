// Compiled, never run: the types of hccl_api.h are those of the genuine headers. (These are C++ only.)
#include "third_party/hccl/inc/hccl/hccl.h"

#include <cstddef>
#include <type_traits>

#define CANN_SIM_TYPES_ONLY
namespace sim
{
#include "hccl_api.h"
}

#define SAME_SIZE(type) static_assert(sizeof(::type) == sizeof(sim::type), #type)
#define SAME_VALUE(name) static_assert(static_cast<int>(::name) == static_cast<int>(sim::name), #name)
#define SAME_OFFSET(type, member) static_assert(offsetof(::type, member) == offsetof(sim::type, member), #member)

SAME_SIZE(HcclResult);
SAME_SIZE(HcclComm);
SAME_SIZE(HcclRootInfo);
SAME_SIZE(HcclConfigValue);
SAME_SIZE(HcclCommConfig);
SAME_OFFSET(HcclCommConfig, hcclBufferSize);
SAME_OFFSET(HcclCommConfig, hcclCommName);
SAME_OFFSET(HcclCommConfig, hcclUdi);
SAME_OFFSET(HcclCommConfig, hcclJobID);
SAME_OFFSET(HcclCommConfig, aclGraphZeroCopyEnable);
SAME_OFFSET(HcclCommConfig, hcclExecTimeOut);
SAME_OFFSET(HcclCommConfig, hcclAlgo);
SAME_OFFSET(HcclCommConfig, hcclSymWinMaxMemSizePerRank);
SAME_SIZE(HcclSendRecvItem);
SAME_OFFSET(HcclSendRecvItem, buf);
SAME_OFFSET(HcclSendRecvItem, count);
SAME_OFFSET(HcclSendRecvItem, dataType);
SAME_OFFSET(HcclSendRecvItem, remoteRank);

SAME_VALUE(HCCL_E_PARA);
SAME_VALUE(HCCL_E_PTR);
SAME_VALUE(HCCL_E_MEMORY);
SAME_VALUE(HCCL_E_INTERNAL);
SAME_VALUE(HCCL_E_NOT_SUPPORT);
SAME_VALUE(HCCL_E_NOT_FOUND);
SAME_VALUE(HCCL_E_UNAVAIL);
SAME_VALUE(HCCL_E_SYSCALL);
SAME_VALUE(HCCL_E_TIMEOUT);
SAME_VALUE(HCCL_E_RUNTIME);
SAME_VALUE(HCCL_E_REMOTE);
SAME_VALUE(HCCL_REDUCE_SUM);
SAME_VALUE(HCCL_REDUCE_PROD);
SAME_VALUE(HCCL_REDUCE_MAX);
SAME_VALUE(HCCL_REDUCE_MIN);
SAME_VALUE(HCCL_DATA_TYPE_INT8);
SAME_VALUE(HCCL_DATA_TYPE_INT16);
SAME_VALUE(HCCL_DATA_TYPE_INT32);
SAME_VALUE(HCCL_DATA_TYPE_FP16);
SAME_VALUE(HCCL_DATA_TYPE_FP32);
SAME_VALUE(HCCL_DATA_TYPE_INT64);
SAME_VALUE(HCCL_DATA_TYPE_UINT64);
SAME_VALUE(HCCL_DATA_TYPE_UINT8);
SAME_VALUE(HCCL_DATA_TYPE_UINT16);
SAME_VALUE(HCCL_DATA_TYPE_UINT32);
SAME_VALUE(HCCL_DATA_TYPE_FP64);
SAME_VALUE(HCCL_DATA_TYPE_BFP16);
SAME_VALUE(HCCL_DATA_TYPE_INT128);
SAME_VALUE(HCCL_DATA_TYPE_HIF8);
SAME_VALUE(HCCL_DATA_TYPE_FP8E4M3);
SAME_VALUE(HCCL_DATA_TYPE_FP8E5M2);
SAME_VALUE(HCCL_DATA_TYPE_FP8E8M0);
SAME_VALUE(HCCL_SEND);
SAME_VALUE(HCCL_RECV);
SAME_VALUE(HCCL_DETERMINISTIC);
SAME_VALUE(HCCL_COMM_CONFIG_COMM_NAME);
SAME_VALUE(HCCL_COMM_CONFIG_EXEC_TIMEOUT);

// The functions take as many arguments as ours.
template <typename Result, typename... Arguments> constexpr std::size_t arguments(Result (*)(Arguments...))
{
    return sizeof...(Arguments);
}

static_assert(arguments(&::HcclAllReduce) == 7 && arguments(&::HcclBroadcast) == 6, "");
static_assert(arguments(&::HcclReduceScatter) == 7 && arguments(&::HcclReduceScatterV) == 9, "");
static_assert(arguments(&::HcclReduce) == 8 && arguments(&::HcclScatter) == 7, "");
static_assert(arguments(&::HcclAllGather) == 6 && arguments(&::HcclAllGatherV) == 8, "");
static_assert(arguments(&::HcclBarrier) == 2 && arguments(&::HcclAlltoAll) == 8, "");
static_assert(arguments(&::HcclAlltoAllV) == 10 && arguments(&::HcclAlltoAllVC) == 7, "");
static_assert(arguments(&::HcclSend) == 6 && arguments(&::HcclRecv) == 6, "");
static_assert(arguments(&::HcclBatchSendRecv) == 4 && arguments(&::HcclCommInitRootInfoConfig) == 5, "");
