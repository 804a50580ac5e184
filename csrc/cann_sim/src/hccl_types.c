#include "hccl_types.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

size_t hccl_type_size(HcclDataType type)
{
    static const unsigned char sizes[] = {
        [HCCL_DATA_TYPE_INT8] = 1,    [HCCL_DATA_TYPE_INT16] = 2,   [HCCL_DATA_TYPE_INT32] = 4,
        [HCCL_DATA_TYPE_FP16] = 2,    [HCCL_DATA_TYPE_FP32] = 4,    [HCCL_DATA_TYPE_INT64] = 8,
        [HCCL_DATA_TYPE_UINT64] = 8,  [HCCL_DATA_TYPE_UINT8] = 1,   [HCCL_DATA_TYPE_UINT16] = 2,
        [HCCL_DATA_TYPE_UINT32] = 4,  [HCCL_DATA_TYPE_FP64] = 8,    [HCCL_DATA_TYPE_BFP16] = 2,
        [HCCL_DATA_TYPE_INT128] = 16, [HCCL_DATA_TYPE_HIF8] = 1,    [HCCL_DATA_TYPE_FP8E4M3] = 1,
        [HCCL_DATA_TYPE_FP8E5M2] = 1, [HCCL_DATA_TYPE_FP8E8M0] = 1,
    };

    return (int)type >= 0 && (size_t)type < sizeof sizes ? sizes[type] : 0;
}

bool hccl_can_reduce(HcclDataType type, HcclReduceOp op)
{
    return (int)type >= 0 && type <= HCCL_DATA_TYPE_BFP16 && (int)op >= 0 && op <= HCCL_REDUCE_MIN;
}

static float from_bf16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;

    memcpy(&value, &wide, sizeof value);
    return value;
}

static uint16_t to_bf16(float value)
{
    uint32_t wide;

    memcpy(&wide, &value, sizeof wide);
    if (isnan(value))
        return (uint16_t)(wide >> 16 | 0x40);
    return (uint16_t)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

static float from_half(uint16_t bits)
{
    int exponent = bits >> 10 & 0x1f;
    float fraction = (float)(bits & 0x3ff), value;

    if (exponent == 0x1f)
        value = fraction != 0 ? NAN : INFINITY;
    else if (exponent)
        value = ldexpf(fraction + 1024, exponent - 25);
    else
        value = ldexpf(fraction, -24);
    return bits & 0x8000 ? -value : value;
}

static uint16_t to_half(float value)
{
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    float size = fabsf(value), steps;
    int exponent;

    if (isnan(value))
        return sign | 0x7e00;
    if (size == 0)
        return sign;
    if (size >= 65520) /* half of the last step above the largest number */
        return sign | 0x7c00;
    frexpf(size, &exponent);
    if (exponent < -13)
        exponent = -13; /* below 2^-14 the steps stay the same */
    /* The number in steps of its last place; 2048 of them are the next power of two, and its bits come out right. */
    steps = nearbyintf(ldexpf(size, 11 - exponent));
    return (uint16_t)(sign + (uint16_t)(exponent + 13) * 1024 + (uint16_t)steps);
}

#define LOOP(type, expression) \
    for (size_t i = 0; i < count; i++) { \
        type a = ((const type *)parts[0])[i]; \
        for (size_t part = 1; part < part_count; part++) { \
            type b = ((const type *)parts[part])[i]; \
            a = (expression); \
        } \
        ((type *)out)[i] = a; \
    } \
    break

/* `wide` is a type in which the arithmetic cannot overflow in an undefined way. */
#define REDUCER(name, type, wide) \
    static void name(void *out, const void *const *parts, size_t part_count, size_t count, HcclReduceOp op) \
    { \
        switch (op) { \
        case HCCL_REDUCE_SUM: \
            LOOP(type, (type)((wide)a + (wide)b)); \
        case HCCL_REDUCE_PROD: \
            LOOP(type, (type)((wide)a * (wide)b)); \
        case HCCL_REDUCE_MAX: \
            LOOP(type, a > b ? a : b); \
        case HCCL_REDUCE_MIN: \
            LOOP(type, a < b ? a : b); \
        default: \
            break; \
        } \
    }

REDUCER(reduce_int8, int8_t, uint32_t)
REDUCER(reduce_uint8, uint8_t, uint32_t)
REDUCER(reduce_int16, int16_t, uint32_t)
REDUCER(reduce_uint16, uint16_t, uint32_t)
REDUCER(reduce_int32, int32_t, uint32_t)
REDUCER(reduce_uint32, uint32_t, uint32_t)
REDUCER(reduce_int64, int64_t, uint64_t)
REDUCER(reduce_uint64, uint64_t, uint64_t)
REDUCER(reduce_float, float, float)
REDUCER(reduce_double, double, double)

static void reduce_16_bit(void *out, const void *const *parts, size_t part_count, size_t count, HcclReduceOp op,
                          float (*load)(uint16_t bits), uint16_t (*store)(float value))
{
    for (size_t i = 0; i < count; i++) {
        float a = load(((const uint16_t *)parts[0])[i]);

        for (size_t part = 1; part < part_count; part++) {
            float b = load(((const uint16_t *)parts[part])[i]);

            if (op == HCCL_REDUCE_SUM)
                a += b;
            else if (op == HCCL_REDUCE_PROD)
                a *= b;
            else if (op == HCCL_REDUCE_MAX ? b > a : b < a)
                a = b;
        }
        ((uint16_t *)out)[i] = store(a);
    }
}

void hccl_reduce(void *out, const void *const *parts, size_t part_count, size_t count, HcclDataType type,
                 HcclReduceOp op)
{
    static void (*const reducers[])(void *, const void *const *, size_t, size_t, HcclReduceOp) = {
        [HCCL_DATA_TYPE_INT8] = reduce_int8,     [HCCL_DATA_TYPE_INT16] = reduce_int16,
        [HCCL_DATA_TYPE_INT32] = reduce_int32,   [HCCL_DATA_TYPE_FP16] = NULL,
        [HCCL_DATA_TYPE_FP32] = reduce_float,    [HCCL_DATA_TYPE_INT64] = reduce_int64,
        [HCCL_DATA_TYPE_UINT64] = reduce_uint64, [HCCL_DATA_TYPE_UINT8] = reduce_uint8,
        [HCCL_DATA_TYPE_UINT16] = reduce_uint16, [HCCL_DATA_TYPE_UINT32] = reduce_uint32,
        [HCCL_DATA_TYPE_FP64] = reduce_double,
    };

    if (type == HCCL_DATA_TYPE_FP16)
        reduce_16_bit(out, parts, part_count, count, op, from_half, to_half);
    else if (type == HCCL_DATA_TYPE_BFP16)
        reduce_16_bit(out, parts, part_count, count, op, from_bf16, to_bf16);
    else
        reducers[type](out, parts, part_count, count, op);
}
