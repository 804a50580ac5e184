/* Data types of HCCL and how they are reduced. */
#ifndef CANN_SIM_HCCL_TYPES_H
#define CANN_SIM_HCCL_TYPES_H

#include <stdbool.h>
#include <stddef.h>

#include "hccl_api.h"

/* The bytes of an element; 0 for an unknown type. */
size_t hccl_type_size(HcclDataType type);

/* Whether hccl_reduce can do this operation on this type. */
bool hccl_can_reduce(HcclDataType type, HcclReduceOp op);

/* Reduces `count` elements of each of the `parts`, in their order, into `out`, which may be one of them. 16-bit floats
 * are reduced as float and rounded once, to even; integers wrap. */
void hccl_reduce(void *out, const void *const *parts, size_t part_count, size_t count, HcclDataType type,
                 HcclReduceOp op);

#endif
