/* How the collectives move data: each rank talks to every other directly.
 *
 * A reduction is done part by part, each part by one rank and in the order of the ranks, so that all ranks get the same
 * bits, each time.
 */
#ifndef CANN_SIM_HCCL_ALGORITHMS_H
#define CANN_SIM_HCCL_ALGORITHMS_H

#include "hccl_call.h"

/* Each rank reduces a slice of each chunk and gives it to all. Needs `slices`. */
HcclResult hccl_run_all_reduce(hccl_round *round, const hccl_call *call);

/* Each rank reduces the part that `sent` gives it; for a reduction to one rank all is that rank's part. Needs `sent`
 * and `slices`. */
HcclResult hccl_run_reduce_scatter(hccl_round *round, const hccl_call *call);

/* The root gives `receive` to all. */
HcclResult hccl_run_broadcast(hccl_round *round, const hccl_call *call);

/* The root gives each rank `count` elements of `send`. */
HcclResult hccl_run_scatter(hccl_round *round, const hccl_call *call);

/* Each rank gives `send` to all. Needs `received`. */
HcclResult hccl_run_all_gather(hccl_round *round, const hccl_call *call);

/* Nobody is done before everybody has begun. */
HcclResult hccl_run_barrier(hccl_round *round, const hccl_call *call);

/* Each rank gives a part of `send` to each. Needs `sent` and `received`. */
HcclResult hccl_run_all_to_all(hccl_round *round, const hccl_call *call);

#endif
